"""Differences between methods in sweeps that are not the paper's."""

import math
from dataclasses import dataclass

from .records import QUANTITIES, Grid
from .statistics import Difference, holm, interval


@dataclass
class Row:
    """The difference between two methods on one task, in one quantity."""

    pair: str
    task: str
    quantity: str
    difference: Difference
    p: float = math.nan  # Holm's, over the rows of the same pair of methods
    family: int = 0  # the number of those tests

    @property
    def cells(self) -> list[str]:
        mean, half = interval(self.difference.values)
        out = [self.pair, self.task, self.quantity, f"{mean:+.3f} ± {half:.3f}", str(len(self.difference.values))]
        if math.isnan(self.p):
            return [*out, "–", "–", "–"]
        return [*out, f"{self.difference.p:.4f}", f"{self.p:.4f}", self.difference.sight(comparisons=self.family)]

    @property
    def sentence(self) -> str:
        mean, half = interval(self.difference.values)
        higher = "higher" if mean > 0 else "lower"
        word = f"**{higher}**" if self.p < 0.05 else "cannot tell"
        return f"- {self.task}, {self.quantity}, {self.pair}: {mean:+.2f} ± {half:.2f}, {word}"


def difference_rows(grid: Grid) -> list[Row]:
    """Every method against AMSGrad (or the first one if AMSGrad did not run), and AdaSAM against every other."""
    first = "AMSGrad" if "AMSGrad" in grid.methods else grid.methods[0]
    pairs = [(method, first) for method in grid.methods if method != first]
    pairs += [("AdaSAM", m) for m in grid.methods if "AdaSAM" in grid.methods and m not in ("AdaSAM", first)]
    out = []
    for one, other in pairs:
        rows = [
            Row(
                f"{one} – {other}",
                task.upper(),
                what,
                Difference.between(*(grid.values(task, m, value) for m in (one, other))),
            )
            for task in grid.tasks
            for what, value, _ in QUANTITIES
        ]
        rows = [row for row in rows if row.difference.values]
        corrected_ps = holm([row.difference.p for row in rows])
        for row, p in zip(rows, corrected_ps, strict=True):
            row.p, row.family = p, sum(not math.isnan(q) for q in corrected_ps)
        out += rows
    return out
