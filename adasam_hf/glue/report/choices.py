"""What the trials of a sweep chose for its runs."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from .records import Record, points, score
from .wording import in_order, name

SHORT = {"learning_rate": "rate", "sam_rho": "radius"}


@dataclass
class Choice:
    """The trials of one sweep, task and method, each with its score, and the point that the runs used."""

    sweep: str
    task: str
    method: str
    trials: list[tuple[dict[str, float], float]]  # each point and its mean score over the trials' seeds
    taken: dict[str, float]
    single: list[list[float]] = field(default_factory=list)  # the scores of each seed alone

    @property
    def budget(self) -> tuple[int, int]:
        """Number of points, and of seeds for each point."""
        return len(self.trials), len(self.single)

    @property
    def untried(self) -> bool:
        """Whether no trial had the point that the runs used."""
        return self.taken not in [point for point, _ in self.trials]

    @property
    def otherwise(self) -> str:
        """How often one seed alone would have chosen another point, which shows what a single trial is worth."""
        if len(self.single) < 2:
            return ""
        best = max(range(len(self.trials)), key=lambda i: self.trials[i][1])
        other = sum(scores[best] < max(scores) for scores in self.single)
        return f"{other} of {len(self.single)} seeds alone would have chosen otherwise"

    @property
    def tie(self) -> bool:
        """Whether all scores are equal, so that they chose nothing."""
        return len(self.trials) > 1 and len({value for _, value in self.trials}) == 1

    @property
    def edge(self) -> str:
        """The edges of the grid that the choice lies on, where a wider grid might have had a better point."""
        found = []
        for key, value in self.taken.items():
            values = sorted({trial[key] for trial, _ in self.trials})
            if len(values) > 1 and value in (values[0], values[-1]) and value != 0:  # no value is below 0
                found.append(f"{'lowest' if value == values[0] else 'highest'} {SHORT.get(key, key)}")
        return f"{name(self.method)} on {self.task.upper()}: its grid's {' and '.join(found)}" if found else ""

    @staticmethod
    def label(trial: dict[str, float]) -> str:
        return " / ".join(f"{value:g}" for value in trial.values())


def choices(runs: Sequence[Record], trials: Sequence[Record]) -> list[Choice]:
    """One choice for each sweep, task and method that has both runs and trials."""
    found: dict[tuple[str, str, str], list[tuple[dict[str, float], dict[int, Record]]]] = {}
    for (sweep, task, method, point), seeds in points(trials).items():
        found.setdefault((sweep, task, method), []).append((dict(point), seeds))
    out = []
    for sweep, task in sorted({place[:2] for place in found}):
        for method in in_order(m for s, t, m in found if (s, t) == (sweep, task)):
            final = [
                r for r in runs if (r["sweep"], r["axes"]["task_name"], r["axes"]["method"]) == (sweep, task, method)
            ]
            if final:
                mine = sorted(found[sweep, task, method], key=lambda pair: tuple(pair[0].values()))
                tried = [(point, statistics.fmean(map(score, seeds.values()))) for point, seeds in mine]
                common = sorted(set.intersection(*(set(seeds) for _, seeds in mine)))
                single = [[score(seeds[seed]) for _, seeds in mine] for seed in common]
                taken = {k: float(final[0]["arguments"][k] or 0) for k in mine[0][0]}
                out.append(Choice(sweep, task, method, tried, taken, single))
    return out
