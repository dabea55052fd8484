#!/usr/bin/env python
"""The report on the records of scripts/sweep_glue.py: tables, pictures, and a verdict on each claim of the paper.

    python scripts/report_glue.py results/small

reads results/small/records and nothing else, and writes results/small/REPORT.md and the pictures beside it.

A verdict follows from a rule that is fixed before the runs, at the 95 % level, over seeds (a run of one method and a
run of another with the same seed make a pair):

* a difference is confirmed if the paired t test says so with the paper's sign, not confirmed if it says so with the
  other sign, and otherwise the runs cannot tell;
* "on most tasks" is confirmed if AdaSAM's mean is the higher one on more than half of the tasks in at least 95 % of the
  bootstrap's samples of at least three seeds, not confirmed if AMSGrad's is (which describes the runs and is no test);
* the linear speed-up is confirmed if the whole interval of the exponent (Student's t) is within 0.25 of -1, not
  confirmed if the whole of it is farther away.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

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
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("records/**/*.json"))]
    if not records:
        raise ValueError(f"{folder}/records has no records; make some with scripts/sweep_glue.py")
    return [r for r in records if r["trial"] is None], [r for r in records if r["trial"] is not None]


def score(record: dict) -> float:
    """The task's number, times 100."""
    return 100 * get_task(record["axes"]["task_name"]).score(record["metrics"])


@dataclass
class Grid:
    """The runs of one sweep by task, method and seed."""

    runs: dict[tuple[str, str, int], dict]

    @classmethod
    def of(cls, runs: Sequence[dict], sweep: str) -> "Grid":
        chosen = [r for r in runs if r["sweep"] == sweep]
        return cls({(r["axes"]["task_name"], r["axes"]["method"], r["axes"]["seed"]): r for r in chosen})

    def _seen(self, index: int) -> list:
        return list(dict.fromkeys(key[index] for key in self.runs))

    @property
    def tasks(self) -> list[str]:
        return sorted(self._seen(0))

    @property
    def methods(self) -> list[str]:
        return [method for method in NAMES if method in self._seen(1)]

    def values(self, task: str, method: str, value: Callable[[dict], float] = score) -> dict[int, float]:
        """Seed → value."""
        return {s: value(r) for (t, m, s), r in sorted(self.runs.items()) if (t, m) == (task, method)}

    def average(self, method: str, value: Callable[[dict], float] = score) -> dict[int, float]:
        """Seed → mean over the tasks, for seeds that have them all."""
        columns = [self.values(task, method, value) for task in self.tasks]
        seeds = set.intersection(*(set(column) for column in columns)) if columns else set()
        return {seed: statistics.mean(column[seed] for column in columns) for seed in sorted(seeds)}


# ---- statistics ----


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by resampling, percentiles."""
    values = np.asarray(values)
    picks = np.random.default_rng(0).integers(len(values), size=(SAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


@dataclass
class Difference:
    """Paired over seeds: mean, standard deviation, p of the t test, interval of the bootstrap."""

    values: list[float]

    @classmethod
    def between(cls, one: dict[int, float], other: dict[int, float]) -> "Difference":
        return cls([one[seed] - other[seed] for seed in sorted(set(one) & set(other))])

    @property
    def mean(self) -> float:
        return statistics.mean(self.values) if self.values else math.nan

    @property
    def p(self) -> float:
        """Of no difference; not a number with fewer than two pairs."""
        if len(self.values) < 2:
            return math.nan
        if len(set(self.values)) == 1:
            return 1.0 if self.values[0] == 0 else 0.0
        return float(stats.ttest_1samp(self.values, 0.0).pvalue)

    def verdict(self, sign: int = 1) -> str:
        if math.isnan(self.p) or self.p >= 0.05:
            return UNKNOWN
        return CONFIRMED if self.mean * sign > 0 else DENIED

    def __str__(self) -> str:
        if len(self.values) < 2:
            return f"{self.mean:+.2f} (one pair)" if self.values else "–"
        low, high = bootstrap(self.values)
        return f"{self.mean:+.2f} [{low:+.2f}, {high:+.2f}], p = {self.p:.3f}"


def share_of_most(differences: Sequence[Sequence[float]]) -> float:
    """Share of the bootstrap's samples of seeds in which more than half of the tasks have a positive mean difference.

    differences: task × seed, of the same seeds.
    """
    table = np.asarray(differences)
    picks = np.random.default_rng(0).integers(table.shape[1], size=(SAMPLES, table.shape[1]))
    wins = (table[:, picks].mean(axis=2) > 0).sum(axis=0)
    return float((wins > len(table) / 2).mean())


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of Student's 95 % interval."""
    if len(values) < 2:
        return statistics.mean(values), math.inf
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)


