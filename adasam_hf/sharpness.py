"""How sharp the loss is around a model's weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
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
    with _evaluating(model):
        for batch in batches:
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            with perturbation.perturbed(rho), torch.no_grad():
                gaps.append(float(model(**batch).loss - loss))
    if not gaps:
        raise ValueError("batches is empty; give at least one")
    return sum(gaps) / len(gaps)


def top_eigenvalues(
    model: nn.Module, batches: Sequence[Mapping], count: int = 1, tolerance: float = 0.01, seed: int = 0
) -> list[float]:
    r"""The `count` largest eigenvalues of the Hessian ∇²L(w) of the mean loss over `batches`, largest first.

    Lanczos (SciPy's `eigsh`) on Hessian–vector products from double backward, in eval mode. λ₁ is what the worst
    direction adds at second order: L(w + ρv₁) ≈ L(w) + ρ ∇L·v₁ + ρ²λ₁/2.

    Args:
        model: called as ``model(**batch)``; its output has ``.loss``. Its attention must have a second derivative,
            which SDPA has not on a CPU: ``model.set_attn_implementation("eager")``.
        batches: on the model's device. Cost: about three passes over all of them for each of some 10 to 30 products,
            and 2·count + 1, at least 8, vectors of the model's size in float32.
        count: at least 1.
        tolerance: relative accuracy of the eigenvalues.
        seed: of the start vector.

    Raises:
        ValueError: without batches, or for a bad count.
    """
    if not batches or count < 1:
        raise ValueError(f"count={count!r} must be >= 1, and batches not empty ({len(batches)} given)")
    params = [p for p in model.parameters() if p.requires_grad]
    shapes = [p.numel() for p in params]

    def product(vector: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(np.ascontiguousarray(vector.ravel(), dtype=np.float32)).split(shapes)
        parts = [v.view_as(p).to(p) for v, p in zip(parts, params, strict=True)]
        total = [torch.zeros_like(p) for p in params]
        for batch in batches:
            gradients = torch.autograd.grad(model(**batch).loss, params, create_graph=True, materialize_grads=True)
            slope = sum((g * v).sum() for g, v in zip(gradients, parts, strict=True))
            for t, h in zip(total, torch.autograd.grad(slope, params, materialize_grads=True), strict=True):
                t += h.detach() / len(batches)
        return torch.cat([t.reshape(-1) for t in total]).float().cpu().numpy()

    size = sum(shapes)
    start = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    with _evaluating(model):
        hessian = LinearOperator((size, size), matvec=product, dtype=np.float32)
        # SciPy's own choice of 20 basis vectors costs 20 products at least; the top of a Hessian stands out
        basis = max(2 * count + 1, 8)
        values = eigsh(hessian, k=count, which="LA", ncv=basis, tol=tolerance, v0=start, return_eigenvectors=False)
    return sorted(map(float, values), reverse=True)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module's own mode again, and no gradients."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        model.zero_grad()
