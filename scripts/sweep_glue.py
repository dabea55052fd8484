#!/usr/bin/env python
"""A grid of run_glue.py runs from one file: chooses rates and radii on held-out rows, then runs every seed.

    python scripts/sweep_glue.py configs/sweeps/small/table1.yaml --dataset_name_or_path ../shared/glue --dry_run
    python scripts/sweep_glue.py configs/sweeps/small/table1.yaml --dataset_name_or_path ../shared/glue --jobs 2
    python scripts/sweep_glue.py configs/sweeps/table1.yaml --engine ray --gpus_per_run 1

Each finished run leaves one file, <output_dir>/records/<sweep>/<run>.json (trials: in its folder trials), whole or not
at all, and is skipped from then on: stop the command whenever you like, and repeat it. A run that fails is tried once
more; a trial that fails twice for the same reason stops the sweep. Data, model and folders are checked before the first
run. scripts/report_glue.py makes the report.

A sweep file has

    output_dir   where records go
    configs      YAML files for run_glue.py, in which {axis} stands for the run's value on that axis
    arguments    arguments of run_glue.py for all runs; they win over the configs
    when         more arguments for some runs: [{axis: [values], arguments: {…}}]. In values, too, {axis} stands for the
                 run's value, and {runs} for the folder that has all sweeps' runs
    axes         the grid: axis → values. An axis that run_glue.py has as an argument is passed to it, and wins over all
    tasks        tasks that are not GLUE's: name → arguments of run_glue.py (train_file, validation_file, …)
    choose       {arguments, grid: {method: {argument: [values]}}, seeds: [three or more]}: for each task and method a
                 trial for each point of its grid and each of the seeds, as many for each method. The point with the
                 best mean over the seeds is taken. If that is at an edge of its grid (0 is none: nothing is below) the
                 sweep stops, and the grid is to be widened. Or the name of a sweep whose trials are taken
    scale_learning_rate_from   b₀: the rate is multiplied by √(rows of an optimizer step / b₀)
    keep_models  whether weights stay in the scratch folder; otherwise only logs do
"""

import argparse
import fcntl
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import get_type_hints
from zlib import crc32

import torch
import yaml
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification

from adasam_hf.checkpoints import last_complete
from adasam_hf.glue.data import load_task, resolve_path
from adasam_hf.glue.record import write_json
from adasam_hf.glue.run import DataArguments, GlueTrainingArguments, ModelArguments, parse
from adasam_hf.glue.tasks import TASKS, get_task, score

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"output_dir", "configs", "arguments", "when", "axes", "tasks", "choose", "scale_learning_rate_from"}
KEYS |= {"keep_models"}
CLASSES = (ModelArguments, DataArguments, GlueTrainingArguments)
FIELDS = {f.name: f for c in CLASSES for f in fields(c)}
LISTS = {name for c in CLASSES for name, kind in get_type_hints(c).items() if kind in (list[str], list[str] | None)}
ARGUMENTS = set(FIELDS)
TRAIN_ROWS = {  # of GLUE
    "cola": 8551,
    "sst2": 67349,
    "mrpc": 3668,
    "stsb": 5749,
    "qqp": 363846,
    "mnli": 392702,
    "qnli": 104743,
    "rte": 2490,
    "wnli": 635,
}
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
OVERHEAD = 20.0  # seconds of a run that do not depend on its rows: imports, loading, evaluation


@dataclass(frozen=True, eq=False)
class Run:
    """One run: its place on the axes, its arguments of run_glue.py, its record."""

    sweep: str
    name: str
    axes: dict
    words: tuple[str, ...]  # without the machine's own: where the data is, where the output goes, which device
    record: Path
    folder: Path
    trial: dict | None = None  # its point of the grid, if it is a trial
    keep_model: bool = False

    @property
    def point(self) -> tuple:
        """Which trials are of one point of the grid, and differ by seed alone."""
        return self.axes["task_name"], self.axes["method"], tuple((self.trial or {}).items())

    @property
    def finished(self) -> bool:
        """A record, and beside it the model, if that is to be kept."""
        return self.record.exists() and (not self.keep_model or (self.folder / "record.json").is_file())

    @property  # not cached: a cached_property has a lock, which Ray cannot send
    def arguments(self) -> dict:
        """All arguments, as a record has them; of two runs with the same ones, one record will do."""
        model_args, data_args, args = parse_run(self.words)
        return comparable(asdict(model_args) | asdict(data_args) | args.to_dict())


