"""What a model card says of the optimizer, the ascent and their source."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .distributed import climbs_locally
from .optim import AdaSAM
from .schedule import Schedule
from .training_args import SGD_NAMES, SharpnessAwareArgumentsMixin

if TYPE_CHECKING:
    from .trainer import SharpnessAwareTrainerMixin

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


def complete(path: Path, trainer: SharpnessAwareTrainerMixin, adasam: AdaSAM | None, rho: float) -> None:
    """Put into the card at `path`, which the Trainer or a library has written, the entries that they cannot know and,
    if the run used AdaSAM or an ascent, a section on them with the paper and its citation. Twice is as once."""
    # sentence-transformers goes on without a card if it fails to make one; nothing is known before training
    if not path.exists() or trainer.optimizer is None:
        return
    entries = "".join(f"- {key}: {value}\n" for key, value in _entries(trainer, adasam, rho).items())
    # Without the section that an earlier call or run has left.
    text = re.sub(rf"^{HEADING}.*?(?=^#+ |\Z)", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    if not (listed := entries in text):
        # The stock entry reads betas only for names with "adam" in them, and may go on over a second line.
        stock = re.compile(r"^- optimizer: .*?\n(?=- )", flags=re.M | re.S)
        text, count = stock.subn(lambda _: entries, text, count=1)
        listed = count > 0
    if adasam is not None or rho > 0:
        text = f"{text.rstrip()}\n\n{_section(trainer, adasam, rho, '' if listed else entries)}"
    path.write_text(text, encoding="utf-8")


def _name(args: SharpnessAwareArgumentsMixin) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _base(trainer: SharpnessAwareTrainerMixin) -> str:
    """What the ascent is around: the optimizer's name, or its class if it was given to the trainer."""
    own = trainer.args.own_optimizer()
    used = trainer.used_optimizer()
    return type(used).__qualname__ if own and not isinstance(used, own[0]) else _name(trainer.args)


def _entries(trainer: SharpnessAwareTrainerMixin, adasam: AdaSAM | None, rho: float) -> dict[str, object]:
    args = trainer.args
    if adasam is not None:
        group = adasam.param_groups[0]
        how = f"AdaSAM, arXiv:2303.00565, with betas={group['betas']}, epsilon={group['eps']}"
    elif (base := _base(trainer)) != _name(args):
        how = f"not in use; {base} was given to the trainer"
    elif _name(args) in SGD_NAMES:
        how = f"SGD with momentum={args.sgd_momentum}"
    else:
        how = f"betas={args.resolved_betas}, epsilon={args.resolved_epsilon}, optimizer_args={args.optim_args}"
    entries: dict[str, object] = {"optimizer": f"{_name(args)} ({how})", "sam_rho": rho}
    if rho > 0:
        entries |= {"sam_scope": args.sam_scope, "sam_dropout": args.sam_dropout}
        if args.world_size > 1:
            entries["sam_sync"] = not climbs_locally(trainer)
        ascent = {"sam_direction": args.resolved_direction, "sam_ascent_fraction": args.resolved_ascent_fraction}
        ascent |= {name: getattr(args, name) for name in ("sam_parameters", "sam_adaptive", "sam_reuse")}
        usual = {"sam_direction": "gradient", "sam_ascent_fraction": 1.0, "sam_parameters": "all"}
        entries |= {name: value for name, value in ascent.items() if value != usual.get(name, False)}
        if args.sam_schedule != Schedule():
            entries["sam_schedule"] = args.sam_schedule
    return entries


def _section(trainer: SharpnessAwareTrainerMixin, adasam: AdaSAM | None, rho: float, entries: str) -> str:
    if rho == 0:
        method = f"AMSGrad, which is [AdaSAM]({PAPER}) at radius 0"
    elif adasam is not None:
        method = f"[AdaSAM]({PAPER}), sharpness-aware minimization, at radius {rho:g}"
    else:
        sam = "[sharpness-aware minimization](https://arxiv.org/abs/2010.01412)"
        method = f"{sam} around `{_base(trainer)}` at radius {rho:g}, by the steps of [AdaSAM]({PAPER})"
    home = project()
    name = f"[adasam_hf]({home})" if home else "`adasam_hf`"
    text = f"{HEADING}{method}, by {name} {__version__}.\n"
    if entries:
        text += f"\n{entries}"
    citation = CITATION if adasam is not None else f"{SAM_CITATION}\n{CITATION}"
    return f"{text}\n```bibtex\n{citation}```\n"


def project() -> str | None:
    """The address of the project: `Homepage` in the project_urls of setup.cfg, if it has one."""
    try:
        urls = metadata("adasam_hf").get_all("Project-URL") or []
    except PackageNotFoundError:  # run from a clone that is not installed
        return None
    return dict(url.split(", ", 1) for url in urls).get("Homepage")
