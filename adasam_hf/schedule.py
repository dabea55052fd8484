"""When the weights climb and how far: the radius as a function of training progress."""

import math
from typing import Literal, NamedTuple, get_args

Shape = Literal["constant", "linear", "cosine", "lr"]
SHAPES = get_args(Shape)


class Schedule(NamedTuple):
    """ρ_t = ρ · `factor` (t) for step t of T, 0 where step t does not climb.

    Attributes:
        start, end: climb only from step ⌈start·T⌉ on and before step ⌈end·T⌉; 0 <= start < end <= 1. The last 30 % of
            training give most of what SAM gives (arXiv:2609.17575).
        interval: of these steps, climb in the first and then in every `interval`-th.
        shape: with u going from 0 at the first of these steps to 1 after the last one: ``constant`` 1, ``linear``
            1 − u, ``cosine`` (1 + cos πu)/2, ``lr`` the learning rate as a share of its peak.
    """

    start: float = 0.0
    end: float = 1.0
    interval: int = 1
    shape: Shape = "constant"

    def steps(self, total: int) -> range:
        """Those from start to end, climbing or not."""
        first, stop = (math.ceil(round(share * total, 9)) for share in (self.start, self.end))  # 0.07 · 100 > 7
        return range(first, stop)

    def climbs(self, step: int, total: int) -> bool:
        """Whether `step` is one of those that climb."""
        return step in self.steps(total)[:: self.interval]

    def factor(self, step: int, total: int, lr_share: float = 1.0) -> float:
        """The radius at `step` as a share of ρ, were it to climb there."""
        steps = self.steps(total)
        u = (step - steps.start) / len(steps)
        return {
            "constant": 1.0,
            "linear": 1.0 - u,
            "cosine": (1.0 + math.cos(math.pi * u)) / 2.0,
            "lr": lr_share,
        }[self.shape]