@dataclass
class Sweep:
    """A sweep file, checked.

    Raises:
        ValueError: for an unknown key or argument, a grid that gives one method more trials than another, ...
    """

    path: Path
    output_dir: Path | None = None
    seeds: list[int] | None = None
    tasks: list[str] | None = None  # of the file's only these
    methods: list[str] | None = None
    scratch: Path = Path("runs/sweeps")
    content: dict = field(init=False)

    def __post_init__(self):
        self.content = self._read()
        if self.output_dir is None:
            self.output_dir = Path(self.content["output_dir"])
        if self.seeds is not None:
            self.axes["seed"] = self.seeds
        self._check_axes()
        self._check_arguments()
        if isinstance(self.choose, dict):
            self._check_trials()
        for axis, wanted in (("task_name", self.tasks), ("method", self.methods)):
            if wanted is not None:
                if unknown := [value for value in wanted if value not in self.axes[axis]]:
                    raise ValueError(f"{self.path} has no {axis} {unknown}; it has {self.axes[axis]}")
                self.axes[axis] = wanted

    def _read(self) -> dict:
        if not self.path.is_file():
            raise FileNotFoundError(f"sweep={str(self.path)!r} does not exist; see configs/sweeps")
        try:
            content = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{self.path} is no YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict) or not {"output_dir", "configs", "axes"} <= set(content):
            raise ValueError(f"{self.path}: must be a mapping with output_dir, configs and axes")
        if unknown := sorted(set(content) - KEYS):
            raise ValueError(f"{self.path}: unknown keys {unknown}; known are {sorted(KEYS)}")
        for key, kind, what in (("axes", dict, "mapping"), ("arguments", dict, "mapping"), ("tasks", dict, "mapping")):
            if not isinstance(content.get(key, {}), kind):
                raise ValueError(f"{self.path}: {key} is {content[key]!r}; it takes a {what}")
        if not isinstance(content["configs"], list):
            raise ValueError(f"{self.path}: configs is {content['configs']!r}; it takes a list of files")
        return content

    def _check_axes(self) -> None:
        for axis, values in self.axes.items():
            _check_values(values, f"{self.path}: axis {axis}")
        missing = {"task_name", "method", "seed"} - set(self.axes)
        if missing:
            raise ValueError(f"{self.path}: axes has no {sorted(missing)}; each sweep has tasks, methods and seeds")
        idle = [a for a in self.axes if a not in ARGUMENTS and f"{{{a}}}" not in str(self.content)]
        if idle:
            raise ValueError(
                f"{self.path}: axes {idle} are no arguments of run_glue.py, and no config has them in its name"
            )
        for case in self.content.get("when") or []:
            if wrong := sorted(set(case) - set(self.axes) - {"arguments"}) or ({"arguments"} - set(case)):
                raise ValueError(f"{self.path}: a case of when has {wrong}; it takes axes and arguments")
        if both := sorted(set(self.own_tasks) & set(TASKS)):
            raise ValueError(f"{self.path}: tasks has {both}, which are GLUE's; give your own another name")
        if unknown := [t for t in self.axes["task_name"] if t not in TASKS and t not in self.own_tasks]:
            raise ValueError(f"{self.path}: axis task_name has {unknown}, not of GLUE; describe them under tasks")

    def _check_arguments(self) -> None:
        given = [self.content.get("arguments") or {}, *self.own_tasks.values()]
        given += [case["arguments"] for case in self.content.get("when") or []]
        given += [self.choose.get("arguments") or {}] if isinstance(self.choose, dict) else []
        for name, value in itertools.chain.from_iterable(arguments.items() for arguments in given):
            if isinstance(value, list) and name not in LISTS:
                raise ValueError(f"{self.path}: {name} is {value!r}; it takes one value; for several, make it an axis")

    def _check_trials(self) -> None:
        choose = self.choose
        if not {"arguments", "grid"} <= set(choose) <= {"arguments", "grid", "seeds"}:
            raise ValueError(f"{self.path}: choose has {sorted(choose)}; it takes arguments and grid, and seeds")
        if not choose["arguments"].get("held_out_samples"):
            raise ValueError(
                f"{self.path}: choose.arguments has no held_out_samples, so that trials would be judged on what is "
                "reported; give a number of training rows"
            )
        if "seeds" in choose:
            _check_values(choose["seeds"], f"{self.path}: choose.seeds")
            if "seed" in choose["arguments"]:
                raise ValueError(f"{self.path}: choose has seeds and arguments.seed; take the second out")
            if common := sorted(set(choose["seeds"]) & set(self.axes["seed"])):
                raise ValueError(f"{self.path}: seeds {common} are of trials and of runs; give the trials others")
        grids = choose["grid"]
        for method, grid in grids.items():
            for name, values in grid.items():
                if not isinstance(values, list) or not values:
                    raise ValueError(f"{self.path}: choose.grid.{method} has {[name]} without a list of values")
                _check_values(values, f"{self.path}: choose.grid.{method}.{name}")
            if both := sorted(set(grid) & set(self.axes)):
                raise ValueError(
                    f"{self.path}: {both} are axes and in choose.grid.{method}, where an axis wins; take one out"
                )
        if absent := [m for m in self.axes["method"] if m not in grids]:
            raise ValueError(f"{self.path}: choose.grid has no {absent}; give each method its trials")
        sizes = {m: math.prod(len(v) for v in grids[m].values()) for m in self.axes["method"]}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{self.path}: choose.grid is unfair: trials by method are {sizes}; make them equal")

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def axes(self) -> dict[str, list]:
        return self.content["axes"]

    @property
    def choose(self) -> dict | str | None:
        return self.content.get("choose")

    @property
    def own_tasks(self) -> dict[str, dict]:
        return self.content.get("tasks") or {}

    @property
    def chooser(self) -> "Sweep":
        """The sweep whose trials choose for this one."""
        if isinstance(self.choose, str):
            return Sweep(self.path.with_name(f"{self.choose}.yaml"), self.output_dir, scratch=self.scratch)
        return self

    def records(self) -> Path:
        return self.output_dir / "records" / self.name

    def runs(self) -> Path:
        """Where logs and, if they are kept, models of all sweeps of the output_dir lie."""
        place = self.output_dir
        if place.is_absolute():
            inside = place.is_relative_to(ROOT)
            place = place.relative_to(ROOT) if inside else Path(f"{place.name}-{crc32(bytes(place)):08x}")
        return self.scratch / Path(*(part for part in place.parts if part != "results"))

    def trials(self) -> list[Run]:
        """The trials of this sweep's own grid, one seed after the other. Other axes are at their first value."""
        if not isinstance(self.choose, dict):
            return []
        first = {name: values[0] for name, values in self.axes.items()}
        first |= {name: value for name, value in self.choose["arguments"].items() if name in first}
        seeds, runs = self.choose.get("seeds"), []
        for seed in seeds or [first["seed"]]:
            for task, method in itertools.product(self.axes["task_name"], self.axes["method"]):
                grid = self.choose["grid"][method]
                for values in itertools.product(*grid.values()):
                    trial = dict(zip(grid, values, strict=True))
                    shown = ",".join(f"{k}={v}" for k, v in trial.items())
                    name = f"{task}-{method}-{shown}" + (f"-{seed}" if seeds else "")
                    point = first | {"task_name": task, "method": method, "seed": seed}
                    runs.append(self._run(point, name, self.choose["arguments"] | trial, trial))
        return runs

    def finals(self, choose: Callable[[str, str], dict]) -> list[Run]:
        """One run for each point of the axes, with what `choose` says for its task and method; one seed after the
        other, so that what is finished are pairs."""
        points = [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]
        points.sort(key=lambda point: self.axes["seed"].index(point["seed"]))
        return [self._run(p, "-".join(map(str, p.values())), choose(p["task_name"], p["method"])) for p in points]

    def chosen(self, task: str, method: str) -> dict:
        """The point of the grid with the best mean score over the trials' seeds on the held-out rows, of equal ones the
        one with the lowest loss there; {} without trials to choose from.

        Raises:
            ValueError: if a trial has no record or one of other arguments, or if all points have diverged.
        """
        if self.choose is None:
            return {}
        sweep = self.chooser
        runs = [run for run in sweep.trials() if (run.axes["task_name"], run.axes["method"]) == (task, method)]
        done = [run for run in runs if run.finished]
        if not runs or len(done) < len(runs):
            raise ValueError(
                f"{self.path}: {len(done)} of {len(runs)} trials of {method} on {task} are in "
                f"{sweep.records() / 'trials'}; run {sweep.path} first"
            )
        check(runs)
        found: dict[tuple, list[Run]] = {}
        for run in runs:
            found.setdefault(run.point, []).append(run)
        ranks = {}
        for point, mine in found.items():
            metrics = [load(run.record)["metrics"] for run in mine]
            # Of a model that is NaN all over, accuracy is that of the first class; only the loss tells. The loss of
            # smoothed labels is another one, so the cross-entropy is taken where a record has it.
            rank = (
                statistics.fmean(score(task, m) for m in metrics),
                -statistics.fmean(m.get("eval_cross_entropy", m["eval_loss"]) for m in metrics),
            )
            if all(map(math.isfinite, rank)):
                ranks[point] = rank
        if not ranks:
            raise ValueError(f"{self.path}: all trials of {method} on {task} have diverged; give it lower rates")
        return found[max(ranks, key=ranks.get)][0].trial

    def blind(self) -> list[str]:
        """In words, the grids in which every choice is at an edge."""
        grids = self.choose["grid"] if isinstance(self.choose, dict) else {}
        return [
            f"{self.path}: choose.grid.{method}.{name} is {values}, so that any choice is at an edge; give it three "
            "values or more, or pass --accept_edge"
            for method in self.axes["method"]
            for name, values in grids.get(method, {}).items()
            if len(values) == 2 and all(is_number(v) and float(v) != 0 for v in values)
        ]

    def edges(self, task: str, method: str) -> list[str]:
        """In words, the arguments that were chosen at an edge of their grid. The value 0 is none: nothing is below."""
        sweep = self.chooser
        if self.choose is None:
            return []
        out = []
        for name, value in self.chosen(task, method).items():
            values = sorted({float(v) for v in sweep.choose["grid"][method][name] if is_number(v)})
            if len(values) > 1 and is_number(value) and float(value) in (values[0], values[-1]) and float(value) != 0:
                side = "lowest" if float(value) == values[0] else "highest"
                out.append(
                    f"{sweep.path}: the trials of {method} on {task} chose {name}={value}, the {side} of its grid, and "
                    f"a better one may lie beyond; widen choose.grid.{method}.{name}, or pass --accept_edge"
                )
        return out

    def _run(self, point: dict, name: str, more: dict, trial: dict | None = None) -> Run:
        arguments = dict(self.content.get("arguments") or {})
        for case in self.content.get("when") or []:
            if all(point[axis] in values for axis, values in case.items() if axis != "arguments"):
                arguments |= case["arguments"]
        own = self.own_tasks.get(point["task_name"])
        arguments |= (own or {}) | more
        arguments |= {name: value for name, value in point.items() if name in ARGUMENTS}  # an axis wins
        if own is not None:
            del arguments["task_name"]
        places = {**point, "runs": self.runs()}

        def fill(text: str) -> str:
            try:
                return text.format(**places)
            except (KeyError, IndexError, ValueError):
                known = ", ".join(f"{{{name}}}" for name in places)
                raise ValueError(f"{self.path}: {text!r} has a name that is no axis; known are {known}") from None

        words = [f"--config={fill(config)}" for config in self.content["configs"]]
        for key, value in arguments.items():
            if isinstance(value, list):
                words += [f"--{key}", *(fill(str(v)) for v in value)]
            elif value is not None:
                text = fill(value) if isinstance(value, str) else value
                words.append(f"--{key}={json.dumps(text) if isinstance(text, dict) else text}")
        base = self.content.get("scale_learning_rate_from")
        if base is not None:
            _, _, args = parse_run(words)
            rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
            words.append(f"--learning_rate={args.learning_rate * math.sqrt(rows / base)!r}")
        place = Path("trials", name) if trial is not None else Path(name)
        return Run(
            self.name,
            name,
            point,
            tuple(words),
            self.records() / place.with_name(f"{place.name}.json"),
            self.runs() / self.name / place,
            trial,
            trial is None and bool(self.content.get("keep_models")),
        )


