"""The page: what goes into its template, and the figures next to it."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .choices import Choice, choices
from .claims import claims
from .curves import LEVELS, WINDOW, SpeedUp
from .differences import difference_rows
from .plots import (
    plot_batch_sizes,
    plot_differences,
    plot_losses,
    plot_radii,
    plot_rates,
    plot_reliability,
)
from .records import QUANTITIES, Grid, Record, gap, labelled, points, read
from .tables import choices_table, differences, markdown, single_metrics, spread, table
from .wording import name

PAPER_SWEEPS = {"table1", "table2", "batch_size", "radius", "mnli_first", "mnli"}
"""The sweeps that test the paper's claims; every other sweep gets its own section."""


def report(folder: Path) -> str:
    """The page on the records in `folder`; also writes the figures there.

    Raises:
        ValueError: without records, for a broken one, or if runs of one task and method have different arguments.
    """
    runs, trials = read(folder)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("page.md.jinja").render(content(runs, trials, folder))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def content(runs: Sequence[Record], trials: Sequence[Record], folder: Path) -> dict[str, Any]:
    """The values of the template's names."""
    records = [*runs, *trials]
    sweeps = {r["sweep"] for r in records}
    others = sorted(sweeps - PAPER_SWEEPS)
    table1, table2, mnli_first = (Grid.of(runs, sweep) for sweep in ("table1", "table2", "mnli_first"))
    sizes, radii = ([r for r in runs if r["sweep"] == sweep] for sweep in ("batch_size", "radius"))
    searched = [t for t in trials if t["sweep"] == "table1"]
    made = choices(runs, trials)
    verdicts = [[c.text, c.known, f"**{c.verdict}**", c.number] for c in claims(table1, table2, sizes, made)]
    titles = (
        (table1, "With momentum"),
        (table2, "Without momentum (β1 = 0)"),
        (mnli_first, "From a model fine-tuned on MNLI"),
    )
    out = {
        "model": ", ".join(sorted({r["arguments"]["model_name_or_path"] for r in records})),
        "folder": folder,
        "origin": origin(records),
        "others": [sweep_section(sweep, runs, trials, folder) for sweep in others],
        "verdicts": len(others) < len(sweeps) and markdown(["claim", "source", "verdict", "evidence"], verdicts),
        "paper": [paper_section(grid, title) for grid, title in titles if grid.runs],
        "losses": bool(table1.runs),
        "window": WINDOW,
        "batch_sizes": sizes and batch_sizes_table(sizes),
        "radius": (searched or radii) and {"runs": bool(radii)},
        "choices": made and choices_table(made),
    }
    if table1.runs:
        plot_losses(table1, folder / "loss.png")
    if sizes:
        plot_batch_sizes(sizes, folder / "batch_size.png")
    if searched or radii:
        plot_radii(searched, radii, folder / "radius.png")
    return out


def paper_section(grid: Grid, title: str) -> dict[str, Any]:
    """The tables of one of the paper's sweeps."""
    both = {"adasam", "amsgrad"} <= set(grid.methods)
    return {
        "title": title,
        "scores": table(grid),
        "single_metrics": single_metrics(grid),
        "differences": differences(grid, "adasam", "amsgrad") if both else "",
        "measured_at": measured_at(list(grid.runs.values())),
        "gaps": table(grid, thousandths, 1),
    }


def batch_sizes_table(sizes: Sequence[Record]) -> str:
    """Iterations to each level by task and seed, and the exponent."""
    rows = []
    for task in sorted({r["axes"]["task_name"] for r in sizes}):
        for share in LEVELS:
            found = SpeedUp.of([r for r in sizes if r["axes"]["task_name"] == task], share)
            for seed, counts in found.found.items():
                cells = ", ".join(f"{b}: {'–' if math.isnan(n) else f'{n:.0f}'}" for b, n in counts.items())
                rows.append([task.upper(), f"{found.level:.3f}", str(seed), cells])
            rows.append([task.upper(), f"{found.level:.3f}", "all", f"exponent {found}"])
    return markdown(["task", "level", "seed", "b: iterations to the level"], rows)


