"""How sharp a model's loss is: measures, and a callback that logs them during training."""

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