def is_number(value: object) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _check_values(values: object, where: str) -> None:
    """A list of one or more different values; 0.01 and "1e-2" are the same."""
    seen = {float(v) if is_number(v) else str(v) for v in values} if isinstance(values, list) else set()
    if not seen or len(seen) < len(values):
        raise ValueError(f"{where} is {values!r}; it takes a list of one or more different values")


def parse_run(words: Iterable[str]) -> tuple[ModelArguments, DataArguments, GlueTrainingArguments]:
    """The arguments of run_glue.py, as it reads them."""
    return parse([*words, "--output_dir=unused", *device_flags()])


def device_flags() -> list[str]:
    return [] if torch.accelerator.is_available() else ["--use_cpu"]  # bf16 on a CPU must be asked for


def load(path: Path) -> dict:
    """A record."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["arguments"].items(), record["axes"]["task_name"], record["seconds_per_row"]
        float(record["metrics"]["eval_loss"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of a run ({error!r}); delete it, and repeat the command") from None
    return record


def comparable(arguments: dict) -> dict:
    """Arguments as JSON has them, without what is the machine's own."""
    dropped = MACHINE if arguments.get("load_best_model_at_end") else MACHINE | SAVING
    found = {k: v for k, v in json.loads(json.dumps(arguments, default=str)).items() if k not in dropped}
    if found.get("init_from"):
        found["init_from"] = "/".join(Path(found["init_from"]).parts[-2:])  # sweep and run, wherever that lies
    return found


