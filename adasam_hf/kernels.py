"""The one place that decides which of torch's implementations (fused, foreach, loop) may see a set of tensors.

Fused kernels walk through memory from each operand's first element on, all of them in step. On the CPU nothing checks
that this is what the tensors are: a transposed gradient is permuted, what lies beside a slice is overwritten, and a
moment smaller than its parameter is read past its end. Here they see only what they are right for; the rest goes
through single operations, which honour strides.
"""

from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim.sgd import sgd
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate
else:
    DTensor = ()  # type: ignore[assignment, misc]  # of which nothing is an instance

HALF = (torch.float16, torch.bfloat16)

Row = TypeVar("Row", bound=tuple[Tensor, ...])


def shard(t: Tensor) -> Tensor:
    """The part of a `DTensor` that lies on this process, sharing its memory; any other tensor as it is."""
    return t.to_local() if isinstance(t, DTensor) else t


# ---- what may be seen together ----


def split(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """(together, apart): rows that a fused or foreach kernel may see in one call, and those for a loop.

    A row holds the operands of one parameter, the one that is written to first. It may go together with others if its
    operands agree in dtype, device and dense strides, and if its first one shares no memory with another row's, which
    a parallel kernel would write to at once. Decided from the tensors at hand, every time: nothing can be stale.

    Raises:
        RuntimeError: if shapes differ, or the first operand has two elements in one place (as after `Tensor.expand`).
    """
    together: list[Row] = []
    apart: list[Row] = []
    for row in rows:
        first, *others = row
        shape, order = first.shape, dense_order(first)
        for other in others:
            if other.shape != shape:
                raise RuntimeError(
                    f"a parameter of shape {tuple(shape)} meets a tensor of shape {tuple(other.shape)}, "
                    "made before the model was changed; make the optimizer after the last change"
                )
            if order is not None and not (_alike(first, other) and dense_order(other) == order):
                order = None
        if order is None and _overlaps_itself(first.shape, first.stride()):
            raise RuntimeError(
                f"a parameter of shape {tuple(first.shape)} with strides {first.stride()} has several elements in one "
                "place in memory (torch.Tensor.expand does this), so they cannot move apart; make it contiguous"
            )
        (apart if order is None else together).append(row)
    return _without_shared_memory(together, apart)


def copy_of(buffer: Tensor | None, t: Tensor) -> Tensor:
    """`buffer` if it can hold a copy of `t`, in the same order where that is dense; otherwise a new one."""
    if buffer is not None and buffer.shape == t.shape and _alike(buffer, t):
        order = dense_order(t)
        if order is None or order == dense_order(buffer):
            return buffer
    return torch.empty_like(t, requires_grad=False)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and a.device == b.device


def dense_order(t: Tensor) -> tuple[int, ...] | None:
    """In which order the elements fill one gapless piece of memory, () for row-major; None if they do not."""
    return () if t.is_contiguous() else _dense_order(t.shape, t.stride())


@lru_cache(maxsize=4096)  # a function of its arguments alone
def _dense_order(shape: Sequence[int], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride != expected:
            return None
        expected *= size
    return tuple(stride if size > 1 else 0 for stride, size in zip(strides, shape, strict=True))


@lru_cache(maxsize=4096)
def _overlaps_itself(shape: Sequence[int], strides: tuple[int, ...]) -> bool:
    """Whether two elements may lie in one place; True also for a few interleaved `as_strided` views where none do."""
    if 0 in shape:
        return False
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _without_shared_memory(together: list[Row], apart: list[Row]) -> tuple[list[Row], list[Row]]:
    storages: dict[int, list[int]] = {}
    for i, row in enumerate(together):
        storages.setdefault(row[0].untyped_storage()._cdata, []).append(i)
    if len(storages) == len(together):
        return together, apart
    shared: set[int] = set()
    for indices in storages.values():
        end, last = -1, -1
        for start, size, i in sorted(
            (int(together[i][0].storage_offset()), together[i][0].numel(), i) for i in indices
        ):
            if start < end and size:
                shared |= {last, i}
            if start + size > end:
                end, last = start + size, i
    rest = [row for i, row in enumerate(together) if i in shared]
    return [row for i, row in enumerate(together) if i not in shared], apart + rest


def have_fused(tensors: Iterable[Tensor]) -> bool:
    """Whether torch has fused optimizers for the devices of all these tensors."""
    return {t.device.type for t in tensors} <= set(_get_fused_kernels_supported_devices())


def check_vector(vector: Tensor, p: Tensor) -> None:
    """Raise RuntimeError unless the weights `p` can move along `vector`."""
    if vector.is_sparse:
        raise RuntimeError("sparse gradients have no ascent; use dense ones (nn.Embedding(..., sparse=False))")
    if vector.shape != p.shape:
        raise RuntimeError(
            f"a direction has a vector of shape {tuple(vector.shape)} for a parameter of shape {tuple(p.shape)}; "
            "it must return one of the parameter's shape, or None"
        )
    if not p.is_floating_point():
        raise RuntimeError(f"a parameter has dtype {p.dtype}; only real floating-point parameters can ascend")


def check_moment(moment: Tensor, p: Tensor, owner: str) -> None:
    """Raise RuntimeError unless `moment`, which the optimizer `owner` keeps for `p`, has a number for each of p's."""
    part, whole = shard(moment), shard(p)
    if moment.shape != p.shape or part.shape != whole.shape:
        problem = f"of shape {tuple(moment.shape)} for a parameter of shape {tuple(p.shape)}"
    elif not part.is_floating_point() or part.is_quantized or is_traceable_wrapper_subclass(part):
        problem = f"as {type(part).__name__} of dtype {part.dtype}, which is quantized"
    elif part.layout is not torch.strided:
        problem = f"with layout {part.layout}"
    else:
        return
    raise RuntimeError(
        f"{owner} keeps its first moment {problem}, so it is not a direction for the weights; use "
        "sam_direction='gradient' (or sam_preset='full'), or an optimizer with a full first moment such as adamw_torch"
    )


# ---- what the ascent needs of them ----


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Global L2 norm √(Σ‖gᵢ‖²) over tensors of any shapes and strides, sharded ones (`DTensor`) included.

    Accumulated in float32 (float64 if any gradient is float64): the norm of half-precision
    gradients is inaccurate or infinite in their own dtype. Sharded gradients cost one all-reduce of one number
    for each way of sharding among them.

    Returns: a 0-d tensor on the device of the first gradient, 0 if there is none; the host does not wait for it.
    """
    if not gradients:
        return torch.zeros(())
    wide = any(g.dtype == torch.float64 for g in gradients)
    placed: dict[tuple | None, list[Tensor]] = {}
    for g in gradients:
        placed.setdefault((g.device_mesh, g.placements) if isinstance(g, DTensor) else None, []).append(shard(g))
    norms = []
    for place, shards in placed.items():
        parts = torch._foreach_norm(shards, 2.0, dtype=torch.float64 if wide else torch.float32)
        norm = torch.linalg.vector_norm(torch.stack([n.to(parts[0].device) for n in parts]))
        if place is not None:
            mesh, placements = place
            parted = [Replicate() if placement.is_replicate() else Partial("sum") for placement in placements]
            square = DTensor.from_local(norm.double().square(), mesh, parted, run_check=False)
            norm = square.full_tensor().sqrt().to(norm.dtype)
        norms.append(norm)
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def add_along(together: Sequence[Row], apart: Sequence[Row], length: float, norm: Tensor) -> None:
    """p += length · v / norm for the rows (p, v, …) of `split`, or nothing if norm is 0 or not finite.

    The host does not ask which.
    """
    scale = length / norm  # infinite for a norm of 0, and for one so small that the move would overflow
    blocked = ~(torch.isfinite(scale) & torch.isfinite(norm))
    fused: list[Row] = []
    rest = list(apart)
    devices = _get_fused_kernels_supported_devices()
    for row in together:
        (fused if _has_fused_sgd(row[0], devices) else rest).append(row)
    if fused:
        # One read of p and v and one write of p: SGD's fused kernel with rate -length/norm, which leaves the
        # weights alone where found_inf is set (a zero scale would not: 0 · inf is NaN).
        rate = -scale if norm.device.type == "cpu" else -scale.float()  # the others read a float32
        sgd(
            [row[0] for row in fused], [row[1] for row in fused], [None] * len(fused),
            fused=True, found_inf=blocked.float(),
            lr=rate,  # type: ignore[arg-type]  # the fused kernel reads a tensor
            weight_decay=0.0, momentum=0.0, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip
    if rest:
        scale = torch.where(blocked, 0.0, scale)
        for p, v, *_ in rest:
            v = v.to(torch.promote_types(p.dtype, v.dtype))  # a bfloat16 moment would round its product with the scale
            p.add_(torch.where(blocked.to(p.device), 0, v) * scale.to(p.device))


def _has_fused_sgd(p: Tensor, devices: Collection[str]) -> bool:
    # Up to torch 2.13 the CPU kernel leaves float16 and bfloat16 weights as they are, and says nothing.
    exact = p.dtype in (torch.float32, torch.float64) or (p.is_floating_point() and p.device.type != "cpu")
    return exact and p.device.type in devices
