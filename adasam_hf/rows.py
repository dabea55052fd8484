"""Which rows of a window the ascent looks at."""

import heapq
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .cutting import NotUnderstood, PackedSequences, Rows, sequence_bounds

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
        units: which rows, pairs or sequences of each micro-batch these are, and of how many.
        paired: as in `choose_rows`.
    """

    batches: list[Any | None]
    rows: int
    total: int
    share: float
    units: list[tuple[list[int], int]]
    paired: bool

    def take(self, index: int, batch: Any) -> Any | None:
        """The same rows of `batch`, to which a trainer has changed the micro-batch at `index`.

        Raises:
            NotImplementedError: if it has another number of rows, or is not known to be by row.
        """
        units, count = self.units[index]
        with _refusing(f" takes {len(units)} of {count} rows of a batch"):
            (part,) = _parts([batch], self.paired)
            if len(part.weights) != count:
                raise NotUnderstood(f"the trainer has made {len(part.weights)} of them")
            return _take(batch, part, units)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except NotUnderstood as error:
        raise NotImplementedError(f"sam_ascent_fraction{what}, but {error}; use sam_ascent_fraction=1") from None


def _take(batch: Any, part: "Rows | PackedSequences", units: list[int]) -> Any | None:
    return None if not units else batch if len(units) == len(part.weights) else part.take(units)


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
    with _refusing(f"={fraction!r} takes some of a batch's rows"):
        parts = _parts(batches, paired)
        chosen = _choose(parts, fraction, minimum)
        reduced = [_take(*one) for one in zip(batches, parts, chosen, strict=True)]
    units = [(some, len(part.weights)) for some, part in zip(chosen, parts, strict=True)]
    total = sum(count for _, count in units)
    if not total:
        return AscentRows(list(batches), 0, 0, 1.0, units, paired)
    share = _weight(parts, chosen) / sum(sum(part.weights) for part in parts)
    return AscentRows(reduced, sum(map(len, chosen)), total, share, units, paired)


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
                f"sam_ascent_fraction below 1 takes some of a batch's rows, which batches of trl's {name} do not "
                "allow; use sam_ascent_fraction=1"
            )
    return False


# ---- which rows ----


def _parts(batches: Sequence[Any], paired: bool) -> Sequence["Rows | PackedSequences"]:
    """The micro-batches, as packed sequences if all can be read so."""
    bounds = [None if paired else sequence_bounds(batch) for batch in batches]
    if None not in bounds:
        return [PackedSequences.of(batch, b) for batch, b in zip(batches, bounds, strict=True) if b]
    if any(b and len(b) > 2 for b in bounds):
        raise NotUnderstood(f"of the window's batches some are packed rows and that at {bounds.index(None)} is not")
    return [Rows.of(batch, paired) for batch in batches]


def _choose(parts: Sequence["Rows | PackedSequences"], fraction: float, minimum: int) -> list[list[int]]:
    """The units of each micro-batch that the ascent looks at."""
    total = sum(len(part.weights) for part in parts)
    if not any(isinstance(part, PackedSequences) for part in parts):
        return _choose_count(parts, min(total, max(minimum, round(fraction * total))), minimum)
    tokens = sum(sum(part.weights) for part in parts)
    for count in range(min(minimum, total), total):
        chosen = _choose_count(parts, count, minimum)
        if _weight(parts, chosen) >= fraction * tokens:
            return chosen
    return _choose_count(parts, total, minimum)


def _choose_count(parts: Sequence["Rows | PackedSequences"], count: int, minimum: int) -> list[list[int]]:
    """`count` units, or the next larger number that lets each micro-batch that takes part have `minimum`."""
    sizes, useful = [len(part.weights) for part in parts], [len(part.useful) for part in parts]
    counts = _share_out(sizes, useful, count, minimum)
    return [_pick(part, counts.get(j, 0)) for j, part in enumerate(parts)]


def _pick(part: "Rows | PackedSequences", count: int) -> list[int]:
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


def _weight(parts: Sequence["Rows | PackedSequences"], chosen: list[list[int]]) -> int:
    return sum(part.weights[i] for part, units in zip(parts, chosen, strict=True) for i in units)
