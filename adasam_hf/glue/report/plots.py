"""The figures of the report."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..metrics import merged
from .curves import SpeedUp, losses
from .differences import Row
from .records import BATCH, QUANTITIES, Grid, Record, cross_entropy, points, score
from .statistics import interval
from .wording import counted, name

matplotlib.use("Agg")
from matplotlib import pyplot


def save(figure: Figure, path: Path) -> None:
    """Write a figure without the names of the programs that made it."""
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def together(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Curves over the same steps, cut to the shortest: steps, and losses by run × step. Empty curves are left out."""
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


def plot_batch_sizes(runs: Sequence[Record], path: Path) -> None:
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
        for counts in found.values():
            axes[1][column].plot(list(counts), list(counts.values()), "o", color="tab:blue", alpha=0.5)
        sizes = sorted({size for values in found.values() for size in values})
        there = [values[sizes[0]] for values in found.values() if values.get(sizes[0], math.nan) > 0] if sizes else []
        if there:
            start = statistics.geometric_mean(there)
            axes[1][column].plot(sizes, [start * sizes[0] / size for size in sizes], "--", color="gray", label="∝ 1/b")
            axes[1][column].legend()
            axes[1][column].set(xscale="log", yscale="log")
        axes[1][column].set(xlabel="batch size b", ylabel="iterations to the level")
    save(figure, path)


def plot_radii(trials: Sequence[Record], runs: Sequence[Record], path: Path) -> None:
    """Score against the radius. Above: trials (one seed, held-out rows), a line for each learning rate; radius 0 is
    AMSGrad or SGD. Below, if the sweep `radius` has run: mean and standard deviation over seeds, validation set."""
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
    """Accuracy against confidence in bins, all seeds pooled: a panel for each task, a line for each method."""
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


def plot_rates(trials: Sequence[Record], path: Path) -> None:
    """Score (above) and cross-entropy (below) against the learning rate, a line for each radius: means over the seeds
    that all points of a task share (or, if they share none, over each point's own)."""
    tasks = sorted({t["axes"]["task_name"] for t in trials})
    figure, axes = pyplot.subplots(2, len(tasks), figsize=(4.5 * len(tasks), 6), squeeze=False)
    for column, task in enumerate(tasks):
        lines: dict[tuple[str, float], dict[float, list[Record]]] = {}
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
        axes[1][column].set(xscale="log", xlabel="learning rate")
        axes[0][column].legend(fontsize=7)
    axes[0][0].set_ylabel("score on held-out rows")
    axes[1][0].set_ylabel("cross-entropy on held-out rows")
    save(figure, path)
