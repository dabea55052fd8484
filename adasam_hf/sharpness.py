"""How sharp the loss is around a model's weights."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from .perturbation import Perturbation


def sam_gap(model: nn.Module, batches: Iterable[Mapping], rho: float) -> float:
    r"""Mean over batches of L_B(w + ρ s/‖s‖₂) - L_B(w), s = ∇L_B(w): how much the worst nearby weights lose.

    The trainer logs the same quantity for its training batches, with dropout. Here the model is in eval mode, so
    that models can be compared. (The ascent of SAM, arXiv:2010.01412, used as a measure.)

    Args:
        model: called as ``model(**batch)``; its output has ``.loss``.
        batches: on the model's device. Cost: two forward passes and a backward pass for each.
        rho: radius > 0, in weight units.

    Returns: the mean gap. The weights are as before, bit for bit; gradients are cleared.

    Raises:
        ValueError: for a bad radius or without batches.
    """
    if not rho > 0:
        raise ValueError(f"rho={rho!r} must be > 0: at radius 0 there is no gap; try 0.05")
    perturbation = Perturbation(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0))
    gaps = []
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in batches:
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            with perturbation.perturbed(rho), torch.no_grad():
                gaps.append(float(model(**batch).loss - loss))
    finally:
        for module, mode in training.items():
            module.training = mode
        model.zero_grad()
    if not gaps:
        raise ValueError("batches is empty; give at least one")
    return sum(gaps) / len(gaps)
