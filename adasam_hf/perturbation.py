"""The climb to the worst nearby weights and the exact way back.

Knows tensors and parameter groups only: no closure, no Trainer, no update rule.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.sgd import sgd
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from .directions import Direction, Gradient

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate
else:
    DTensor = ()  # type: ignore[assignment, misc]  # of which nothing is an instance

HALF = (torch.float16, torch.bfloat16)
ASAM_ETA = 0.01  # of the ASAM paper: weights near 0 are to move, too


def local(t: Tensor) -> Tensor:
    """The shard of a `DTensor` that lies here, sharing its memory; any other tensor as it is."""
    return t.to_local() if isinstance(t, DTensor) else t


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Global L2 norm √(Σ‖gᵢ‖²) over tensors of any shapes, sharded ones (`DTensor`) included.

    Accumulated in float32 (float64 if any gradient is float64): the norm of half-precision
    gradients is inaccurate or infinite in their own dtype. Sharded gradients cost one all-reduce of one number
    for each way of sharding among them.

    Returns: a 0-d tensor on the device of the first gradient; the host does not wait for it.
    """
    wide = any(g.dtype == torch.float64 for g in gradients)
    layouts: dict[tuple | None, list[Tensor]] = {}
    for g in gradients:
        layout = (g.device_mesh, g.placements) if isinstance(g, DTensor) else None
        layouts.setdefault(layout, []).append(local(g))
    norms = []
    for layout, shards in layouts.items():
        parts = torch._foreach_norm(shards, 2.0, dtype=torch.float64 if wide else torch.float32)
        norm = torch.linalg.vector_norm(torch.stack([n.to(parts[0].device) for n in parts]))
        if layout is not None:
            mesh, placements = layout
            parted = [Replicate() if placement.is_replicate() else Partial("sum") for placement in placements]
            square = DTensor.from_local(norm.double().square(), mesh, parted, run_check=False)
            norm = square.full_tensor().sqrt().to(norm.dtype)
        norms.append(norm)
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def check_radius(rho: float, name: str = "rho") -> float:
    """Return `rho` if it is a finite number >= 0; raise ValueError otherwise."""
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not (math.isfinite(rho) and rho >= 0):
        raise ValueError(f"{name}={rho!r} must be a finite number >= 0 (0 switches the ascent off; try 0.05)")
    return rho


