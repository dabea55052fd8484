"""The former home of `adasam_hf.parameters` and `adasam_hf.rows`, for one release."""

import warnings
from typing import Any

from . import parameters
from .rows import choose_rows


def _take_rows(inputs: Any, fraction: float) -> Any:
    """`choose_rows` of a window of one micro-batch."""
    return choose_rows([inputs], fraction, 1).batches[0]


_MOVED = {
    "choose_parameters": ("adasam_hf.parameters.choose_parameters", parameters.choose_parameters),
    "gradients_only_for": ("adasam_hf.parameters.gradients_only_for", parameters.gradients_only_for),
    "take_rows": ("adasam_hf.rows.choose_rows", _take_rows),
}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    instead, found = _MOVED[name]
    warnings.warn(f"adasam_hf.selection.{name} will be removed in 0.2; use {instead}", DeprecationWarning, stacklevel=2)
    return found
