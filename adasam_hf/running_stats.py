"""The former name of `adasam_hf.buffers`, for one release."""

from .buffers import unchanged as kept

__all__ = ["kept"]
