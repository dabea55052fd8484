"""AdaSAM (arXiv:2303.00565) for the Hugging Face Trainer. Names are loaded when they are first used."""

from importlib import import_module

__version__ = "0.1.0"

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
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
