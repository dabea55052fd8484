"""When the ascent takes place, and its radius as a function of training progress."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

Shape = Literal["constant", "linear", "cosine", "lr"]
SHAPES = get_args(Shape)


class Schedule(NamedTuple):
    """ρ_t = ρ · `factor` (t) for step t of T, 0 where step t does not ascend.

    Attributes:
        start, end: ascend only from step ⌈start·T⌉ on and before step ⌈end·T⌉; 0 <= start < end <= 1. The last 30 % of
            training give most of what SAM gives (arXiv:2609.17575).
        interval: of these steps, ascend in the first and then in every `interval`-th.
        shape: with u going from 0 at the first of these steps to 1 after the last one: ``constant`` 1, ``linear``
            1 − u, ``cosine`` (1 + cos πu)/2, ``lr`` the learning rate as a share of its peak (`PeakRates`), for each
            parameter group by itself.
    """

    start: float = 0.0
    end: float = 1.0
    interval: int = 1
    shape: Shape = "constant"

    def steps(self, total: int) -> range:
        """Those from start to end, with an ascent or without."""
        first, stop = (math.ceil(round(share * total, 9)) for share in (self.start, self.end))  # 0.07 · 100 > 7
        return range(first, stop)

    def ascends(self, step: int, total: int) -> bool:
        """Whether `step` is one of those that ascend."""
        return step in self.steps(total)[:: self.interval]

    def climbs(self, step: int, total: int) -> bool:
        """`ascends`, by its name before 0.1; to be removed in 0.2."""
        return self.ascends(step, total)

    def factor(self, step: int, total: int, lr_share: float = 1.0) -> float:
        """The radius at `step` as a share of ρ, were it to ascend there; `lr_share` is that of one parameter group."""
        steps = self.steps(total)
        u = (step - steps.start) / len(steps)
        return {
            "constant": 1.0,
            "linear": 1.0 - u,
            "cosine": (1.0 + math.cos(math.pi * u)) / 2.0,
            "lr": lr_share,
        }[self.shape]


class PeakRates:
    """The learning rate of each parameter group as a share of the highest one that the group has had.

    The peak of a group is the maximum of its scheduler's ``initial_lr``, where it has one, and of all rates seen. So a
    scheduler that begins at its peak (a warm-up by `LambdaLR`, a decay) has shares from its first step on, and one that
    rises above its ``initial_lr`` (`OneCycleLR`, `CyclicLR`) or has none (`ReduceLROnPlateau`) is at 1 while it rises.
    Ask at every step: a peak that was not seen is not known.

    Groups go by their position, as in `Optimizer.param_groups`, and may be added at any time.
    """

    def __init__(self) -> None:
        self._peaks: list[float] = []

    def share(self, group: int, lr: float, initial_lr: float | None = None) -> float:
        """lr / peak of the group at position `group`, at most 1; 0 as long as its peak is 0."""
        self._peaks += [0.0] * (group + 1 - len(self._peaks))
        peak = self._peaks[group] = max(self._peaks[group], initial_lr or 0.0, lr)
        return lr / peak if peak > 0.0 else 0.0

    def state(self) -> list[float]:
        """The peaks, for a checkpoint: no scheduler's state has them all."""
        return list(self._peaks)

    def load(self, state: Sequence[float]) -> None:
        """Go on from the peaks of `state`."""
        self._peaks = [float(peak) for peak in state]
