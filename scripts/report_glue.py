#!/usr/bin/env python
"""The report on the records of scripts/sweep_glue.py: tables, pictures, and a verdict on each claim of the paper.

    python scripts/report_glue.py results/small

reads results/small/records and nothing else, and writes results/small/REPORT.md and the pictures beside it.

A verdict follows from a rule, at the 95 % level, over seeds (a run of one method and a run of another with the same
seed make a pair):

* a difference is confirmed if the paired t test says so with the paper's sign, not confirmed if it says so with the
  other sign, and otherwise the runs cannot tell; p is Holm's, over all differences among the claims. A task on which
  all trials of a method tie, so that nothing was chosen for it, is left out where that method has not won;
* "on most tasks" is confirmed if on more than half of at least three tasks the difference is, not confirmed if on half
  of them or more it is not confirmed, and otherwise the runs cannot tell;
* the linear speed-up is confirmed if, at each of three levels of the loss, all below that of the best constant answer,
  the whole interval of the exponent (Student's t) is within 0.25 of -1, not confirmed if at each the whole of it is
  farther away.

Tasks on which one of two methods had more trials than the other, or was run with what none of its trials had, decide
nothing between them. Runs of one cell with other arguments are refused. Sweeps with names of their own have tables of
score, loss and calibration.

A run whose loss on the evaluation rows is no number has diverged: it has no score, and no pair.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from adasam_hf.glue import tasks as glue
from adasam_hf.glue.metrics import merged
from adasam_hf.glue.power import pairs_for, visible_gain
from adasam_hf.glue.tasks import get_task

matplotlib.use("Agg")
from matplotlib import pyplot

NAMES = {"sgdm": "SGD", "sam": "SAM", "amsgrad": "AMSGrad", "adasam": "AdaSAM", "adamw": "AdamW"}
PAPER = ("sgdm", "sam", "amsgrad", "adasam")
SAMPLES = 10_000  # of the bootstrap
WINDOW = 256  # training rows over which a loss curve is averaged
NEAR = 0.25  # of the exponent to -1
CONFIRMED, DENIED, UNKNOWN = "confirmed here", "not confirmed here", "cannot tell from these runs"


# ---- records ----


def read(folder: Path) -> tuple[list[dict], list[dict]]:
    """Runs and trials."""
    records = [load(path) for path in sorted(folder.glob("records/**/*.json"))]
    if not records:
        raise ValueError(f"{folder}/records has no records; make some with scripts/sweep_glue.py")
    return [r for r in records if r["trial"] is None], [r for r in records if r["trial"] is not None]


def load(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["trial"], record["sweep"], score(record), record["arguments"]["learning_rate"], record["log_history"]
        record["axes"]["method"], record["axes"]["seed"], record["metrics"]["train_runtime"], record["attempts"]
        record["commit"], record["dirty"], record["versions"].items(), record["hardware"]["accelerators"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of scripts/sweep_glue.py ({error!r}); delete it") from None
    return record


def score(record: dict) -> float:
    """The task's number, times 100; not a number for a run that has diverged (of a model of NaN, accuracy is that of
    the first class)."""
    found = 100 * glue.score(record["axes"]["task_name"], record["metrics"])
    return found if math.isfinite(record["metrics"]["eval_loss"]) else math.nan


def name(method: str) -> str:
    return NAMES.get(method, method)


def in_order(methods: Iterable[str]) -> list[str]:
    """The paper's first, in its order."""
    known = list(NAMES)
    return sorted(set(methods), key=lambda m: (known.index(m) if m in NAMES else len(known), m))


def cross_entropy(record: dict) -> float:
    """Of the evaluation rows; of older records the loss, which is the same where labels were not smoothed."""
    return record["metrics"].get("eval_cross_entropy", record["metrics"]["eval_loss"])


def calibration(record: dict) -> float:
    """Expected calibration error, times 100."""
    return 100 * record["metrics"].get("eval_calibration_error", math.nan)


# Of a cell, all runs have the same; more of them could not be told apart in a table.
SAME = ("learning_rate", "sam_rho", "num_train_epochs", "max_steps", "max_train_samples", "per_device_train_batch_size")
SAME += ("gradient_accumulation_steps", "model_name_or_path", "init_from", "optim", "adam_beta1", "adam_beta2")
SAME += ("adam_epsilon", "sgd_momentum", "weight_decay", "max_grad_norm", "max_seq_length", "warmup_steps", "bf16")
SAME += ("lr_scheduler_type", "label_smoothing_factor", "label_noise", "held_out_samples")


