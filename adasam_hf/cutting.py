"""How a micro-batch is cut down to some of its rows or, if it is packed, of its sequences."""

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

IGNORED = -100  # the label of a position, or of a row, that does not count in the loss

# Whose first dimension is the number of rows, where there is one of them.
BY_ROW = ("input_ids", "inputs_embeds", "labels", "pixel_values", "input_values", "input_features")

# Tensors that end in an `attention_mask`'s columns, and that go with it when padding is cut.
PADDED = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids", "special_tokens_mask"}
PADDED |= {"completion_mask", "assistant_masks", "inputs_embeds", "labels"}

# What is known of packed rows, (1, tokens), in which one sequence follows another.
PACKED = {"input_ids", "labels", "shift_labels", "position_ids", "token_type_ids", "special_tokens_mask"}
PACKED |= {"completion_mask", "assistant_masks"}
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")


class NotUnderstood(Exception):
    """Something in a batch that is not known to be by row: the middle of `choose_rows`'s message."""


# ---- a micro-batch of rows ----


class Rows(NamedTuple):
    """A micro-batch whose units are rows, or pairs of rows i and n + i."""

    batch: Any
    paired: bool
    weights: list[int]  # of each unit
    useful: list[int]  # units with a label that counts

    @classmethod
    def of(cls, batch: Any, paired: bool) -> "Rows":
        rows = _count_rows(batch)
        if paired and rows % 2:
            raise NotUnderstood(f"{rows} rows are not pairs, as a preference batch has them")
        counts = _rows_with_labels(batch, rows)
        units = rows // 2 if paired else rows
        useful = [i for i in range(units) if counts[i] or (paired and counts[units + i])]
        return cls(batch, paired, [1] * units, useful)

    def take(self, units: list[int]) -> Any:
        n = len(self.weights)
        if self.paired:
            rows = _Picked({2 * n: units + [n + i for i in units], n: units}, f"{n} pairs of rows")
        else:
            rows = _Picked({n: units}, f"{n} rows")
        return _without_padding(rows.columns(self.batch))


