"""What the ascent looks at: a choice of parameters, a share of the rows."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def choose_parameters(model: nn.Module, which: str) -> list[nn.Parameter] | None:
    """The trainable parameters that `which` names, or None for all of them.

    Args:
        which: ``all``; ``norm``, the parameters of normalization layers (SAM-ON, arXiv:2306.04226); or a regular
            expression that is searched for in the parameters' names.

    Raises:
        ValueError: if it names none, or is no regular expression.
    """
    if which == "all":
        return None
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if which == "norm":
        norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
        inside = {p for m in norms for p in m.parameters(recurse=False)}
        chosen = [p for p in trainable.values() if p in inside]
    else:
        chosen = [p for name, p in trainable.items() if re.search(which, name)]
    if not chosen:
        some = ", ".join(list(trainable)[:3])
        raise ValueError(
            f"sam_parameters={which!r} names no trainable parameter; use 'all', 'norm', or a regular expression that "
            f"is found in names such as {some}"
        )
    return chosen


@contextmanager
def gradients_only_for(chosen: Collection[nn.Parameter] | None, model: nn.Module) -> Iterator[None]:
    """Inside it backward computes no weight gradient for parameters that are not chosen (None: for all as ever)."""
    keep = set() if chosen is None else set(chosen)
    others = [] if chosen is None else [p for p in model.parameters() if p.requires_grad and p not in keep]
    try:
        for p in others:
            p.requires_grad_(False)
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


def take_rows(inputs: dict[str, Any], fraction: float) -> dict[str, Any]:
    """About `fraction` of a batch's rows (at least one), evenly spaced, without columns that are then only padding.

    The batch's size is the length of ``input_ids``, or else of the first tensor. Columns are cut on the right, down to
    a multiple of 8, where no taken row has ``attention_mask`` or a label (other than -100), from every tensor whose
    second dimension is the mask's. (Evenly spaced, since batches that are grouped by length are sorted.)

    Raises:
        ValueError: for a tensor or list that does not have one entry for each row, such as the patches of images.
    """
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
    if not tensors:
        raise ValueError(f"sam_ascent_fraction={fraction!r} needs batches of tensors, not {sorted(inputs)}")
    size = len(tensors.get("input_ids", next(iter(tensors.values()))))
    count = max(1, round(fraction * size))
    rows = torch.arange(count) * size // count
    taken = dict(inputs)
    for key, value in inputs.items():
        if key in tensors or isinstance(value, list):
            if len(value) != size:
                raise ValueError(
                    f"sam_ascent_fraction={fraction!r} takes rows, but {key!r} has {len(value)} entries for {size} "
                    "rows; use sam_ascent_fraction=1"
                )
            taken[key] = [value[i] for i in rows] if isinstance(value, list) else value[rows.to(value.device)]

    mask = taken.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.any():
        width = mask.shape[1]
        used = mask.bool().any(0)
        labels = taken.get("labels")
        if isinstance(labels, Tensor) and labels.shape == mask.shape:
            used = used | (labels != -100).any(0)
        length = min(width, -(-(int(used.nonzero().max()) + 1) // 8) * 8)
        for key in tensors:
            if taken[key].shape[:2] == (count, width):
                taken[key] = taken[key][:, :length]
    return taken