def sweep_section(sweep: str, runs: Sequence[Record], trials: Sequence[Record], folder: Path) -> dict[str, Any]:
    """The section on a sweep that is not the paper's: its runs and their differences, and its trials."""
    grid, mine = labelled(runs, sweep), [t for t in trials if t["sweep"] == sweep]
    return {
        "name": sweep,
        "runs": runs_section(grid, folder) if grid.runs else None,
        "trials": trials_table(mine, folder / f"{sweep}.png") if mine else None,
    }


def runs_section(grid: Grid, folder: Path) -> dict[str, Any]:
    """The runs of one sweep; also writes their figures."""
    rows = difference_rows(grid)
    header = ["methods", "task", "quantity", "difference", "pairs", "p", "Holm's p", "detectable"]
    reliability = any(run["metrics"].get("eval_reliability") for run in grid.runs.values())
    if rows:
        plot_differences(rows, folder / f"{grid.sweep}_differences.png")
    plot_losses(grid, folder / f"{grid.sweep}_loss.png")
    if reliability:
        plot_reliability(grid, folder / f"{grid.sweep}_reliability.png")
    return {
        "sentences": [row.sentence for row in rows if row.pair == "AdaSAM – AMSGrad"],
        "tables": [(what, table(grid, value, digits)) for what, value, digits in measured(list(grid.runs.values()))],
        "differences": markdown(header, [row.cells for row in rows]) if rows else None,
        "reliability": reliability,
    }


def trials_table(trials: Sequence[Record], path: Path) -> str:
    """The trials of one sweep, one row for each point of the grid; also draws them to `path`."""
    plot_rates(trials, path)
    rows, columns = [], measured(trials)
    for (_, task, method, point), seeds in sorted(points(trials).items(), key=lambda item: item[0][1:]):
        cells = [spread({s: value(r) for s, r in seeds.items()}, digits) for _, value, digits in columns]
        rows.append([task.upper(), name(method), Choice.label(dict(point)), str(len(seeds)), *cells])
    return markdown(["task", "method", "rate / radius", "seeds", *(what for what, *_ in columns)], rows)


def measured(runs: Sequence[Record]) -> list[tuple[str, Callable[[Record], float], int]]:
    """The quantities, and the gap, that at least one of `runs` has; each with its name and its digits."""
    quantities = (*QUANTITIES, (f"`sam_gap` × 1000 at radius {measured_at(runs)}", thousandths, 1))
    return [one for one in quantities if any(not math.isnan(one[1](run)) for run in runs)]


def thousandths(run: Record) -> float:
    """`sam_gap` of the final weights (lower is flatter), times 1000."""
    return 1000 * gap(run)


def measured_at(runs: Sequence[Record]) -> str:
    return ", ".join(sorted({f"{r['arguments']['measure_gap']:g}" for r in runs if r["arguments"].get("measure_gap")}))


def origin(records: Sequence[Record]) -> str:
    """Commits, versions and machines."""

    def unique(values: Iterable[object]) -> str:
        return ", ".join(sorted({str(v) for v in values}))

    commits = unique(
        (r["commit"] or "unknown")[:12] + (" (with uncommitted changes)" if r["dirty"] else "") for r in records
    )
    packages = sorted({package for r in records for package in r["versions"]})
    versions = "; ".join(f"{p} {unique(r['versions'][p] for r in records if p in r['versions'])}" for p in packages)
    machines = unique(", ".join(r["hardware"]["accelerators"]) or f"{r['hardware']['cpus']} CPU cores" for r in records)
    hours = sum(r["metrics"]["train_runtime"] for r in records) / 3600  # for resumed runs, only the last part
    again = sum(r["attempts"] > 1 for r in records)
    return (
        f"{len(records)} runs, {hours:.1f} hours of training in all; {again} of them needed a second attempt. "
        f"Commit: {commits}. Versions: {versions}. Machine: {machines}."
    )