# ---- loss curves ----


def losses(record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and the training loss (at w), each averaged over WINDOW rows: those of the window's middle.

    (A mean over the last rows would come about WINDOW/2b iterations late, in proportion to 1/b, and so look like a
    linear speed-up.)
    """
    entries = [(e["step"], float(e["loss"])) for e in record["log_history"] if "loss" in e]
    steps, raw = (np.array(column, dtype=float) for column in zip(*entries, strict=True))
    size = record["axes"].get(BATCH, record["arguments"][BATCH])
    every = steps[0]  # iterations of which an entry is the mean
    width = max(1, min(len(raw), round(WINDOW / (size * every))))
    kernel = np.full(width, 1 / width)
    return np.convolve(steps - (every - 1) / 2, kernel, "valid"), np.convolve(raw, kernel, "valid")


BATCH = "per_device_train_batch_size"


def level_of(curves: Sequence[np.ndarray]) -> float:
    """Of averaged losses: half way from where the runs begin to the lowest that all of them reach."""
    begin = statistics.mean(float(curve[0]) for curve in curves)
    reached = max(float(curve.min()) for curve in curves)
    return (begin + reached) / 2


def iterations_to(steps: np.ndarray, curve: np.ndarray, level: float) -> float:
    """The first iteration at or below the level, between two by interpolation."""
    i = int(np.argmax(curve <= level))
    if i == 0:
        return float(steps[0])
    share = (curve[i - 1] - level) / (curve[i - 1] - curve[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def exponents(runs: Sequence[dict]) -> tuple[float, dict[int, dict[int, float]], list[float]]:
    """Of one task's runs: the level, seed → b → iterations, and for each seed the slope of log iterations on log b."""
    curves = {(r["axes"]["seed"], r["axes"][BATCH]): losses(r) for r in runs}
    level = level_of([curve for _, curve in curves.values()])
    found: dict[int, dict[int, float]] = {}
    for (seed, size), (steps, curve) in sorted(curves.items()):
        found.setdefault(seed, {})[size] = iterations_to(steps, curve, level)
    full = max(len(sizes) for sizes in found.values())
    slopes = [
        float(np.polyfit(np.log(list(sizes)), np.log(list(sizes.values())), 1)[0])
        for sizes in found.values()
        if len(sizes) == full > 1
    ]
    return level, found, slopes


# ---- tables ----


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def spread(values: dict[int, float], digits: int = 2) -> str:
    """Mean ± standard deviation [interval of the mean]."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values.values()):.{digits}f}"
    if len(values) == 1:
        return f"{mean} (one seed)"
    low, high = bootstrap(list(values.values()))
    return f"{mean} ± {statistics.stdev(values.values()):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(grid: Grid, value: Callable[[dict], float] = score, digits: int = 2) -> str:
    """Methods × tasks and their average: mean ± standard deviation over seeds."""
    rows = [
        [
            NAMES[method],
            *(spread(grid.values(task, method, value), digits) for task in grid.tasks),
            spread(grid.average(method, value), digits),
        ]
        for method in grid.methods
    ]
    return markdown(["", *(task.upper() for task in grid.tasks), "average"], rows)


def single_metrics(grid: Grid) -> str:
    """Every metric of the tasks that have more than one number, mean ± standard deviation over seeds."""
    columns = []
    for task in map(get_task, grid.tasks):
        names = [f"{metric}{suffix}" for _, suffix in task.evaluations for metric in task.metrics]
        columns += [(task.name, name) for name in names if len(names) > 1]
    rows = [
        [NAMES[m], *(spread(grid.values(t, m, lambda r, n=n: 100 * r["metrics"][f"eval_{n}"])) for t, n in columns)]
        for m in grid.methods
    ]
    return markdown(["", *(f"{task.upper()} {name}" for task, name in columns)], rows) if columns else ""


def differences(grid: Grid, one: str, other: str) -> str:
    """Task by task and on average: mean difference, its bootstrap interval and p."""
    cells = [str(Difference.between(grid.values(t, one), grid.values(t, other))) for t in grid.tasks]
    cells.append(str(Difference.between(grid.average(one), grid.average(other))))
    return markdown(["", *(t.upper() for t in grid.tasks), "average"], [[f"{NAMES[one]} – {NAMES[other]}", *cells]])


# ---- pictures ----


def save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def together(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Curves of the same steps, cut to the shortest: steps, and run × step."""
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
                (line,) = axis.plot(steps, mean, label=NAMES[method])
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
        level, found, _ = exponents(mine)
        for size in sorted({r["axes"][BATCH] for r in mine}):
            steps, stacked = together([losses(r) for r in mine if r["axes"][BATCH] == size])
            axes[0][column].plot(steps, stacked.mean(axis=0), label=f"b = {size}")
        axes[0][column].axhline(level, linestyle="--", color="gray")
        axes[0][column].set(title=task.upper(), xlabel="iteration", ylabel="training loss", xscale="log")
        axes[0][column].legend()
        for sizes in found.values():
            axes[1][column].plot(list(sizes), list(sizes.values()), "o", color="tab:blue", alpha=0.5)
        sizes = sorted({size for values in found.values() for size in values})
        start = statistics.geometric_mean(values[sizes[0]] for values in found.values() if sizes[0] in values)
        axes[1][column].plot(sizes, [start * sizes[0] / size for size in sizes], "--", color="gray", label="∝ 1/b")
        axes[1][column].set(xlabel="batch size b", ylabel="iterations to the level", xscale="log", yscale="log")
        axes[1][column].legend()
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
                    axes[0][column].plot(x, [line[r] for r in x], f"{mark}-", label=f"{NAMES[method]}, rate {rate:g}")
            found: dict[float, list[float]] = {}
            for record in runs:
                if record["axes"]["task_name"] == task and record["axes"]["method"] == method:
                    found.setdefault(float(record["axes"]["sam_rho"]), []).append(score(record))
            if found:
                x = sorted(found)
                deviations = [np.std(found[r], ddof=1) if len(found[r]) > 1 else 0.0 for r in x]
                axes[1][column].errorbar(x, [np.mean(found[r]) for r in x], deviations, capsize=3, label=NAMES[method])
        for axis in axes[:, column]:
            axis.set_xscale("symlog", linthresh=1e-3)
            axis.set(title=task.upper(), xlabel="radius")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=7)
    axes[0][0].set_ylabel("score on held-out rows")
    if runs:
        axes[1][0].set_ylabel("score on the validation set")
    save(figure, path)


