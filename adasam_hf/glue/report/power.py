"""`adasam power`: how many seeds it takes to detect a gain, given the spread between finished ones."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from ...console import CommandParser
from .records import calibration, cross_entropy, read, score
from .statistics import pairs_for, power
from .tables import markdown

DESCRIPTION = """Show how many seeds a paired t test needs to detect a gain, given the spread between finished seeds.

    adasam power results/small --gain 0.28 0.5 1 --seeds 5 12 --comparisons 4

The table has, for each sweep and task, the standard deviation of the differences between two methods, paired by seed;
the number of seeds that detect each gain with 80 % power; and the power of each number of seeds. The tests are
two-sided, at the level 0.05 divided by the number of comparisons (the first and strictest step of Holm's correction).
`--spread` takes a number in place of records; `--tasks` divides the spread by the square root of the number of tasks
whose mean is tested.
"""
VALUES = {"score": score, "loss": cross_entropy, "calibration": calibration}


def spreads(folder: Path, one: str, other: str, value: str) -> dict[str, tuple[int, float]]:
    """Sweep and task → number of pairs, and the standard deviation of their differences."""
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
    """One row for each spread: the seeds that detect each gain, and the power of each number of seeds."""
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
    parser.add_argument("folder", type=Path, nargs="?", help="output_dir of finished sweeps")
    parser.add_argument(
        "--spread", type=float, help="standard deviation of the paired differences, in place of a folder of records"
    )
    parser.add_argument(
        "--tasks", type=int, default=1, help="number of tasks whose mean is tested (default: %(default)s)"
    )
    parser.add_argument(
        "--value",
        default="score",
        choices=VALUES,
        help="what to compare; score and calibration are times 100 (default: %(default)s)",
    )
    parser.add_argument(
        "--methods",
        nargs=2,
        default=["adasam", "amsgrad"],
        metavar=("ONE", "OTHER"),
        help="the two methods to compare (default: adasam amsgrad)",
    )
    parser.add_argument(
        "--gain",
        type=float,
        nargs="+",
        default=[0.28, 0.5, 1.0],
        help="gains to detect, in the unit of --value (default: 0.28 0.5 1)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[5, 10],
        help="numbers of seeds to show the power of (default: 5 10)",
    )
    parser.add_argument(
        "--comparisons", type=int, default=1, help="number of tests that share the level of 0.05 (default: %(default)s)"
    )
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
        raise ValueError(
            f"{args.folder}/records has fewer than two pairs of runs of {one} and {other} with the same seed; "
            "run more seeds of both"
        )
    found = {name: (pairs, spread / math.sqrt(args.tasks)) for name, (pairs, spread) in found.items()}
    print(table(found, args.gain, args.seeds, args.comparisons))
    return 0
