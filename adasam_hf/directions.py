"""Along what the weights climb. A new direction is one class here and its name at the end."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer


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
    """

    first_pass = False
    sign = -1.0
    KEYS = ("exp_avg", "momentum_buffer")

    def __call__(self, p: Tensor) -> Tensor | None:
        state = self.optimizer.state.get(p, {})
        return next((state[key] for key in self.KEYS if state.get(key) is not None), None)


class Last(Direction):
    """What was climbed last, again, without a pass of its own."""

    first_pass = False

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.vectors: dict[Tensor, Tensor] = {}

    def remember(self, direction: Direction, params: Iterable[Tensor]) -> None:
        """Copy its vectors; DistributedDataParallel may go on using the memory of gradients."""
        self.sign = direction.sign
        self.vectors = {p: d.detach().clone() for p in params if (d := direction(p)) is not None}

    def __call__(self, p: Tensor) -> Tensor | None:
        return self.vectors.get(p)


DirectionName = Literal["gradient", "momentum"]
DIRECTIONS: dict[DirectionName, type[Direction]] = {"gradient": Gradient, "momentum": Momentum}
