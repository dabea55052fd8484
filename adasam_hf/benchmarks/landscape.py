"""`adasam landscape`: the loss around the weights of checkpoints, drawn side by side."""

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..console import CommandParser
from ..glue.data import load_files, load_task, resolve_path
from ..glue.record import provenance, write_json
from ..glue.tasks import TASKS, get_task
from ..sharpness import filter_normalized, loss_along

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
Losses: TypeAlias = dict[str, list[float]]
"""`line`: over the coefficients of one direction; `plane`: over the square of two."""


def read_batches(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, names: list[str]
) -> list[dict[str, torch.Tensor]]:
    """The first training rows, in batches. `names` are the labels of the model's head."""
    if args.train_file:
        columns = args.text_column_names and args.text_column_names.split(",")
        task, data = load_files(None, {"train": args.train_file}, columns, "label", ["train"])
    else:
        task = get_task(args.task_name)
        data = load_task(task, args.dataset_name_or_path, ["train"])
    wanted = [name.lower() for name in task.labels]
    if len(names) != max(len(wanted), 1):
        raise ValueError(f"a checkpoint has {len(names)} labels, {names}, and the rows have {len(wanted)}, {wanted}")
    if sorted(names) == sorted(wanted) and names != wanted:
        raise ValueError(
            f"a checkpoint has its labels in the order {names}, the rows in {wanted}: losses would be wrong"
        )
    rows = data["train"].select(range(min(args.rows, len(data["train"]))))
    batches = []
    for start in range(0, len(rows), args.batch_size):
        part = rows[start : start + args.batch_size]
        texts = [part[column] for column in task.texts]
        encoded = tokenizer(*texts, truncation=True, max_length=args.max_seq_length, padding=True, return_tensors="pt")
        batches.append({**encoded, "labels": torch.tensor(part["label"])})
    return batches


def measure(path: Path, args: argparse.Namespace) -> Losses:
    """The losses of one checkpoint: `line` over the coefficients, `plane` over their square."""
    model = AutoModelForSequenceClassification.from_pretrained(resolve_path(str(path)))
    names = [name.lower() for _, name in sorted(model.config.id2label.items())]
    batches = read_batches(args, AutoTokenizer.from_pretrained(resolve_path(str(path))), names)
    directions = [filter_normalized(model, seed) for seed in (args.seed, args.seed + 1)]
    line = np.linspace(-args.extent, args.extent, args.points)
    grid = np.linspace(-args.extent, args.extent, args.grid)
    return {
        "line": loss_along(model, batches, directions[:1], tqdm([(a,) for a in line], f"{path.name}, line")),
        "plane": loss_along(
            model, batches, directions, tqdm([(a, b) for b in grid for a in grid], f"{path.name}, plane")
        ),
    }


def plot(found: dict[str, Losses], args: argparse.Namespace) -> None:
    """One panel of lines, then one of contours for each checkpoint."""
    import matplotlib
    import matplotlib.colors

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 1 + len(found), figsize=(4 * (1 + len(found)), 3.6), layout="constrained")
    line = np.linspace(-args.extent, args.extent, args.points)
    grid = np.linspace(-args.extent, args.extent, args.grid)
    values = np.concatenate([losses["plane"] for losses in found.values()])
    values = values[np.isfinite(values)]
    low = max(values.min(), 1e-6)
    levels = np.geomspace(low, max(values.max(), 1.01 * low), 16)  # distinct, also for a flat loss
    for axis, (name, losses) in zip(axes[1:], found.items(), strict=True):
        axes[0].plot(line, losses["line"], label=name)
        plane = np.ma.masked_invalid(np.reshape(losses["plane"], (args.grid, args.grid)))
        filled = axis.contourf(grid, grid, plane, levels=levels, norm=matplotlib.colors.LogNorm(), extend="both")
        axis.plot(0, 0, "x", color="white")
        axis.set(title=name, xlabel="first direction", aspect="equal")
    axes[0].set(xlabel="distance along a direction, in norms of the filters", ylabel="training loss")
    axes[0].legend()
    axes[1].set_ylabel("second direction")
    figure.colorbar(filled, ax=list(axes[1:]), label="training loss", format="%.3g")
    figure.savefig(args.output, dpi=110)


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
            raise FileNotFoundError(f"{path} is no folder of a model")
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
    import_module("matplotlib")  # if it is missing, now rather than after the measurements
    logging.set_verbosity_error()
    names = [path.name for path in args.checkpoints]
    names = names if len(set(names)) == len(names) else [str(path) for path in args.checkpoints]
    found = {name: measure(path, args) for name, path in zip(names, args.checkpoints, strict=True)}
    if lost := [name for name, losses in found.items() if not np.isfinite(losses["line"]).any()]:
        raise ValueError(f"the loss of {', '.join(lost)} is no number anywhere; has its training diverged?")
    write_json(args.output.with_suffix(".json"), {**provenance(), "arguments": vars(args), "losses": found})
    plot(found, args)
    print(f"{args.output}: {', '.join(found)}")
    return 0