# ---- verdicts ----


@dataclass
class Claim:
    """What the paper says, how that is known, and what these runs say."""

    text: str
    known: str
    verdict: str
    number: str


def claims(with_momentum: Grid, without: Grid, sizes: Sequence[dict]) -> list[Claim]:
    """A verdict on each claim of the paper."""
    read, remembered = "read", "remembered, not re-read"
    out = []

    def most(grid: Grid) -> tuple[str, str]:
        columns = [(grid.values(t, "adasam"), grid.values(t, "amsgrad")) for t in grid.tasks]
        seeds = sorted(set.intersection(*(set(c) for pair in columns for c in pair))) if columns else []
        if len(seeds) < 3:
            return UNKNOWN, f"{len(seeds)} seeds have every task and both methods"
        pairs = np.array([[one[s] - other[s] for s in seeds] for one, other in columns])
        ours, theirs = share_of_most(pairs), share_of_most(-pairs)
        verdict = CONFIRMED if ours >= 0.95 else DENIED if theirs >= 0.95 else UNKNOWN
        wins = (pairs.mean(axis=1) > 0).sum()
        return verdict, f"higher on {wins} of {len(pairs)} tasks; on most in {ours:.0%} of the bootstrap's samples"

    def compare(one: dict[int, float], other: dict[int, float]) -> tuple[str, str]:
        found = Difference.between(one, other)
        return found.verdict(), str(found) if found.values else "no pairs of runs"

    out.append(
        Claim("AdaSAM is better than AMSGrad on most tasks", f"{read}; 6 of 8: {remembered}", *most(with_momentum))
    )
    for grid, text, known in (
        (with_momentum, "AdaSAM's average is above AMSGrad's", f"by 0.28: {remembered}"),
        (without, "the same without momentum", f"by 0.74: {remembered}"),
    ):
        out.append(Claim(text, known, *compare(grid.average("adasam"), grid.average("amsgrad"))))
    for method in PAPER:
        common = [task for task in with_momentum.tasks if task in without.tasks]
        one, other = (
            Grid({k: r for k, r in grid.runs.items() if k[0] in common}).average(method)
            for grid in (with_momentum, without)
        )
        out.append(Claim(f"momentum helps {NAMES[method]}", read, *compare(one, other)))
    for method, plain in (("amsgrad", "sgdm"), ("adasam", "sam")):
        text = f"the adaptive rate helps: {NAMES[method]} is above {NAMES[plain]}"
        out.append(Claim(text, read, *compare(with_momentum.average(method), with_momentum.average(plain))))
    for task in sorted({r["axes"]["task_name"] for r in sizes}):
        _, _, slopes = exponents([r for r in sizes if r["axes"]["task_name"] == task])
        verdict, number = UNKNOWN, "no complete seed"
        if slopes:
            mean, half = interval(slopes)
            away = abs(mean + 1)
            verdict = CONFIRMED if away + half <= NEAR else DENIED if away - half > NEAR else UNKNOWN
            number = f"exponent {mean:.2f} ± {half:.2f} over {len(slopes)} seeds"
        out.append(
            Claim(f"iterations to a loss level fall as 1/b ({task.upper()}: exponent -1)", read, verdict, number)
        )
    return out


