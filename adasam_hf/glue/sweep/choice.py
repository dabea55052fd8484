"""What the trials of a sweep chose, and whether a wider grid might have had a better one."""

import math
import statistics
from typing import Any

from ..tasks import score
from .records import check, load
from .run import Run
from .specification import Sweep
from .validation import is_number


def chosen(sweep: Sweep, task: str, method: str) -> dict[str, Any]:
    """The point of the grid with the best mean score over the trials' seeds on the held-out rows, of equal ones the
    one with the lowest loss there; {} without trials to choose from.

    Raises:
        ValueError: if a trial has no record or one of other arguments, or if all points have diverged.
    """
    if sweep.choose is None:
        return {}
    chooser = sweep.chooser
    runs = [run for run in chooser.trials() if (run.axes["task_name"], run.axes["method"]) == (task, method)]
    done = [run for run in runs if run.finished]
    if not runs or len(done) < len(runs):
        raise ValueError(
            f"{sweep.path}: {len(done)} of {len(runs)} trials of {method} on {task} are in "
            f"{chooser.records() / 'trials'}; run {chooser.path} first"
        )
    check(runs)
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(run.point, []).append(run)
    ranks = {}
    for point, mine in found.items():
        metrics = [load(run.record)["metrics"] for run in mine]
        # Of a model that is NaN all over, accuracy is that of the first class; only the loss tells. The loss of
        # smoothed labels is another one, so the cross-entropy is taken where a record has it.
        rank = (
            statistics.fmean(score(task, m) for m in metrics),
            -statistics.fmean(m.get("eval_cross_entropy", m["eval_loss"]) for m in metrics),
        )
        if all(map(math.isfinite, rank)):
            ranks[point] = rank
    if not ranks:
        raise ValueError(f"{sweep.path}: all trials of {method} on {task} have diverged; give it lower rates")
    return found[max(ranks, key=lambda point: ranks[point])][0].trial or {}


def blind_grids(sweep: Sweep) -> list[str]:
    """In words, the grids in which every choice is at an edge."""
    grids = sweep.choose["grid"] if isinstance(sweep.choose, dict) else {}
    return [
        f"{sweep.path}: choose.grid.{method}.{name} is {values}, so that any choice is at an edge; give it three "
        "values or more, or pass --accept_edge"
        for method in sweep.axes["method"]
        for name, values in grids.get(method, {}).items()
        if len(values) == 2 and all(is_number(v) and float(v) != 0 for v in values)
    ]


def edges(sweep: Sweep, task: str, method: str) -> list[str]:
    """In words, the arguments that were chosen at an edge of their grid. The value 0 is none: nothing is below."""
    if sweep.choose is None:
        return []
    chooser, out = sweep.chooser, []
    for name, value in chosen(sweep, task, method).items():
        values = sorted({float(v) for v in chooser.grid[method][name] if is_number(v)})
        if len(values) > 1 and is_number(value) and float(value) in (values[0], values[-1]) and float(value) != 0:
            side = "lowest" if float(value) == values[0] else "highest"
            out.append(
                f"{chooser.path}: the trials of {method} on {task} chose {name}={value}, the {side} of its grid, and "
                f"a better one may lie beyond; widen choose.grid.{method}.{name}, or pass --accept_edge"
            )
    return out
