"""The former home of `adasam_hf.parameters` and `adasam_hf.rows`, for one release."""

from typing import Any

from .parameters import choose_parameters, gradients_only_for
from .rows import choose_rows

__all__ = ["choose_parameters", "gradients_only_for", "take_rows"]


def take_rows(inputs: Any, fraction: float) -> Any:
    """`choose_rows` of a window of one micro-batch."""
    return choose_rows([inputs], fraction, 1).batches[0]
