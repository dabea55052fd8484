"""One fine-tuning run: arguments → model, scores, predictions and a record."""

import itertools
import json
import re
import sys
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import transformers
import yaml
from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..checkpoints import last_complete
from ..sharpness import sam_gap
from ..trainer import AdaSAMTrainer
from ..training_args import AdaSAMTrainingArguments
from .data import load_files, load_task, resolve_path
from .metrics import Evaluation, constant_loss, predictions_of
from .record import provenance, write_record
from .tasks import TASKS, Task, get_task

GAP_BATCHES = 4
logger = transformers.utils.logging.get_logger(__name__)


@dataclass
class ModelArguments:
    """Which model is fine-tuned."""

    model_name_or_path: str = field(
        metadata={"help": "A model on the hub, a folder, or pip:PACKAGE/PATH inside an installed package."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Its tokenizer, if it lies elsewhere."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep what is downloaded."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace a head whose number of labels is not the task's by a new one."}
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "A finished run of this script (its output_dir): start from its weights under a new head (as "
            "RTE, MRPC and STS-B from MNLI in the paper [remembered, not re-read]). model_name_or_path stays that of "
            "the run."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code from the model's repository. Only for repositories you have read."}
    )


@dataclass
class DataArguments:
    """Which task, and where its rows come from."""

    task_name: str | None = field(default=None, metadata={"help": f"A GLUE task: {', '.join(TASKS)}."})
    dataset_name_or_path: str = field(
        default="nyu-mll/glue", metadata={"help": "GLUE on the hub, or a local folder in the same layout."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Your own training rows: CSV, TSV, JSON or JSONL."})
    validation_file: str | None = field(default=None, metadata={"help": "Your own validation rows."})
    test_file: str | None = field(default=None, metadata={"help": "Your own rows to predict."})
    text_column_names: str | None = field(
        default=None, metadata={"help": "The one or two text columns of your files, separated by a comma."}
    )
    label_column_name: str = field(default="label", metadata={"help": "The label column of your files."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut to so many tokens."})
    pad_to_max_length: bool = field(
        default=False,
        metadata={"help": "Pad all inputs to max_seq_length, instead of a batch to its longest, in multiples of 8."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many rows only."})
    subset_seed: int | None = field(
        default=None,
        metadata={
            "help": "Shuffle the training rows by this seed before max_train_samples and held_out_samples are taken. "
            "Unset: in the order of the data."
        },
    )
    held_out_samples: int | None = field(
        default=None,
        metadata={
            "help": "Evaluate on so many training rows, which are held out (those after max_train_samples, or the last "
            "ones), instead of the validation split: for choosing hyperparameters."
        },
    )
    selection_samples: int | None = field(
        default=None,
        metadata={
            "help": "Do not train on the last so many training rows, but evaluate on them during training, so that "
            "load_best_model_at_end keeps what is best on them; the scores at the end are of other rows."
        },
    )
    label_noise: float | None = field(
        default=None,
        metadata={
            "help": "Give this share of the training rows another label, drawn by subset_seed (unset: 0). Rows that "
            "are evaluated keep theirs."
        },
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many rows only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict the first so many rows only."})
    measure_gap: float | None = field(
        default=None,
        metadata={
            "help": "After training, measure sam_gap of the final weights at this radius, on four training batches "
            "without dropout (final_sam_gap): how sharp they are, whatever the optimizer was."
        },
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again what has been tokenized before."})

    def __post_init__(self) -> None:
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            get_task(self.task_name)
        elif self.train_file is None:
            raise ValueError(
                f"task_name and train_file are not set; name a task ({', '.join(TASKS)}) or a file (which defines the "
                "labels, so it is needed also where nothing is trained)"
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
    """`AdaSAMTrainingArguments`; one of the three jobs must be asked for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.do_train or self.do_eval or self.do_predict):
            raise ValueError("nothing to do; pass --do_train, --do_eval or --do_predict")


def config_tokens(path: str, known: set[str]) -> list[str]:
    """A YAML file as command-line tokens, so that argparse converts and checks its values.

    (PyYAML takes 1e-5 for text, and a dataclass would keep it so.)

    Raises:
        FileNotFoundError: without the file.
        ValueError: if it is no YAML or no mapping, or has a key that is not `known`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"config={path!r} does not exist")
    text = Path(path).read_text(encoding="utf-8")
    try:
        typed, plain = yaml.safe_load(text), yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"config={path!r} is no YAML that can be read: {' '.join(str(error).split())}") from error
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


# HfArgumentParser rewrites the types of the dataclasses' fields while it reads them: no two threads at once.
_PARSING = threading.Lock()


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, GlueTrainingArguments]:
    """Arguments from `argv`, where each --config FILE.yaml stands for its entries and all others come after them."""
    classes = (ModelArguments, DataArguments, GlueTrainingArguments)
    with _PARSING:
        parser = HfArgumentParser(
            classes,  # type: ignore[arg-type]  # no class is Transformers' NewType of Any
            prog="run_glue.py",
            allow_abbrev=False,
            conflict_handler="resolve",
        )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE.yaml", help="Read arguments from FILE; may be repeated."
    )
    first = transformers.HfArgumentParser((), add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    known = {f.name for c in classes for f in fields(c)}
    configs, rest = first.parse_known_args(argv)
    words = [token for path in configs.config for token in config_tokens(path, known)] + rest
    model_args, data_args, args, _ = parser.parse_args_into_dataclasses(args=words, look_for_args_file=False)
    return model_args, data_args, args


def main(argv: list[str] | None = None) -> AdaSAMTrainer:
    """Run what the command line asks for. Returns the trainer; results are in its `output_dir`."""
    return run(*parse(sys.argv[1:] if argv is None else argv))


def run(model_args: ModelArguments, data_args: DataArguments, args: GlueTrainingArguments) -> AdaSAMTrainer:
    """Train, evaluate and predict as asked.

    Writes to ``args.output_dir``: the model, `all_results.json`, GLUE's submission files, a model card and
    `record.json`, which has all that is needed to do the run again; that of an earlier run stays, as `record-1.json`
    and so on.
    """
    origin = provenance()  # of the code that runs, not of what it has become when the run ends
    _prepare_folder(Path(args.output_dir))
    checkpoint = _find_checkpoint(args)
    task, data = _load_data(data_args, args, model_args)
    set_seed(args.seed)
    model, tokenizer = _load_model(model_args, task, args.do_train)
    data = _tokenize(data, task, tokenizer, data_args, args)
    compute_metrics = Evaluation(task.metrics, task.is_regression)

    trainer = AdaSAMTrainer(
        model=model,
        args=args,
        train_dataset=data["train"] if args.do_train else None,
        eval_dataset=data.get("selection", data[task.evaluations[0][0]] if args.do_eval else None),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        compute_metrics=compute_metrics,
    )
    # Classification heads take **kwargs, so the Trainer believes that they divide by num_items_in_batch. They do not:
    # it would sum over micro-batches, and results would depend on how a batch is split.
    trainer.model_accepts_loss_kwargs = False

    metrics: dict[str, Any] = {}
    if args.do_train:
        metrics |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        metrics["train_samples"] = len(data["train"])
        metrics["train_constant_loss"] = constant_loss(data["train"]["label"][:], task.is_regression)
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if args.do_eval:
        scores: dict[str, float] = {}
        bins: dict[str, list] = {}
        for split, suffix in reversed(task.evaluations):  # the main one last: the model card shows the last
            found = trainer.evaluate(data[split], metric_key_prefix=f"eval{suffix}")
            scores |= {
                name.replace(f"eval{suffix}_", "eval_") + suffix: v for name, v in found.items() if name != "epoch"
            }
            scores[f"eval_samples{suffix}"] = len(data[split])
            bins[f"eval_reliability{suffix}"] = compute_metrics.reliability
        trainer.log_metrics("eval", scores)
        trainer.save_metrics("eval", scores)
        metrics |= scores | bins
    if args.do_predict:
        for split, file in task.submissions:
            rows = data[split]
            if "label" in rows.column_names:
                rows = rows.remove_columns("label")  # hidden labels are -1, of which no loss can be taken
            output = trainer.predict(rows, metric_key_prefix="predict").predictions
            if trainer.is_world_process_zero():
                write_submission(Path(args.output_dir) / file, task, predictions_of(output, task.is_regression))
    if args.do_train and data_args.measure_gap is not None:
        # in float32; last, as unwrapping takes autocast off the model itself
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        batches = itertools.islice(trainer.get_train_dataloader(), GAP_BATCHES)
        metrics["final_sam_gap"] = sam_gap(model, batches, data_args.measure_gap)

    card: dict[str, Any] = {"tasks": "text-classification"}
    if not model_args.model_name_or_path.startswith("pip:"):  # which the hub has not, and a card would link there
        card["finetuned_from"] = model_args.model_name_or_path
    if data_args.task_name:
        card |= {"dataset_tags": "glue", "dataset_args": task.name, "dataset": f"GLUE {task.name.upper()}"}
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    if trainer.is_world_process_zero():
        _keep_older_record(Path(args.output_dir))
        write_record(Path(args.output_dir) / "record.json", origin, trainer, (model_args, data_args), metrics)
    return trainer


def write_submission(path: Path, task: Task, predictions: Iterable) -> None:
    """A TSV file as the GLUE leaderboard takes it: index and prediction; scores of STS-B are cut to [0, 5]."""
    with open(path, "w", encoding="utf-8") as file:
        file.write("index\tprediction\n")
        for index, value in enumerate(predictions):
            if task.is_regression:
                text = f"{min(max(float(value), 0.0), 5.0) if task.name == 'stsb' else float(value):.3f}"
            else:
                text = task.labels[value] if task.named_labels else str(int(value))
            file.write(f"{index}\t{text}\n")


def _prepare_folder(folder: Path) -> None:
    """Notice before the run, not after, that nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"output_dir={str(folder)!r} cannot be written to ({error}); give another one") from error


def _keep_older_record(folder: Path) -> None:
    if (folder / "record.json").exists():
        number = next(n for n in itertools.count(1) if not (folder / f"record-{n}.json").exists())
        (folder / "record.json").rename(folder / f"record-{number}.json")
        logger.warning("%s has the record of an earlier run, which is now record-%d.json", folder, number)


def _find_checkpoint(args: GlueTrainingArguments) -> str | None:
    """The checkpoint to go on from. Refuses to start anew over the checkpoints of an old run."""
    if not args.do_train:
        return None
    asked, last = args.resume_from_checkpoint, last_complete(args.output_dir)
    if asked is None:
        if last is not None:
            raise ValueError(
                f"output_dir={args.output_dir!r} has {Path(last).name} of an earlier run; pass "
                "--resume_from_checkpoint last to go on with it, or another output_dir"
            )
        return None
    if asked.lower() in ("last", "true"):
        if last is None:
            raise FileNotFoundError(
                f"resume_from_checkpoint={asked!r}: output_dir={args.output_dir!r} has no checkpoint that was saved to "
                "its end"
            )
        return last
    if not Path(asked).is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint={asked!r} is no folder; give a checkpoint-N folder, or 'last'")
    return asked


def _load_data(
    data_args: DataArguments, args: GlueTrainingArguments, model_args: ModelArguments
) -> tuple[Task, DatasetDict]:
    task = get_task(data_args.task_name) if data_args.task_name else None
    given = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    files = {split: file for split, file in given.items() if file is not None}
    in_files = bool(files)
    evaluations = ["validation"] if in_files or task is None else [split for split, _ in task.evaluations]
    tests = ["test"] if in_files or task is None else [split for split, _ in task.submissions]
    held_out = data_args.held_out_samples is not None and (args.do_train or args.do_eval)
    needs_train = args.do_train or held_out
    splits = ["train"] * needs_train + evaluations * (args.do_eval and not held_out) + tests * args.do_predict
    if in_files:
        names = data_args.text_column_names
        texts = [name.strip() for name in names.split(",")] if names else None
        task, data = load_files(task, files, texts, data_args.label_column_name, splits)
    else:
        assert task is not None  # or DataArguments would have asked for a file
        data = load_task(task, data_args.dataset_name_or_path, splits, model_args.cache_dir, args.hub_token)
    if data_args.subset_seed is not None and needs_train:
        data["train"] = data["train"].shuffle(seed=data_args.subset_seed)
    if held_out:
        data |= _hold_out(data["train"], evaluations, data_args)
        splits += evaluations
    # Only what is used is tokenized.
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
    """The rows, of which this share has another class, each of the others with the same probability."""
    if task.is_regression:
        raise ValueError(f"label_noise={share!r} needs classes, and {task.name} is a regression; leave it unset")
    labels, random = np.array(rows["label"]), np.random.default_rng(seed)
    chosen = random.choice(len(labels), round(share * len(labels)), replace=False)
    classes = len(task.labels)
    labels[chosen] = (labels[chosen] + random.integers(1, classes, size=len(chosen))) % classes
    return rows.remove_columns("label").add_column("label", labels.tolist(), feature=rows.features["label"])


def _load_model(
    model_args: ModelArguments, task: Task, trains: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = resolve_path(model_args.model_name_or_path)
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise FileNotFoundError(f"model_name_or_path={path!r} is no folder; give one with a config.json, or a hub name")
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
            f"model_name_or_path={model_args.model_name_or_path!r} has a head with labels in the order {found}, the "
            f"task has {labels}: scores would be wrong; start from the model without that head"
        )
    named = not all(re.fullmatch(r"label_\d+", name) for name in found)
    if not trains and named and labels and set(found) != set(wanted):
        raise ValueError(
            f"model_name_or_path={model_args.model_name_or_path!r} has a head for the labels {found}, the task has "
            f"{labels}: its predictions would be given the wrong names; use the data that it was trained for, or train"
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
    """Everything below the head, from a finished run. The head stays the new one, also where the labels are alike."""
    if not (Path(run) / "record.json").is_file():
        raise FileNotFoundError(
            f"init_from={run!r} has no record.json, so it is no finished run; finish that run first"
        )
    other = AutoModelForSequenceClassification.from_pretrained(run)
    if type(other) is not type(model):
        raise ValueError(
            f"init_from={run!r} is a {type(other).__name__}, model_name_or_path gives a {type(model).__name__}; name "
            "the model that the run was made of"
        )
    model.base_model.load_state_dict(other.base_model.state_dict())


def _tokenize(
    data: DatasetDict,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    args: GlueTrainingArguments,
) -> DatasetDict:
    length = min(data_args.max_seq_length, tokenizer.model_max_length)

    def tokenize(rows: dict) -> BatchEncoding:
        texts = [rows[column] for column in task.texts]
        padding = "max_length" if data_args.pad_to_max_length else False
        return tokenizer(*texts, padding=padding, max_length=length, truncation=True)

    kept = {"label"}
    with args.main_process_first(desc="tokenization"):
        return DatasetDict(
            {
                split: rows.map(
                    tokenize,
                    batched=True,
                    remove_columns=[c for c in rows.column_names if c not in kept],
                    load_from_cache_file=not data_args.overwrite_cache,
                    desc=f"tokenize {split}",
                )
                for split, rows in data.items()
            }
        )


def _hold_out(rows: Dataset, evaluations: list[str], data_args: DataArguments) -> dict[str, Dataset]:
    """Training rows without, and each evaluation split made of, the rows that are held out."""
    count = data_args.held_out_samples
    assert count is not None  # there are rows to hold out
    start = min(data_args.max_train_samples or len(rows), len(rows) - count)
    if start < 1 or (data_args.max_train_samples or 0) > start:
        raise ValueError(
            f"held_out_samples={count!r} leaves too few of the {len(rows)} training rows for "
            f"max_train_samples={data_args.max_train_samples!r}; lower one of the two"
        )
    held_out = rows.select(range(start, start + count))
    return {"train": rows.select(range(start)), **dict.fromkeys(evaluations, held_out)}


def _head(rows: Dataset, count: int | None) -> Dataset:
    return rows if count is None else rows.select(range(min(count, len(rows))))
