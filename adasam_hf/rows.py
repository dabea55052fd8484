"""Which rows of a window the ascent looks at, and how its micro-batches are cut down to them."""

import copy
import heapq
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
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

# trl's trainers and collators, by what their batches are.
PAIRED = {"DPOTrainer", "RewardTrainer", "DataCollatorForPreference", "DataCollatorForVisionPreference"}
UNPAIRED = {"SFTTrainer", "KTOTrainer", "CPOTrainer", "ORPOTrainer", "DPODataCollatorWithPadding"}
UNPAIRED |= {"DataCollatorForLanguageModeling", "DataCollatorForVisionLanguageModeling"}
UNPAIRED |= {"DataCollatorForUnpairedPreference", "DataCollatorForVisionUnpairedPreference"}


@dataclass(frozen=True)
class AscentRows:
    """What the ascent of one optimizer step looks at.

    Attributes:
        batches: one entry for each micro-batch of the window: those of its rows that the ascent looks at, or None
            where it takes no part. A micro-batch that takes part with all its rows is the same object.
        rows: rows that the ascent looks at; pairs of rows where they are paired, sequences where they are packed.
        total: rows, pairs or sequences of the window.
        share: rows / total; of packed rows the share of their tokens.
    """

    batches: list[Any | None]
    rows: int
    total: int
    share: float


def choose_rows(batches: Sequence[Any], fraction: float, minimum: int = 2, *, paired: bool = False) -> AscentRows:
    """About `fraction` of a window's rows, evenly spaced.

    The count is max(minimum, round(fraction · total)), at most `total`. Each micro-batch that takes part does so with
    `minimum` rows at least, or with all it has, for the sake of batch statistics and in-batch negatives; where the
    count does not suffice for every micro-batch, fewer take part. Where it is no sum of such parts, more rows are
    taken, never fewer. Micro-batches are evenly spaced over the window and rows within them (batches that are grouped
    by length are sorted). Rows whose ``labels`` are all -100 are taken only where there are no others, or to fill a
    micro-batch up to `minimum`.

    The number of a micro-batch's rows is the first dimension of ``input_ids``, ``inputs_embeds``, ``labels``,
    ``pixel_values``, ``input_values`` or ``input_features``, whichever it has first; else that of its first tensor or
    array; else the length of its first list. All that it holds is cut by that dimension: tensors, arrays, lists,
    tuples, and what is inside mappings, dataclasses, named tuples, and tuples or lists of tensors that have the rows
    each. Numbers, strings, None and tensors without a dimension stay.

    Columns that are then only padding (in ``attention_mask``, and -100 in ``labels``) are cut on the right, down to a
    multiple of 8, where the batch has no tensor of that width but those of a tokenizer, which are known to go by
    position. Of a packed row, (1, tokens) with ``position_ids`` that start again, ``seq_idx`` or ``cu_seq_lens_q`` and
    without an ``attention_mask``, whole sequences are taken: the fewest that hold `fraction` of the window's tokens.

    Values of labels, masks and boundaries are read. Where batches are on an accelerator already, this waits once for
    what has been queued there.

    Args:
        batches: the micro-batches of one optimizer step, as the collator makes them. They are left unchanged.
        fraction: in (0, 1].
        minimum: rows, pairs or sequences for each micro-batch, at least 1.
        paired: rows i and n + i belong together, as in trl's batches of n chosen above n rejected rows (`is_paired`);
            entries for each pair, such as ``margin``, may stand beside them.

    Raises:
        ValueError: if `fraction` or `minimum` is out of range.
        NotImplementedError: for what is not known to be by row, such as the patches of images; names its key.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"sam_ascent_fraction={fraction!r} must be above 0 and at most 1; 1 is the whole batch")
    if minimum < 1:
        raise ValueError(f"minimum={minimum!r} must be at least 1 row; 2 suits batch statistics and in-batch negatives")
    try:
        parts = _parts(batches, paired)
        chosen = _choose(parts, fraction, minimum)
        reduced = [
            None if not units else batch if len(units) == len(part.weights) else part.take(units)
            for batch, part, units in zip(batches, parts, chosen, strict=True)
        ]
    except _NotUnderstood as error:
        raise NotImplementedError(
            f"sam_ascent_fraction={fraction!r} takes some of a batch's rows, but {error}; use sam_ascent_fraction=1"
        ) from None
    total = sum(len(part.weights) for part in parts)
    if not total:
        return AscentRows(list(batches), 0, 0, 1.0)
    share = _weight(parts, chosen) / sum(sum(part.weights) for part in parts)
    return AscentRows(reduced, sum(map(len, chosen)), total, share)


def is_paired(trainer: Any) -> bool:
    """Whether batches of `trainer` (or of a collator) stack n chosen rows above n rejected ones, as trl's do.

    Raises:
        NotImplementedError: for a trainer or collator of trl of whose batches no share of the rows can be taken, since
            they stack other than pairs, or are generated or repeated in groups.
    """
    for something in (trainer, getattr(trainer, "data_collator", None)):
        for cls in type(something).__mro__:
            name, package = cls.__name__, cls.__module__.split(".")[0]
            if package != "trl" or name == "_BaseTrainer" or not re.search("Trainer$|Collator", name):
                continue
            if name in PAIRED | UNPAIRED:
                return name in PAIRED
            raise NotImplementedError(
                f"sam_ascent_fraction below 1 takes some of a batch's rows, which those of trl's {name} do not "
                "allow; use sam_ascent_fraction=1"
            )
    return False


class _NotUnderstood(Exception):
    """Something in a batch that is not known to be by row: the middle of `choose_rows`'s message."""