@dataclass
class Grid:
    """The runs of one sweep by task, method and seed."""

    sweep: str
    runs: dict[tuple[str, str, int], dict]

    @classmethod
    def of(cls, runs: Sequence[dict], sweep: str) -> "Grid":
        """
        Raises:
            ValueError: if two runs have one place, or a task and method have runs of different arguments.
        """
        found: dict[tuple[str, str, int], dict] = {}
        cells: dict[tuple[str, str], tuple] = {}
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

    def _seen(self, index: int) -> list:
        return list(dict.fromkeys(key[index] for key in self.runs))

    @property
    def tasks(self) -> list[str]:
        return sorted(self._seen(0))

    @property
    def methods(self) -> list[str]:
        return in_order(self._seen(1))

    def only(self, tasks: Iterable[str]) -> "Grid":
        return Grid(self.sweep, {key: run for key, run in self.runs.items() if key[0] in set(tasks)})

    def values(self, task: str, method: str, value: Callable[[dict], Any] = score) -> dict[int, Any]:
        """Seed → value."""
        return {s: value(r) for (t, m, s), r in sorted(self.runs.items()) if (t, m) == (task, method)}

    def average(self, method: str, value: Callable[[dict], float] = score) -> dict[int, float]:
        """Seed → mean over the tasks, for seeds that have them all."""
        columns = [self.values(task, method, value) for task in self.tasks]
        seeds = set.intersection(*(set(column) for column in columns)) if columns else set()
        return {seed: statistics.mean(column[seed] for column in columns) for seed in sorted(seeds)}


# ---- statistics ----


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by resampling, percentiles. (Of five values it covers the mean in 83 % of cases.)"""
    values = np.asarray(values)
    picks = np.random.default_rng(0).integers(len(values), size=(SAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


@dataclass
class Difference:
    """Paired over seeds: mean, intervals of the bootstrap and of Student's t, p of the t test."""

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
        """Of no difference; not a number with fewer than two pairs, or if all are the same: no test can judge that."""
        if len({round(value, 9) for value in self.values}) < 2:  # 1/277 more by five sums is not five times the same
            return math.nan
        return float(stats.ttest_1samp(self.values, 0.0).pvalue)

    def verdict(self, sign: int = 1, p: float | None = None) -> str:
        """With `p` instead of the test's own, if several tests are made."""
        p = self.p if p is None else p
        if math.isnan(p) or p >= 0.05:
            return UNKNOWN
        return CONFIRMED if self.mean * sign > 0 else DENIED

    def sight(self, gain: float | None = None, comparisons: int = 1) -> str:
        """What so many pairs can see with a power of 80 %, and the pairs that a gain would take."""
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
    """p by Holm's correction for so many tests; those that are no numbers stay so, and do not count."""
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    out, highest = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, (len(order) - rank) * ps[i])
        out[i] = min(highest, 1.0)
    return out


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of Student's 95 % interval."""
    if len(values) < 2:
        return statistics.mean(values), math.inf
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)


# ---- loss curves ----


