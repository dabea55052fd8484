"""AdaSAM (arXiv:2303.00565) for the Hugging Face Trainer. Names are loaded when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

_HOME = {
    "AdaSAM": "optim",
    "Perturbation": "perturbation",
    "AdaSAMTrainingArguments": "training_args",
    "AdaSAMSeq2SeqTrainingArguments": "training_args",
    "SharpnessAwareArgumentsMixin": "training_args",
    "AdaSAMTrainer": "trainer",
    "AdaSAMSeq2SeqTrainer": "trainer",
    "SharpnessAwareTrainerMixin": "trainer",
    "patch": "patching",
    "SharpnessAwareLoop": "loop",
}
__all__ = [
    "AdaSAM",
    "AdaSAMSeq2SeqTrainer",
    "AdaSAMSeq2SeqTrainingArguments",
    "AdaSAMTrainer",
    "AdaSAMTrainingArguments",
    "Perturbation",
    "SharpnessAwareArgumentsMixin",
    "SharpnessAwareLoop",
    "SharpnessAwareTrainerMixin",
    "__version__",
    "patch",
]

if TYPE_CHECKING:  # type checkers do not execute the function below
    from .loop import SharpnessAwareLoop
    from .optim import AdaSAM
    from .patching import patch
    from .perturbation import Perturbation
    from .trainer import AdaSAMSeq2SeqTrainer, AdaSAMTrainer, SharpnessAwareTrainerMixin
    from .training_args import (
        AdaSAMSeq2SeqTrainingArguments,
        AdaSAMTrainingArguments,
        SharpnessAwareArgumentsMixin,
    )
else:

    def __getattr__(name: str):
        if name in _HOME:
            return getattr(import_module(f".{_HOME[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