# ---- which rows ----


def _parts(batches: Sequence[Any], paired: bool) -> Sequence["_Rows | _Sequences"]:
    """The micro-batches, as packed sequences if all can be read so."""
    bounds = [None if paired else _sequence_bounds(batch) for batch in batches]
    if None not in bounds:
        return [_Sequences.of(batch, b) for batch, b in zip(batches, bounds, strict=True) if b]
    if any(b and len(b) > 2 for b in bounds):
        raise _NotUnderstood(f"of the window's batches some are packed rows and that at {bounds.index(None)} is not")
    return [_Rows.of(batch, paired) for batch in batches]


def _choose(parts: Sequence["_Rows | _Sequences"], fraction: float, minimum: int) -> list[list[int]]:
    """The units of each micro-batch that the ascent looks at."""
    total = sum(len(part.weights) for part in parts)
    if not any(isinstance(part, _Sequences) for part in parts):
        return _choose_count(parts, min(total, max(minimum, round(fraction * total))), minimum)
    tokens = sum(sum(part.weights) for part in parts)
    for count in range(min(minimum, total), total):
        chosen = _choose_count(parts, count, minimum)
        if _weight(parts, chosen) >= fraction * tokens:
            return chosen
    return _choose_count(parts, total, minimum)


def _choose_count(parts: Sequence["_Rows | _Sequences"], count: int, minimum: int) -> list[list[int]]:
    """`count` units, or the next larger number that lets each micro-batch that takes part have `minimum`."""
    sizes, useful = [len(part.weights) for part in parts], [len(part.useful) for part in parts]
    counts = _share_out(sizes, useful, count, minimum)
    return [_pick(part, counts.get(j, 0)) for j, part in enumerate(parts)]


def _pick(part: "_Rows | _Sequences", count: int) -> list[int]:
    """`count` units of a micro-batch, evenly spaced among those with labels; others only if these are too few."""
    if count <= len(part.useful):
        return _evenly(part.useful, count)
    others = sorted(set(range(len(part.weights))).difference(part.useful))
    return sorted(part.useful + _evenly(others, count - len(part.useful)))


def _share_out(sizes: list[int], useful: list[int], count: int, minimum: int) -> dict[int, int]:
    """How many units of each micro-batch that takes part: the minimum, and the rest in proportion to what it has."""
    members = _participants(sizes, useful, count, minimum)
    counts = {j: min(minimum, sizes[j]) for j in members}
    missing = count - sum(counts.values())
    for limits in (useful, sizes):
        # Sainte-Laguë's method: the next unit is that of the micro-batch with the smallest share so far.
        queue = [((counts[j] + 0.5) / limits[j], j) for j in members if counts[j] < limits[j]]
        heapq.heapify(queue)
        while queue and missing > 0:
            _, j = heapq.heappop(queue)
            counts[j] += 1
            missing -= 1
            if counts[j] < limits[j]:
                heapq.heappush(queue, ((counts[j] + 0.5) / limits[j], j))
    return counts


