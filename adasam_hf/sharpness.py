"""How sharp a model's loss is: the measures, and a callback that logs them while a model trains."""

from .measures import average_sharpness, filter_normalized, loss_along, sam_gap, top_eigenvalues
from .sharpness_callback import SharpnessCallback

__all__ = [
    "SharpnessCallback",
    "average_sharpness",
    "filter_normalized",
    "loss_along",
    "sam_gap",
    "top_eigenvalues",
]