# ---- the page ----


def gap(record: dict) -> float:
    return record["metrics"].get("final_sam_gap", math.nan)


def chosen(runs: Sequence[dict], trials: Sequence[dict]) -> str:
    """What the trials chose, by sweep, task and method, and how many there were."""
    own = {t["sweep"] for t in trials}  # batch_size and radius take those of table1
    runs, rows = [r for r in runs if r["sweep"] in own], []
    groups = itertools.groupby(
        sorted(runs, key=lambda r: (r["sweep"], r["axes"]["task_name"], list(NAMES).index(r["axes"]["method"]))),
        key=lambda r: (r["sweep"], r["axes"]["task_name"], r["axes"]["method"]),
    )
    for (sweep, task, method), mine in groups:
        count = sum((t["sweep"], t["axes"]["task_name"], t["axes"]["method"]) == (sweep, task, method) for t in trials)
        arguments = next(iter(mine))["arguments"]
        rows.append(
            [sweep, task.upper(), NAMES[method], f"{arguments['learning_rate']:g}", radius_of(arguments), str(count)]
        )
    return markdown(["sweep", "task", "method", "rate", "radius", "trials"], rows)


def measured_at(runs: Sequence[dict]) -> str:
    return ", ".join(sorted({f"{r['arguments']['measure_gap']:g}" for r in runs if r["arguments"].get("measure_gap")}))


def radius_of(arguments: dict) -> str:
    return "–" if arguments.get("sam_rho") is None else f"{arguments['sam_rho']:g}"


