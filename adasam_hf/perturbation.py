"""The move to the worst nearby weights and the exact way back.

Knows tensors and parameter groups only: no closure, no Trainer, no update rule.
"""

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from . import activity
from .directions import Direction, Gradient, innermost
from .gradients import GradientRecord
from .hyperparameters import check_radius
from .kernels import (
    HALF,
    CopiedRow,
    add_along,
    check_vector,
    copy_all,
    dense_order,
    gradient_norm,
    shard,
    split_with_copies,
)

local = shard  # its name up to 0.1

ASAM_ETA = 0.01  # of the ASAM paper: weights near 0 are to move, too


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

    - Parameters without a gradient, frozen ones, and groups with radius 0 keep their bits. A group with radius 0
      still counts in the norm; a frozen parameter does not.
    - If ‖s‖ is 0 or not finite nothing moves.
    - Parameters may be slices, transposed or in any other layout; memory beside them is not touched.
    - Bytes read + written for each float32 parameter that moves: norm 4 + 0, save 4 + 4, move 8 + 4, restore 4 + 4;
      in another precision in proportion. One pass each on devices with torch's fused kernels, and no temporary of the
      model's size but the saved copy (``adaptive`` needs two more, and 40 bytes).
    - No host–device synchronization. What torch's fused kernels cannot take is moved in a loop (see `kernels`).
    - Sharded parameters (`DTensor`, as FSDP2 makes them) move shard by shard along one direction with one norm.
    - Half-precision weights round part of δ away; `applied` says what remains of it.
    - The saved weights live here (one copy of the moving parameters, kept between steps), never in
      ``optimizer.state``. Groups are read at each ascent, so new or replaced groups are seen.

    Args:
        optimizer: anything with torch's ``param_groups``.
        only: deprecated, give it to `ascend`.
    """

    def __init__(self, optimizer: Optimizer, only: Collection[Tensor] | None = None) -> None:
        self.optimizer = optimizer
        self.only = None if only is None else set(only)
        self._buffers: dict[Tensor, Tensor] = {}
        self._saved: tuple[list[Tensor], list[Tensor]] | None = None
        self._spent: GradientRecord | None = None  # gradients at w + δ, which are for the update and no other ascent
        self._step_hook: Any = None
        self.moved: list[Tensor] = []
        """The parameters that the last ascent moved, provided that its norm was finite and above 0."""
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
        self,
        rho: float | Sequence[float],
        direction: Direction | None = None,
        *,
        adaptive: bool = False,
        only: Collection[Tensor] | None = None,
    ) -> Tensor:
        """w ← w + ρ·s/‖s‖, and take the gradients away (``.grad = None``) for the second pass.

        Args:
            rho: radius in weight units, finite and >= 0: one for all groups, or one for each.
            direction: along what to move in place of the gradient s. One that needs no first pass leaves ``.grad``
                alone, and may be without vectors, whereupon nothing moves.
            adaptive: w ← w + ρ·T²s/‖Ts‖ with T = |w| + 0.01, element by element: the radius is then relative to the
                weights, and the neighbourhood does not depend on their scale (ASAM, arXiv:2102.11600).
            only: the parameters that may move and that count in the norm; None for all. If none of them has a gradient
                but others have, nothing moves.

        Returns: ‖s‖₂ (adaptive: ‖Ts‖₂), 0-d. 0, NaN or infinity mean that nothing moved.

        Raises:
            ValueError: for a bad radius, or a number of radii that is not the number of groups.
            RuntimeError: when called twice without `restore`, without any gradient, with sparse ones, with gradients
                that are still those of the last second pass, or for memory that cannot be moved as asked.
        """
        if self.active:
            raise RuntimeError("the weights are already perturbed; call restore() before the next ascend()")
        direction = direction or Gradient(self.optimizer)
        radii = self._radii(rho)
        if direction.first_pass:
            self._refuse_spent_gradients()
        params, vectors, radii = self._vectors(direction, radii, self.only if only is None else only)
        if adaptive and params:
            vectors, norm = _relative_to_weights(params, vectors)
        else:
            norm = gradient_norm(vectors)

        moves: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for p, vector, radius in zip(params, vectors, radii, strict=True):
            if radius > 0:
                some_params, some_vectors = moves.setdefault(radius, ([], []))
                some_params.append(p)
                some_vectors.append(vector)
        # Refuses before anything has changed.
        parts = {radius: split_with_copies(*pair, self._buffers) for radius, pair in moves.items()}
        rows = [row for together, apart in parts.values() for row in (*together, *apart)]
        moving, saved = [row[0] for row in rows], [row[2] for row in rows]
        self._refuse_fused_update(moving)
        copy_all(saved, moving)
        # Complete before the first change, so that an interrupt anywhere from here on can be undone.
        self._saved = (moving, saved)
        for radius, (together, apart) in parts.items():
            add_along(together, apart, direction.sign * radius, norm)
        # (The fused kernel counts no change, and a backward pass through a graph of the old weights is to be an error.)
        torch.autograd.graph.increment_version([shard(p) for p in moving])
        self.moved = [p for p, radius in zip(params, radii, strict=True) if radius > 0]
        half = any(p.dtype in HALF for p in moving)
        self.applied = _applied(parts, direction.sign, norm) if half else None
        direction.ascended(params, norm)
        if direction.first_pass:
            for p in self._trainable():
                p.grad = None
        self._note_ascent()
        if moving:
            activity.record_ascent()
        _forget_computed_weights()
        return norm

    @torch.no_grad()
    def restore(self) -> None:
        """w + δ → w by copying, bit for bit. Does nothing if the weights are not perturbed."""
        if self._saved is None:
            return
        moving, saved = self._saved
        copy_all(moving, saved)
        self._saved = None
        _forget_computed_weights()
        self.forget_spent_gradients()
        largest = max((p for p in self.moved if p.grad is not None), key=Tensor.numel, default=None)
        if largest is not None and self._step_hook is not None:  # without, nobody says when they have been used
            self._spent = GradientRecord([largest])

    @contextmanager
    def perturbed(
        self,
        rho: float | Sequence[float],
        direction: Direction | None = None,
        *,
        adaptive: bool = False,
        only: Collection[Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """`ascend` on entry, `restore` on exit, also when the body raises. Yields the norm."""
        try:
            yield self.ascend(rho, direction, adaptive=adaptive, only=only)
        finally:
            try:
                self.restore()
            finally:
                self.restore()  # where Ctrl-C cut the first call short

    def forget_spent_gradients(self) -> None:
        """Whoever has taken the gradients of the last second pass away says so here, and the next ascent may begin."""
        if self._spent is not None:
            self._spent.close()
            self._spent = None

    def release(self) -> None:
        """Restore and free what is kept between steps."""
        self.restore()
        self.forget_spent_gradients()
        if self._step_hook is not None:
            self._step_hook.remove()
            self._step_hook = None
        self._buffers.clear()
        self.moved = []

    # ---- what moves ----

    def _radii(self, rho: float | Sequence[float]) -> list[float]:
        groups = self.optimizer.param_groups
        several = isinstance(rho, Sequence) and not isinstance(rho, str)
        radii = list(rho) if several else [rho] * len(groups)  # type: ignore[arg-type]
        if len(radii) != len(groups):
            raise ValueError(
                f"rho={rho!r} has {len(radii)} radii for {len(groups)} parameter groups; give one for each"
            )
        return [check_radius(radius) for radius in radii]

    def _trainable(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _vectors(
        self, direction: Direction, radii: list[float], only: Collection[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """The parameters that have a vector to move along, their vectors and their radii."""
        chosen = None if only is None else set(only)  # `in` a list would compare elements
        found = [
            (p, vector, radius)
            for group, radius in zip(self.optimizer.param_groups, radii, strict=True)
            for p in group["params"]
            if p.requires_grad and (chosen is None or p in chosen) and (vector := direction(p)) is not None
        ]
        if not found:
            if direction.first_pass and all(p.grad is None for p in self._trainable()):
                raise RuntimeError("no parameter has a gradient to ascend along; call loss.backward() first")
            return [], [], []
        for p, vector, _ in found:
            check_vector(vector, p)
        params, vectors, per_parameter = zip(*found, strict=True)
        return list(params), list(vectors), list(per_parameter)

    def _refuse_fused_update(self, moving: list[Tensor]) -> None:
        """Torch's own fused optimizers would write beside a slice after we have been careful not to."""
        optimizer = innermost(self.optimizer)
        if not type(optimizer).__module__.startswith("torch.optim."):
            return
        if all(dense_order(p) is not None for p in moving):
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                if group.get("fused") and dense_order(shard(p)) is None:
                    raise RuntimeError(
                        f"{type(optimizer).__name__} with fused=True ignores the strides of a parameter of shape "
                        f"{tuple(p.shape)} that is a slice, or a negated view, of another tensor, and would write "
                        "beside it; set fused=False (optim='adamw_torch'), or make the parameter contiguous"
                    )

    # ---- what is known of the optimizer's steps ----

    def _note_ascent(self) -> None:
        optimizer = innermost(self.optimizer)
        if hasattr(optimizer, "note_ascent"):
            optimizer.note_ascent(self)
        if self._step_hook is None and isinstance(optimizer, Optimizer):
            this = weakref.ref(self)  # so that the optimizer does not keep the saved weights

            def on_step(*_: Any) -> None:
                perturbation = this()
                if perturbation is not None:
                    perturbation.forget_spent_gradients()

            self._step_hook = optimizer.register_step_post_hook(on_step)

    def _refuse_spent_gradients(self) -> None:
        if self._spent is not None and self._spent.uncleared():
            raise RuntimeError(
                "the gradients at w are mixed with those of the last second pass, since neither step() nor zero_grad() "
                "came between two ascents; to accumulate over micro-batches, take all first passes, then all second "
                "passes inside one `perturbed()`"
            )
        self.forget_spent_gradients()