def check(runs: list[Run], arguments: bool = True) -> list[str]:
    """Every run's arguments before anything runs, and that the records that are there are whole, and (with
    `arguments`) those of these runs.

    Returns: the runs that must be finished first.
    """
    missing: set[str] = set()
    for run in runs:
        wanted = run.arguments
        if run.finished:
            found = load(run.record)["arguments"]
            if arguments:
                _refuse_other(comparable(found), wanted, run.record)
            continue
        source = parse_run(run.words)[0].init_from
        if source and not Path(source, "record.json").is_file():
            missing.add(source)
    return sorted(missing)


def _refuse_other(found: dict, wanted: dict, where: Path) -> None:
    # An argument that is younger than the record had its default.
    younger = [FIELDS[k] for k in wanted if k in FIELDS and k not in found]
    found = {f.name: f.default for f in younger if f.default is not MISSING} | found
    different = {k: found.get(k) for k in sorted(found | wanted) if found.get(k) != wanted.get(k)}
    if different:
        raise ValueError(f"{where} is of a run with other arguments: {different}; move it away, and {where.parent} too")


class RunFailed(RuntimeError):
    """A run failed twice; `same`: for the same reason, so that it will again."""

    def __init__(self, message: str, same: bool):
        super().__init__(message)
        self.same = same

    def __reduce__(self):  # Ray sends it
        return type(self), (*self.args, self.same)


