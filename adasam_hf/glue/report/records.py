"""Read the records of sweeps, and arrange their numbers by task, method and seed."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from .. import tasks as glue
from .wording import in_order, name

Record: TypeAlias = dict[str, Any]
BATCH = "per_device_train_batch_size"
Place: TypeAlias = tuple[str, str, str, tuple[tuple[str, float], ...]]
"""Sweep, task, method and point of the grid."""


def read(folder: Path) -> tuple[list[Record], list[Record]]:
    """All runs, and all trials, with records in `folder`."""
    records = [load(path) for path in sorted(folder.glob("records/**/*.json"))]
    if not records:
        raise ValueError(f"{folder}/records has no records; make some with adasam sweep")
    return [r for r in records if r["trial"] is None], [r for r in records if r["trial"] is not None]


def load(path: Path) -> Record:
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        record["trial"], record["sweep"], score(record), record["arguments"]["learning_rate"], record["log_history"]
        record["axes"]["method"], record["axes"]["seed"], record["metrics"]["train_runtime"], record["attempts"]
        record["commit"], record["dirty"], record["versions"].items(), record["hardware"]["accelerators"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a record of a run ({error!r}); delete it") from None
    return record


def score(record: Record) -> float:
    """The task's score, times 100; NaN for a run that has diverged (with NaN weights, accuracy would be that of always
    predicting the first class)."""
    found = 100 * glue.score(record["axes"]["task_name"], record["metrics"])
    return found if math.isfinite(record["metrics"]["eval_loss"]) else math.nan


def cross_entropy(record: Record) -> float:
    """On the evaluation rows. Older records have only the loss, which is the same without label smoothing."""
    return float(record["metrics"].get("eval_cross_entropy", record["metrics"]["eval_loss"]))


def calibration(record: Record) -> float:
    """Expected calibration error, times 100."""
    return 100 * float(record["metrics"].get("eval_calibration_error", math.nan))


def gap(record: Record) -> float:
    return float(record["metrics"].get("final_sam_gap", math.nan))


QUANTITIES = (
    ("score × 100", score, 2),
    ("cross-entropy", cross_entropy, 3),
    ("calibration error × 100", calibration, 2),
)

# All runs of a task and method must agree on these; a table could not tell apart runs that differ.
SAME = (
    *("learning_rate", "sam_rho", "num_train_epochs", "max_steps", "max_train_samples", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "model_name_or_path", "init_from", "optim", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "sgd_momentum", "weight_decay", "max_grad_norm", "max_seq_length", "warmup_steps", "bf16"),
    *("lr_scheduler_type", "label_smoothing_factor", "label_noise", "held_out_samples"),
)


@dataclass
class Grid:
    """The runs of one sweep by task, method and seed."""

    sweep: str
    runs: dict[tuple[str, str, int], Record]

    @classmethod
    def of(cls, runs: Sequence[Record], sweep: str) -> "Grid":
        """
        Raises:
            ValueError: if two runs share a task, method and seed, or runs of a task and method differ in arguments.
        """
        found: dict[tuple[str, str, int], Record] = {}
        cells: dict[tuple[str, str], tuple[Any, ...]] = {}
        for run in runs:
            if run["sweep"] != sweep:
                continue
            axes, arguments = run["axes"], tuple(run["arguments"].get(key) for key in SAME)
            cell = axes["task_name"], axes["method"]
            if (*cell, axes["seed"]) in found:
                raise ValueError(
                    f"{sweep} has two runs of {cell} with seed {axes['seed']}; its axes are {sorted(axes)}"
                )
            if cells.setdefault(cell, arguments) != arguments:
                pairs = zip(SAME, arguments, cells[cell], strict=True)
                other = "; ".join(f"{key}: {one!r} and {two!r}" for key, one, two in pairs if one != two)
                raise ValueError(f"{sweep} has runs of {cell} that differ in {other}; move the older ones away")
            found[*cell, axes["seed"]] = run
        return cls(sweep, found)

    def _seen(self, index: int) -> list[Any]:
        return list(dict.fromkeys(key[index] for key in self.runs))

    @property
    def tasks(self) -> list[str]:
        return sorted(self._seen(0))

    @property
    def methods(self) -> list[str]:
        return in_order(self._seen(1))

    def only(self, tasks: Iterable[str]) -> "Grid":
        return Grid(self.sweep, {key: run for key, run in self.runs.items() if key[0] in set(tasks)})

    def values(self, task: str, method: str, value: Callable[[Record], Any] = score) -> dict[int, Any]:
        """Seed → value."""
        return {s: value(r) for (t, m, s), r in sorted(self.runs.items()) if (t, m) == (task, method)}

    def average(self, method: str, value: Callable[[Record], float] = score) -> dict[int, float]:
        """Seed → mean over the tasks, for seeds that have every task."""
        columns = [self.values(task, method, value) for task in self.tasks]
        seeds = set.intersection(*(set(column) for column in columns)) if columns else set()
        return {seed: statistics.mean(column[seed] for column in columns) for seed in sorted(seeds)}


def labelled(runs: Sequence[Record], sweep: str) -> Grid:
    """The sweep's runs, with the values of any further axes in the method's name."""
    out = []
    for run in runs:
        if run["sweep"] == sweep:
            axes = run["axes"]
            more = [f"{k} = {v}" for k, v in axes.items() if k not in ("task_name", "method", "seed")]
            out.append(run | {"axes": axes | {"method": ", ".join([name(axes["method"]), *more])}})
    return Grid.of(out, sweep)


def points(trials: Iterable[Record]) -> dict[Place, dict[int, Record]]:
    """Sweep, task, method and point of the grid → seed → trial."""
    out: dict[Place, dict[int, Record]] = {}
    for t in trials:
        point = tuple((k, float(v)) for k, v in t["trial"].items())
        out.setdefault((t["sweep"], t["axes"]["task_name"], t["axes"]["method"], point), {})[t["axes"]["seed"]] = t
    return out
