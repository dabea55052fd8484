"""`adasam quickstart`: AdaSAM beside AMSGrad on real sentences."""

import argparse
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .console import CommandParser

DESCRIPTION = """Compare AdaSAM with AMSGrad (the same at radius 0) on real sentences, from packages alone.

    adasam quickstart
    adasam quickstart --seeds 1 2 3 --sam_rho 0.02 --output_dir runs/quickstart

Fine-tunes MiniLM on Rotten Tomatoes as configs/quickstart.yaml says, once with each, and prints what came out. Data,
models, records, results.json and, with matplotlib, reliability.png go to --output_dir. Further arguments go to
`adasam glue`, but for those that make the comparison. Needs pip install 'adasam_hf[quickstart]'.
"""
FIXED = {"--optim", "--seed", "--config", "--train_file", "--validation_file"}
"""What the comparison sets itself."""
EXPLANATION = """
accuracy, loss (cross-entropy) and calibration (expected error of the probabilities): on held-out sentences;
sam_gap: how much the loss rises one gradient step of the radius away, lower is flatter; seconds: of training."""


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Its own arguments, and those for `adasam glue`."""
    parser = CommandParser("quickstart", DESCRIPTION)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--sam_rho", type=float, default=0.05, help="AdaSAM's radius, at which sam_gap is taken too")
    args, more = parser.parse_known_args(argv)
    if not 0 < args.sam_rho < math.inf:
        parser.error(f"--sam_rho={args.sam_rho} must be a finite number > 0; try 0.05")
    if taken := sorted(FIXED & {word.partition("=")[0] for word in more}):
        parser.error(f"{', '.join(taken)}: set by this comparison itself; for a run of your own: adasam glue")
    return args, more


def main(argv: Sequence[str] | None = None) -> int:
    """`adasam quickstart`."""
    args, more = parse(argv)
    from .glue.comparison import compare, plot_reliability, table

    rows = compare(args.seeds, args.sam_rho, args.output_dir, more)
    print(f"\n{table(rows)}\n{EXPLANATION}")
    print(f"Written to {args.output_dir}/results.json")
    if find_spec("matplotlib") is not None:
        plot_reliability(rows, args.output_dir / "reliability.png")
        print(f"How sure and how right the two are: {args.output_dir}/reliability.png")
    return 0
