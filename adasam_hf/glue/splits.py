"""The splits of one run: which rows it trains, evaluates and predicts on, tokenized."""

from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .arguments import DataArguments, GlueTrainingArguments, ModelArguments
from .data import load_files, load_task
from .tasks import Task, get_task


def load_splits(
    data_args: DataArguments, args: GlueTrainingArguments, model_args: ModelArguments
) -> tuple[Task, DatasetDict]:
    """The task, and the rows of each split that the run uses, cut to the sizes asked for.

    Raises:
        ValueError, FileNotFoundError: for rows that are missing, broken or too few.
    """
    named = get_task(data_args.task_name) if data_args.task_name else None
    given = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    files = {split: file for split, file in given.items() if file is not None}
    of_hub = None if files else named
    evaluations = ["validation"] if of_hub is None else [split for split, _ in of_hub.evaluations]
    tests = ["test"] if of_hub is None else [split for split, _ in of_hub.submissions]
    held_out = data_args.held_out_samples if args.do_train or args.do_eval else None
    needs_train = args.do_train or held_out is not None
    splits = ["train"] * needs_train + evaluations * (args.do_eval and held_out is None) + tests * args.do_predict
    if of_hub is None:
        names = data_args.text_column_names
        texts = [name.strip() for name in names.split(",")] if names else None
        task, data = load_files(named, files, texts, data_args.label_column_name, splits)
    else:
        task = of_hub
        data = load_task(task, data_args.dataset_name_or_path, splits, model_args.cache_dir, args.hub_token)
    if data_args.subset_seed is not None and needs_train:
        data["train"] = data["train"].shuffle(seed=data_args.subset_seed)
    if held_out is not None:
        data |= _hold_out(data["train"], evaluations, held_out, data_args.max_train_samples)
        splits += evaluations
    # Rows that are not used are not tokenized.
    counts = {"train": data_args.max_train_samples, **dict.fromkeys(evaluations, data_args.max_eval_samples)}
    counts |= dict.fromkeys(tests, data_args.max_predict_samples)
    data = DatasetDict({split: _head(data[split], counts[split]) for split in splits})
    if data_args.label_noise and args.do_train:
        data["train"] = _with_other_labels(data["train"], task, data_args.label_noise, data_args.subset_seed or 0)
    if data_args.selection_samples and args.do_train:
        count = len(data["train"]) - data_args.selection_samples
        if count < 1:
            raise ValueError(
                f"selection_samples={data_args.selection_samples!r} leaves none of the {len(data['train'])} training "
                "rows to train on; lower it"
            )
        data["selection"] = data["train"].select(range(count, len(data["train"])))
        data["train"] = data["train"].select(range(count))
    return task, data


def _with_other_labels(rows: Dataset, task: Task, share: float, seed: int) -> Dataset:
    """The rows, with a wrong class for this share of them, drawn uniformly from the other classes."""
    if task.is_regression:
        raise ValueError(f"label_noise={share!r} needs classes, but {task.name} is a regression; leave it unset")
    labels, random = np.array(rows["label"]), np.random.default_rng(seed)
    chosen = random.choice(len(labels), round(share * len(labels)), replace=False)
    classes = len(task.labels)
    labels[chosen] = (labels[chosen] + random.integers(1, classes, size=len(chosen))) % classes
    return rows.remove_columns("label").add_column("label", labels.tolist(), feature=rows.features["label"])


def tokenize_splits(
    data: DatasetDict,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    args: GlueTrainingArguments,
) -> DatasetDict:
    """The splits with token ids in place of texts."""
    length = min(data_args.max_seq_length, tokenizer.model_max_length)

    def tokenize(rows: dict[str, list[Any]]) -> BatchEncoding:
        texts = [rows[column] for column in task.texts]
        padding = "max_length" if data_args.pad_to_max_length else False
        encoded: BatchEncoding = tokenizer(*texts, padding=padding, max_length=length, truncation=True)
        return encoded

    with args.main_process_first(desc="tokenization"):
        return DatasetDict(
            {
                split: rows.map(
                    tokenize,
                    batched=True,
                    remove_columns=[c for c in rows.column_names if c != "label"],
                    load_from_cache_file=not data_args.overwrite_cache,
                    desc=f"tokenize {split}",
                )
                for split, rows in data.items()
            }
        )


def _hold_out(rows: Dataset, evaluations: list[str], count: int, max_train: int | None) -> dict[str, Dataset]:
    """Hold out `count` training rows: the split without them, and each evaluation split made of them."""
    start = min(max_train or len(rows), len(rows) - count)
    if start < 1 or (max_train or 0) > start:
        raise ValueError(
            f"held_out_samples={count!r} leaves too few of the {len(rows)} training rows for "
            f"max_train_samples={max_train!r}; lower one of the two"
        )
    held_out = rows.select(range(start, start + count))
    return {"train": rows.select(range(start)), **dict.fromkeys(evaluations, held_out)}


def _head(rows: Dataset, count: int | None) -> Dataset:
    return rows if count is None else rows.select(range(min(count, len(rows))))