def _reason(log: Path, start: int = 0) -> str:
    """The last line of a log from this byte on: of a Python program that failed, the error."""
    lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def execute(run: Run, machine: list[str], threads: int | None = None, node: str | None = None) -> dict:
    """Do one run, in a process of its own, and once more if it fails, and write its record.

    Args:
        machine: arguments that say where the data is.
        threads: OMP_NUM_THREADS of the process.
        node: of the cluster, for the record.

    Returns: its record; that of another sweep in the same folder, if that has done the run meanwhile.

    Raises:
        RunFailed: if it failed twice, with the end of its log.
        RuntimeError: if it was interrupted.
        ValueError: if its folder has checkpoints of a run with other arguments.
    """
    folder, log = run.folder, run.folder / "log.txt"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        # Runs of a sweep that was killed may still be going on. They inherited the lock; wait for them.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if run.finished:
            check([run])
            return load(run.record)
        plan, record = folder / "plan.json", folder / "record.json"
        state = json.loads(plan.read_text()) if plan.exists() else {}
        if state.get("arguments") != run.arguments:
            if last_complete(str(folder)) is not None:
                _refuse_other(state.get("arguments", {}), run.arguments, plan)
            record.unlink(missing_ok=True)
            state = {"arguments": run.arguments, "failures": 0, "resumed": False}
        environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        reasons = []
        for _ in range(2):
            if record.exists():
                break
            start = log.stat().st_size if log.exists() else 0
            resume = ["--resume_from_checkpoint=last"] if last_complete(str(folder)) is not None else []
            state["resumed"] = bool(resume)
            write_json(plan, state)
            words = [*run.words, f"--output_dir={folder}", "--disable_tqdm=true", *device_flags(), *machine, *resume]
            with open(log, "a") as out:
                done = subprocess.run(
                    [sys.executable, str(ROOT / "scripts" / "run_glue.py"), *words],
                    stdout=out, stderr=out, env=environment, pass_fds=[lock.fileno()], check=False,
                )  # fmt: skip
            if done.returncode in (-signal.SIGINT, 128 + signal.SIGINT):
                raise RuntimeError("interrupted")
            if done.returncode != 0:
                state["failures"] += 1
                reasons.append(_reason(log, start))
                write_json(plan, state)
                tqdm.write(f"{run.name} failed, see {log}", file=sys.stderr)
        if not record.exists():
            raise RunFailed(f"failed twice; {log} ends in\n{log.read_text()[-800:]}", len(set(reasons)) == 1)
        content = json.loads(record.read_text())
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        if not run.keep_model:
            for path in folder.glob("*.safetensors"):
                path.unlink()
        # train_runtime is that of the last session
        speed = None if state["resumed"] else content["metrics"]["train_runtime"] / work(run)
        content |= {"sweep": run.sweep, "run": run.name, "axes": run.axes, "trial": run.trial}
        content |= {} if node is None else {"node": node}
        content |= {"attempts": state["failures"] + 1, "resumed": state["resumed"], "seconds_per_row": speed}
        write_json(run.record, content)  # while the lock is held: another sweep sees either the lock or the record
        if not run.keep_model:
            record.unlink()  # of no use any more, if the other is deleted
    return content


