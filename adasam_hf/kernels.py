"""The one place that decides which of torch's implementations (fused, foreach, loop) may see a set of tensors.

Fused kernels walk through memory from each operand's first element on, all of them in step. On the CPU nothing checks
that this is what the tensors are: a transposed gradient is permuted, what lies beside a slice is overwritten, and a
moment smaller than its parameter is read past its end. Here they see only what they are right for; the rest goes
through single operations, which honour strides.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

if torch.distributed.is_available():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor as DTensor  # with its fallback, for other modules, too
    from torch.distributed.tensor import Partial, Placement, Replicate, distribute_tensor
else:
    DTensor = ()  # type: ignore[assignment, misc]  # of which nothing is an instance

HALF = (torch.float16, torch.bfloat16)

PLAIN = {Tensor, nn.Parameter}
SHAPE, DTYPE, DEVICE, LAYOUT = map(attrgetter, ("shape", "dtype", "device", "layout"))

Row = TypeVar("Row", bound=tuple[Tensor, ...])
CopiedRow = tuple[Tensor, Tensor, Tensor]  # parameter, vector, saved copy


def shard(t: Tensor) -> Tensor:
    """The part of a `DTensor` that lies on this process, sharing its memory; any other tensor as it is."""
    return t.to_local() if isinstance(t, DTensor) else t


def sharded_like(full: Tensor, p: Tensor) -> Tensor:
    """`full`, which every process has, in the shards of `p` if it is a `DTensor`; nothing travels."""
    return distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else full


# ---- what may be seen together ----


def split(rows: Iterable[Row], operands: int | None = None) -> tuple[list[Row], list[Row]]:
    """(together, apart): rows that a fused or foreach kernel may see in one call, and those for a loop.

    A row holds the operands of one parameter, the one that is written to first. It may go together with others if its
    operands agree in dtype, device and dense strides, if none is a lazily negated or conjugated view, and if its first
    one shares no memory with another row's, which a parallel kernel would write to at once. Decided from the tensors at
    hand, every time: nothing can be stale.

    Args:
        rows: of sharded parameters (`DTensor`) the shards come back.
        operands: how many of a row's tensors are operands, and may be sharded; all by default.

    Raises:
        RuntimeError: if shapes differ, or the first operand has two elements in one place (as after `Tensor.expand`).
    """
    rows = list(rows)
    if _all_plain([row[:operands] for row in rows]):
        return _without_shared_memory(rows, [])
    together: list[Row] = []
    apart: list[Row] = []
    for row in map(_shards, rows):
        (together if _dense_alike(row[:operands]) else apart).append(row)
    return _without_shared_memory(together, apart)


def _all_plain(rows: Sequence[tuple[Tensor | None, ...]]) -> bool:
    """Whether every row holds contiguous tensors alike, and no None, as nearly all models have them.

    It looks at one property of many tensors at a time, which takes a third of the time that rows one by one do.
    """
    columns = list(zip(*rows, strict=True))
    if not columns:
        return True
    if not all(set(map(type, column)) <= PLAIN for column in columns):
        return False
    first, *others = columns
    shapes, dtypes, devices = list(map(SHAPE, first)), list(map(DTYPE, first)), list(map(Tensor.get_device, first))
    return (
        not any(dtype.is_complex for dtype in set(dtypes))
        and all(list(map(DTYPE, column)) == dtypes for column in others)
        and all(list(map(Tensor.get_device, column)) == devices for column in others)
        and all(list(map(SHAPE, column)) == shapes for column in others)
        and all(all(map(Tensor.is_contiguous, column)) for column in columns)
        and not any(any(map(Tensor.is_neg, column)) for column in columns[:2])  # what comes from outside
    )


def _shards(row: Row) -> Row:
    return tuple(map(shard, row)) if isinstance(row[0], DTensor) else row  # type: ignore[return-value]


def _dense_alike(row: tuple[Tensor, ...]) -> bool:
    """Whether the operands of `row` fill memory in one order."""
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
    return order is not None


def split_with_copies(
    params: Sequence[Tensor], vectors: Sequence[Tensor], buffers: dict[Tensor, Tensor]
) -> tuple[list[CopiedRow], list[CopiedRow]]:
    """`split` for rows (parameter, vector), to each of which it adds a place for a copy of the parameter.

    That is its one of `buffers` if that has its shape, dtype and device and, where the parameter is dense, its
    order; otherwise a new one, which takes its place there.
    """
    rows = [(p, vector, buffers.get(p)) for p, vector in zip(params, vectors, strict=True)]
    if not _all_plain(rows):
        for p in params:
            buffers[p] = _copy_of(buffers.get(p), shard(p))
        return split([(p, vector, buffers[p]) for p, vector, _ in rows], operands=2)
    return _without_shared_memory(cast("list[CopiedRow]", rows), [])


def _copy_of(buffer: Tensor | None, t: Tensor) -> Tensor:
    if buffer is not None and buffer.shape == t.shape and _alike(buffer, t):
        order = dense_order(t)
        if order is None or order == dense_order(buffer):
            return buffer
    return torch.empty_like(t, requires_grad=False)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each of `sources` over the tensor of `targets` in its place."""
    if any(map(Tensor.is_neg, targets)):  # a list of tensors that are written to may hold no negated view
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
    elif targets:
        torch._foreach_copy_(list(targets), list(sources))


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and a.device == b.device


