"""How sharp a model's loss is: the measures, and a callback that logs them while a model trains."""

from .sharpness_callback import SharpnessCallback
from .sharpness_measures import average_sharpness, filter_normalized, loss_along, sam_gap, top_eigenvalues

__all__ = [
    "SharpnessCallback",
    "average_sharpness",
    "filter_normalized",
    "loss_along",
    "sam_gap",
    "top_eigenvalues",
]
