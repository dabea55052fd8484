"""The classifier and the tokenizer of one run."""

import re
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .arguments import ModelArguments
from .data import resolve_path
from .tasks import Task


def load_model(model_args: ModelArguments, task: Task, trains: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with a head for the task, and its tokenizer.

    trains: whether the run trains, which makes a head with other labels acceptable.

    Raises:
        ValueError: for a head with the labels in another order or, without training, with other labels.
        FileNotFoundError: for a folder that does not exist.
    """
    path = resolve_path(model_args.model_name_or_path)
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise FileNotFoundError(
            f"model_name_or_path={path!r} is not a folder; give one with a config.json, or a name on the Hub"
        )
    common = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "trust_remote_code": model_args.trust_remote_code,
    }
    labels = list(task.labels)
    found = [name.lower() for _, name in sorted(AutoConfig.from_pretrained(path, **common).id2label.items())]
    wanted = [name.lower() for name in labels]
    if found != wanted and sorted(found) == sorted(wanted):
        raise ValueError(
            f"model_name_or_path={model_args.model_name_or_path!r} has a head with labels in the order {found}, but "
            f"the task has {labels}: scores would be wrong; start from the model without that head"
        )
    named = not all(re.fullmatch(r"label_\d+", name) for name in found)
    if not trains and named and labels and set(found) != set(wanted):
        raise ValueError(
            f"model_name_or_path={model_args.model_name_or_path!r} has a head for the labels {found}, but the task "
            f"has {labels}: its predictions would get the wrong names; use the data that it was trained on, or train"
        )
    config = AutoConfig.from_pretrained(
        path,
        num_labels=max(len(labels), 1),
        problem_type="regression" if task.is_regression else "single_label_classification",
        **common,
    )
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: i for i, name in enumerate(labels)}
    tokenizer = AutoTokenizer.from_pretrained(resolve_path(model_args.tokenizer_name or path), **common)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, config=config, ignore_mismatched_sizes=model_args.ignore_mismatched_sizes, **common
    )
    if model_args.init_from is not None:
        _take_weights(model, model_args.init_from)
    return model, tokenizer


def _take_weights(model: PreTrainedModel, run: str) -> None:
    """Copy everything below the head from a finished run. The head stays new, even if the labels are the same."""
    if not (Path(run) / "record.json").is_file():
        raise FileNotFoundError(f"init_from={run!r} has no record.json, so that run is not finished; finish it first")
    other = AutoModelForSequenceClassification.from_pretrained(run)
    if type(other) is not type(model):
        raise ValueError(
            f"init_from={run!r} is a {type(other).__name__}, but model_name_or_path is a {type(model).__name__}; "
            "give the model that the run started from"
        )
    model.base_model.load_state_dict(other.base_model.state_dict())
