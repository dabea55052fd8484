"""`adasam landscape`: the command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..console import CommandParser
from ..glue.tasks import TASKS

DESCRIPTION = """Draw the loss landscapes of several checkpoints, side by side in one figure.

    adasam landscape runs/quickstart/amsgrad-42 runs/quickstart/adasam-42 \\
        --train_file runs/quickstart/data/train.csv --output landscape.png

Each checkpoint is a classifier that Transformers loads, with its tokenizer. Left: the training loss along one random
direction, all checkpoints in one panel. Then, for each, the loss on the plane of two. Directions are filter-normalized
(arXiv:1712.09913), so that they compare across scales of weights; all checkpoints get the same noise, the same rows
and the same colours. Writes the numbers beside the picture, as JSON. Cost: --points + --grid² passes over the rows for
each checkpoint, minutes on a CPU. Needs matplotlib: pip install 'adasam_hf[report]'.
"""
FORMATS = (".png", ".pdf", ".svg", ".jpg")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """
    Raises:
        ValueError, FileNotFoundError: before anything is loaded.
    """
    parser = CommandParser("landscape", DESCRIPTION)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="folders of models")
    parser.add_argument("--train_file", help="rows, as in `adasam glue`")
    parser.add_argument("--text_column_names", help="its one or two text columns, separated by a comma")
    parser.add_argument("--task_name", choices=list(TASKS), help="a GLUE task instead")
    parser.add_argument("--dataset_name_or_path", default="nyu-mll/glue", help="as in `adasam glue`")
    parser.add_argument("--rows", type=int, default=128, help="training rows that the loss is taken of")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_seq_length", type=int, default=64)
    parser.add_argument("--extent", type=float, default=0.5, help="at 1 a direction is as long as the weights")
    parser.add_argument("--points", type=int, default=21, help="on the line")
    parser.add_argument("--grid", type=int, default=9, help="in each direction of the plane")
    parser.add_argument("--seed", type=int, default=0, help="of the directions")
    parser.add_argument("--output", type=Path, default=Path("landscape.png"))
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