def _entries(value: Any) -> dict[str, Any] | None:
    """What is inside a mapping, dataclass, list or tuple, by the end of its path; None if it is none of these."""
    if isinstance(value, Mapping):
        return {f".{key}": entry for key, entry in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {f".{field.name}": getattr(value, field.name) for field in fields(value)}
    if isinstance(value, (list, tuple)):
        return {f"[{i}]": entry for i, entry in enumerate(value)}
    return None


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0


def _is_scalar(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 0
    return value is None or isinstance(value, (str, bytes, int, float, complex, np.generic))


def _arrays(value: Any, lists: bool = True) -> Iterator[Any]:
    """The tensors and arrays in `value`; without those in lists, if so asked."""
    if _is_array(value):
        yield value
    elif lists or not isinstance(value, list):
        for entry in (_entries(value) or {}).values():
            yield from _arrays(entry, lists)


def _count_rows(batch: Any) -> int:
    if isinstance(batch, (list, tuple)) and batch and all(isinstance(entry, Mapping) for entry in batch):
        raise NotUnderstood("the batch is a list of mappings, which may be examples or columns")
    columns = [batch] if _is_array(batch) else list((_entries(batch) or {}).values())
    if isinstance(batch, Mapping):
        for key in [key for key in batch if str(key).endswith(("offsets", *BOUNDARIES)) and _is_array(batch[key])]:
            if batch[key].ndim == 1:
                raise NotUnderstood(f"{key!r} says that rows are flattened into one")
        columns = [batch[key] for key in BY_ROW if key in batch] + columns
    direct = (value for value in columns if _is_array(value))
    inside = (array for value in columns for array in _arrays(value, lists=False))
    lists = (value for value in columns if isinstance(value, (list, tuple)))
    for value in chain(direct, inside, lists):
        return len(value)
    names = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
    raise NotUnderstood(f"a batch of {names} has no tensor, array or list of rows")


def _rows_with_labels(batch: Any, rows: int) -> list[bool]:
    """For each row whether one of its ``labels``, as far as they are whole numbers, is not -100."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        labels = torch.from_numpy(labels)
    if not _is_whole(labels) or len(labels) != rows:
        return [True] * rows
    return (labels.reshape(rows, -1) != IGNORED).any(1).tolist()


def _is_whole(value: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor of integers, as labels are for which -100 has a meaning."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return False
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


class _Picked:
    """Cuts what a micro-batch holds, down to the rows that `rows` has for its length."""

    def __init__(self, rows: dict[int, list[int]], whole: str):
        self.rows, self.whole = rows, whole

    def columns(self, batch: Any) -> Any:
        """The batch itself: the entries of a list or tuple are its columns."""
        return self.entry(batch, "batch") if _is_array(batch) else self._inside(batch, "")

    def entry(self, value: Any, path: str) -> Any:
        if _is_scalar(value):
            return value
        if _is_array(value):
            return self._array(value, path)
        if isinstance(value, (list, tuple)) and not hasattr(value, "_make"):
            return self._sequence(value, path)
        if _entries(value) is None:
            raise NotUnderstood(f"{path!r} is of type {type(value).__name__}, which is not known to be by row")
        return self._inside(value, path)

    def _array(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor) and value.layout != torch.strided:
            raise NotUnderstood(f"{path!r} is a tensor of layout {value.layout}")
        rows = self._rows_for(value, path)
        return value[rows] if isinstance(value, np.ndarray) else value[torch.tensor(rows, device=value.device)]

    def _sequence(self, value: Any, path: str) -> Any:
        """A list or tuple of one entry for each row, or of tensors that have the rows each."""
        lengths = [len(array) for array in _arrays(value)]
        columns = bool(lengths) and all(length in self.rows for length in lengths)
        if columns and len(value) in self.rows:
            raise NotUnderstood(f"{path!r}, {len(value)} entries of {len(value)} rows, may be by row or by column")
        # If neither fits: the path into tensors or mappings that do not have the rows says more than the length here.
        inside = bool(value) and all(_is_array(entry) or isinstance(entry, Mapping) for entry in value)
        if columns or (inside and len(value) not in self.rows):
            return self._inside(value, path)
        return _rebuilt(value, [value[i] for i in self._rows_for(value, path)])

    def _inside(self, value: Any, path: str) -> Any:
        return _rebuilt(value, [self.entry(e, (path + end).lstrip(".")) for end, e in (_entries(value) or {}).items()])

    def _rows_for(self, value: Any, path: str) -> list[int]:
        if len(value) not in self.rows:
            raise NotUnderstood(f"{path!r} has {len(value)} entries for {self.whole}")
        return self.rows[len(value)]


def _rebuilt(value: Any, entries: list[Any]) -> Any:
    """A mapping, dataclass, list or tuple like `value`, with other entries in it."""
    if isinstance(value, Mapping):
        # As Transformers and Accelerate do when they move a batch.
        return type(value)(dict(zip(value, entries, strict=True)))  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(entries)
    if isinstance(value, (list, tuple)):
        return type(value)(entries)
    other = copy.copy(value)
    for field, entry in zip(fields(value), entries, strict=True):
        object.__setattr__(other, field.name, entry)  # which a frozen dataclass allows, too
    return other


def _without_padding(batch: Any) -> Any:
    """Without columns on the right that are only padding, as `choose_rows` says. Changes `batch` itself."""
    if not isinstance(batch, MutableMapping):
        return batch
    masks = {key: _mask_of(batch, key) for key in batch}
    for mask_key in sorted({mask for mask in masks.values() if mask is not None}):
        mask, columns = batch[mask_key], [key for key in batch if masks[key] == mask_key]
        if any(masks[key] is None and _has_columns(value, mask.shape[1]) for key, value in batch.items()):
            continue
        used = mask.bool().any(0)
        for key in columns:
            if key.endswith("labels"):
                used = used | (batch[key] != IGNORED).any(0)
        used_columns = used.nonzero()
        if len(used_columns):
            length = -(-(int(used_columns.max()) + 1) // 8) * 8
            batch.update({key: batch[key][:, :length] for key in columns})
    return batch


def _mask_of(batch: Mapping[Any, Any], key: Any) -> str | None:
    """The key of the mask whose columns `key` is known to share, as `a_input_ids` those of `a_attention_mask`.

    A mask is one only beside tokens of its shape; a decoder's is none, since its columns are those of ``labels``, too.
    """
    value = batch[key]
    for name in PADDED if isinstance(key, str) and isinstance(value, Tensor) else ():
        prefix: str = key.removesuffix(name)
        mask = batch.get(prefix + "attention_mask")
        tokens = batch.get(prefix + "input_ids", batch.get(prefix + "inputs_embeds"))
        if prefix == key or prefix == "decoder_" or not isinstance(mask, Tensor) or not isinstance(tokens, Tensor):
            continue
        if mask.ndim != 2 or tokens.shape[:2] != mask.shape or value.shape[:2] != mask.shape:
            continue
        if name == "inputs_embeds" or (value.ndim == 2 and (name != "labels" or _is_whole(value))):
            return prefix + "attention_mask"
    return None


def _has_columns(value: Any, width: int) -> bool:
    """Whether a dimension of `value`, other than the first, is `width`."""
    if _is_array(value):
        return width in value.shape[1:]
    entries = list((_entries(value) or {}).values())
    if isinstance(value, (list, tuple)) and any(
        len(e) == width for e in entries if isinstance(e, (list, tuple)) or _is_array(e)
    ):
        return True
    return any(_has_columns(entry, width) for entry in entries)


# ---- a packed row ----


class PackedSequences(NamedTuple):
    """A micro-batch of one row, in which one sequence follows another; the units are sequences."""

    batch: Mapping[str, Any]
    bounds: list[int]  # 0, the end of the first sequence, …, the number of tokens
    weights: list[int]  # tokens of each unit
    useful: list[int]  # units with a label that counts

    @classmethod
    def of(cls, batch: Mapping[str, Any], bounds: list[int]) -> "PackedSequences":
        weights = [stop - start for start, stop in pairwise(bounds)]
        labels, useful = batch.get("labels"), list(range(len(weights)))
        if isinstance(labels, Tensor) and labels.shape == batch["input_ids"].shape:
            before = pad((labels[0] != IGNORED).cumsum(0), (1, 0))[torch.tensor(bounds, device=labels.device)]
            useful = before.diff().nonzero().flatten().tolist()
        return cls(batch, bounds, weights, useful)

    def take(self, units: list[int]) -> Any:
        spans = [torch.arange(self.bounds[i], self.bounds[i + 1]) for i in units]
        lengths = torch.tensor([len(span) for span in spans])
        positions, shape = torch.cat(spans), self.batch["input_ids"].shape

        def cut(key: str, value: Any) -> Any:
            if key in BOUNDARIES and isinstance(value, Tensor) and value.ndim == 1:
                return pad(lengths.cumsum(0), (1, 0)).to(value)
            if key in LONGEST and value is not None:
                longest = int(lengths.max())
                return torch.full_like(value, longest) if isinstance(value, Tensor) else longest
            if key == "seq_idx" and isinstance(value, Tensor):
                return torch.repeat_interleave(torch.arange(len(units)), lengths)[None].to(value)
            if _is_scalar(value):
                return value
            if key not in PACKED or not isinstance(value, Tensor) or value.shape != shape:
                raise NotUnderstood(f"{key!r} of a packed row is not known to be by token")
            return value[:, positions.to(value.device)]

        return _rebuilt(self.batch, [cut(key, value) for key, value in self.batch.items()])


def sequence_bounds(batch: Any) -> list[int] | None:
    """0 and the end of each sequence of a row that may be packed, (1, tokens); None for any other batch."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1 or batch.get("attention_mask") is not None:
        return None
    tokens = ids.shape[1]
    given = [batch[key] for key in BOUNDARIES if isinstance(batch.get(key), Tensor)]
    if given:
        bounds = [sorted(set(value.flatten().tolist())) for value in given]
        if any(b[0] != 0 or b[-1] != tokens or b != bounds[0] for b in bounds):
            raise NotUnderstood(f"'cu_seq_lens_q' and 'cu_seq_lens_k' are not the bounds of {tokens} tokens")
        return bounds[0]
    for key, step in (("seq_idx", 0), ("position_ids", 1)):
        marks = batch.get(key)
        if isinstance(marks, Tensor) and marks.shape == ids.shape:
            starts = (marks[0, 1:] != marks[0, :-1] + step).nonzero().flatten() + 1
            return [0, *starts.tolist(), tokens]
    return None