# ---- how long ----


def work(run: Run) -> float:
    """Rows that pass through the model, forward and backward."""
    _, data_args, args = parse_run(run.words)
    rows = data_args.max_train_samples or TRAIN_ROWS.get(data_args.task_name)
    if rows is None and args.max_steps < 0:
        raise ValueError(
            f"{run.sweep}: {run.axes['task_name']} has no max_train_samples; its rows are not known: set it"
        )
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    seen = rows * args.num_train_epochs if args.max_steps < 0 else args.max_steps * batch
    return seen * (2 if args.resolved_rho > 0 else 1)


def estimate(runs: list[Run]) -> dict[Run, float | None]:
    """Seconds of each run, from those that have finished: their time for each row, of the same task if there is one."""
    speeds: dict[str, list[float]] = {}
    for folder in {run.record.parents[2 if run.trial else 1] for run in runs}:  # all sweeps of the output_dir
        for path in folder.glob("**/*.json"):
            record = load(path)
            if record["seconds_per_row"] is not None:
                speeds.setdefault(record["axes"]["task_name"], []).append(record["seconds_per_row"])
    anything = [speed for found in speeds.values() for speed in found]
    known = {run: speeds.get(run.axes["task_name"], anything) for run in runs}
    return {run: OVERHEAD + work(run) * statistics.median(found) if found else None for run, found in known.items()}


# ---- engines: both give futures ----


class Local:
    """So many processes on this machine, which share its cores."""

    def __init__(self, jobs: int):
        if torch.cuda.device_count() > 1:
            raise ValueError(
                f"--engine local gives each run all {torch.cuda.device_count()} GPUs; use --engine ray --gpus_per_run 1"
            )
        self.jobs = jobs
        self.pool = ThreadPoolExecutor(jobs)

    def submit(self, run: Run, machine: list[str]) -> Future:
        asked = os.environ.get("OMP_NUM_THREADS")  # by the user, who may want to leave cores to others
        return self.pool.submit(execute, run, machine, None if asked else max(1, (os.cpu_count() or 1) // self.jobs))

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


class Ray:
    """A Ray cluster: the one at --ray_address, or else this machine. The repository lies at the same path on each node
    (a shared folder), as do runs/ and the data."""

    def __init__(self, address: str | None, cpus: float, gpus: float | None):
        import ray

        if gpus is not None and not 0 <= gpus <= 1:
            raise ValueError(
                f"gpus_per_run={gpus!r} must be in [0, 1]: a run is one process; the batch is that of the file"
            )
        ray.init(address=address, log_to_driver=False)
        self.ray = ray
        resources = ray.cluster_resources()
        gpus = float("GPU" in resources) if gpus is None else gpus
        for name, wanted in (("CPU", cpus), ("GPU", gpus)):
            if wanted > resources.get(name, 0):
                raise ValueError(f"the cluster has {resources.get(name, 0):g} {name}s, a run is to have {wanted:g}")

        @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)  # if a node is lost
        def remote(run: Run, machine: list[str], root: str, threads: int) -> dict:
            os.chdir(root)
            return execute(run, machine, threads, ray.get_runtime_context().get_node_id())

        self.remote, self.threads = remote, max(1, int(cpus))

    def submit(self, run: Run, machine: list[str]) -> Future:
        return self.remote.remote(run, machine, str(ROOT), self.threads).future()

    def close(self) -> None:
        self.ray.shutdown()


def do(runs: list[Run], engine: Local | Ray, machine: list[str], needed: bool = False) -> list[str]:
    """Do the runs that have no record. Returns what failed, in words.

    needed: without one of them the others are of no use, so none begins after one that failed twice for one reason.
    """
    open_runs = [run for run in runs if not run.finished]
    seconds = estimate(open_runs)
    weights = {run: seconds[run] or OVERHEAD + work(run) for run in open_runs}
    failures = []
    futures = {engine.submit(run, machine): run for run in open_runs}
    shape = "{percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
    with tqdm(total=sum(weights.values()), bar_format=shape, postfix=f"0 of {len(open_runs)} runs") as bar:
        for count, future in enumerate(as_completed(futures), 1):
            run = futures[future]
            try:
                future.result()
            except Exception as error:  # of whatever kind: the others go on
                failures.append(f"{run.name}: {error}")
                if needed and getattr(getattr(error, "cause", error), "same", False):  # Ray wraps it
                    break
            bar.set_postfix_str(f"{count} of {len(open_runs)} runs, {len(failures)} failed", refresh=False)
            bar.update(weights[run])
    return failures


STATES = {"adasam": 3, "amsgrad": 3, "sgdm": 1, "sam": 1}  # copies of the weights in an optimizer; of the others two


@cache
def parameters(name: str) -> int | None:
    """Of a model; not known of one that is neither here nor to be had."""
    try:
        config = AutoConfig.from_pretrained(resolve_path(name))
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config).num_parameters()
    except (OSError, ValueError):
        return None


