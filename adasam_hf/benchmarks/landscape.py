"""Draw the loss around the weights of several checkpoints, side by side."""

import argparse
from importlib import import_module
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..glue.data import load_files, load_task, resolve_path
from ..glue.record import provenance, write_json
from ..glue.tasks import get_task
from ..sharpness import filter_normalized, loss_along

Losses: TypeAlias = dict[str, list[float]]
"""Losses along one direction (`line`) and on the plane of two (`plane`)."""


def read_batches(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, names: list[str]
) -> list[dict[str, torch.Tensor]]:
    """The first training rows in the order of `subset_seed`, in batches; `names` are the labels of the model."""
    if args.train_file:
        columns = args.text_column_names and args.text_column_names.split(",")
        task, data = load_files(None, {"train": args.train_file}, columns, "label", ["train"])
    else:
        task = get_task(args.task_name)
        data = load_task(task, args.dataset_name_or_path, ["train"])
    wanted = [name.lower() for name in task.labels]
    if len(names) != max(len(wanted), 1):
        raise ValueError(f"a checkpoint has {len(names)} labels, {names}, but the rows have {len(wanted)}, {wanted}")
    if sorted(names) == sorted(wanted) and names != wanted:
        raise ValueError(
            f"a checkpoint has its labels in the order {names}, but the rows in {wanted}: losses would be wrong"
        )
    rows = data["train"] if args.subset_seed is None else data["train"].shuffle(seed=args.subset_seed)
    rows = rows.select(range(min(args.rows, len(rows))))
    batches = []
    for start in range(0, len(rows), args.batch_size):
        part = rows[start : start + args.batch_size]
        texts = [part[column] for column in task.texts]
        encoded = tokenizer(*texts, truncation=True, max_length=args.max_seq_length, padding=True, return_tensors="pt")
        batches.append({**encoded, "labels": torch.tensor(part["label"])})
    return batches


def measure(path: Path, args: argparse.Namespace) -> Losses:
    """The losses of one checkpoint, on the line and on the plane."""
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
    """One panel with the lines of all checkpoints, then one with the contours of each."""
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
    levels = np.geomspace(low, max(values.max(), 1.01 * low), 16)  # distinct even for a flat loss
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


def draw(args: argparse.Namespace) -> list[str]:
    """Measure all checkpoints, then write the figure and its numbers. Returns the checkpoints' names.

    Raises:
        ValueError: if the loss of a checkpoint is not finite anywhere.
    """
    import_module("matplotlib")  # fail before the measurements if it is missing
    logging.set_verbosity_error()
    names = [path.name for path in args.checkpoints]
    names = names if len(set(names)) == len(names) else [str(path) for path in args.checkpoints]
    found = {name: measure(path, args) for name, path in zip(names, args.checkpoints, strict=True)}
    if lost := [name for name, losses in found.items() if not np.isfinite(losses["line"]).any()]:
        raise ValueError(f"the loss of {', '.join(lost)} is not finite anywhere; did its training diverge?")
    write_json(args.output.with_suffix(".json"), {**provenance(), "arguments": vars(args), "losses": found})
    plot(found, args)
    return names
