"""`adasam landscape`: the command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..console import CommandParser
from ..glue.tasks import TASKS

DESCRIPTION = """Draw the loss landscapes of several checkpoints, side by side in one figure.

    adasam landscape runs/quickstart/amsgrad-42 runs/quickstart/adasam-42 --subset_seed 42 \\
        --train_file runs/quickstart/data/train.csv --output landscape.png

Each checkpoint is a classifier that Transformers can load, with its tokenizer. The first panel shows the training loss
of all checkpoints along one random direction; then each checkpoint has a panel with the loss on the plane of two.
Directions are filter-normalized (arXiv:1712.09913), so that models with weights of different scale can be compared. All
checkpoints share the same noise, rows and colours. The numbers are written next to the figure, as JSON. Cost: --points
+ --grid² forward passes over the rows for each checkpoint, which takes minutes on a CPU. Needs matplotlib:
pip install '.[report]' in a checkout.
"""
FORMATS = (".png", ".pdf", ".svg", ".jpg")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """
    Raises:
        ValueError, FileNotFoundError: before anything is loaded.
    """
    parser = CommandParser("landscape", DESCRIPTION)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="folders of fine-tuned models")
    parser.add_argument("--train_file", help="your own rows: CSV, TSV, JSON or JSONL")
    parser.add_argument("--text_column_names", help="the one or two text columns of --train_file, comma-separated")
    parser.add_argument("--task_name", choices=list(TASKS), help="a GLUE task, in place of --train_file")
    parser.add_argument(
        "--dataset_name_or_path",
        default="nyu-mll/glue",
        help="GLUE on the Hub, or a local folder with the same layout (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", type=int, default=128, help="number of training rows to measure the loss on (default: %(default)s)"
    )
    parser.add_argument(
        "--subset_seed",
        type=int,
        help="the one that the checkpoints were trained with, if any, so that rows are theirs",
    )
    parser.add_argument("--batch_size", type=int, default=32, help="rows per forward pass (default: %(default)s)")
    parser.add_argument(
        "--max_seq_length",
        type=int,
        default=64,
        help="maximum number of tokens; longer inputs are truncated (default: %(default)s)",
    )
    parser.add_argument(
        "--extent",
        type=float,
        default=0.5,
        help="how far to move along a direction; 1 is the norm of the weights (default: %(default)s)",
    )
    parser.add_argument("--points", type=int, default=21, help="number of points on the line (default: %(default)s)")
    parser.add_argument(
        "--grid", type=int, default=9, help="number of points along each side of the plane (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed for drawing the directions (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("landscape.png"),
        help="figure to write: .png, .pdf, .svg or .jpg (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if bool(args.train_file) == bool(args.task_name):
        parser.error("give one of --train_file and --task_name")
    if min(args.rows, args.batch_size, args.points - 1, args.grid - 1) < 1 or not args.extent > 0:
        parser.error("--rows and --batch_size must be at least 1, --points and --grid at least 2, --extent above 0")
    for path in args.checkpoints:
        if not str(path).startswith("pip:") and not path.is_dir():
            raise FileNotFoundError(f"{path} is not the folder of a model")
    if args.output.suffix not in FORMATS:
        parser.error(f"--output={args.output} must end as a picture does: {', '.join(FORMATS)}")
    if not args.output.parent.is_dir():
        raise FileNotFoundError(
            f"--output={args.output}: the folder {args.output.parent} does not exist; make it first"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """`adasam landscape`."""
    args = parse(argv)
    from .landscape import draw

    print(f"{args.output}: {', '.join(draw(args))}")
    return 0
