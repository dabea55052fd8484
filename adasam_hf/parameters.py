"""Which parameters a step concerns: those in the optimizer's groups, read at every step.

A loss with weights (sentence-transformers' `SoftmaxLoss`), layers that are unfrozen or frozen in mid-run and groups
that a callback adds are in the groups; `model.parameters()` may know nothing of them.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def optimized(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters of all groups of `optimizer`, as they are now."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def reached(model: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters whose ``.grad`` a backward pass may leave something in that the update or the clipping sees."""
    return list(dict.fromkeys([*optimized(optimizer), *model.parameters()]))


def choose_parameters(
    model: nn.Module, which: str, candidates: Iterable[nn.Parameter] | None = None
) -> list[nn.Parameter] | None:
    """The parameters that `which` names, or None for all of them.

    Args:
        which: ``all``; ``norm``, the parameters of normalization layers (SAM-ON, arXiv:2306.04226); or a regular
            expression that is searched for in the parameters' names.
        candidates: those to choose among, such as an optimizer's; by default the trainable ones of `model`.
            Parameters outside the model have no name and are chosen by ``all`` only.

    Raises:
        ValueError: if it names none of them.
    """
    if which == "all":
        return None
    allowed = set(candidates) if candidates is not None else {p for p in model.parameters() if p.requires_grad}
    named = {name: p for name, p in model.named_parameters() if p in allowed}
    if which == "norm":
        norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
        inside = {p for m in norms for p in m.parameters(recurse=False)}
        chosen = [p for p in named.values() if p in inside]
    else:
        chosen = [p for name, p in named.items() if re.search(which, name)]
    if not chosen:
        some = ", ".join(list(named)[:3])
        raise ValueError(
            f"sam_parameters={which!r} names no trainable parameter; use 'all', 'norm', or a regular expression that "
            f"is found in names such as {some}"
        )
    return chosen


@contextmanager
def gradients_only_for(chosen: Collection[nn.Parameter] | None, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside it backward computes no gradient for those of `parameters` that are not chosen (None: all are)."""
    keep = set() if chosen is None else set(chosen)
    others = [] if chosen is None else [p for p in parameters if p.requires_grad and p not in keep]
    try:
        for p in others:
            p.requires_grad_(False)
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


def take_gradients(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """The gradients of `parameters`, which have none afterwards."""
    found = {}
    for p in parameters:
        if p.grad is not None:
            found[p] = p.grad
            p.grad = None
    return found


@torch.no_grad()
def add_gradients(gradients: Mapping[nn.Parameter, Tensor]) -> None:
    """Add each to the ``.grad`` of its parameter."""
    for p, gradient in gradients.items():
        p.grad = gradient if p.grad is None else p.grad.add_(gradient)
