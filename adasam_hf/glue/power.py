"""How many pairs a paired t test needs to see a difference (two-sided, at the level 0.05)."""

import math

from scipy import stats

LEVEL, WANTED, MOST = 0.05, 0.8, 100_000


def power(pairs: int, gain: float, spread: float, comparisons: int = 1) -> float:
    """Probability that the test sees a true mean difference of `gain`, if differences are normal.

    spread: their standard deviation, in the unit of `gain`.
    comparisons: the level is divided by it (the first and strictest step of Holm's correction).
    """
    if pairs < 2:
        return 0.0
    edge = stats.t.ppf(1 - LEVEL / comparisons / 2, pairs - 1)
    shift = gain / spread * math.sqrt(pairs)
    return float(stats.nct.sf(edge, pairs - 1, shift) + stats.nct.cdf(-edge, pairs - 1, shift))


def pairs_for(gain: float, spread: float, comparisons: int = 1) -> int:
    """The fewest pairs with a power of 80 %.

    Raises:
        ValueError: if more than 100,000 would be needed.
    """
    low, high = 1, 2
    while power(high, gain, spread, comparisons) < WANTED:
        low, high = high, 2 * high
        if high > MOST:
            raise ValueError(f"gain={gain!r} is too small beside a spread of {spread:g}; {MOST} pairs do not see it")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, gain, spread, comparisons) >= WANTED else (middle, high)
    return high


def visible_gain(pairs: int, spread: float, comparisons: int = 1) -> float:
    """The smallest true difference that so many pairs see with a power of 80 %, in the unit of `spread`."""
    low, high = 0.0, 1.0
    while power(pairs, high, 1.0, comparisons) < WANTED:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power(pairs, middle, 1.0, comparisons) >= WANTED else (middle, high)
    return high * spread
