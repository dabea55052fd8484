"""β2 and ε: numbers whose defaults depend on the optimizer and follow it until they are set.

A default is recognized by identity: `default_float(0.98)` is always the same object, and any other 0.98 is a number
that somebody has set. It is a plain float. A subclass of float would end up in the parameter groups of optimizers,
and with them in ``optimizer.pt``, where ``torch.load(weights_only=True)`` refuses classes that it does not know; so
does YAML.
"""

import argparse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments
from transformers.utils import logging

from .optimizer_names import ADASAM_NAMES
from .reading import read_number

logger = logging.get_logger(__name__)

# Of the paper's update. All other optimizers have the defaults of Transformers.
ADASAM_DEFAULTS = {"adam_beta2": 0.98, "adam_epsilon": 1e-6}

_default_floats: dict[float, float] = {}

if TYPE_CHECKING:  # what the mixin finds behind it
    _Base = TrainingArguments
else:
    _Base = object


def default_float(value: float) -> float:
    """The one float equal to `value` that is a default."""
    # By way of text, as the interpreter may use one object for all equal literals.
    return _default_floats.setdefault(value, float(repr(value)))


def is_default(value: object) -> bool:
    """Whether `value` was left to the optimizer: a `default_float`, or None."""
    return value is None or (isinstance(value, float) and _default_floats.get(value) is value)


@dataclass(repr=False)
class AdamDefaultsMixin(_Base):
    """`adam_beta2` and `adam_epsilon` read as the numbers in force and, unless they were set, follow `optim`.

    They do so in an attribute that is set (hyperparameter search), in `dataclasses.replace`, copies and pickles. JSON,
    YAML and dictionaries of `to_dict` know only numbers; there, ``adam_defaults`` says which of them are defaults.
    """

    adam_beta2: float = field(
        default=default_float(TrainingArguments.adam_beta2),
        metadata={"help": "β2 of Adam-like optimizers. Unless it is set, that of adasam and amsgrad is 0.98."},
    )
    adam_epsilon: float = field(
        default=default_float(TrainingArguments.adam_epsilon),
        metadata={"help": "ε of Adam-like optimizers. Unless it is set, that of adasam and amsgrad is 1e-6."},
    )
    adam_defaults: dict[str, float] | None = field(default=None, metadata={"help": argparse.SUPPRESS})

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "optim" or name in ADASAM_DEFAULTS:
            self._follow_optimizer()

    def _follow_optimizer(self) -> None:
        for name, number in ADASAM_DEFAULTS.items():
            if is_default(vars(self).get(name)):
                # (super() is the class behind the mixin, which may have a default of its own.)
                default = number if self.optim in ADASAM_NAMES else getattr(super(), name)
                vars(self)[name] = default_float(default)

    def __getstate__(self) -> dict[str, Any]:
        # A pickle does not keep the identity of a float.
        return {n: None if n in ADASAM_DEFAULTS and is_default(v) else v for n, v in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.optim = self.optim  # an enumeration's member in arguments that were saved before 0.1
        self._follow_optimizer()

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers; ``adam_defaults`` has those numbers that are defaults."""
        numbers = {name: getattr(self, name) for name in ADASAM_DEFAULTS}
        defaults = {name: number for name, number in numbers.items() if is_default(number)}
        # (YAML refuses subclasses of str.)
        values: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]  # Transformers' types lack it
        return {**values, "optim": str(self.optim), "adam_defaults": defaults}

    def _read_adam_defaults(self) -> None:
        """Let the numbers that a dictionary of `to_dict` says are defaults follow the optimizer again."""
        recorded: Any = self.adam_defaults or {}
        if not isinstance(recorded, dict) or not recorded.keys() <= ADASAM_DEFAULTS.keys():
            raise ValueError(
                f"adam_defaults={recorded!r} must have the names {' and '.join(ADASAM_DEFAULTS)} at most, as to_dict "
                "writes it; leave it out to keep all numbers as they are"
            )
        for name, number in recorded.items():
            value = getattr(self, name)
            if value == read_number(f"adam_defaults: {name}", number, "a number, as to_dict writes it"):
                setattr(self, name, None)
                if (default := getattr(self, name)) != value:
                    logger.warning(
                        f"{name}={default!r}, the default of optim={self.optim}, replaces {value!r}, which "
                        "adam_defaults says was one; leave out adam_defaults to keep it"
                    )
        self.adam_defaults = None  # from here on, identity tells
