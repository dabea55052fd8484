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
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


def take_rows(inputs: dict[str, Any], fraction: float) -> dict[str, Any]:
    """About `fraction` of a batch's rows (at least one), evenly spaced, without columns that are then only padding.

    Rows: of tensors whose first dimension is the batch's, that of ``input_ids`` or else of the first tensor. Columns:
    those outside the taken rows' ``attention_mask``, on either side, down to a multiple of 8, are cut from every tensor
    whose second dimension is the mask's. (Evenly spaced, since batches grouped by length are sorted.)
    """
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
    if not tensors:
        raise ValueError(f"sam_ascent_fraction={fraction!r} needs batches of tensors, not {sorted(inputs)}")
    size = len(tensors.get("input_ids", next(iter(tensors.values()))))
    count = max(1, round(fraction * size))
    rows = torch.arange(count) * size // count
    taken = {key: v[rows.to(v.device)] if key in tensors and len(v) == size else v for key, v in inputs.items()}

    mask = taken.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.any():
        width = mask.shape[1]
        seen = mask.any(0).nonzero().flatten()
        first, last = int(seen[0]), int(seen[-1]) + 1
        length = min(width, -(-(last - first) // 8) * 8)
        first = min(first, width - length) if first else 0
        for key, v in taken.items():
            if key in tensors and v.dim() >= 2 and v.shape[:2] == (count, width):
                taken[key] = v[:, first : first + length]
    return taken