def checkpoint_size(run: Run) -> float | None:
    """Bytes of a checkpoint: weights and optimizer state in float32; 0 if the run saves none."""
    model_args, _, args = parse_run(run.words)
    if args.save_strategy == "no":
        return 0.0
    count = parameters(model_args.model_name_or_path)
    return None if count is None else 4.0 * count * (1 + STATES.get(args.optim, 2))


def cost(runs: list[Run]) -> str:
    """In words: rows, time and the size of a checkpoint, of the runs that are not finished."""
    seconds, size = list(estimate(runs).values()), checkpoint_size(runs[0])
    time = "? h" if None in seconds else f"{sum(seconds) / 3600:.1f} h"
    disk = "? GB" if size is None else f"{size / 1e9:.1f} GB"
    return f"{sum(map(work, runs)) / 1e6:.2f} M rows, {time}, {disk} a checkpoint"


def show(title: str, runs: list[Run], jobs: int | None, settled: Callable[[str, str], bool]) -> None:
    """The plan: what is done and what is left, by task and method, and what that costs. Without `jobs` the time is that
    of all runs."""
    left = [run for run in runs if not run.finished]
    seconds = list(estimate(left).values())
    time = "none" if not left else "unknown until a first run has finished"
    if left and None not in seconds:
        how = f"with {jobs} at once" if jobs else "over the runs that the cluster does at once"
        time = f"about {sum(seconds) / (jobs or 1) / 3600:.1f} hours {how}"
    print(f"{title}: {len(runs)} runs, {len(runs) - len(left)} finished; time left: {time}")
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.axes["task_name"], run.axes["method"]), []).append(run)
    width, wide = (
        1 + max(map(len, column), default=0) for column in (zip(*groups, strict=True) if groups else ((), ()))
    )
    largest = 0.0
    for (task, method), mine in groups.items():
        words = " ".join(mine[0].words) + ("" if settled(task, method) else " (a trial's; to be chosen)")
        rest = [run for run in mine if not run.finished]
        costs = f"{cost(rest)}  " if rest else ""
        largest = max([largest, *(checkpoint_size(run) or 0.0 for run in rest[:1])])
        print(f"  {task:<{max(width, 6)}}{method:<{max(wide, 9)}}{len(mine) - len(rest)}/{len(mine)}  {costs}{words}")
    if largest:  # the newest is written before the one before is deleted
        print(f"  disk: 2 checkpoints of each run at work, at most {2 * (jobs or 1) * largest / 1e9:.1f} GB")


def prepare(runs: list[Run], machine: list[str], folders: Iterable[Path]) -> None:
    """What would make every run fail, before the first one: data (which is fetched once, here), model, and folders.

    Raises:
        ValueError, OSError: with what is wrong.
    """
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):  # to be writable is not a matter of flags alone
            pass
    seen = set()
    for run in runs:
        model_args, data_args, args = parse([*run.words, "--output_dir=unused", *device_flags(), *machine])
        model = resolve_path(model_args.model_name_or_path)
        if model.startswith((".", "/")) and not Path(model).is_dir():
            raise FileNotFoundError(
                f"{run.name}: model_name_or_path={model!r} is no folder; see its config or arguments"
            )
        for name in ("train_file", "validation_file"):
            file = getattr(data_args, name)
            if file is not None and not Path(resolve_path(file)).expanduser().is_file():
                raise FileNotFoundError(f"{run.name}: {name}={file!r} does not exist")
        if data_args.train_file is None and run.axes["task_name"] not in seen:
            task = get_task(data_args.task_name)
            splits = ["train", *(split for split, _ in task.evaluations)]
            load_task(task, data_args.dataset_name_or_path, splits, model_args.cache_dir, args.hub_token)
            seen.add(run.axes["task_name"])


