"""The names that `optim` takes: this package's beside those of Transformers."""

import difflib
from typing import Any, Self

from transformers.training_args import OptimizerNames

# The paper's four methods: two updates, each with and without the ascent.
ADASAM_NAMES = ("adasam", "amsgrad")
SGD_NAMES = ("sam", "sgdm")
# That keep no second moment with a number for each weight.
WITHOUT_SECOND_MOMENT = (*SGD_NAMES, "sgd", "adafactor", "adagrad", "lion_32bit", "lion_8bit")


class OptimizerName(str):
    """A name of this package, or one of Transformers', which is then equal to the member of `OptimizerNames`.

    Transformers keeps a member of its enumeration. A hyperparameter search converts each value to the type of the one
    before, though, and that enumeration refuses the names of this package.
    """

    def __new__(cls, name: object) -> Self:
        return super().__new__(cls, getattr(name, "value", name))  # str() of a member would begin with its class

    @property
    def value(self) -> str:
        """As plain text, and as of a member."""
        return str(self)

    @property
    def name(self) -> str:
        """As of a member."""
        return self.value.upper() if self in ADASAM_NAMES + SGD_NAMES else OptimizerNames(self.value).name


def read_optimizer_name(name: str, value: Any) -> OptimizerName:
    """`value` of the argument `name`, text or a member of `OptimizerNames`.

    Raises:
        ValueError: for a name that does not exist, with the nearest and all others.
    """
    known = [*ADASAM_NAMES, *SGD_NAMES, *(o.value for o in OptimizerNames)]
    if isinstance(value, str) and value in known:
        return OptimizerName(value)
    close = difflib.get_close_matches(str(value).lower(), known, n=1)
    meant = f"did you mean {close[0]!r}? Or " if close else ""
    raise ValueError(f"{name}={value!r} is unknown; {meant}choose one of {', '.join(known)}")