def _relative_to_weights(params: list[Tensor], vectors: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """(T²s, ‖Ts‖₂) for the vectors s, with T = |w| + 0.01."""
    sizes = [p.abs().add_(ASAM_ETA) for p in params]
    scaled = list(torch._foreach_mul(sizes, vectors))
    norm = gradient_norm(scaled)
    torch._foreach_mul_(scaled, sizes)
    return scaled, norm


def _applied(parts: Mapping[float, tuple[list[CopiedRow], list[CopiedRow]]], sign: float, norm: Tensor) -> Tensor:
    """⟨δ', δ⟩/‖δ‖² with δ' = what the parameters moved by and δ = radius · vector / norm."""
    wide = torch.float64 if norm.device.type == "cpu" else torch.float32
    moved = wanted = torch.zeros((), dtype=wide, device=norm.device)
    for radius, (together, apart) in parts.items():
        for p, vector, before in (*together, *apart):
            delta = vector.float() * (sign * radius / norm).to(vector.device)
            moved = moved + ((p.float() - before.float()) * delta).sum().to(norm.device)
            wanted = wanted + delta.square().sum().to(norm.device)
    share = moved / wanted
    return torch.where(torch.isfinite(share), share, 1.0)  # nothing was to move, so nothing was lost


def _forget_computed_weights() -> None:
    """What enclosing regions would go on using: autocast's casts of the weights that were, and their parametrizations
    under `parametrize.cached`."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()