def losses(record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and the training loss (at w), each averaged over WINDOW rows: those of the window's middle. Empty if
    no loss was logged.

    (A mean over the last rows would come about WINDOW/2b iterations late, in proportion to 1/b, and so look like a
    linear speed-up.)
    """
    entries = [(e["step"], float(e["loss"])) for e in record["log_history"] if "loss" in e]
    if not entries:
        return np.array([]), np.array([])
    steps, raw = (np.array(column, dtype=float) for column in zip(*entries, strict=True))
    size = record["axes"].get(BATCH, record["arguments"][BATCH])
    every = steps[0]  # iterations of which an entry is the mean
    width = max(1, min(len(raw), round(WINDOW / (size * every))))
    kernel = np.full(width, 1 / width)
    return np.convolve(steps - (every - 1) / 2, kernel, "valid"), np.convolve(raw, kernel, "valid")


BATCH = "per_device_train_batch_size"


LEVELS = (0.25, 0.5, 0.75)


def level_of(curves: Sequence[np.ndarray], share: float, constant: float = math.inf) -> float:
    """Of averaged losses: this share of the way to the lowest that all of them reach, from where the runs begin or
    from the loss of the best constant answer, if that is lower. Not a number if not all get below it."""
    begin = min(statistics.mean(float(curve[0]) for curve in curves), constant)
    reached = max(float(curve.min()) for curve in curves)
    return begin + share * (reached - begin) if reached < begin else math.nan


def constant_loss(runs: Sequence[dict]) -> float:
    """The training loss of the best constant answer, as the runs have recorded it; not a number if one has not."""
    return max((r["metrics"].get("train_constant_loss", math.nan) for r in runs), default=math.nan, key=_nan_first)


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value


def iterations_to(steps: np.ndarray, curve: np.ndarray, level: float) -> float:
    """The first iteration at or below the level, between two by interpolation. Not a number if the curve begins there
    (what is seen then is the window's middle, which is ∝ 1/b), or never gets there."""
    below = np.flatnonzero(curve <= level)
    if not len(below) or below[0] == 0:
        return math.nan
    i = int(below[0])
    share = (curve[i - 1] - level) / (curve[i - 1] - curve[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


@dataclass
class SpeedUp:
    """Of one task's runs, at one level: seed → b → iterations, and the slope of log iterations on log b for each seed
    that got there at every b, of three or more."""

    level: float
    found: dict[int, dict[int, float]]
    learned: bool = True  # whether the level is known to be below the loss of a constant answer

    @classmethod
    def of(cls, runs: Sequence[dict], share: float = 0.5) -> "SpeedUp":
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


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


# ---- tables ----


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def spread(values: dict[int, float], digits: int = 2, full: int = 0) -> str:
    """Mean ± standard deviation [interval of the mean], how many have diverged, how many seeds, if not `full`."""
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


def table(grid: Grid, value: Callable[[dict], float] = score, digits: int = 2) -> str:
    """Methods × tasks and their average: mean ± standard deviation over seeds."""
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
    """Every metric of the tasks that have more than one number, mean ± standard deviation over seeds."""
    columns = []
    for task in (get_task(task) for task in grid.tasks if task in glue.TASKS):
        names = [f"{metric}{suffix}" for _, suffix in task.evaluations for metric in task.metrics]
        columns += [(task.name, name) for name in names if len(names) > 1]
    rows = [
        [name(m), *(spread(grid.values(t, m, lambda r, n=n: 100 * r["metrics"][f"eval_{n}"])) for t, n in columns)]
        for m in grid.methods
    ]
    return markdown(["", *(f"{task.upper()} {name}" for task, name in columns)], rows) if columns else ""


def differences(grid: Grid, one: str, other: str) -> str:
    """Task by task and on average: mean difference, its bootstrap interval and p."""
    cells = [str(Difference.between(grid.values(t, one), grid.values(t, other))) for t in grid.tasks]
    cells.append(str(Difference.between(grid.average(one), grid.average(other))))
    return markdown(["", *(t.upper() for t in grid.tasks), "average"], [[f"{name(one)} – {name(other)}", *cells]])


# ---- pictures ----


def save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def together(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Curves of the same steps, cut to the shortest: steps, and run × step. Without those of runs that log none."""
    curves = [(steps, values) for steps, values in curves if len(steps)]
    if not curves:
        return np.array([]), np.empty((1, 0))
    length = min(len(steps) for steps, _ in curves)
    return curves[0][0][:length], np.array([values[:length] for _, values in curves])


def plot_losses(grid: Grid, path: Path) -> None:
    """Training loss against iterations, one panel for each task: mean and standard deviation over seeds."""
    figure, axes = pyplot.subplots(1, len(grid.tasks), figsize=(3.6 * len(grid.tasks), 3.2), squeeze=False)
    for axis, task in zip(axes[0], grid.tasks, strict=True):
        for method in grid.methods:
            curves = [losses(r) for (t, m, _), r in grid.runs.items() if (t, m) == (task, method)]
            if curves:
                steps, stacked = together(curves)
                mean, deviation = stacked.mean(axis=0), stacked.std(axis=0)
                (line,) = axis.plot(steps, mean, label=name(method))
                axis.fill_between(steps, mean - deviation, mean + deviation, alpha=0.15, color=line.get_color())
        axis.set_title(task.upper())
        axis.set_xlabel("iteration")
    axes[0][0].set_ylabel("training loss")
    axes[0][0].legend()
    save(figure, path)


def plot_batch_sizes(runs: Sequence[dict], path: Path) -> None:
    """Above: loss against iterations for each b. Below: iterations to the level against b."""
    tasks = sorted({r["axes"]["task_name"] for r in runs})
    figure, axes = pyplot.subplots(2, len(tasks), figsize=(4.2 * len(tasks), 6), squeeze=False)
    for column, task in enumerate(tasks):
        mine = [r for r in runs if r["axes"]["task_name"] == task]
        middle = SpeedUp.of(mine)
        level, found = middle.level, middle.found
        for size in sorted({r["axes"][BATCH] for r in mine}):
            steps, stacked = together([losses(r) for r in mine if r["axes"][BATCH] == size])
            axes[0][column].plot(steps, stacked.mean(axis=0), label=f"b = {size}")
        axes[0][column].axhline(level, linestyle="--", color="gray")
        axes[0][column].set(title=task.upper(), xlabel="iteration", ylabel="training loss")
        if not math.isnan(level):
            axes[0][column].set_xscale("log")
        axes[0][column].legend()
        for sizes in found.values():
            axes[1][column].plot(list(sizes), list(sizes.values()), "o", color="tab:blue", alpha=0.5)
        sizes = sorted({size for values in found.values() for size in values})
        there = [values[sizes[0]] for values in found.values() if values.get(sizes[0], math.nan) > 0] if sizes else []
        if there:
            start = statistics.geometric_mean(there)
            axes[1][column].plot(sizes, [start * sizes[0] / size for size in sizes], "--", color="gray", label="∝ 1/b")
            axes[1][column].legend()
            axes[1][column].set(xscale="log", yscale="log")
        axes[1][column].set(xlabel="batch size b", ylabel="iterations to the level")
    save(figure, path)


def plot_radii(trials: Sequence[dict], runs: Sequence[dict], path: Path) -> None:
    """Score against the radius. Above: trials (one seed, held-out rows), a line for each rate; radius 0 is AMSGrad or
    SGD. Below, if the sweep `radius` has run: its seeds' mean and standard deviation on the validation set."""
    tasks = sorted({r["axes"]["task_name"] for r in [*trials, *runs]})
    figure, axes = pyplot.subplots(
        1 + bool(runs), len(tasks), figsize=(3.6 * len(tasks), 3 + 3 * bool(runs)), squeeze=False
    )
    for column, task in enumerate(tasks):
        for (method, plain), mark in zip((("adasam", "amsgrad"), ("sam", "sgdm")), "os", strict=True):
            lines: dict[float, dict[float, float]] = {}
            for record in trials:
                if record["axes"]["task_name"] == task and record["axes"]["method"] in (method, plain):
                    arguments = record["arguments"]
                    lines.setdefault(arguments["learning_rate"], {})[arguments["sam_rho"] or 0.0] = score(record)
            for rate, line in sorted(lines.items()):
                if len(line) > 1:  # rates that were tried at more than one radius
                    x = sorted(line)
                    axes[0][column].plot(x, [line[r] for r in x], f"{mark}-", label=f"{name(method)}, rate {rate:g}")
            found: dict[float, list[float]] = {}
            for record in runs:
                if record["axes"]["task_name"] == task and record["axes"]["method"] == method:
                    found.setdefault(float(record["axes"]["sam_rho"]), []).append(score(record))
            if found:
                x = sorted(found)
                deviations = [np.std(found[r], ddof=1) if len(found[r]) > 1 else 0.0 for r in x]
                axes[1][column].set_ylabel("score on the validation set")
                axes[1][column].errorbar(x, [np.mean(found[r]) for r in x], deviations, capsize=3, label=name(method))
        if runs and not any(r["axes"]["task_name"] == task for r in runs):
            axes[1][column].remove()
        for axis in axes[: 1 + any(r["axes"]["task_name"] == task for r in runs), column]:
            axis.set_xscale("symlog", linthresh=1e-3)
            axis.set(title=task.upper(), xlabel="radius")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=7)
    axes[0][0].set_ylabel("score on held-out rows")
    save(figure, path)


# ---- what the trials chose ----


@dataclass
class Choice:
    """The trials of one sweep, task and method, each with its score, and the one that the runs have taken."""

    sweep: str
    task: str
    method: str
    trials: list[tuple[dict[str, float], float]]  # points and their means over the trials' seeds
    taken: dict[str, float]
    single: list[list[float]] = field(default_factory=list)  # the same for each seed alone

    @property
    def budget(self) -> tuple[int, int]:
        """Points, and the seeds of each."""
        return len(self.trials), len(self.single)

    @property
    def untried(self) -> bool:
        """Whether no trial had what the runs have."""
        return self.taken not in [point for point, _ in self.trials]

    @property
    def otherwise(self) -> str:
        """How often one seed alone would have chosen another point: what a choice by a single trial is worth."""
        if len(self.single) < 2:
            return ""
        best = max(range(len(self.trials)), key=lambda i: self.trials[i][1])
        other = sum(scores[best] < max(scores) for scores in self.single)
        return f"{other} of {len(self.single)} seeds alone would have chosen otherwise"

    @property
    def tie(self) -> bool:
        """Whether the scores chose nothing."""
        return len(self.trials) > 1 and len({value for _, value in self.trials}) == 1

    @property
    def edge(self) -> str:
        """Whether a wider grid might have had a better one."""
        found = []
        for key, value in self.taken.items():
            values = sorted({trial[key] for trial, _ in self.trials})
            if len(values) > 1 and value in (values[0], values[-1]) and value != 0:  # nothing is below 0
                found.append(f"{'lowest' if value == values[0] else 'highest'} {SHORT.get(key, key)}")
        return f"{name(self.method)} on {self.task.upper()}: its grid's {' and '.join(found)}" if found else ""

    @staticmethod
    def label(trial: dict[str, float]) -> str:
        return " / ".join(f"{value:g}" for value in trial.values())


SHORT = {"learning_rate": "rate", "sam_rho": "radius"}


def points(trials: Iterable[dict]) -> dict[tuple, dict[int, dict]]:
    """Trials by sweep, task, method and point of the grid: seed → record."""
    out: dict[tuple, dict[int, dict]] = {}
    for t in trials:
        point = tuple((k, float(v)) for k, v in t["trial"].items())
        out.setdefault((t["sweep"], t["axes"]["task_name"], t["axes"]["method"], point), {})[t["axes"]["seed"]] = t
    return out


def choices(runs: Sequence[dict], trials: Sequence[dict]) -> list[Choice]:
    """By sweep, task and method, of those that have run and had trials of their own."""
    found: dict[tuple, list[tuple[dict, dict[int, dict]]]] = {}
    for (*place, point), seeds in points(trials).items():
        found.setdefault(tuple(place), []).append((dict(point), seeds))
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


# ---- verdicts ----


@dataclass
class Claim:
    """What the paper says, how that is known, and what these runs say."""

    text: str
    known: str
    verdict: str
    number: str
    difference: Difference | None = None  # if a t test of it decides


def claims(with_momentum: Grid, without: Grid, sizes: Sequence[dict], choices: Sequence[Choice] = ()) -> list[Claim]:
    """A verdict on each claim of the paper."""
    read, remembered = "read", "remembered, not re-read"
    of = {(c.sweep, c.task, c.method): c for c in choices}

    def has_not_won(task: str, tying: tuple[Grid, str], other: tuple[Grid, str]) -> bool:
        found = Difference.between(*(grid.values(task, method) for grid, method in (tying, other)))
        return not found.mean > 0

    def compare(one: tuple[Grid, str], other: tuple[Grid, str]) -> tuple[str, str, Difference]:
        """Of the averages over the tasks that both have, without those where a method for which nothing was chosen has
        not won."""
        common = [task for task in one[0].tasks if task in other[0].tasks]
        chosen = {task: [of.get((grid.sweep, task, method)) for grid, method in (one, other)] for task in common}
        tied = [
            task
            for task in common
            for c, mine, theirs in zip(chosen[task], (one, other), (other, one), strict=True)
            if c is not None and c.tie and has_not_won(task, mine, theirs)
        ]
        tied = list(dict.fromkeys(tied))
        unfair = [task for task, (a, b) in chosen.items() if a is not None and b is not None and a.budget != b.budget]
        untried = [task for task, found in chosen.items() if any(c is not None and c.untried for c in found)]
        tasks = [task for task in common if task not in [*tied, *unfair, *untried]]
        found = Difference.between(*(grid.only(tasks).average(method) for grid, method in (one, other)))
        left_out = f"; left out, as all trials of one tie: {shown(tied)}" if tied else ""
        left_out += f"; left out, as one had more trials: {shown(unfair)}" if unfair else ""
        left_out += f"; left out, as one was run with what no trial had: {shown(untried)}" if untried else ""
        if not found.values:
            return UNKNOWN, f"no pairs of runs{left_out}", found
        notes = [c.edge for task in tasks for c in chosen[task] if c is not None and c.edge]
        number = f"{found}; {shown(tasks)}, {counted(len(found.values), 'pair')}{left_out}"
        return found.verdict(), "; ".join([number, *dict.fromkeys(notes)]), found

    def most() -> tuple[str, str]:
        verdicts = [
            compare((one := with_momentum.only([t]), "adasam"), (one, "amsgrad"))[0] for t in with_momentum.tasks
        ]
        count = {v: verdicts.count(v) for v in (CONFIRMED, DENIED)}
        number = f"{count[CONFIRMED]} of {counted(len(verdicts), 'task')} confirmed, {count[DENIED]} not"
        if len(verdicts) < 3:
            return UNKNOWN, f"{number}; needs three tasks"
        if count[CONFIRMED] > len(verdicts) / 2:
            return CONFIRMED, number
        return (DENIED if count[DENIED] >= len(verdicts) / 2 else UNKNOWN), number

    out = [
        Claim("AdaSAM is better than AMSGrad on most tasks", f"“on most tasks”: {read}; 6 of 8: {remembered}", *most())
    ]
    for grid, text, known in (
        (with_momentum, "AdaSAM's average is above AMSGrad's", f"by 0.28: {remembered}"),
        (without, "the same without momentum", f"by 0.74: {remembered}"),
    ):
        out.append(Claim(text, known, *compare((grid, "adasam"), (grid, "amsgrad"))))
    for method in PAPER:
        out.append(Claim(f"momentum helps {name(method)}", read, *compare((with_momentum, method), (without, method))))
    for grid, how in ((with_momentum, "the adaptive rate helps"), (without, "and without momentum")):
        for method, plain in (("amsgrad", "sgdm"), ("adasam", "sam")):
            text = f"{how}: {name(method)} is above {name(plain)}"
            out.append(Claim(text, read, *compare((grid, method), (grid, plain))))
    for task in sorted({r["axes"]["task_name"] for r in sizes}):
        found = [SpeedUp.of([r for r in sizes if r["axes"]["task_name"] == task], share) for share in LEVELS]
        verdicts = {speed_up.verdict for speed_up in found}
        verdict = verdicts.pop() if len(verdicts) == 1 else UNKNOWN
        text = f"iterations to a loss level fall as 1/b ({task.upper()}: exponent -1)"
        out.append(Claim(text, read, verdict, "; ".join(map(str, found))))
    return corrected(out)


def corrected(made: list[Claim]) -> list[Claim]:
    """The claims with Holm's p over those that a t test decides, and, where it cannot tell, what the test can see."""
    tests = [c.difference.p if c.difference is not None else math.nan for c in made]
    count = sum(not math.isnan(p) for p in tests)
    for claim, p in zip(made, holm(tests), strict=True):
        if not math.isnan(p) and claim.difference is not None:
            claim.verdict = claim.difference.verdict(p=p)
            claim.number += f"; Holm's p = {p:.3f}"
            if claim.verdict == UNKNOWN:
                claim.number += f"; with a power of 80 %, {claim.difference.sight(comparisons=count)}"
    return made


def shown(tasks: Iterable[str]) -> str:
    return ", ".join(task.upper() for task in tasks)


# ---- the page ----


def gap(record: dict) -> float:
    return record["metrics"].get("final_sam_gap", math.nan)


def chosen(choices: Sequence[Choice]) -> str:
    rows = []
    for c in choices:
        tried = ", ".join(f"{c.label(trial)}: {value:.1f}" for trial, value in c.trials)
        note = "; ".join(
            filter(None, ["all tie" if c.tie else c.edge, "no trial had it" if c.untried else "", c.otherwise])
        )
        rows.append([c.sweep, c.task.upper(), name(c.method), c.label(c.taken), tried, note])
    return markdown(["sweep", "task", "method", "chosen", "score of each trial", "note"], rows)


def measured_at(runs: Sequence[dict]) -> str:
    return ", ".join(sorted({f"{r['arguments']['measure_gap']:g}" for r in runs if r["arguments"].get("measure_gap")}))


def origin(records: Sequence[dict]) -> str:
    """Commits, versions and machines."""

    def unique(values) -> str:
        return ", ".join(sorted({str(v) for v in values}))

    commits = unique((r["commit"] or "unknown")[:12] + (" (with changes)" if r["dirty"] else "") for r in records)
    packages = sorted({package for r in records for package in r["versions"]})
    versions = "; ".join(f"{p} {unique(r['versions'][p] for r in records if p in r['versions'])}" for p in packages)
    machines = unique(", ".join(r["hardware"]["accelerators"]) or f"{r['hardware']['cpus']} CPU cores" for r in records)
    hours = sum(r["metrics"]["train_runtime"] for r in records) / 3600  # of resumed runs, the last part
    again = sum(r["attempts"] > 1 for r in records)
    return (
        f"{len(records)} runs, {hours:.1f} hours of training in all; {again} of them needed a second attempt. "
        f"Commit: {commits}. Versions: {versions}. Machine: {machines}."
    )


def labelled(runs: Sequence[dict], sweep: str) -> Grid:
    """The sweep's runs with what is on further axes in the method's name."""
    out = []
    for run in runs:
        if run["sweep"] == sweep:
            axes = run["axes"]
            more = [f"{k} = {v}" for k, v in axes.items() if k not in ("task_name", "method", "seed")]
            out.append(run | {"axes": axes | {"method": ", ".join([name(axes["method"]), *more])}})
    return Grid.of(out, sweep)


QUANTITIES = (
    ("score × 100", score, 2),
    ("cross-entropy", cross_entropy, 3),
    ("calibration error × 100", calibration, 2),
)


@dataclass
class Row:
    """One difference of a sweep with a name of its own."""

    pair: str
    task: str
    quantity: str
    difference: Difference
    p: float = math.nan  # Holm's, over the rows of the same pair of methods
    family: int = 0  # how many tests those are

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
    """Every method beside AMSGrad (or, without that, the first one), and AdaSAM beside every other."""
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


def own_section(sweep: str, runs: Sequence[dict], trials: Sequence[dict], folder: Path) -> list[str]:
    """Of a sweep with a name of its own: what it says in short, its runs, their differences, and its trials."""
    grid, mine = labelled(runs, sweep), [t for t in trials if t["sweep"] == sweep]
    parts = [f"## {sweep}"]
    if grid.runs:
        parts += run_parts(grid, folder)
    if mine:
        parts += trial_parts(sweep, mine, folder)
    return parts


def run_parts(grid: Grid, folder: Path) -> list[str]:
    rows = difference_rows(grid)
    short = [row.sentence for row in rows if row.pair == "AdaSAM – AMSGrad"]
    parts = ["\n".join(short), "Of the evaluation rows: mean ± standard deviation over seeds [interval by bootstrap]."]
    for what, value, digits in QUANTITIES:
        if any(not math.isnan(value(r)) for r in grid.runs.values()):
            parts += [f"{what[0].upper()}{what[1:]}:", table(grid, value, digits)]
    if rows:
        plot_differences(rows, folder / f"{grid.sweep}_differences.png")
        parts += [
            "Differences, paired by seed: mean ± half the 95 % interval of Student's t; p of the paired t test, "
            "and Holm's over the rows of the same two methods; what so many pairs see with a power of 80 %:",
            markdown(["", "task", "of", "difference", "pairs", "p", "Holm's p", "sight"], [row.cells for row in rows]),
            f"![differences with their intervals]({grid.sweep}_differences.png)",
        ]
    plot_losses(grid, folder / f"{grid.sweep}_loss.png")
    parts.append(f"![training loss against iterations]({grid.sweep}_loss.png)")
    if any(run["metrics"].get("eval_reliability") for run in grid.runs.values()):
        plot_reliability(grid, folder / f"{grid.sweep}_reliability.png")
        parts.append(f"![accuracy against confidence, over all seeds]({grid.sweep}_reliability.png)")
    return parts


def trial_parts(sweep: str, trials: Sequence[dict], folder: Path) -> list[str]:
    plot_rates(trials, folder / f"{sweep}.png")
    rows = []
    for (_, task, method, point), seeds in sorted(points(trials).items(), key=lambda item: item[0][1:]):
        cells = [spread({s: value(r) for s, r in seeds.items()}, digits) for _, value, digits in QUANTITIES]
        rows.append([task.upper(), name(method), Choice.label(dict(point)), str(len(seeds)), *cells])
    return [
        "Trials, on rows held out from training: mean ± standard deviation over the trials' seeds [bootstrap].",
        markdown(["task", "method", "rate / radius", "seeds", *(what for what, *_ in QUANTITIES)], rows),
        f"![score and cross-entropy of the trials against the rate]({sweep}.png)",
    ]


def plot_differences(rows: Sequence[Row], path: Path) -> None:
    """A forest plot: a panel for each quantity, a line for each task and pair of methods, Student's 95 % intervals."""
    panels = [[row for row in rows if row.quantity == what] for what, *_ in QUANTITIES]
    panels = [panel for panel in panels if panel]
    height = 1.2 + 0.3 * max(map(len, panels))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), height), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        found = [interval(row.difference.values) for row in panel]
        halves = [half if math.isfinite(half) else 0.0 for _, half in found]
        axis.errorbar([mean for mean, _ in found], range(len(panel)), xerr=halves, fmt="o", capsize=3)
        axis.axvline(0, color="gray", linestyle="--")
        axis.set_yticks(range(len(panel)), [f"{row.task}: {row.pair}" for row in panel], fontsize=7)
        axis.set(title=panel[0].quantity, ylim=(len(panel) - 0.5, -0.5))
    save(figure, path)


def plot_reliability(grid: Grid, path: Path) -> None:
    """Accuracy against confidence by bins, all seeds together: a panel for each task, a line for each method."""
    figure, axes = pyplot.subplots(1, len(grid.tasks), figsize=(4 * len(grid.tasks), 3.6), squeeze=False)
    for axis, task in zip(axes[0], grid.tasks, strict=True):
        axis.plot([0.5, 1], [0.5, 1], "--", color="gray")
        for method in grid.methods:
            runs = grid.values(task, method, lambda run: run["metrics"].get("eval_reliability") or []).values()
            means = merged(found for bins in runs for found in bins)
            axis.plot([f["confidence"] for f in means], [f["accuracy"] for f in means], "o-", label=method)
        axis.set(title=task.upper(), xlabel="confidence")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("accuracy")
    save(figure, path)


def plot_rates(trials: Sequence[dict], path: Path) -> None:
    """Score above and cross-entropy below against the rate: a line for each radius, means over the seeds that all the
    points of a task have (or, if there is none, over those that each has)."""
    tasks = sorted({t["axes"]["task_name"] for t in trials})
    figure, axes = pyplot.subplots(2, len(tasks), figsize=(4.5 * len(tasks), 6), squeeze=False)
    for column, task in enumerate(tasks):
        lines: dict[tuple[str, float], dict[float, list[dict]]] = {}
        found = {place: seeds for place, seeds in points(trials).items() if place[1] == task}
        common = set.intersection(*map(set, found.values()))
        for (_, _, method, _), seeds in found.items():
            runs = [run for seed, run in seeds.items() if seed in common or not common]
            place = name(method), float(runs[0]["arguments"]["sam_rho"] or 0)
            lines.setdefault(place, {})[float(runs[0]["arguments"]["learning_rate"])] = runs
        for (method, radius), line in sorted(lines.items()):
            label = method if method == "AMSGrad" else f"{method}, radius {radius:g}"
            x = sorted(line)
            for row, value in enumerate((score, cross_entropy)):
                means = [statistics.fmean(map(value, line[rate])) for rate in x]
                axes[row][column].plot(x, means, "o-", label=label)
        title = f"{task.upper()}, {counted(len(common), 'seed')}" if common else task.upper()
        axes[0][column].set(title=title, xscale="log")
        axes[1][column].set(xscale="log", xlabel="rate")
        axes[0][column].legend(fontsize=7)
    axes[0][0].set_ylabel("score on held-out rows")
    axes[1][0].set_ylabel("cross-entropy there")
    save(figure, path)


def report(folder: Path) -> str:
    """The page; writes the pictures."""
    runs, trials = read(folder)
    table1, table2 = Grid.of(runs, "table1"), Grid.of(runs, "table2")
    sizes, radii = ([r for r in runs if r["sweep"] == sweep] for sweep in ("batch_size", "radius"))
    made = choices(runs, trials)
    model = ", ".join(sorted({r["arguments"]["model_name_or_path"] for r in runs + trials}))
    parts = [
        f"# GLUE with {model}",
        f"Made by `python scripts/report_glue.py {folder}` from the records there.",
        origin(runs + trials),
    ]
    verdicts = [[c.text, c.known, f"**{c.verdict}**", c.number] for c in claims(table1, table2, sizes, made)]
    known = {"table1", "table2", "batch_size", "radius", "mnli_first", "mnli"}
    own = sorted({r["sweep"] for r in runs + trials} - known)
    for sweep in own:
        parts += own_section(sweep, runs, trials, folder)
    if len(own) == len({r["sweep"] for r in runs + trials}):  # nothing is there for the paper's claims
        verdicts = []
    parts += verdicts and [
        "## Verdicts",
        "The claims of arXiv:2303.00565, and how each is known to us. Differences are of scores × 100, paired by seed: "
        "mean, interval by bootstrap (of five seeds it covers the mean in 83 % of cases, not in 95 %), half the 95 % "
        "interval of Student's t, p of the paired t test; then the tasks they are of, and which choices of the trials "
        "are at an edge of their grid, so that a wider one might do better; then p by Holm's correction over these "
        "tests, which decides, and where it cannot tell, the difference that so many pairs would see. An average over "
        "one to three tasks is not the paper's over eight. The rules are in scripts/report_glue.py.",
        markdown(["claim", "known from", "verdict", "the number that decides"], verdicts),
    ]
    for grid, title in (
        (table1, "With momentum"),
        (table2, "Without momentum (β1 = 0)"),
        (Grid.of(runs, "mnli_first"), "From a model that was fine-tuned on MNLI"),
    ):
        if grid.runs:
            parts += [
                f"## {title}",
                "Score × 100 on the validation set (the mean of a task's metrics, as GLUE averages them): mean ± "
                "standard deviation over seeds [95 % interval of the mean, by bootstrap].",
                table(grid),
                single_metrics(grid),
            ]
            if {"adasam", "amsgrad"} <= set(grid.methods):
                parts.append(differences(grid, "adasam", "amsgrad"))
            if where := measured_at(grid.runs.values()):
                parts += [
                    f"`sam_gap` of the final weights (lower is flatter) in thousandths, at radius {where}, on four "
                    "training batches, without dropout, in float32:",
                    table(grid, lambda r: 1000 * gap(r), 1),
                ]
    if table1.runs:
        plot_losses(table1, folder / "loss.png")
        parts += ["Training loss against iterations:", "![training loss against iterations](loss.png)"]
    if sizes:
        plot_batch_sizes(sizes, folder / "batch_size.png")
        rows = []
        for task in sorted({r["axes"]["task_name"] for r in sizes}):
            for share in LEVELS:
                found = SpeedUp.of([r for r in sizes if r["axes"]["task_name"] == task], share)
                for seed, counts in found.found.items():
                    cells = ", ".join(f"{b}: {'–' if math.isnan(n) else f'{n:.0f}'}" for b, n in counts.items())
                    rows.append([task.upper(), f"{found.level:.3f}", str(seed), cells])
                rows.append([task.upper(), f"{found.level:.3f}", "all", f"exponent {found}"])
        parts += [
            "## Batch size",
            "AdaSAM with the rate ∝ √b and as many epochs each (the paper's set-up: remembered, not re-read). Levels: "
            "the training loss a quarter, half and three quarters of the way from where the runs begin to the lowest "
            f"that all of them reach, each averaged over {WINDOW} rows (in the picture, half). A dash: it begins "
            "there, or never gets there. Mind that with as many epochs warm-up and decay, too, are shorter in "
            "proportion to 1/b, which by itself pulls the exponent towards -1, and that a level which a constant "
            "answer reaches tells nothing of learning.",
            markdown(["task", "level", "seed", "b: iterations to the level"], rows),
            "![loss and iterations against the batch size](batch_size.png)",
        ]
    searched = [t for t in trials if t["sweep"] == "table1"]
    if searched or radii:
        plot_radii(searched, radii, folder / "radius.png")
        parts += [
            "## Radius",
            "Score × 100: the trials (one seed, rows held out from training) of table1"
            + (", and below the sweep radius (mean and standard deviation over seeds, validation set)" if radii else "")
            + ". A line joins runs at one rate; radius 0 is AMSGrad or SGD.",
            "![score against the radius](radius.png)",
        ]
    if made:
        parts += [
            "## What the trials chose",
            "On rows held out from training, by the score, of equal ones by the loss: rate, or rate / radius.",
            chosen(made),
        ]
    return "\n\n".join(filter(None, parts)) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the output_dir of sweeps")
    args = parser.parse_args()
    try:
        text = report(args.folder)
    except ValueError as error:
        parser.error(str(error))
    (args.folder / "REPORT.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
