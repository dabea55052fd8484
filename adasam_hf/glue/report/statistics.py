"""Means and differences with their intervals, significance tests and power."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

SAMPLES = 10_000  # bootstrap resamples
CONFIRMED, DENIED, UNKNOWN = "confirmed here", "not confirmed here", "cannot tell from these runs"


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean. (With five values it covers the mean in 83 % of cases.)

    values: two or more.
    """
    random = np.random.default_rng(0)
    low, high = stats.bootstrap(
        (values,), np.mean, n_resamples=SAMPLES, method="percentile", rng=random
    ).confidence_interval
    return float(low), float(high)


@dataclass
class Difference:
    """Differences paired by seed: mean, bootstrap and Student's t intervals, p of the t test."""

    values: list[float]

    @classmethod
    def between(cls, one: dict[int, float], other: dict[int, float]) -> "Difference":
        pairs = [one[seed] - other[seed] for seed in sorted(set(one) & set(other))]
        return cls([value for value in pairs if not math.isnan(value)])

    @property
    def mean(self) -> float:
        return statistics.mean(self.values) if self.values else math.nan

    @property
    def p(self) -> float:
        """p of the two-sided t test; NaN with fewer than two pairs or if all are equal, which no test can judge."""
        if len({round(value, 9) for value in self.values}) < 2:  # 1/277 from five different sums differs by rounding
            return math.nan
        return float(stats.ttest_1samp(self.values, 0.0).pvalue)

    def verdict(self, sign: int = 1, p: float | None = None) -> str:
        """`p` replaces the test's own p, to correct for several tests."""
        p = self.p if p is None else p
        if math.isnan(p) or p >= 0.05:
            return UNKNOWN
        return CONFIRMED if self.mean * sign > 0 else DENIED

    def sight(self, gain: float | None = None, comparisons: int = 1) -> str:
        """The difference that this many pairs detect with 80 % power, and the pairs that `gain` would take."""
        if math.isnan(self.p):
            return ""
        spread = statistics.stdev(self.values)
        seen = f"{len(self.values)} pairs see {visible_gain(len(self.values), spread, comparisons):.2g}"
        return seen + ("" if gain is None else f", {gain} takes {pairs_for(gain, spread, comparisons)}")

    def __str__(self) -> str:
        if len(self.values) < 2:
            return f"{self.mean:+.2f} (one pair)" if self.values else "–"
        low, high = bootstrap(self.values)
        mean, half = interval(self.values)
        p = "–" if math.isnan(self.p) else f"{self.p:.3f}"
        return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}], t: ± {half:.2f}, p = {p}"


def holm(ps: Sequence[float]) -> list[float]:
    """p-values after Holm's correction; NaNs stay NaN and do not count as tests."""
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    out, highest = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, (len(order) - rank) * ps[i])
        out[i] = min(highest, 1.0)
    return out


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half-width of its 95 % interval by Student's t."""
    if len(values) < 2:
        return statistics.mean(values), math.inf
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return statistics.mean(values), float(half)


# ---- power ----


LEVEL, WANTED, MOST = 0.05, 0.8, 100_000


def power(pairs: int, gain: float, spread: float, comparisons: int = 1) -> float:
    """Probability that the test detects a true mean difference of `gain`, if differences are normal.

    spread: standard deviation of the differences, in the unit of `gain`.
    comparisons: what the level is divided by (the first and strictest step of Holm's correction).
    """
    if pairs < 2:
        return 0.0
    edge = stats.t.ppf(1 - LEVEL / comparisons / 2, pairs - 1)
    shift = gain / spread * math.sqrt(pairs)
    return float(stats.nct.sf(edge, pairs - 1, shift) + stats.nct.cdf(-edge, pairs - 1, shift))


def pairs_for(gain: float, spread: float, comparisons: int = 1) -> int:
    """The fewest pairs that detect `gain` with 80 % power.

    Raises:
        ValueError: if more than 100,000 would be needed.
    """
    low, high = 1, 2
    while power(high, gain, spread, comparisons) < WANTED:
        low, high = high, 2 * high
        if high > MOST:
            raise ValueError(
                f"gain={gain!r} is too small beside a spread of {spread:g}; even {MOST} pairs would miss it"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, gain, spread, comparisons) >= WANTED else (middle, high)
    return high


def visible_gain(pairs: int, spread: float, comparisons: int = 1) -> float:
    """The smallest true difference that this many pairs detect with 80 % power, in the unit of `spread`."""
    low, high = 0.0, 1.0
    while power(pairs, high, 1.0, comparisons) < WANTED:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power(pairs, middle, 1.0, comparisons) >= WANTED else (middle, high)
    return high * spread