class Perturbation:
    r"""Moves an optimizer's parameters to w + δ and back, for any `torch.optim.Optimizer`.

    δ_g = ρ_g · s / ‖s‖₂ for each parameter group g (step 2 of Algorithm 1, arXiv:2303.00565), where
    s is the gradient in ``.grad`` when the ascent begins and ‖s‖₂ is **one** norm over every gradient of
    all groups:

        perturbation = Perturbation(optimizer)
        loss(w).backward()
        with perturbation.perturbed(0.05):
            loss(w).backward()      # the gradient at w + δ
        optimizer.step()            # from w, restored bit for bit

    - Parameters without a gradient, and groups with radius 0, keep their bits. A group with radius 0
      still counts in the norm.
    - If ‖s‖ is 0 or not finite nothing moves.
    - Bytes read + written for each climbing float32 parameter: norm 4 + 0, save 4 + 4, climb 8 + 4, restore 4 + 4;
      in another precision in proportion. One pass each on devices with torch's fused kernels, and no temporary of the
      model's size but the saved copy (``adaptive`` needs two more, and 40 bytes).
    - No host–device synchronization. On devices without torch's fused kernels the climb is a loop.
    - Sharded parameters (`DTensor`, as FSDP2 makes them) move shard by shard along one direction with one norm.
    - Half-precision weights round part of δ away; `applied` says what is left of it.
    - The saved weights live here (one copy of the climbing parameters, kept between steps), never in
      ``optimizer.state``. Groups are read at each ascent, so new or replaced groups are seen.

    Args:
        optimizer: anything with torch's ``param_groups``.
        only: the parameters that may climb and that count in the norm; None for all.
    """

    def __init__(self, optimizer: Optimizer, only: Collection[Tensor] | None = None) -> None:
        self.optimizer = optimizer
        self.only = None if only is None else set(only)
        self._buffers: dict[Tensor, Tensor] = {}
        self._saved: tuple[list[Tensor], list[Tensor]] | None = None
        self.applied: Tensor | None = None
        """Share of the last δ that survived rounding, ⟨δ', δ⟩/‖δ‖² over what moved here, where δ' is what the
        weights really moved by. 0-d, 1 if nothing was to move; None unless some of it is float16 or bfloat16
        (in float32 it is 1 to rounding)."""

    @property
    def active(self) -> bool:
        """Whether the weights are away from w now."""
        return self._saved is not None

    @torch.no_grad()
    def ascend(
        self, rho: float | Sequence[float], direction: Direction | None = None, *, adaptive: bool = False
    ) -> Tensor:
        """w ← w + ρ·s/‖s‖, and take the gradients away (``.grad = None``) for the second pass.

        Args:
            rho: radius in weight units, finite and >= 0: one for all groups, or one for each.
            direction: what to climb along in place of the gradient s. One that needs no first pass leaves ``.grad``
                alone, and may be without vectors, whereupon nothing moves.
            adaptive: w ← w + ρ·T²s/‖Ts‖ with T = |w| + 0.01, element by element: the radius is then relative to the
                weights, and the neighbourhood does not depend on their scale (ASAM, arXiv:2102.11600).

        Returns: ‖s‖₂ (adaptive: ‖Ts‖₂), 0-d. 0, NaN or infinity mean that nothing moved.

        Raises:
            ValueError: for a bad radius, or a number of radii that is not the number of groups.
            RuntimeError: when called twice without `restore`, without any gradient, or with sparse ones.
        """
        if self.active:
            raise RuntimeError("the weights are already perturbed; call restore() before the next ascend()")
        direction = direction or Gradient(self.optimizer)
        groups = self.optimizer.param_groups
        radii = list(rho) if isinstance(rho, Sequence) else [rho] * len(groups)
        if len(radii) != len(groups):
            raise ValueError(
                f"rho={rho!r} has {len(radii)} radii for {len(groups)} parameter groups; give one for each"
            )
        radii = [check_radius(radius) for radius in radii]
        found = [
            (p, vector, radius)
            for group, radius in zip(groups, radii, strict=True)
            for p in group["params"]
            if (self.only is None or p in self.only) and (vector := direction(p)) is not None
        ]
        vectors: list[Tensor] | tuple[Tensor, ...]
        params, vectors, radii = map(list, zip(*found, strict=True)) if found else ([], [], [])
        if not params:
            if direction.first_pass:
                raise RuntimeError("no parameter has a gradient to climb along; call loss.backward() first")
            return torch.zeros(())
        if any(v.is_sparse for v in vectors):
            raise RuntimeError("sparse gradients have no ascent; use dense ones (nn.Embedding(..., sparse=False))")

        if adaptive:
            sizes = [p.abs().add_(ASAM_ETA) for p in params]
            vectors = torch._foreach_mul(sizes, vectors)
        norm = gradient_norm(vectors)
        if adaptive:
            torch._foreach_mul_(vectors, sizes)

        shards: dict[float, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
        for p, vector, radius in zip(params, vectors, radii, strict=True):
            if radius > 0:
                lists = shards.setdefault(radius, ([], [], []))
                for items, item in zip(lists, (local(p), self._buffer(p), local(vector)), strict=True):
                    items.append(item)
        moving = [p for here, _, _ in shards.values() for p in here]
        saved = [b for _, buffers, _ in shards.values() for b in buffers]
        if moving:
            torch._foreach_copy_(saved, moving)
        # Complete before the first change, so that an interrupt anywhere from here on can be undone.
        self._saved = (moving, saved)
        for radius, (here, _, along) in shards.items():
            _climb(here, along, direction.sign * radius, norm)
        half = any(p.dtype in HALF for p in moving)
        self.applied = _applied(shards, direction.sign, norm) if half else None
        if direction.first_pass:
            for group in groups:
                for p in group["params"]:
                    p.grad = None
        # An enclosing autocast region would go on using its half-precision casts of the old weights.
        torch.clear_autocast_cache()
        return norm

    @torch.no_grad()
    def restore(self) -> None:
        """w + δ → w by copying, bit for bit. Does nothing if the weights are not perturbed."""
        if self._saved is None:
            return
        moving, saved = self._saved
        if moving:
            torch._foreach_copy_(moving, saved)
        self._saved = None
        torch.clear_autocast_cache()

    @contextmanager
    def perturbed(
        self, rho: float | Sequence[float], direction: Direction | None = None, *, adaptive: bool = False
    ) -> Iterator[Tensor]:
        """`ascend` on entry, `restore` on exit, also when the body raises. Yields the norm."""
        try:
            yield self.ascend(rho, direction, adaptive=adaptive)
        finally:
            try:
                self.restore()
            finally:
                self.restore()  # where Ctrl-C cut the first call short

    def release(self) -> None:
        """Restore and free the saved copy."""
        self.restore()
        self._buffers.clear()

    def _buffer(self, p: Tensor) -> Tensor:
        buffer, shard = self._buffers.get(p), local(p)
        if buffer is None or any(getattr(buffer, a) != getattr(shard, a) for a in ("shape", "dtype", "device")):
            buffer = self._buffers[p] = torch.empty_like(shard, requires_grad=False)
        return buffer


def _climb(params: list[Tensor], gradients: list[Tensor], rho: float, norm: Tensor) -> None:
    """params += rho · gradients / norm, or nothing if norm is 0 or not finite, without asking the host."""
    scale = rho / norm  # infinite for a norm of 0, and for one so small that the climb would overflow
    blocked = ~(torch.isfinite(scale) & torch.isfinite(norm))
    if all(_has_fused_sgd(p) for p in params):
        # One read of p and g and one write of p: SGD's fused kernel with rate -rho/norm, which leaves the
        # weights alone where found_inf is set (a zero scale would not: 0 · inf is NaN).
        rate = -scale if norm.device.type == "cpu" else -scale.float()  # the others read a float32
        sgd(
            params, gradients, [None] * len(params), fused=True, found_inf=blocked.float(),
            lr=rate,  # type: ignore[arg-type]  # the fused kernel reads a tensor
            weight_decay=0.0, momentum=0.0, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip
    else:
        scale = torch.where(blocked, 0.0, scale)
        for p, g in zip(params, gradients, strict=True):
            p.add_(torch.where(blocked.to(p.device), 0, g) * scale.to(p.device))


def _applied(shards: Mapping[float, tuple[list[Tensor], ...]], sign: float, norm: Tensor) -> Tensor:
    """⟨δ', δ⟩/‖δ‖² with δ' = what the parameters moved by and δ = radius · vector / norm."""
    wide = torch.float64 if norm.device.type == "cpu" else torch.float32
    moved = wanted = torch.zeros((), dtype=wide, device=norm.device)
    for radius, lists in shards.items():
        for p, before, vector in zip(*lists, strict=True):
            delta = vector.float() * (sign * radius / norm).to(vector.device)
            moved = moved + ((p.float() - before.float()) * delta).sum().to(norm.device)
            wanted = wanted + delta.square().sum().to(norm.device)
    share = moved / wanted
    return torch.where(torch.isfinite(share), share, 1.0)  # nothing was to move, so nothing was lost


def _has_fused_sgd(p: Tensor) -> bool:
    # Up to torch 2.13 the CPU kernel leaves float16 and bfloat16 weights as they are, and says nothing.
    exact = p.dtype in (torch.float32, torch.float64) or (p.is_floating_point() and p.device.type != "cpu")
    return exact and p.device.type in _get_fused_kernels_supported_devices()