def run_sweep(sweep: Sweep, args: argparse.Namespace, machine: list[str]) -> list[str]:
    """The trials, then the runs. Returns what failed, in words."""
    trials = sweep.trials()
    choosing: dict[tuple[str, str], list[Run]] = {}
    for run in sweep.chooser.trials():
        choosing.setdefault((run.axes["task_name"], run.axes["method"]), []).append(run)

    def settled(task: str, method: str) -> bool:
        return all(run.finished for run in choosing.get((task, method), []))

    def foreseen(task: str, method: str) -> dict:
        """What is chosen, or stands for it as long as it is not."""
        if settled(task, method) and (task, method) in choosing:
            return sweep.chosen(task, method)
        return choosing[task, method][0].trial if (task, method) in choosing else {}

    finals = sweep.finals(foreseen)
    missing = check([*trials, *(run for run in finals if not run.finished)])
    check([run for run in finals if run.finished], arguments=False)  # what is chosen is not known yet
    if args.dry_run:
        jobs = args.jobs if args.engine == "local" else None
        show("trials", trials, jobs, lambda *key: True)
        show("runs", finals, jobs, settled)
        if missing:
            print(f"to be finished first: {', '.join(missing)}")
        return []
    if missing:
        raise ValueError(f"{sweep.path} starts from {', '.join(missing)}, which is no finished run; do its sweep first")
    open_runs = [run for run in [*trials, *finals] if not run.finished]
    if open_runs:
        if sweep.blind() and not args.accept_edge:
            raise ValueError(sweep.blind()[0])
        prepare(open_runs, machine, [sweep.records(), sweep.runs()])
    local = args.engine == "local"
    engine = Local(args.jobs) if local else Ray(args.ray_address, args.cpus_per_run, args.gpus_per_run)
    try:
        failures = do(trials, engine, machine, needed=True)
        if failures:
            return [*failures, "without all trials nothing is chosen; repeat the command"]
        finals = sweep.finals(sweep.chosen)
        check(finals)
        if not args.accept_edge and not all(run.finished for run in finals):
            edges = [edge for key in choosing for edge in sweep.edges(*key) if key in places_of(finals)]
            if edges:
                return edges
        return do(finals, engine, machine)
    finally:
        engine.close()


def places_of(runs: list[Run]) -> set[tuple[str, str]]:
    return {(run.axes["task_name"], run.axes["method"]) for run in runs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="a file of configs/sweeps")
    parser.add_argument("--dataset_name_or_path", default="nyu-mll/glue", help="as in run_glue.py")
    parser.add_argument("--output_dir", type=Path, help="instead of the file's")
    parser.add_argument(
        "--scratch_dir", type=Path, help="where logs, checkpoints and kept models go; runs/sweeps in the repository"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
    parser.add_argument("--tasks", nargs="+", help="of the file's tasks only these")
    parser.add_argument("--methods", nargs="+", help="of the file's methods only these")
    parser.add_argument(
        "--accept_edge", action="store_true", help="run the seeds also where the trials chose an edge of their grid"
    )
    parser.add_argument("--dry_run", action="store_true", help="show the plan and the time it takes, and do nothing")
    parser.add_argument("--engine", default="local", choices=["local", "ray"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (local)")
    parser.add_argument("--ray_address", help="of a running cluster, or auto; a cluster of this machine by default")
    parser.add_argument("--cpus_per_run", type=float, default=1, help="(ray)")
    parser.add_argument(
        "--gpus_per_run", type=float, help="(ray) 1 by default, or 0 if the cluster has no GPU; below 1 they share"
    )
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs={args.jobs} must be at least 1")
    data = Path(args.dataset_name_or_path).expanduser()
    if args.dataset_name_or_path.startswith((".", "/", "~")) and not data.is_dir() and not args.dry_run:
        parser.error(
            f"--dataset_name_or_path={args.dataset_name_or_path!r} is no folder; give a snapshot of nyu-mll/glue, or "
            "the hub's name"
        )
    machine = [f"--dataset_name_or_path={data.resolve() if data.is_dir() else args.dataset_name_or_path}"]
    output_dir = args.output_dir and args.output_dir.resolve()
    scratch = args.scratch_dir.resolve() if args.scratch_dir else Sweep.scratch
    path = args.sweep.resolve()
    os.chdir(ROOT)  # the paths in sweep files begin there
    try:
        sweep = Sweep(path, output_dir, args.seeds, args.tasks, args.methods, scratch)
        failures = run_sweep(sweep, args, machine)
    except KeyboardInterrupt:
        print(
            "\ninterrupted; repeat the command to go on. Runs that did not see Ctrl-C go on to their end",
            file=sys.stderr,
        )
        os._exit(130)  # the threads of runs that go on would be waited for
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
