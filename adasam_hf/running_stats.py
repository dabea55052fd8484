"""The former name of `adasam_hf.buffers`, for one release."""

import warnings
from typing import Any

from . import buffers


def __getattr__(name: str) -> Any:
    if name != "kept":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "adasam_hf.running_stats.kept will be removed in 0.2; use adasam_hf.buffers.unchanged",
        DeprecationWarning,
        stacklevel=2,
    )
    return buffers.unchanged
