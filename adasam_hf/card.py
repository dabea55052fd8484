"""What a model card says about the optimizer, the ascent and the paper."""

import functools
import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from transformers import Trainer

from ._version import __version__
from .directions import innermost
from .optim import AdaSAM
from .optimizer_names import SGD_NAMES
from .plan import base_radii
from .schedule import Schedule
from .synchronization import ascends_per_process
from .training_args import SharpnessAwareArgumentsMixin

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

CITATION = """@article{sun2024adasam,
  title   = {{AdaSAM}: Boosting Sharpness-Aware Minimization with Adaptive Learning Rate and Momentum for Training Deep
             Neural Networks},
  author  = {Sun, Hao and Shen, Li and Zhong, Qihuang and Ding, Liang and Chen, Shixiang and Sun, Jingwei and
             Li, Jing and Sun, Guangzhong and Tao, Dacheng},
  journal = {Neural Networks},
  volume  = {169},
  year    = {2024},
  note    = {arXiv:2303.00565}
}
"""

PAPER = "https://arxiv.org/abs/2303.00565"
HEADING = "## Optimizer\n\nFine-tuned with "
SAM_CITATION = """@inproceedings{foret2021sharpness,
  title     = {Sharpness-Aware Minimization for Efficiently Improving Generalization},
  author    = {Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam},
  booktitle = {International Conference on Learning Representations},
  year      = {2021}
}
"""


class ModelCardMixin(_Base):
    """The card says how a model was trained, links the paper and carries the citation."""

    args: SharpnessAwareArgumentsMixin
    optimizer: Optimizer

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of Transformers, plus the optimizer and the ascent as they were used, and the paper to cite."""
        super().create_model_card(*args, **kwargs)
        self._sam_complete_card()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        write = vars(cls).get("create_model_card")
        if write is not None:  # trl and sentence-transformers write their own cards, without Transformers'

            @functools.wraps(write)
            def create_model_card(self: ModelCardMixin, *args: Any, **kwargs: Any) -> None:
                write(self, *args, **kwargs)
                self._sam_complete_card()

            cls.create_model_card = create_model_card  # type: ignore[method-assign]

    def _sam_complete_card(self) -> None:
        if self.is_world_process_zero() and self.optimizer is not None:  # there is none before training
            radii = base_radii(self.args, self.optimizer)
            complete(Path(self.args.output_dir, "README.md"), self.args, self.optimizer, max(radii, default=0.0))


def complete(path: Path, args: SharpnessAwareArgumentsMixin, optimizer: Optimizer, rho: float) -> None:
    """Complete the card that the Trainer or a library has written to `path`: add the entries that only this package
    knows and, if the run used AdaSAM or an ascent, a section with the paper and its citation. Calling it again changes
    nothing."""
    if not path.exists():  # sentence-transformers goes on without a card if it fails to make one
        return
    used = innermost(optimizer)
    entries = "".join(f"- {key}: {value}\n" for key, value in _entries(args, used, rho).items())
    # Drop the section of an earlier call or run.
    text = re.sub(rf"^{HEADING}.*?(?=^#+ |\Z)", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    if not (listed := entries in text):
        # The stock entry has betas only for names with "adam" in them, and may span two lines.
        stock = re.compile(r"^- optimizer: .*?\n(?=- )", flags=re.M | re.S)
        text, count = stock.subn(lambda _: entries, text, count=1)
        listed = count > 0
    if isinstance(used, AdaSAM) or rho > 0:
        text = f"{text.rstrip()}\n\n{_section(args, used, rho, '' if listed else entries)}"
    path.write_text(text, encoding="utf-8")


def _name(args: SharpnessAwareArgumentsMixin) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _base(args: SharpnessAwareArgumentsMixin, used: Optimizer) -> str:
    """The optimizer that the ascent wraps: its name, or its class if the trainer was given one."""
    ours = args.package_optimizer()
    return type(used).__qualname__ if ours and not isinstance(used, ours[0]) else _name(args)


def _entries(args: SharpnessAwareArgumentsMixin, used: Optimizer, rho: float) -> dict[str, object]:
    if isinstance(used, AdaSAM):
        group = used.param_groups[0]
        how = f"AdaSAM, arXiv:2303.00565, with betas={group['betas']}, epsilon={group['eps']}"
    elif (base := _base(args, used)) != _name(args):
        how = f"not in use; {base} was given to the trainer"
    elif _name(args) in SGD_NAMES:
        how = f"SGD with momentum={args.sgd_momentum}"
    else:
        betas = (args.adam_beta1, float(args.adam_beta2))
        how = f"betas={betas}, epsilon={float(args.adam_epsilon)}, optimizer_args={args.optim_args}"
    entries: dict[str, object] = {"optimizer": f"{_name(args)} ({how})", "sam_rho": rho}
    if rho > 0:
        entries |= {"sam_scope": args.sam_scope, "sam_dropout": args.sam_dropout}
        if args.world_size > 1:
            entries["sam_sync"] = not ascends_per_process(args)
        ascent = {"sam_direction": args.resolved_direction, "sam_ascent_fraction": args.resolved_ascent_fraction}
        ascent |= {name: getattr(args, name) for name in ("sam_parameters", "sam_adaptive", "sam_reuse", "sam_descent")}
        usual = {
            "sam_direction": "gradient",
            "sam_ascent_fraction": 1.0,
            "sam_parameters": "all",
            "sam_descent": "loss",
        }
        entries |= {name: value for name, value in ascent.items() if value != usual.get(name, False)}
        if args.sam_schedule != Schedule():
            entries["sam_schedule"] = args.sam_schedule
    return entries


def _section(args: SharpnessAwareArgumentsMixin, used: Optimizer, rho: float, entries: str) -> str:
    adasam = isinstance(used, AdaSAM)
    if rho == 0:
        method = f"AMSGrad, which is [AdaSAM]({PAPER}) at radius 0"
    elif adasam:
        method = f"[AdaSAM]({PAPER}), sharpness-aware minimization, at radius {rho:g}"
    else:
        sam = "[sharpness-aware minimization](https://arxiv.org/abs/2010.01412)"
        method = f"{sam} around `{_base(args, used)}` at radius {rho:g}, by the steps of [AdaSAM]({PAPER})"
    home = project()
    name = f"[adasam_hf]({home})" if home else "`adasam_hf`"
    text = f"{HEADING}{method}, by {name} {__version__}.\n"
    if entries:
        text += f"\n{entries}"
    citation = CITATION if adasam else f"{SAM_CITATION}\n{CITATION}"
    return f"{text}\n```bibtex\n{citation}```\n"


def project() -> str | None:
    """The project's address: `Homepage` in the project_urls of setup.cfg, if it is there."""
    try:
        urls = metadata("adasam_hf").get_all("Project-URL") or []
    except PackageNotFoundError:  # run from a clone that is not installed
        return None
    return dict(url.split(", ", 1) for url in urls).get("Homepage")
