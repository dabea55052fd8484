"""Loss curves, and how the number of iterations to a loss level falls with the batch size."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .records import BATCH, Record
from .statistics import CONFIRMED, DENIED, UNKNOWN, interval
from .wording import counted

WINDOW = 256  # training rows over which a loss curve is averaged
NEAR = 0.25  # largest distance of the exponent from -1
LEVELS = (0.25, 0.5, 0.75)


def losses(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and training losses (at w), averaged over WINDOW rows; an iteration is the middle of its window. Both
    are empty if no loss was logged.

    (A mean over the last rows would lag by about WINDOW/2b iterations, in proportion to 1/b, and so look like a linear
    speed-up.)
    """
    entries = [(e["step"], float(e["loss"])) for e in record["log_history"] if "loss" in e]
    if not entries:
        return np.array([]), np.array([])
    steps, raw = (np.array(column, dtype=float) for column in zip(*entries, strict=True))
    size = record["axes"].get(BATCH, record["arguments"][BATCH])
    every = steps[0]  # each entry is the mean over this many iterations
    width = max(1, min(len(raw), round(WINDOW / (size * every))))
    kernel = np.full(width, 1 / width)
    return np.convolve(steps - (every - 1) / 2, kernel, "valid"), np.convolve(raw, kernel, "valid")


def level_of(curves: Sequence[np.ndarray], share: float, constant: float = math.inf) -> float:
    """The loss `share` of the way from the start to the lowest loss that all curves reach. The start is the mean first
    loss, or the loss of the best constant answer if that is lower. NaN if some curve stays above it."""
    begin = min(statistics.mean(float(curve[0]) for curve in curves), constant)
    reached = max(float(curve.min()) for curve in curves)
    return begin + share * (reached - begin) if reached < begin else math.nan


def constant_loss(runs: Sequence[Record]) -> float:
    """The training loss of the best constant answer, as recorded by the runs; NaN if one of them lacks it."""
    return max((r["metrics"].get("train_constant_loss", math.nan) for r in runs), default=math.nan, key=_nan_first)


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value


def iterations_to(steps: np.ndarray, curve: np.ndarray, level: float) -> float:
    """The first iteration at or below the level, interpolated between two. NaN if the curve begins there (its first
    point is the middle of a window, which is ∝ 1/b) or never gets there."""
    below = np.flatnonzero(curve <= level)
    if not len(below) or below[0] == 0:
        return math.nan
    i = int(below[0])
    share = (curve[i - 1] - level) / (curve[i - 1] - curve[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


@dataclass
class SpeedUp:
    """One task's runs at one level: seed → b → iterations, and the slope of log iterations on log b for each seed that
    reached the level at every b (three or more)."""

    level: float
    found: dict[int, dict[int, float]]
    learned: bool = True  # whether the level is known to be below the loss of a constant answer

    @classmethod
    def of(cls, runs: Sequence[Record], share: float = 0.5) -> "SpeedUp":
        curves = {(r["axes"]["seed"], r["axes"][BATCH]): losses(r) for r in runs}
        usable = [curve for _, curve in curves.values() if len(curve) and np.isfinite(curve).all()]
        constant = constant_loss(runs)
        known = not math.isnan(constant)
        level = level_of(usable, share, constant if known else math.inf) if usable else math.nan
        found: dict[int, dict[int, float]] = {}
        for (seed, size), (steps, curve) in sorted(curves.items()):
            found.setdefault(seed, {})[size] = iterations_to(steps, curve, level)
        return cls(level, found, known)

    @property
    def slopes(self) -> list[float]:
        full = max(len(sizes) for sizes in self.found.values())
        return [
            float(np.polyfit(np.log(list(sizes)), np.log(list(sizes.values())), 1)[0])
            for sizes in self.found.values()
            if len(sizes) == full > 2 and not any(map(math.isnan, sizes.values()))
        ]

    @property
    def verdict(self) -> str:
        if len(self.slopes) < 2 or not self.learned:
            return UNKNOWN
        mean, half = interval(self.slopes)
        away = abs(mean + 1)
        return CONFIRMED if away + half <= NEAR else DENIED if away - half > NEAR else UNKNOWN

    def __str__(self) -> str:
        where = f"at loss {self.level:.3f}" + ("" if self.learned else ", which a constant answer may have")
        if not self.slopes:
            return f"no complete seed {where}"
        mean, half = interval(self.slopes)
        return f"{mean:.2f} ± {half:.2f} {where} ({counted(len(self.slopes), 'seed')})"