def _participants(sizes: list[int], useful: list[int], count: int, minimum: int) -> list[int]:
    """The micro-batches that take part: as many as can have the minimum, and enough to have `count` units."""
    able = [j for j, units in enumerate(useful) if units >= minimum]
    if sum(useful[j] for j in able) >= count > 0:
        members = _evenly(able, min(len(able), count // minimum))
        if sum(useful[j] for j in members) < count:
            members = _evenly(able, len(members) + 1)
        return members
    members = able
    for pool, limits in (
        ([j for j, units in enumerate(useful) if 0 < units < minimum], useful),
        ([j for j, units in enumerate(useful) if not units and sizes[j]], sizes),
    ):
        for more in range(len(pool) + 1):
            candidates = members + _evenly(pool, more)
            if sum(limits[j] for j in candidates) >= count:
                break
        members = candidates
    return members


def _evenly(items: list[int], count: int) -> list[int]:
    return [items[i * len(items) // count] for i in range(count)]


def _weight(parts: Sequence["_Rows | _Sequences"], chosen: list[list[int]]) -> int:
    return sum(part.weights[i] for part, units in zip(parts, chosen, strict=True) for i in units)


# ---- a micro-batch of rows ----


class _Rows(NamedTuple):
    """A micro-batch whose units are rows, or pairs of rows i and n + i."""

    batch: Any
    paired: bool
    weights: list[int]  # of each unit
    useful: list[int]  # units with a label that counts

    @classmethod
    def of(cls, batch: Any, paired: bool) -> "_Rows":
        rows = _count_rows(batch)
        if paired and rows % 2:
            raise _NotUnderstood(f"{rows} rows are no pairs, as those of a preference batch")
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
        raise _NotUnderstood("the batch is a list of mappings, which may be examples or columns")
    columns = [batch] if _is_array(batch) else list((_entries(batch) or {}).values())
    if isinstance(batch, Mapping):
        for key in [key for key in batch if str(key).endswith(("offsets", *BOUNDARIES)) and _is_array(batch[key])]:
            if batch[key].ndim == 1:
                raise _NotUnderstood(f"{key!r} says that rows are flattened into one")
        columns = [batch[key] for key in BY_ROW if key in batch] + columns
    direct = (value for value in columns if _is_array(value))
    inside = (array for value in columns for array in _arrays(value, lists=False))
    lists = (value for value in columns if isinstance(value, (list, tuple)))
    for value in chain(direct, inside, lists):
        return len(value)
    names = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
    raise _NotUnderstood(f"a batch of {names} has no tensor, array or list of rows")


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
            raise _NotUnderstood(f"{path!r} is of type {type(value).__name__}, which is not known to be by row")
        return self._inside(value, path)

    def _array(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor) and value.layout != torch.strided:
            raise _NotUnderstood(f"{path!r} is a tensor of layout {value.layout}")
        rows = self._rows_for(value, path)
        return value[rows] if isinstance(value, np.ndarray) else value[torch.tensor(rows, device=value.device)]

    def _sequence(self, value: Any, path: str) -> Any:
        """A list or tuple of one entry for each row, or of tensors that have the rows each."""
        lengths = [len(array) for array in _arrays(value)]
        columns = bool(lengths) and all(length in self.rows for length in lengths)
        if columns and len(value) in self.rows:
            raise _NotUnderstood(f"{path!r}, {len(value)} entries of {len(value)} rows, may be by row or by column")
        # If neither fits: the path into tensors or mappings that do not have the rows says more than the length here.
        inside = bool(value) and all(_is_array(entry) or isinstance(entry, Mapping) for entry in value)
        if columns or (inside and len(value) not in self.rows):
            return self._inside(value, path)
        return _rebuilt(value, [value[i] for i in self._rows_for(value, path)])

    def _inside(self, value: Any, path: str) -> Any:
        return _rebuilt(value, [self.entry(e, (path + end).lstrip(".")) for end, e in (_entries(value) or {}).items()])

    def _rows_for(self, value: Any, path: str) -> list[int]:
        if len(value) not in self.rows:
            raise _NotUnderstood(f"{path!r} has {len(value)} entries for {self.whole}")
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
        prefix = key.removesuffix(name)
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


class _Sequences(NamedTuple):
    """A micro-batch of one row, in which one sequence follows another; the units are sequences."""

    batch: Mapping[str, Any]
    bounds: list[int]  # 0, the end of the first sequence, …, the number of tokens
    weights: list[int]  # tokens of each unit
    useful: list[int]  # units with a label that counts

    @classmethod
    def of(cls, batch: Mapping[str, Any], bounds: list[int]) -> "_Sequences":
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
                raise _NotUnderstood(f"{key!r} of a packed row is not known to be by token")
            return value[:, positions.to(value.device)]

        return _rebuilt(self.batch, [cut(key, value) for key, value in self.batch.items()])


def _sequence_bounds(batch: Any) -> list[int] | None:
    """0 and the end of each sequence of a row that may be packed, (1, tokens); None for any other batch."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1 or batch.get("attention_mask") is not None:
        return None
    tokens = ids.shape[1]
    given = [batch[key] for key in BOUNDARIES if isinstance(batch.get(key), Tensor)]
    if given:
        bounds = [sorted(set(value.flatten().tolist())) for value in given]
        if any(b[0] != 0 or b[-1] != tokens or b != bounds[0] for b in bounds):
            raise _NotUnderstood(f"'cu_seq_lens_q' and 'cu_seq_lens_k' are not the bounds of {tokens} tokens")
        return bounds[0]
    for key, step in (("seq_idx", 0), ("position_ids", 1)):
        marks = batch.get(key)
        if isinstance(marks, Tensor) and marks.shape == ids.shape:
            starts = (marks[0, 1:] != marks[0, :-1] + step).nonzero().flatten() + 1
            return [0, *starts.tolist(), tokens]
    return None
