"""How sharp the loss is around a model's weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import overload

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import nn

from .perturbation import Perturbation

Batch = Mapping[str, torch.Tensor]


@overload
def sam_gap(model: nn.Module, batches: Iterable[Batch], rho: float) -> float: ...
@overload
def sam_gap(model: nn.Module, batches: Iterable[Batch], rho: Iterable[float]) -> list[float]: ...
def sam_gap(model: nn.Module, batches: Iterable[Batch], rho: float | Iterable[float]) -> float | list[float]:
    r"""Mean over batches of L_B(w + ρ s/‖s‖₂) - L_B(w), s = ∇L_B(w): the rise in loss at the worst nearby weights.

    The trainer logs the same quantity for its training batches, with dropout. Here the model is in eval mode, so
    that models can be compared. (It is the perturbation of SAM, arXiv:2010.01412, used as a measure.)

    Args:
        model: called as ``model(**batch)``; its output has ``.loss``, a mean over the batch (0-d).
        batches: tensors by name, rows first, on the model's device; any iterable.
        rho: radius > 0, in weight units, or several. Cost: a forward and a backward pass for each batch, plus a
            forward pass for each radius; and one copy of the weights.

    Returns: the mean gap, or one for each radius. The weights are restored, bit for bit; gradients are cleared.

    Raises:
        ValueError: for a bad radius or no batches.
    """
    several = isinstance(rho, Iterable) and getattr(rho, "ndim", 1) > 0
    radii = [float(radius) for radius in rho] if several else [float(rho)]  # type: ignore[union-attr, arg-type]
    if not radii or not all(radius > 0 for radius in radii):
        raise ValueError(f"rho={rho!r} must be > 0: at radius 0 there is no gap; try 0.05")
    params = [p for p in model.parameters() if p.requires_grad]
    perturbation = Perturbation(torch.optim.SGD(params, lr=0.0))
    gaps: list[list[float]] = []
    with _evaluating(model):
        for batch in batches:
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            gradients = [p.grad for p in params]
            gaps.append([])
            for radius in radii:
                for p, gradient in zip(params, gradients, strict=True):
                    p.grad = gradient  # perturbing removes it
                with perturbation.perturbed(radius), torch.no_grad():
                    gaps[-1].append(float(model(**batch).loss - loss))
    if not gaps:
        raise ValueError("batches is empty; give at least one")
    means = [sum(column) / len(gaps) for column in zip(*gaps, strict=True)]
    return means if several else means[0]


def average_sharpness(
    model: nn.Module, batches: Sequence[Batch], rho: float, samples: int = 10, seed: int = 0
) -> float:
    r"""Mean over batches and random directions u, ‖u‖₂ = 1, of (L_B(w + ρu) + L_B(w - ρu))/2 - L_B(w).

    How much the loss rises at typical nearby weights, where `sam_gap` takes the worst ones (to first order). Each u is
    paired with -u, to cancel the slope ρ∇L·u, whose mean is 0 and whose spread would swamp the result. For small radii
    the measure is ρ²·tr(∇²L)/2n with n parameters, so it takes a far larger radius to show anything. (It is the
    average-case sharpness of arXiv:2302.07011, with a radius in place of a variance.)

    Args:
        model, batches: as in `sam_gap`; each direction is measured on all batches.
        rho: radius > 0, in weight units.
        samples: number of directions, at least 1. Cost: 2·samples + 1 forward passes for each batch, and one copy of
            the weights.
        seed: random seed of the directions.

    Returns: the mean rise. The weights are restored, bit for bit.

    Raises:
        ValueError: for a bad radius or count, or no batches.
    """
    if not rho > 0 or samples < 1 or not batches:
        raise ValueError(
            f"rho={rho!r} must be > 0, samples={samples!r} at least 1, and batches not empty ({len(batches)} given)"
        )
    generator = torch.Generator().manual_seed(seed)  # on the host, so that all devices draw the same
    params = [p for p in model.parameters() if p.requires_grad]
    perturbation = Perturbation(torch.optim.SGD(params, lr=0.0))
    held = [p.grad for p in params]
    rises = []
    try:
        with _evaluating(model), torch.no_grad():
            clean = [float(model(**batch).loss) for batch in batches]
            for _ in range(samples):
                direction = [torch.randn(p.shape, generator=generator).to(p) for p in params]
                for sign in (1, -1):
                    for p, part in zip(params, direction, strict=True):
                        p.grad = sign * part  # a new tensor, because perturbing removes it
                    with perturbation.perturbed(rho):
                        rises += [float(model(**batch).loss) - loss for batch, loss in zip(batches, clean, strict=True)]
    finally:
        for p, grad in zip(params, held, strict=True):
            p.grad = grad
    return sum(rises) / len(rises)


def top_eigenvalues(
    model: nn.Module, batches: Sequence[Batch], count: int = 1, tolerance: float = 0.01, seed: int = 0
) -> list[float]:
    r"""The `count` largest eigenvalues of the Hessian ∇²L(w) of the mean loss over `batches`, largest first.

    Lanczos (SciPy's `eigsh`) on Hessian–vector products from double backward, in eval mode (as in arXiv:1901.10159). λ₁
    is what the worst direction adds at second order: L(w + ρv₁) ≈ L(w) + ρ ∇L·v₁ + ρ²λ₁/2.

    Args:
        model: called as ``model(**batch)``; its output has ``.loss``. Its attention must have a second derivative;
            SDPA has none, so call ``model.set_attn_implementation("eager")`` first.
        batches: on the model's device. Cost: 10 to 30 products, each of about three passes over all batches, and
            max(2·count + 1, 8) vectors of the model's size in float32.
        count: how many eigenvalues, at least 1.
        tolerance: relative accuracy of the eigenvalues.
        seed: random seed of the start vector.

    Returns: `count` numbers.

    Raises:
        ValueError: for no batches, a bad count, or attention without a second derivative.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    shapes = [p.numel() for p in params]
    if not batches or not 1 <= count < sum(shapes):
        raise ValueError(
            f"count={count!r} must be at least 1 and below the number of parameters, {sum(shapes)}, and batches not "
            f"empty ({len(batches)} given)"
        )
    refuse_fused_attention(model)

    def product(vector: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(np.ascontiguousarray(vector.ravel(), dtype=np.float32)).split(shapes)
        parts = [v.view_as(p).to(p) for v, p in zip(parts, params, strict=True)]
        total = [torch.zeros_like(p) for p in params]
        for batch in batches:
            gradients = torch.autograd.grad(model(**batch).loss, params, create_graph=True, materialize_grads=True)
            slope = sum((g * v).sum() for g, v in zip(gradients, parts, strict=True))
            if not slope.requires_grad:  # a loss that is linear in w
                continue
            for t, h in zip(total, torch.autograd.grad(slope, params, materialize_grads=True), strict=True):
                t += h.detach() / len(batches)
        return torch.cat([t.reshape(-1) for t in total]).float().cpu().numpy()

    size = sum(shapes)
    start = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    with _evaluating(model):
        hessian = LinearOperator((size, size), matvec=product, dtype=np.float32)
        # SciPy's default of 20 basis vectors costs at least 20 products; the top eigenvalues of a Hessian need fewer
        basis = max(2 * count + 1, 8)
        try:
            values = eigsh(hessian, k=count, which="LA", ncv=basis, tol=tolerance, v0=start, return_eigenvectors=False)
        except ArpackError:
            if product(start).any():
                raise
            values = np.zeros(count)  # for a Hessian of 0, ARPACK complains about the start vector
    return sorted(map(float, values), reverse=True)


def refuse_fused_attention(model: nn.Module) -> None:
    """
    Raises:
        ValueError: for a Transformers model whose attention has no second derivative in torch.
    """
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if used not in (None, "eager"):
        raise ValueError(
            f"attn_implementation={used!r} has no second derivative in torch, which a Hessian needs; load the "
            "model with attn_implementation='eager', or call model.set_attn_implementation('eager')"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is back in its own mode, and gradients are cleared."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        model.zero_grad()


def filter_normalized(model: nn.Module, seed: int = 0) -> list[torch.Tensor]:
    r"""A random direction in which the loss landscapes of different models can be compared (arXiv:1712.09913).

    Gaussian noise in which each filter d_i (a row of a matrix, or an output channel of a convolution) is scaled to the
    norm of the weights that it belongs to: ‖d_i‖ = ‖w_i‖. (GPT-2's `Conv1D` stores its matrices transposed, so there
    the weights of one input are scaled together.) Biases and normalization parameters have no filters; their part is 0.

    Returns: one tensor for each trainable parameter, in order, on its device. With the same seed, models of the same
    shapes get the same noise.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = []
    for p in (p for p in model.parameters() if p.requires_grad):
        noise = torch.randn(p.shape, generator=generator).to(p)
        if p.dim() < 2:
            direction.append(torch.zeros_like(noise))
            continue
        rows, weights = noise.flatten(1), p.detach().flatten(1)
        length = rows.norm(dim=1, keepdim=True)
        direction.append((rows * (weights.norm(dim=1, keepdim=True) / length)).view_as(p))
    return direction


def loss_along(
    model: nn.Module,
    batches: Sequence[Batch],
    directions: Sequence[Sequence[torch.Tensor]],
    coefficients: Iterable[Sequence[float]],
) -> list[float]:
    r"""L(w + Σ_k c_k d_k), the mean over batches, for each of the `coefficients` c.

    Args:
        model, batches: as in `sam_gap`. Cost: one forward pass over all batches for each point, and one copy of the
            weights.
        directions: one or more, such as those of `filter_normalized`.
        coefficients: points, each with one number for each direction.

    Returns: one loss for each point. The weights are restored, bit for bit.

    Raises:
        ValueError: for no batches.
    """
    if not batches:
        raise ValueError("batches is empty; give at least one")
    params = [p for p in model.parameters() if p.requires_grad]
    saved = [p.detach().clone() for p in params]
    losses = []
    try:
        with _evaluating(model), torch.no_grad():
            for point in coefficients:
                for i, (p, w) in enumerate(zip(params, saved, strict=True)):
                    p.copy_(w)
                    for c, direction in zip(point, directions, strict=True):
                        p.add_(direction[i], alpha=c)
                losses.append(sum(float(model(**batch).loss) for batch in batches) / len(batches))
    finally:
        with torch.no_grad():
            for p, w in zip(params, saved, strict=True):
                p.copy_(w)
    return losses
