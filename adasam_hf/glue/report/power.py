"""`adasam power`: how many seeds it takes to see a gain, from the spread between those that have run."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from ...console import CommandParser
from .records import calibration, cross_entropy, read, score
from .statistics import pairs_for, power
from .tables import markdown

DESCRIPTION = """Show how many seeds a paired t test needs to see a gain, from the spread between the seeds of sweeps.

    adasam power results/small --gain 0.28 0.5 1 --seeds 5 12 --comparisons 4

For each sweep and task: the standard deviation of the differences of two methods, paired by seed; the seeds that see
each gain with 80 % power; and the power that so many seeds have. The tests are two-sided, at the level 0.05 divided by
the number of comparisons: the first and strictest step of Holm's correction. `--spread` takes a number instead of
records, `--tasks` divides it by the root of the number of tasks whose mean is tested.
"""
VALUES = {"score": score, "loss": cross_entropy, "calibration": calibration}


def spreads(folder: Path, one: str, other: str, value: str) -> dict[str, tuple[int, float]]:
    """Sweep and task → number of pairs and the standard deviation of their differences."""
    cells: dict[tuple[str, str, str], dict[str, float]] = {}
    for record in read(folder)[0]:
        axes = record["axes"]
        if axes["method"] in (one, other):
            place = json.dumps({k: v for k, v in axes.items() if k not in ("method", "task_name")}, sort_keys=True)
            cells.setdefault((record["sweep"], axes["task_name"], axes["method"]), {})[place] = VALUES[value](record)
    out = {}
    for (sweep, task, method), mine in cells.items():
        theirs = cells.get((sweep, task, other), {})
        pairs = [mine[place] - theirs[place] for place in mine if place in theirs]
        pairs = [difference for difference in pairs if math.isfinite(difference)]
        if method == one and len(pairs) > 1:
            out[f"{sweep} {task}"] = len(pairs), statistics.stdev(pairs)
    return out


def table(found: dict[str, tuple[int, float]], gains: list[float], seeds: list[int], comparisons: int) -> str:
    """One line for each spread: the seeds that see each gain, and the power that so many seeds have."""
    header = ["", "pairs", "spread", *(f"seeds for {g:+g}" for g in gains)]
    header += [f"power of {n} seeds at {g:+g}" for g in gains for n in seeds]
    rows = []
    for name, (pairs, spread) in found.items():
        needed = [str(pairs_for(g, spread, comparisons)) if spread > 0 else "–" for g in gains]
        powers = [f"{power(n, g, spread, comparisons):.2f}" if spread > 0 else "–" for g in gains for n in seeds]
        rows.append([name, str(pairs) if pairs else "–", f"{spread:.3g}", *needed, *powers])
    return markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """`adasam power`."""
    parser = CommandParser("power", DESCRIPTION)
    parser.add_argument("folder", type=Path, nargs="?", help="the output_dir of sweeps")
    parser.add_argument("--spread", type=float, help="instead of records: the standard deviation of the differences")
    parser.add_argument("--tasks", type=int, default=1, help="the test is of the mean of so many tasks")
    parser.add_argument("--value", default="score", choices=VALUES, help="score and calibration are times 100")
    parser.add_argument("--methods", nargs=2, default=["adasam", "amsgrad"], metavar=("ONE", "OTHER"))
    parser.add_argument("--gain", type=float, nargs="+", default=[0.28, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--comparisons", type=int, default=1)
    args = parser.parse_args(argv)
    if (args.folder is None) == (args.spread is None):
        parser.error("give a folder of records, or --spread")
    if min(args.comparisons, args.tasks) < 1 or (args.spread is not None and not 0 < args.spread < math.inf):
        parser.error("--comparisons, --tasks and --spread must be finite and above 0")
    if not all(math.isfinite(gain) and gain for gain in args.gain):
        parser.error(f"--gain={args.gain} must be finite numbers other than 0")
    one, other = args.methods
    found = {"given": (0, args.spread)} if args.folder is None else spreads(args.folder, one, other, args.value)
    if not found:
        raise ValueError(f"{args.folder}/records has no two runs of {one} and {other} with the same seeds")
    found = {name: (pairs, spread / math.sqrt(args.tasks)) for name, (pairs, spread) in found.items()}
    print(table(found, args.gain, args.seeds, args.comparisons))
    return 0
