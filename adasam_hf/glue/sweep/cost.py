"""How long the runs take that are not finished, how large their checkpoints are, and the plan of a dry run."""

import heapq
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from ..data import resolve_path
from .records import load
from .run import Run, parse_run

TRAIN_ROWS = {  # of GLUE
    "cola": 8551,
    "sst2": 67349,
    "mrpc": 3668,
    "stsb": 5749,
    "qqp": 363846,
    "mnli": 392702,
    "qnli": 104743,
    "rte": 2490,
    "wnli": 635,
}
OVERHEAD = 20.0  # seconds of a run that do not depend on its rows: imports, loading, evaluation
STATES = {"adasam": 3, "amsgrad": 3, "sgdm": 1, "sam": 1}  # copies of the weights in an optimizer; of the others two


class Size(NamedTuple):
    """Of a model."""

    parameters: int
    hidden: int
    layers: int


KNOWN = {"roberta-large": Size(355_361_794, 1024, 24), "roberta-base": Size(124_647_170, 768, 12)}
"""Of models that need not be fetched for a dry run."""


def work(run: Run) -> float:
    """Rows that pass through the model, forward and backward."""
    _, data_args, args = parse_run(run.words)
    rows = data_args.max_train_samples or TRAIN_ROWS.get(data_args.task_name or "")
    if args.max_steps >= 0:
        seen = float(args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps)
    elif rows is None:
        raise ValueError(
            f"{run.sweep}: {run.axes['task_name']} has no max_train_samples; its rows are not known: set it"
        )
    else:
        seen = rows * args.num_train_epochs
    return seen * (2 if args.resolved_rho > 0 else 1)


def hours(seconds: Sequence[float | None]) -> float | None:
    """The sum in hours, if all are known."""
    known = [value for value in seconds if value is not None]
    return sum(known) / 3600 if len(known) == len(seconds) else None


def accelerators() -> list[str]:
    """The names of this machine's, as records have them."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def estimate(runs: Sequence[Run]) -> dict[Run, float | None]:
    """Seconds of each run, from those that have finished on the same accelerators, or on none as here: their time for
    each row, of the same task if there is one."""
    here = accelerators()
    speeds: dict[str, list[float]] = {}
    for folder in {run.record.parents[2 if run.trial else 1] for run in runs}:  # all sweeps of the output_dir
        for path in folder.glob("**/*.json"):
            record = load(path)
            same = record.get("hardware", {}).get("accelerators", here) == here
            if record["seconds_per_row"] is not None and same:
                speeds.setdefault(record["axes"]["task_name"], []).append(record["seconds_per_row"])
    anything = [speed for found in speeds.values() for speed in found]
    known = {run: speeds.get(run.axes["task_name"], anything) for run in runs}
    return {run: OVERHEAD + work(run) * statistics.median(found) if found else None for run, found in known.items()}


class OutOfTime(Exception):
    """A run does not fit into the budget any more, or has not come to its end in it."""


class Budget:
    """So many minutes from `start` on, an instant of `time.monotonic`; from now on by default.

    A run whose time is known begins only if it can end in time; of one whose time is not known, the longest that any
    has taken so far stands for it.
    """

    def __init__(self, minutes: float, start: float | None = None) -> None:
        self.deadline = (time.monotonic() if start is None else start) + 60 * minutes
        self._longest = 0.0

    @property
    def rest(self) -> float:
        """Seconds that are still there, at least 0."""
        return max(0.0, self.deadline - time.monotonic())

    def check(self, run: Run, seconds: float | None) -> None:
        """
        Raises:
            OutOfTime: if the run is not to begin any more.
        """
        if self.rest <= (self._longest if seconds is None else seconds):
            raise OutOfTime(run.name)

    def note(self, seconds: float) -> None:
        """A run has taken so long."""
        self._longest = max(self._longest, seconds)


def fitting(runs: Sequence[Run], jobs: int, minutes: float) -> int | None:
    """How many of the runs, begun in their order on so many jobs, end in time; None if times are not known."""
    seconds = list(estimate(runs).values())
    ends = [0.0] * jobs
    count = 0
    for spent in seconds:
        if spent is None:
            return None
        if ends[0] + spent <= 60 * minutes:
            count += 1
            heapq.heapreplace(ends, ends[0] + spent)
    return count


@cache
def parameters(name: str) -> int | None:
    """Of a model; not known of one that is neither here nor to be had."""
    if name in KNOWN:
        return KNOWN[name].parameters
    try:
        config = AutoConfig.from_pretrained(resolve_path(name))
        with torch.device("meta"):
            return int(AutoModelForSequenceClassification.from_config(config).num_parameters())
    except (OSError, ValueError):
        return None


def checkpoint_size(run: Run) -> float | None:
    """Bytes of a checkpoint: weights and optimizer state in float32; 0 if the run saves none."""
    model_args, _, args = parse_run(run.words)
    if args.save_strategy == "no":
        return 0.0
    count = parameters(model_args.model_name_or_path)
    return None if count is None else 4.0 * count * (1 + STATES.get(args.optim, 2))


def cost(runs: Sequence[Run]) -> str:
    """In words: rows, time and the size of a checkpoint, of the runs that are not finished."""
    total, size = hours(list(estimate(runs).values())), checkpoint_size(runs[0])
    time = "? h" if total is None else f"{total:.1f} h"
    disk = "? GB" if size is None else f"{size / 1e9:.1f} GB"
    return f"{sum(map(work, runs)) / 1e6:.2f} M rows, {time}, {disk} a checkpoint"


def show(title: str, runs: Sequence[Run], jobs: int | None, settled: Callable[[str, str], bool]) -> None:
    """The plan: what is done and what remains, by task and method, and what that costs. Without `jobs` the time is that
    of all runs."""
    remaining = [run for run in runs if not run.finished]
    total = hours(list(estimate(remaining).values()))
    time = "none" if not remaining else "unknown until a first run has finished"
    if remaining and total is not None:
        how = f"with {jobs} at once" if jobs else "over the runs that the cluster does at once"
        time = f"about {total / (jobs or 1):.1f} hours {how}"
    print(f"{title}: {len(runs)} runs, {len(runs) - len(remaining)} finished; time left: {time}")
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.axes["task_name"], run.axes["method"]), []).append(run)
    width, wide = (
        1 + max(map(len, column), default=0) for column in (zip(*groups, strict=True) if groups else ((), ()))
    )
    largest = 0.0
    for (task, method), mine in groups.items():
        words = " ".join(mine[0].words) + ("" if settled(task, method) else " (a trial's; to be chosen)")
        rest = [run for run in mine if not run.finished]
        costs = f"{cost(rest)}  " if rest else ""
        largest = max([largest, *(checkpoint_size(run) or 0.0 for run in rest[:1])])
        print(f"  {task:<{max(width, 6)}}{method:<{max(wide, 9)}}{len(mine) - len(rest)}/{len(mine)}  {costs}{words}")
    if largest:  # the newest is written before the one before is deleted
        print(f"  disk: 2 checkpoints of each run at work, at most {2 * (jobs or 1) * largest / 1e9:.1f} GB")
