"""Along what the weights ascend. A new direction is one class here and its name at the end."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .kernels import shard


def innermost(optimizer: Any) -> Any:
    """The optimizer that updates, out of wrappers such as Accelerate's (``.optimizer``) and ZeRO's (``.optim``)."""
    for name in ("optimizer", "optim"):
        inner = getattr(optimizer, name, None)
        if hasattr(inner, "param_groups"):
            return innermost(inner)
    return optimizer


class Direction(ABC):
    """d_p for each parameter p; the weights go to w + ρ·d/‖d‖ with one norm over all of them.

    Attributes:
        first_pass: whether d needs a forward/backward at w first, whose gradients are then used up.
        sign: of the move along `__call__`'s vectors.
    """

    first_pass: bool
    sign = 1.0

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @abstractmethod
    def __call__(self, p: Tensor) -> Tensor | None:
        """sign · d_p, of p's shape, or None where p is to stay."""


class Gradient(Direction):
    """The gradient at w: SAM, arXiv:2010.01412, and Algorithm 1 of AdaSAM, arXiv:2303.00565."""

    first_pass = True

    def __call__(self, p: Tensor) -> Tensor | None:
        return p.grad


class Momentum(Direction):
    """Where the last update went: w − ρ·m/‖m‖ with the optimizer's own first moment m (Momentum-SAM, arXiv:2401.12033).

    It needs no pass of its own, so a step costs what a plain one does; useful radii are many times those of SAM. Before
    the first update there is no m, and the step is a plain one.

    Raises:
        RuntimeError: where m has another shape than its parameter (GaLore, APOLLO) or is quantized.
    """

    first_pass = False
    sign = -1.0
    KEYS = ("exp_avg", "momentum_buffer")

    def __call__(self, p: Tensor) -> Tensor | None:
        state = self.optimizer.state.get(p, {})
        moment = next((state[key] for key in self.KEYS if state.get(key) is not None), None)
        if moment is not None:
            check_moment(moment, p, self.optimizer, "first")
        return moment


def check_moment(moment: Tensor, p: Tensor, optimizer: Optimizer, which: str) -> None:
    """Raise RuntimeError unless the `which` moment that `optimizer` keeps for `p` has a number for each of p's."""
    part, whole = shard(moment), shard(p)
    if moment.shape != p.shape or part.shape != whole.shape:
        problem = f"of shape {tuple(moment.shape)} for a parameter of shape {tuple(p.shape)}"
    elif not part.is_floating_point() or part.is_quantized or is_traceable_wrapper_subclass(part):
        problem = f"as {type(part).__name__} of dtype {part.dtype}, which is quantized"
    elif part.layout is not torch.strided:
        problem = f"with layout {part.layout}"
    else:
        return
    owner = type(innermost(optimizer))
    raise RuntimeError(
        f"{owner.__module__}.{owner.__qualname__} keeps its {which} moment {problem}, so it is of no use for the "
        "direction of the ascent; use sam_direction='gradient' (or sam_preset='full'), or an optimizer with a full "
        f"{which} moment such as adamw_torch"
    )


class PreviousAscent(Direction):
    """Along what the weights ascended last, once more, without a pass of its own."""

    first_pass = False

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.vectors: dict[Tensor, Tensor] = {}

    def remember(self, direction: Direction) -> None:
        """Copy its vectors; DistributedDataParallel may go on using the memory of gradients."""
        self.sign = direction.sign
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.vectors = {p: d.detach().clone() for p in params if (d := direction(p)) is not None}

    def __call__(self, p: Tensor) -> Tensor | None:
        return self.vectors.get(p)


Last = PreviousAscent  # its name up to 0.1

DirectionName = Literal["gradient", "momentum"]
DIRECTIONS: dict[DirectionName, type[Direction]] = {"gradient": Gradient, "momentum": Momentum}
