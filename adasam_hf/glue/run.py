"""One fine-tuning run: arguments → model, scores, predictions and a record."""

import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset, DatasetDict
from transformers import DataCollatorWithPadding, set_seed

from ..checkpoints import last_complete
from ..sharpness import sam_gap
from ..trainer import AdaSAMTrainer
from .arguments import DataArguments, GlueTrainingArguments, ModelArguments, parse
from .metrics import Evaluation, constant_loss, predictions_of
from .model import load_model
from .record import provenance, write_record
from .splits import load_splits, tokenize_splits
from .submission import write_submission
from .tasks import Task

GAP_BATCHES = 4
logger = transformers.utils.logging.get_logger(__name__)


def main(argv: Sequence[str] | None = None, trainer_class: type[AdaSAMTrainer] = AdaSAMTrainer) -> AdaSAMTrainer:
    """Do what the command line asks for. Returns the trainer; the results are in its `output_dir`."""
    return run(*parse(sys.argv[1:] if argv is None else argv), trainer_class=trainer_class)


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: GlueTrainingArguments,
    trainer_class: type[AdaSAMTrainer] = AdaSAMTrainer,
) -> AdaSAMTrainer:
    """Train, evaluate and predict as asked.

    Writes to ``args.output_dir``: the model, `all_results.json`, GLUE's submission files, a model card and
    `record.json` (everything needed to repeat the run). The record of an earlier run is kept, as `record-1.json` and so
    on.
    """
    origin = provenance()  # now, because the files may have changed when the run ends
    _prepare_folder(Path(args.output_dir))
    checkpoint = _find_checkpoint(args)
    task, data = load_splits(data_args, args, model_args)
    set_seed(args.seed)
    model, tokenizer = load_model(model_args, task, args.do_train)
    data = tokenize_splits(data, task, tokenizer, data_args, args)
    evaluation = Evaluation(task.metrics, task.is_regression)
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data["train"] if args.do_train else None,
        eval_dataset=data.get("selection", data[task.evaluations[0][0]] if args.do_eval else None),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        compute_metrics=evaluation,
    )
    # Classification heads take **kwargs, so the Trainer assumes that they divide by num_items_in_batch. They do not:
    # it would sum over micro-batches, and results would depend on how a batch is split.
    trainer.model_accepts_loss_kwargs = False

    metrics: dict[str, Any] = {}
    if args.do_train:
        metrics |= _train(trainer, data["train"], checkpoint, task)
    if args.do_eval:
        metrics |= _evaluate(trainer, data, task, evaluation)
    if args.do_predict:
        _predict(trainer, data, task)
    if args.do_train and data_args.measure_gap is not None:
        metrics["final_sam_gap"] = _gap(trainer, data_args.measure_gap)
    _write_card(trainer, model_args, data_args, task)
    if trainer.is_world_process_zero():
        _keep_older_record(Path(args.output_dir))
        write_record(Path(args.output_dir) / "record.json", origin, trainer, (model_args, data_args), metrics)
    return trainer


def _train(trainer: AdaSAMTrainer, rows: Dataset, checkpoint: str | None, task: Task) -> dict[str, Any]:
    metrics: dict[str, Any] = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    metrics["train_samples"] = len(rows)
    metrics["train_constant_loss"] = constant_loss(rows["label"][:], task.is_regression)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def _evaluate(trainer: AdaSAMTrainer, data: DatasetDict, task: Task, evaluation: Evaluation) -> dict[str, Any]:
    """The scores of each evaluation split, and the reliability of its probabilities."""
    scores: dict[str, float] = {}
    bins: dict[str, list[dict[str, float]]] = {}
    for split, suffix in reversed(task.evaluations):  # the main one last: the model card shows the last
        found = trainer.evaluate(data[split], metric_key_prefix=f"eval{suffix}")
        scores |= {name.replace(f"eval{suffix}_", "eval_") + suffix: v for name, v in found.items() if name != "epoch"}
        scores[f"eval_samples{suffix}"] = len(data[split])
        bins[f"eval_reliability{suffix}"] = evaluation.reliability
    trainer.log_metrics("eval", scores)
    trainer.save_metrics("eval", scores)
    return scores | bins


def _predict(trainer: AdaSAMTrainer, data: DatasetDict, task: Task) -> None:
    """Write the files of the task's test splits."""
    for split, file in task.submissions:
        rows = data[split]
        if "label" in rows.column_names:
            rows = rows.remove_columns("label")  # hidden labels are -1, for which there is no loss
        output = trainer.predict(rows, metric_key_prefix="predict").predictions
        if trainer.is_world_process_zero():
            predictions = predictions_of(output, task.is_regression)
            write_submission(Path(trainer.args.output_dir) / file, task, predictions)


def _gap(trainer: AdaSAMTrainer, radius: float) -> float:
    """`sam_gap` in float32. Call it last, because unwrapping removes autocast from the model itself."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return sam_gap(model, itertools.islice(trainer.get_train_dataloader(), GAP_BATCHES), radius)


def _write_card(trainer: AdaSAMTrainer, model_args: ModelArguments, data_args: DataArguments, task: Task) -> None:
    card: dict[str, Any] = {"tasks": "text-classification"}
    if not model_args.model_name_or_path.startswith("pip:"):  # not on the Hub, where the card would link to
        card["finetuned_from"] = model_args.model_name_or_path
    if data_args.task_name:
        card |= {"dataset_tags": "glue", "dataset_args": task.name, "dataset": f"GLUE {task.name.upper()}"}
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def _prepare_folder(folder: Path) -> None:
    """Make sure, before the run rather than after it, that the folder can be written to."""
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
        logger.warning("%s had the record of an earlier run, which is now record-%d.json", folder, number)


def _find_checkpoint(args: GlueTrainingArguments) -> str | None:
    """The checkpoint to resume from. Refuses to start over the checkpoints of an earlier run."""
    if not args.do_train:
        return None
    asked, last = args.resume_from_checkpoint, last_complete(args.output_dir)
    if asked is None:
        if last is not None:
            raise ValueError(
                f"output_dir={args.output_dir!r} has {Path(last).name} of an earlier run; pass "
                "--resume_from_checkpoint last to continue it, or another output_dir"
            )
        return None
    if asked.lower() in ("last", "true"):
        if last is None:
            raise FileNotFoundError(
                f"resume_from_checkpoint={asked!r}: output_dir={args.output_dir!r} has no checkpoint that was "
                "completely saved"
            )
        return last
    if not Path(asked).is_dir():
        raise FileNotFoundError(
            f"resume_from_checkpoint={asked!r} is not a folder; give a checkpoint-N folder, or 'last'"
        )
    return asked
