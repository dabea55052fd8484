"""`adasam quickstart`: AdaSAM beside AMSGrad on real sentences."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .console import CommandParser

DESCRIPTION = """Compare AdaSAM with AMSGrad (the same at radius 0) on real sentences, from packages alone.

    adasam quickstart
    adasam quickstart --seeds 1 2 3 --output_dir runs/quickstart

Fine-tunes MiniLM on 200 sentences of Rotten Tomatoes as configs/quickstart.yaml says, once with each optimizer, and
prints the results. Both use the learning rate, and AdaSAM the radius, that trials on held-out rows of SST-2 chose.
Data, models, records, results.json and, with matplotlib, reliability.png go to --output_dir. Other arguments are
passed on to `adasam glue`. Needs pip install 'adasam_hf[quickstart]'.
"""
FIXED = {"--optim", "--seed", "--subset_seed", "--config", "--train_file", "--validation_file", "--sam_rho"}
"""What the comparison sets itself."""
EXPLANATION = """
accuracy, loss (cross-entropy) and calibration (expected error of the probabilities) are measured on 853 held-out
sentences; sam_gap is how much the training loss rises at a distance of 0.05 along its gradient: lower is flatter;
seconds are those of training. One seed tells little about accuracy: over 35 the two were level, and AdaSAM was flatter
in each (docs/findings.md)."""


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Its own arguments, and those for `adasam glue`."""
    parser = CommandParser("quickstart", DESCRIPTION)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"), help="runs/quickstart by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="one comparison for each; 42 by default")
    args, more = parser.parse_known_args(argv)
    if taken := sorted(FIXED & {word.partition("=")[0] for word in more}):
        parser.error(f"{', '.join(taken)}: set by this comparison itself; for a run of your own: adasam glue")
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
        print(f"How sure and how right the two are: {args.output_dir}/reliability.png")
    return 0