def origin(records: Sequence[dict]) -> str:
    """Commits, versions and machines."""

    def unique(values) -> str:
        return ", ".join(sorted({str(v) for v in values}))

    commits = unique((r["commit"] or "unknown")[:12] + (" (with changes)" if r["dirty"] else "") for r in records)
    versions = unique(", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in records)
    machines = unique(", ".join(r["hardware"]["accelerators"]) or f"{r['hardware']['cpus']} CPU cores" for r in records)
    hours = sum(r["metrics"]["train_runtime"] for r in records) / 3600  # of resumed runs, the last part
    again = sum(r["attempts"] > 1 for r in records)
    return (
        f"{len(records)} runs, {hours:.1f} hours of training in all; {again} of them needed a second attempt. "
        f"Commit: {commits}. Versions: {versions}. Machine: {machines}."
    )


def report(folder: Path) -> str:
    """The page; writes the pictures."""
    runs, trials = read(folder)
    table1, table2 = Grid.of(runs, "table1"), Grid.of(runs, "table2")
    sizes, radii = ([r for r in runs if r["sweep"] == sweep] for sweep in ("batch_size", "radius"))
    model = ", ".join(sorted({r["arguments"]["model_name_or_path"] for r in runs}))
    parts = [
        f"# GLUE with {model}",
        f"Made by `python scripts/report_glue.py {folder}` from the records there.",
        origin(runs + trials),
    ]
    verdicts = [[c.text, c.known, f"**{c.verdict}**", c.number] for c in claims(table1, table2, sizes)]
    parts += [
        "## Verdicts",
        "The claims of arXiv:2303.00565, and how each is known to us. Differences are of scores × 100, paired by seed: "
        "mean, bootstrap interval (95 %), p of the paired t test. The rules are in scripts/report_glue.py.",
        markdown(["claim", "known from", "verdict", "the number that decides"], verdicts),
    ]
    for grid, title in (
        (table1, "With momentum (the paper's table 1)"),
        (table2, "Without momentum (its ablation)"),
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
            parts += [
                f"`sam_gap` of the final weights (lower is flatter) in thousandths, at radius {measured_at(runs)}, on "
                "four training batches, without dropout, in float32:",
                table(grid, lambda r: 1000 * gap(r), 1),
            ]
    if table1.runs:
        plot_losses(table1, folder / "loss.png")
        parts += ["Training loss against iterations:", "![training loss against iterations](loss.png)"]
    if sizes:
        plot_batch_sizes(sizes, folder / "batch_size.png")
        rows = []
        for task in sorted({r["axes"]["task_name"] for r in sizes}):
            level, found, slopes = exponents([r for r in sizes if r["axes"]["task_name"] == task])
            for seed, counts in found.items():
                rows.append(
                    [task.upper(), f"{level:.3f}", str(seed), ", ".join(f"{b}: {n:.0f}" for b, n in counts.items())]
                )
            if slopes:
                mean, half = interval(slopes)
                rows.append([task.upper(), "", "all", f"exponent {mean:.2f} ± {half:.2f}"])
        parts += [
            "## Batch size",
            "AdaSAM with the rate ∝ √b and as many epochs each (the paper's set-up: remembered, not re-read). Level: "
            "the training loss half way from where the runs begin to the lowest that all of them reach, each averaged "
            f"over {WINDOW} rows. Mind that with as many epochs warm-up and decay, too, are shorter in proportion to "
            "1/b, which by itself pulls the exponent towards -1.",
            markdown(["task", "level", "seed", "b: iterations to the level"], rows),
            "![loss and iterations against the batch size](batch_size.png)",
        ]
    if trials or radii:
        plot_radii([t for t in trials if t["sweep"] == "table1"], radii, folder / "radius.png")
        parts += [
            "## Radius",
            "Score × 100: the trials (one seed, rows held out from training) of table1"
            + (", and below the sweep radius (mean and standard deviation over seeds, validation set)" if radii else "")
            + ". A line joins runs at one rate; radius 0 is AMSGrad or SGD.",
            "![score against the radius](radius.png)",
        ]
    parts += ["## What the trials chose", chosen(runs, trials)]
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
