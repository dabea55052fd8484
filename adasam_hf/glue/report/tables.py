"""Tables in Markdown."""

import math
import statistics
from collections.abc import Callable, Sequence

from ..tasks import TASKS, get_task
from .choices import Choice
from .records import Grid, Record, score
from .statistics import Difference, bootstrap
from .wording import name


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def spread(values: dict[int, float], digits: int = 2, full: int = 0) -> str:
    """Mean ± standard deviation [interval of the mean], how many diverged, and how many seeds if fewer than `full`."""
    if not values:
        return "–"
    finite = [value for value in values.values() if not math.isnan(value)]
    lost = "" if len(finite) == len(values) else f"{len(values) - len(finite)} of {len(values)} diverged"
    if not finite:
        return lost
    mean, lost = f"{statistics.mean(finite):.{digits}f}", lost and f", {lost}"
    if 1 < len(values) < full:
        lost += f", {len(values)} seeds"
    if len(finite) == 1:
        return f"{mean} (one seed{lost})"
    low, high = bootstrap(finite)
    return f"{mean} ± {statistics.stdev(finite):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{lost}"


def table(grid: Grid, value: Callable[[Record], float] = score, digits: int = 2) -> str:
    """Methods × tasks, with the average over tasks: mean ± standard deviation over seeds."""
    full = len({seed for _, _, seed in grid.runs})
    rows = [
        [
            name(method),
            *(spread(grid.values(task, method, value), digits, full) for task in grid.tasks),
            spread(grid.average(method, value), digits, full),
        ]
        for method in grid.methods
    ]
    return markdown(["", *(task.upper() for task in grid.tasks), "average"], rows)


def single_metrics(grid: Grid) -> str:
    """Every metric of the tasks that have more than one, mean ± standard deviation over seeds."""
    columns = []
    for task in (get_task(task) for task in grid.tasks if task in TASKS):
        names = [f"{metric}{suffix}" for _, suffix in task.evaluations for metric in task.metrics]
        columns += [(task.name, name) for name in names if len(names) > 1]
    rows = [[name(m), *(spread(grid.values(t, m, _metric(n))) for t, n in columns)] for m in grid.methods]
    return markdown(["", *(f"{task.upper()} {name}" for task, name in columns)], rows) if columns else ""


def _metric(name: str) -> Callable[[Record], float]:
    return lambda record: float(100 * record["metrics"][f"eval_{name}"])


def differences(grid: Grid, one: str, other: str) -> str:
    """For each task and on average: mean difference, its intervals and p."""
    cells = [str(Difference.between(grid.values(t, one), grid.values(t, other))) for t in grid.tasks]
    cells.append(str(Difference.between(grid.average(one), grid.average(other))))
    return markdown(["", *(t.upper() for t in grid.tasks), "average"], [[f"{name(one)} – {name(other)}", *cells]])


def choices_table(choices: Sequence[Choice]) -> str:
    rows = []
    for c in choices:
        tried = ", ".join(f"{c.label(trial)}: {value:.1f}" for trial, value in c.trials)
        note = "; ".join(
            filter(None, ["all tie" if c.tie else c.edge, "no trial had it" if c.untried else "", c.otherwise])
        )
        rows.append([c.sweep, c.task.upper(), name(c.method), c.label(c.taken), tried, note])
    return markdown(["sweep", "task", "method", "chosen", "score of each trial", "note"], rows)
