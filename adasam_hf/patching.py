"""`Trainer` and `TrainingArguments` of Transformers, replaced by their sharpness-aware forms under the same names."""

import copyreg
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields
from types import ModuleType
from typing import Any

import transformers
from transformers import (
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from .trainer import AdaSAMSeq2SeqTrainer, AdaSAMTrainer, SharpnessAwareTrainerMixin
from .training_args import (
    ADASAM_NAMES,
    SGD_NAMES,
    AdaSAMSeq2SeqTrainingArguments,
    AdaSAMTrainingArguments,
    SharpnessAwareArgumentsMixin,
)

logger = logging.get_logger(__name__)

OURS = {
    Trainer: AdaSAMTrainer,
    Seq2SeqTrainer: AdaSAMSeq2SeqTrainer,
    TrainingArguments: AdaSAMTrainingArguments,
    Seq2SeqTrainingArguments: AdaSAMSeq2SeqTrainingArguments,
}
# Where scripts and libraries import these classes from; and the script or notebook itself, if it already has.
MODULES = (
    "transformers",
    "transformers.trainer",
    "transformers.trainer_seq2seq",
    "transformers.training_args",
    "transformers.training_args_seq2seq",
    "__main__",
)


class patch:
    """Replace the four classes that scripts import from Transformers, from now on or for a ``with`` block:

        import adasam_hf

        adasam_hf.patch()                       # before libraries with trainers of their own are imported
        from transformers import Trainer, TrainingArguments
        args = TrainingArguments("out", optim="adasam", sam_rho=0.05)

        with adasam_hf.patch():                 # undone at the end of the block
            ...

    Undoing puts back every name, also those that the script or notebook has imported meanwhile; of several patches, the
    last one to be undone does. A class that is made while this is in effect, such as ``trl.SFTTrainer`` when ``trl`` is
    imported, is sharpness-aware and stays it. One that was made before stays plain, and a warning names it. What other
    modules of yours have imported by name before stays as it was, too, and so do processes that are spawned. Radius 0,
    which is the default of every optimizer but adasam and sam, is the stock run.
    """

    _active: int = 0
    _kept: set[str] = set()  # names of the script's own that were ours before

    def __init__(self) -> None:
        self._on = True
        if not patch._active:
            names = vars(sys.modules["__main__"])
            patch._kept = {n for n, v in list(names.items()) if any(v is ours for ours in OURS.values())}
        patch._active += 1
        _replace(OURS)
        for cls in (TrainingArguments, Seq2SeqTrainingArguments):  # pickle would look for them under their names
            copyreg.pickle(cls, _reduce)
        if late := sorted(_plain_subclasses()):
            logger.warning(
                f"{', '.join(late)}: made before adasam_hf.patch(), so they stay plain trainers; call it before their "
                "library is imported"
            )

    def undo(self) -> None:
        """Put the classes back, unless another patch is still in effect."""
        patch._active -= self._on
        self._on = False
        if not patch._active:
            _replace({ours: stock for stock, ours in OURS.items()}, patch._kept)
            for cls in (TrainingArguments, Seq2SeqTrainingArguments):
                copyreg.dispatch_table.pop(cls, None)

    def __enter__(self) -> "patch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def _replace(others: dict[type, type], kept: Collection[str] = ()) -> None:
    """Every class by its other one, in the modules that scripts import them from and in the script itself (but for the
    names `kept` there)."""
    modules = [module for name in MODULES if (module := sys.modules.get(name)) is not None]
    # Transformers executes itself a second time while it is imported; who came first holds another module object.
    # (By type(): isinstance asks proxies, which import, warn or fail.)
    holders = [vars(module) for module in list(sys.modules.values()) if issubclass(type(module), ModuleType)]
    held = {id(v): v for names in holders for v in list(names.values()) if issubclass(type(v), ModuleType)}
    modules += [m for m in held.values() if m.__name__ == "transformers" and m is not transformers]
    for module in modules:
        lazy = module.__name__ == "transformers"
        names = {cls.__name__ for cls in OURS} if lazy else set(vars(module))
        for name in names - set(kept if module.__name__ == "__main__" else ()):
            found = getattr(module, name, None)
            other = next((other for cls, other in others.items() if found is cls), None)
            if other is not None and not name.startswith("AdaSAM"):
                setattr(module, name, other)


def _reduce(args: TrainingArguments) -> tuple:
    return _restore, (type(args).__name__,), args.__dict__


def _restore(name: str) -> TrainingArguments:
    """An empty one of the stock class, whatever bears its name just now."""
    (cls,) = [cls for cls in (TrainingArguments, Seq2SeqTrainingArguments) if cls.__name__ == name]
    return cls.__new__(cls)


class _FlagWatch(TrainerCallback):
    """Warns if the command line has arguments of ours that the training does not."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        defaults = {f.name: f.default for f in fields(SharpnessAwareArgumentsMixin)}
        lost = []
        for name, wanted in self._given.items():
            value = getattr(args, name, defaults.get(name))
            if name == "optim":
                missed = wanted in (*ADASAM_NAMES, *SGD_NAMES) and value != wanted
            else:
                missed = value == defaults[name] != wanted
            if missed:
                lost.append(f"{name}={getattr(value, 'value', value)!r} in place of {wanted}")
        if lost:
            logger.warning(
                f"the command line's arguments did not reach this training, which has {', '.join(lost)}: the script "
                "does not parse TrainingArguments. Give them before its name: python -m adasam_hf --optim adasam SCRIPT"
            )


def _flags() -> set[str]:
    return {f.name for f in fields(SharpnessAwareArgumentsMixin) if f.name.startswith(("sam_", "sgd_"))} | {"optim"}


def _parser() -> HfArgumentParser:
    cls: Any = AdaSAMTrainingArguments
    return HfArgumentParser(cls, prog="python -m adasam_hf", allow_abbrev=False)


def give(argv: Sequence[str]) -> None:
    """Make the arguments of ours in `argv` the defaults of all sharpness-aware arguments from now on.

    Raises:
        SystemExit: for other arguments, or values of a wrong type.
    """
    parser = _parser()
    given = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    if others := sorted(given - _flags()):
        parser.error(
            f"before the script's name there can be --optim, --sgd_momentum and --sam_…, not {', '.join(others)}"
        )
    found = parser.parse_args([*argv, "--output_dir=unused"])  # no arguments are made: that would begin with a device
    SharpnessAwareArgumentsMixin.launcher_defaults = {name: getattr(found, name) for name in given}


def watch_flags(argv: Sequence[str]) -> None:
    """Have every training from now on look whether the arguments of ours in `argv` have reached it."""
    names, words = _flags(), []
    for word, following in zip(argv, [*argv[1:], "--"], strict=True) if argv else ():
        name, equals, _ = word.removeprefix("--").partition("=")
        if word.startswith("--") and name.replace("-", "_") in names:
            words += [word] if equals or following.startswith("--") else [word, following]
    if words:
        try:
            found = _parser().parse_args([*words, "--output_dir=unused"])
        except SystemExit:  # the script will say what is wrong with them, or has flags of the same names
            return
        given = {w.removeprefix("--").partition("=")[0].replace("-", "_") for w in words if w.startswith("--")}
        watch = _FlagWatch({name: getattr(found, name) for name in given})
        transformers.trainer.DEFAULT_CALLBACKS.append(watch)  # type: ignore[arg-type]


def _plain_subclasses() -> set[str]:
    """Trainers of other libraries that are based on the original classes."""
    found: set[str] = set()
    queue: list[type[Trainer]] = [Trainer, Seq2SeqTrainer]
    while queue:
        for cls in queue.pop().__subclasses__():
            if issubclass(cls, SharpnessAwareTrainerMixin):
                continue
            if cls.__module__.partition(".")[0] != "transformers":
                found.add(f"{cls.__module__}.{cls.__qualname__}")
            queue.append(cls)
    return found
