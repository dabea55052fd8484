"""`Trainer` and `TrainingArguments` of Transformers, replaced by their sharpness-aware forms under the same names."""

import sys
from types import ModuleType

import transformers
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.utils import logging

from .trainer import AdaSAMSeq2SeqTrainer, AdaSAMTrainer, SharpnessAwareTrainerMixin
from .training_args import AdaSAMSeq2SeqTrainingArguments, AdaSAMTrainingArguments

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

    A class that is made while this is in effect, such as ``trl.SFTTrainer`` when ``trl`` is imported, is
    sharpness-aware and stays it. One that was made before stays plain, and a warning names it. What other modules of
    yours have imported by name before stays as it was, too, and so do processes that are spawned. Radius 0, which is
    the default of every optimizer but adasam and sam, is the stock run.
    """

    def __init__(self) -> None:
        self._changed: list[tuple[ModuleType, str, type]] = []
        modules = [module for name in MODULES if (module := sys.modules.get(name)) is not None]
        # Transformers executes itself a second time while it is imported; who came first holds another module object.
        held = [m for m in vars(sys.modules["__main__"]).values() if getattr(m, "__name__", None) == "transformers"]
        for module in [*modules, *(m for m in held if isinstance(m, ModuleType) and m is not transformers)]:
            lazy = module.__name__ == "transformers"
            names = [cls.__name__ for cls in OURS] if lazy else list(vars(module))
            for name in names:
                found = getattr(module, name, None)
                if isinstance(found, type) and found in OURS:
                    setattr(module, name, OURS[found])
                    self._changed.append((module, name, found))
        if late := sorted(_plain_subclasses()):
            logger.warning(
                f"{', '.join(late)}: made before adasam_hf.patch(), so they stay plain trainers; call it before their "
                "library is imported"
            )

    def undo(self) -> None:
        """Put the classes back, as far as nobody else has replaced them since."""
        for module, name, original in self._changed:
            if getattr(module, name, None) is OURS[original]:
                setattr(module, name, original)
        self._changed = []

    def __enter__(self) -> "patch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


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
