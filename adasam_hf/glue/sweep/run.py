"""One run of a sweep: its place in the grid, its arguments and its record."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch

from ..arguments import DataArguments, GlueTrainingArguments, ModelArguments, parse

CLASSES = (ModelArguments, DataArguments, GlueTrainingArguments)
FIELDS = {f.name: f for c in CLASSES for f in fields(c)}
LISTS = {name for c in CLASSES for name, kind in get_type_hints(c).items() if kind in (list[str], list[str] | None)}
ARGUMENTS = set(FIELDS)
# Arguments that say where and how a run is done, not what it is.
MACHINE = {"output_dir", "logging_dir", "run_name", "dataset_name_or_path", "cache_dir", "overwrite_cache", "hub_token"}
MACHINE |= {"push_to_hub_token", "use_cpu", "disable_tqdm", "resume_from_checkpoint", "dataloader_num_workers"}
MACHINE |= {"dataloader_pin_memory"}  # Transformers sets it to False with use_cpu
MACHINE |= {"dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"}
MACHINE |= {"report_to", "project", "log_level", "log_level_replica", "log_on_each_node", "skip_memory_metrics"}
MACHINE |= {"per_device_eval_batch_size", "eval_accumulation_steps", "save_total_limit", "save_only_model"}
MACHINE |= {name for name in ARGUMENTS if name.startswith(("hub_", "push_to_hub", "trackio_"))}
MACHINE |= {"adam_defaults"}  # says who set β2 and ε, whose numbers are compared
SAVING = {"save_strategy", "save_steps"}  # of which the weights depend only where the best checkpoint is taken


@dataclass(frozen=True, eq=False)
class Run:
    """One run: its place on the axes, its arguments of `adasam glue`, its record."""

    sweep: str
    name: str
    axes: dict[str, Any]
    words: tuple[str, ...]  # without the machine's own: where the data is, where the output goes, which device
    record: Path
    folder: Path
    trial: dict[str, Any] | None = None  # its point of the grid, if it is a trial
    keep_model: bool = False

    @property
    def point(self) -> tuple[Any, ...]:
        """Which trials are of one point of the grid, and differ by seed alone."""
        return self.axes["task_name"], self.axes["method"], tuple((self.trial or {}).items())

    @property
    def finished(self) -> bool:
        """A record, and beside it the model, if that is to be kept."""
        return self.record.exists() and (not self.keep_model or (self.folder / "record.json").is_file())

    @property  # not cached: a cached_property has a lock, which Ray cannot send
    def arguments(self) -> dict[str, Any]:
        """All arguments, as a record has them; of two runs with the same ones, one record will do."""
        model_args, data_args, args = parse_run(self.words)
        return comparable(asdict(model_args) | asdict(data_args) | args.to_dict())


def parse_run(words: Iterable[str]) -> tuple[ModelArguments, DataArguments, GlueTrainingArguments]:
    """The arguments of `adasam glue`, as it reads them."""
    return parse([*words, "--output_dir=unused", *device_flags()])


def device_flags() -> list[str]:
    return [] if torch.accelerator.is_available() else ["--use_cpu"]  # bf16 on a CPU must be asked for


def comparable(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as JSON has them, without what is the machine's own."""
    dropped = MACHINE if arguments.get("load_best_model_at_end") else MACHINE | SAVING
    found = {k: v for k, v in json.loads(json.dumps(arguments, default=str)).items() if k not in dropped}
    if found.get("init_from"):
        found["init_from"] = "/".join(Path(found["init_from"]).parts[-2:])  # sweep and run, wherever that lies
    return found