def dense_order(t: Tensor) -> tuple[int, ...] | None:
    """In which order the elements fill one gapless piece of memory, () for row-major; None if they do not.

    None, too, for a view whose memory holds other numbers than it has: the negative or conjugate ones, as in
    ``z.conj().imag``.
    """
    if t.is_neg() or t.is_conj():
        return None
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
    places = [row[0].untyped_storage()._cdata for row in together]
    if len(set(places)) == len(places):
        return together, apart
    storages: dict[int, list[int]] = {}
    for i, place in enumerate(places):
        storages.setdefault(place, []).append(i)
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
    return {device.type for device in set(map(DEVICE, tensors))} <= set(_get_fused_kernels_supported_devices())


def check_vector(vector: Tensor, p: Tensor) -> None:
    """Raise RuntimeError unless the weights `p` can move along `vector`."""
    if vector.layout is not torch.strided:
        raise RuntimeError("sparse gradients have no ascent; use dense ones (nn.Embedding(..., sparse=False))")
    if vector.shape != p.shape:
        raise RuntimeError(
            f"a direction has a vector of shape {tuple(vector.shape)} for a parameter of shape {tuple(p.shape)}; "
            "it must return one of the parameter's shape, or None"
        )
    if not p.is_floating_point():
        raise RuntimeError(f"a parameter has dtype {p.dtype}; only real floating-point parameters can ascend")


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
    wide = torch.float64 in set(map(DTYPE, gradients))
    if set(map(type, gradients)) <= PLAIN:
        return _norm(gradients, wide)
    placed: dict[tuple[DeviceMesh, tuple[Placement, ...]] | None, list[Tensor]] = {}
    for g in gradients:
        placed.setdefault((g.device_mesh, g.placements) if isinstance(g, DTensor) else None, []).append(shard(g))
    norms = []
    for place, shards in placed.items():
        norm = _norm(shards, wide)
        if place is not None:
            mesh, placements = place
            parted = [Replicate() if placement.is_replicate() else Partial("sum") for placement in placements]
            square = DTensor.from_local(norm.double().square(), mesh, parted, run_check=False)
            norm = square.full_tensor().sqrt().to(norm.dtype)
        norms.append(norm)
    return norms[0] if len(norms) == 1 else _norm_of_norms(norms)


def _norm(tensors: Sequence[Tensor], wide: bool) -> Tensor:
    return _norm_of_norms(torch._foreach_norm(list(tensors), 2.0, dtype=torch.float64 if wide else torch.float32))


def _norm_of_norms(parts: Sequence[Tensor]) -> Tensor:
    if len(set(map(DEVICE, parts))) > 1:
        parts = [part.to(parts[0].device) for part in parts]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(tuple(parts)))
    return norm


def add_along(together: Sequence[Row], apart: Sequence[Row], length: float, norm: Tensor) -> None:
    """p += length · v / norm for the rows (p, v, …) of `split`, or nothing if norm is 0 or not finite.

    The host does not ask which.
    """
    scale = length / norm  # infinite for a norm of 0, and for one so small that the move would overflow
    blocked = ~(torch.isfinite(scale) & torch.isfinite(norm))
    kinds = [(row[0].dtype, row[0].device) for row in together]
    able = {kind for kind in set(kinds) if _has_fused_sgd(*kind)}
    fused = [row for row, kind in zip(together, kinds, strict=True) if kind in able]
    rest = [*(row for row, kind in zip(together, kinds, strict=True) if kind not in able), *apart]
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


def _has_fused_sgd(dtype: torch.dtype, device: torch.device) -> bool:
    # Up to torch 2.13 the CPU kernel leaves float16 and bfloat16 weights as they are, and says nothing.
    exact = dtype in (torch.float32, torch.float64) or (dtype.is_floating_point and device.type != "cpu")
    return exact and device.type in _get_fused_kernels_supported_devices()
