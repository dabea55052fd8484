"""What a sweep needs of a GPU: hours, and how a batch is split for cards of 16, 24 and 80 GB."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..configs import PACKAGE
from ..data import resolve_path
from .cost import KNOWN, OVERHEAD, STATES, Size, work
from .run import Run, parse_run

CARDS = (16, 24, 80)  # GB
USABLE = 0.9  # of a card's memory, beside what CUDA and fragments take
ACTIVATION_BYTES = 34  # of a layer, for each token and unit of width in 16 bits (arXiv:2205.05198), without scores
SUSTAINED = 100e12  # multiplications and additions a second, assumed of one card in 16 bits
TOKENS = {"cola": 16, "sst2": 32, "mrpc": 56, "stsb": 40, "rte": 88}
"""Of a padded row, rounded up from those of the small tasks; of other tasks 64 are assumed."""
MEASURED = "step-roberta-large-bf16.json"


def size_of(name: str) -> Size | None:
    """None for a model that is neither known nor here."""
    if name in KNOWN:
        return KNOWN[name]
    try:
        config = AutoConfig.from_pretrained(resolve_path(name))
        hidden, layers = config.hidden_size, config.num_hidden_layers
        inside = getattr(config, "intermediate_size", 4 * hidden)
        embeddings = (config.vocab_size + config.max_position_embeddings) * hidden
        return Size(embeddings + layers * (4 * hidden**2 + 2 * hidden * inside), hidden, layers)
    except (OSError, ValueError, AttributeError):
        return None


def micro_batch(run: Run, size: Size, card: float) -> int:
    """Rows that fit on a card of so many GB: the largest share of the batch by halves; 0 if not even one row does.

    In memory are float32 weights, gradients and moments, where weights are perturbed their copy, with autocast their
    casts, and what each layer's backward pass needs of rows of ``max_seq_length`` tokens. Gradient checkpointing would
    need far less.
    """
    _, data_args, args = parse_run(run.words)
    half = args.bf16 or args.fp16
    copies = 2 + STATES.get(args.optim, 2) + (args.resolved_rho > 0) + half / 2
    row = ACTIVATION_BYTES * (1 if half else 2) * size.layers * data_args.max_seq_length * size.hidden
    room = USABLE * card * 1e9 - 4 * copies * size.parameters
    rows = int(args.per_device_train_batch_size)
    while rows and rows * row > room:
        rows //= 2
    return rows


def seconds_of(run: Run, size: Size, record: dict[str, Any] | None) -> float:
    """Of one run on one card: as measured, or as long as its multiplications and additions would take; and OVERHEAD.

    A run's `work` counts forward and backward passes of a row.
    """
    tokens = work(run) * TOKENS.get(run.axes["task_name"], 64)
    if record is None:
        return OVERHEAD + 6 * size.parameters * tokens / SUSTAINED
    spent = statistics.median(record["seconds"]["AdaSAM"]) / 2  # of one pass
    return float(OVERHEAD + tokens * spent / record["tokens"] * size.parameters / record["parameters"])


def measurement(folder: Path | None = None) -> dict[str, Any] | None:
    """The step benchmark's record of RoBERTa-large in bf16, if an accelerator has made one."""
    path = (folder or PACKAGE.parent / "results" / "accelerator") / MEASURED
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    usable = record.get("device", "cpu") != "cpu" and record.get("seconds", {}).get("AdaSAM")
    return record if usable else None


def describe_cards(runs: Sequence[Run]) -> list[str]:
    """Lines of a dry run: GPU hours of these runs, micro-batches, and what preemption costs."""
    if not runs:
        return []
    sizes = {run: size_of(parse_run(run.words)[0].model_name_or_path) for run in runs}
    known = {run: size for run, size in sizes.items() if size is not None}
    if len(known) < len(sizes):
        return ["  GPU: hours and micro-batches are not known, as the model's size is not"]
    record = measurement()
    hours = sum(seconds_of(run, size, record) for run, size in known.items()) / 3600
    if record is None:
        source = (
            f"no accelerator has been measured: 6 × parameters × tokens at an assumed {SUSTAINED / 1e12:.0f} TFLOP/s"
        )
    else:
        source = f"from the step benchmark on {', '.join(record['hardware']['accelerators'])}"
    lines = [f"  GPU: about {hours:.{1 if hours < 100 else 0}f} hours of one card ({source})"]
    for card in CARDS:
        splits = {(micro_batch(run, size, card), _batch(run)) for run, size in known.items()}
        words = sorted(
            f"{rows} rows × {batch // rows}" if rows else f"not even 1 of {batch} rows" for rows, batch in splits
        )
        lines.append(f"  {card} GB: micro-batch × accumulation {'; '.join(words)}")
    saving = [parse_run(run.words)[2].save_strategy != "no" for run in runs]
    resumes = "goes on from its last checkpoint" if all(saving) else "without checkpoints begins again"
    lines.append(f"  preemption: repeat the command; finished runs are skipped, and one that was cut off {resumes}")
    return lines


def _batch(run: Run) -> int:
    args = parse_run(run.words)[2]
    return int(args.per_device_train_batch_size)
