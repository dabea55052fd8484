"""A verdict on each claim of the paper; RULES says how it follows from the runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .choices import Choice
from .curves import LEVELS, SpeedUp
from .records import Grid, Record
from .statistics import CONFIRMED, DENIED, UNKNOWN, Difference, holm
from .wording import PAPER, counted, name, shown

RULES = """Each verdict follows from a rule, at the 95 % level, over seeds (two runs with the same seed are a pair):

* a difference is confirmed if the paired t test finds it significant with the paper's sign, and not confirmed if it
  finds it significant with the opposite sign; otherwise the runs cannot tell. The p-values are corrected with Holm's
  method over all differences among the claims. If all trials of a method tie on a task, they chose nothing: that task
  is left out, unless the method won there anyway;
* "on most tasks" is confirmed if the difference is confirmed on more than half of at least three tasks, and not
  confirmed if it is not confirmed on half of them or more; otherwise the runs cannot tell;
* the linear speed-up is confirmed if, at each of three levels of the loss (all below the loss of the best constant
  answer), the whole interval of the exponent (Student's t) lies within 0.25 of -1, and not confirmed if at each level
  the whole interval lies farther away; otherwise the runs cannot tell.

A comparison of two methods leaves out tasks on which one of them had more trials than the other, or was run with a
setting that none of its trials had. Runs of the same sweep, task and method with different arguments are refused. All
sweeps that are not the paper's get tables of score, loss and calibration.

A run whose loss on the evaluation rows is not finite has diverged: it has no score and forms no pair.
"""
READ, REMEMBERED = "read", "remembered, not re-read"  # how we know a claim of the paper
Side: TypeAlias = tuple[Grid, str]
"""A grid and one of its methods."""
Choices: TypeAlias = Mapping[tuple[str, str, str], Choice]
"""Sweep, task and method → what their trials chose."""


@dataclass
class Claim:
    """What the paper says, how we know it, and what these runs show."""

    text: str
    known: str
    verdict: str
    number: str
    difference: Difference | None = None  # if a t test decides the claim


def claims(with_momentum: Grid, without: Grid, sizes: Sequence[Record], made: Sequence[Choice] = ()) -> list[Claim]:
    """A verdict on each claim of the paper.

    with_momentum, without: the runs of the sweeps table1 and table2.
    sizes: the runs of the sweep batch_size.
    made: what the trials of table1 and table2 chose.
    """
    choices = {(c.sweep, c.task, c.method): c for c in made}
    known = f"“on most tasks”: {READ}; 6 of 8: {REMEMBERED}"
    out = [Claim("AdaSAM is better than AMSGrad on most tasks", known, *_most_tasks(with_momentum, choices))]
    for grid, text, by in (
        (with_momentum, "AdaSAM's average is above AMSGrad's", "0.28"),
        (without, "the same without momentum", "0.74"),
    ):
        out.append(Claim(text, f"by {by}: {REMEMBERED}", *_compare((grid, "adasam"), (grid, "amsgrad"), choices)))
    for method in PAPER:
        found = _compare((with_momentum, method), (without, method), choices)
        out.append(Claim(f"momentum helps {name(method)}", READ, *found))
    for grid, how in ((with_momentum, "the adaptive rate helps"), (without, "and without momentum")):
        for method, plain in (("amsgrad", "sgdm"), ("adasam", "sam")):
            text = f"{how}: {name(method)} is above {name(plain)}"
            out.append(Claim(text, READ, *_compare((grid, method), (grid, plain), choices)))
    return corrected(out + _speed_ups(sizes))


def _compare(one: Side, other: Side, choices: Choices) -> tuple[str, str, Difference]:
    """Verdict, number and difference of the averages over the tasks of both sides, except the `_excluded`."""
    common = [task for task in one[0].tasks if task in other[0].tasks]
    chosen = {task: [choices.get((grid.sweep, task, method)) for grid, method in (one, other)] for task in common}
    excluded = _excluded(one, other, chosen)
    tasks = [task for task in common if not any(task in found for found in excluded.values())]
    difference = Difference.between(*(grid.only(tasks).average(method) for grid, method in (one, other)))
    without = "".join(f"; left out, as {why}: {shown(found)}" for why, found in excluded.items() if found)
    if not difference.values:
        return UNKNOWN, f"no pairs of runs{without}", difference
    notes = [c.edge for task in tasks for c in chosen[task] if c is not None and c.edge]
    number = f"{difference}; {shown(tasks)}, {counted(len(difference.values), 'pair')}{without}"
    return difference.verdict(), "; ".join([number, *dict.fromkeys(notes)]), difference


def _excluded(one: Side, other: Side, chosen: Mapping[str, Sequence[Choice | None]]) -> dict[str, list[str]]:
    """Reason to leave a task out → the tasks that it applies to."""
    tie: list[str] = []
    unfair: list[str] = []
    untried: list[str] = []
    for task, (mine, theirs) in chosen.items():
        sides = ((mine, one, other), (theirs, other, one))
        if any(c is not None and c.tie and _has_not_won(task, side, against) for c, side, against in sides):
            tie.append(task)
        if mine is not None and theirs is not None and mine.budget != theirs.budget:
            unfair.append(task)
        if any(c is not None and c.untried for c in (mine, theirs)):
            untried.append(task)
    return {
        "all trials of one tie": tie,
        "one had more trials": unfair,
        "one was run with what no trial had": untried,
    }


def _has_not_won(task: str, side: Side, against: Side) -> bool:
    found = Difference.between(*(grid.values(task, method) for grid, method in (side, against)))
    return not found.mean > 0


def _most_tasks(grid: Grid, choices: Choices) -> tuple[str, str]:
    verdicts = []
    for task in grid.tasks:
        alone = grid.only([task])
        verdicts.append(_compare((alone, "adasam"), (alone, "amsgrad"), choices)[0])
    count = {v: verdicts.count(v) for v in (CONFIRMED, DENIED)}
    number = f"{count[CONFIRMED]} of {counted(len(verdicts), 'task')} confirmed, {count[DENIED]} not"
    if len(verdicts) < 3:
        return UNKNOWN, f"{number}; needs three tasks"
    if count[CONFIRMED] > len(verdicts) / 2:
        return CONFIRMED, number
    return (DENIED if count[DENIED] >= len(verdicts) / 2 else UNKNOWN), number


def _speed_ups(sizes: Sequence[Record]) -> list[Claim]:
    out = []
    for task in sorted({r["axes"]["task_name"] for r in sizes}):
        found = [SpeedUp.of([r for r in sizes if r["axes"]["task_name"] == task], share) for share in LEVELS]
        verdicts = {speed_up.verdict for speed_up in found}
        verdict = verdicts.pop() if len(verdicts) == 1 else UNKNOWN
        text = f"iterations to a loss level fall as 1/b ({task.upper()}: exponent -1)"
        out.append(Claim(text, READ, verdict, "; ".join(map(str, found))))
    return out


def corrected(made: list[Claim]) -> list[Claim]:
    """Give claims that a t test decides Holm's p and, where it cannot tell, the difference that the test detects."""
    tests = [c.difference.p if c.difference is not None else math.nan for c in made]
    count = sum(not math.isnan(p) for p in tests)
    for claim, p in zip(made, holm(tests), strict=True):
        if not math.isnan(p) and claim.difference is not None:
            claim.verdict = claim.difference.verdict(p=p)
            claim.number += f"; Holm's p = {p:.3f}"
            if claim.verdict == UNKNOWN:
                claim.number += f"; with a power of 80 %, {claim.difference.sight(comparisons=count)}"
    return made
