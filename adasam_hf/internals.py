"""The methods of Transformers' `Trainer` that the step extends: without one of them it would silently not be called."""

import inspect

import transformers
from transformers import Trainer

OLDEST_TESTED = "5.10.1"
NEWEST_TESTED = "5.24.0"

EXTENDED = (
    "_clip_grad_norm",
    "_get_grad_norm",
    "_inner_training_loop",
    "_load_optimizer_and_scheduler",
    "_maybe_log_save_evaluate",
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
    "_save_rng_state",
    "create_model_card",
    "create_optimizer",
    "floating_point_ops",
    "get_batch_samples",
    "get_optimizer_cls_and_kwargs",
    "log",
    "train",
    "training_step",
)


def check_internals(trainer_class: type = Trainer, version: str = transformers.__version__) -> None:
    """Whether this Transformers still has all methods that are extended.

    Raises:
        ImportError: naming the missing ones and the last version known to work.
    """
    if missing := [name for name in EXTENDED if not callable(getattr(trainer_class, name, None))]:
        raise ImportError(
            f"transformers {version} has no {' and no '.join(f'Trainer.{name}' for name in missing)}, on which the "
            f"sharpness-aware step depends; install transformers=={NEWEST_TESTED}, the last version known to work"
        )


def show_signatures(*mixins: type) -> None:
    """Let those methods of `mixins` that extend the Trainer's show its signatures: scripts look at them, to see which
    arguments a method takes."""
    for mixin in mixins:
        for name in EXTENDED:
            function, stock = vars(mixin).get(name), getattr(Trainer, name, None)
            if inspect.isfunction(function) and stock is not None:
                function.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
