"""The arguments of one fine-tuning run: three dataclasses, YAML files with their values, and the parser."""

import argparse
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import NoReturn

import yaml
from transformers import HfArgumentParser

from ..training_args import AdaSAMTrainingArguments
from .configs import find_config, read_text
from .tasks import TASKS, get_task

DESCRIPTION = """Fine-tune a classifier on a GLUE task or on your own sentences.

    adasam glue --task_name rte --model_name_or_path roberta-large --optim adasam --sam_rho 0.01 \\
        --do_train --do_eval --output_dir runs/rte
    adasam glue --config configs/glue/rte.yaml --config configs/optim/adasam.yaml --output_dir runs/rte
    adasam glue --train_file train.csv --validation_file dev.csv --model_name_or_path roberta-base \\
        --optim adasam --do_train --do_eval --output_dir runs/mine

The model, its scores and predictions, and record.json (everything needed to repeat the run) go to output_dir.
"""


@dataclass
class ModelArguments:
    """The model to fine-tune."""

    model_name_or_path: str = field(
        metadata={"help": "A model on the Hub, a local folder, or pip:PACKAGE/PATH inside an installed package."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "The tokenizer, if it is not the model's own."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "If the model's head has the wrong number of labels, replace it with a new one."},
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "The output_dir of a finished run: start from its weights, with a new head (as the paper starts "
            "RTE, MRPC and STS-B from MNLI). model_name_or_path must be the same as in that run."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code from the model's repository. Use it only if you have read that code."},
    )


@dataclass
class DataArguments:
    """The task, and where its rows come from."""

    task_name: str | None = field(default=None, metadata={"help": f"A GLUE task: {', '.join(TASKS)}."})
    dataset_name_or_path: str = field(
        default="nyu-mll/glue", metadata={"help": "GLUE on the Hub, or a local folder with the same layout."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Your own training rows: CSV, TSV, JSON or JSONL."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Your own validation rows, in the same formats."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Your own rows to predict, in the same formats."})
    text_column_names: str | None = field(
        default=None, metadata={"help": "The one or two text columns of your files, comma-separated."}
    )
    label_column_name: str = field(default="label", metadata={"help": "The label column of your files."})
    max_seq_length: int = field(
        default=128, metadata={"help": "Maximum number of tokens; longer inputs are truncated."}
    )
    pad_to_max_length: bool = field(
        default=False,
        metadata={"help": "Pad every input to max_seq_length, not each batch to its longest input (a multiple of 8)."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on at most this many rows, the first ones."}
    )
    subset_seed: int | None = field(
        default=None,
        metadata={
            "help": "Shuffle the training rows with this seed before max_train_samples and held_out_samples are taken. "
            "If unset, they stay in the order of the data."
        },
    )
    held_out_samples: int | None = field(
        default=None,
        metadata={
            "help": "To choose hyperparameters: hold this many training rows out of training (those after "
            "max_train_samples, or the last ones), and evaluate on them instead of the validation split."
        },
    )
    selection_samples: int | None = field(
        default=None,
        metadata={
            "help": "Hold out this many rows at the end of the training rows, and evaluate on them during training, "
            "so that load_best_model_at_end keeps the best checkpoint on them. The final scores are on other rows."
        },
    )
    label_noise: float | None = field(
        default=None,
        metadata={
            "help": "Give this share of the training rows a wrong label, drawn with subset_seed (0 if that is unset). "
            "Evaluation rows keep their labels."
        },
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on at most this many rows, the first ones."}
    )
    max_predict_samples: int | None = field(
        default=None, metadata={"help": "Predict at most this many rows, the first ones."}
    )
    measure_gap: float | None = field(
        default=None,
        metadata={
            "help": "After training, measure sam_gap of the final weights at this radius, on four training batches "
            "without dropout. The record has the result as final_sam_gap; it compares weights of any optimizers."
        },
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again instead of using cached results."})

    def __post_init__(self) -> None:
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            get_task(self.task_name)
        elif self.train_file is None:
            raise ValueError(
                f"task_name and train_file are not set; give a task ({', '.join(TASKS)}) or a file (needed even "
                "without training, because it defines the labels)"
            )
        for name in (
            "max_seq_length",
            "max_train_samples",
            "held_out_samples",
            "selection_samples",
            "max_eval_samples",
            "max_predict_samples",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"{name}={value!r} must be at least 1" + ("" if name == "max_seq_length" else ", or unset")
                )
        if self.label_noise is not None and not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise={self.label_noise!r} must be a share in [0, 1], or unset; try 0.2")
        if self.measure_gap is not None and not 0 < self.measure_gap < float("inf"):
            raise ValueError(f"measure_gap={self.measure_gap!r} must be a finite radius > 0, or unset; try 0.05")


@dataclass(repr=False)
class GlueTrainingArguments(AdaSAMTrainingArguments):
    """`AdaSAMTrainingArguments` that ask for training, evaluation or prediction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.do_train or self.do_eval or self.do_predict):
            raise ValueError("nothing to do; pass --do_train, --do_eval or --do_predict")


def config_tokens(path: str, known: set[str]) -> list[str]:
    """A YAML file as command-line tokens, so that argparse converts and checks its values.

    (PyYAML reads 1e-5 as text, and a dataclass would keep it that way.)

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not YAML or not a mapping, or has a key that is not `known`.
    """
    text = read_text(find_config(path), f"config={path!r}")
    try:
        typed, plain = yaml.safe_load(text), yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"config={path!r} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(typed, dict):
        raise ValueError(f"config={path!r} must be a mapping of argument names to values")
    if unknown := sorted(set(typed) - known):
        raise ValueError(f"config={path!r} has unknown keys {unknown}; see --help for the arguments")
    tokens: list[str] = []
    for name, value in plain.items():
        if typed[name] is None:
            continue
        if isinstance(value, list):
            tokens += [f"--{name}", *value]
        else:
            tokens.append(f"--{name}={json.dumps(typed[name]) if isinstance(value, dict) else value}")
    return tokens


# HfArgumentParser rewrites the types of the dataclasses' fields while it reads them, so threads take turns.
_PARSING = threading.Lock()


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # without the usage, which lists all of Transformers' arguments


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Appends defaults to the help texts, and leaves the description's line breaks alone."""


def parse(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, GlueTrainingArguments]:
    """Arguments from `argv`. Each --config FILE.yaml stands for its entries, over which all other flags win."""
    classes = (ModelArguments, DataArguments, GlueTrainingArguments)
    with _PARSING:
        parser = _Parser(
            classes,  # type: ignore[arg-type]  # no class is Transformers' NewType of Any
            prog="adasam glue",
            description=DESCRIPTION,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            conflict_handler="resolve",
        )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE.yaml",
        help="Read arguments from this file. Repeatable: later files win over earlier ones, and flags over all files.",
    )
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    known = {f.name for c in classes for f in fields(c)}
    configs, rest = first.parse_known_args(argv)
    words = [token for path in configs.config for token in config_tokens(path, known)] + rest
    model_args, data_args, args, _ = parser.parse_args_into_dataclasses(args=words, look_for_args_file=False)
    return model_args, data_args, args
