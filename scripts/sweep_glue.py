#!/usr/bin/env python
"""A grid of run_glue.py runs from one file: chooses rates and radii on held-out rows, then runs every seed.

    python scripts/sweep_glue.py configs/sweeps/small/table1.yaml --dataset_name_or_path ../shared/glue --dry_run
    python scripts/sweep_glue.py configs/sweeps/small/table1.yaml --dataset_name_or_path ../shared/glue --jobs 2
    python scripts/sweep_glue.py configs/sweeps/table1.yaml --engine ray --gpus_per_run 1

Each finished run leaves one file, <output_dir>/records/<sweep>/<run>.json (trials: in its folder trials), whole or not
at all, and is skipped from then on: stop the command whenever you like, and repeat it. A run that fails is tried once
more. scripts/report_glue.py makes the report.

A sweep file has

    output_dir   where records go
    configs      YAML files for run_glue.py, in which {axis} stands for the run's value on that axis
    arguments    arguments of run_glue.py for all runs; they win over the configs
    when         more arguments for some runs: [{axis: [values], arguments: {…}}]. In values, too, {axis} stands for the
                 run's value, and {runs} for the folder that has all sweeps' runs
    axes         the grid: axis → values. An axis that run_glue.py has as an argument is passed to it, and wins over all
    choose       {arguments, grid: {method: {argument: [values]}}}: for each task and method one trial for each point of
                 its grid, as many for each method; or the name of a sweep whose trials are taken
    scale_learning_rate_from   b₀: the rate is multiplied by √(per_device_train_batch_size / b₀)
    keep_models  whether weights stay in runs/sweeps; otherwise only logs do
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
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from zlib import crc32

import torch
import yaml
from tqdm.auto import tqdm

from adasam_hf.checkpoints import last_complete
from adasam_hf.glue.record import write_json
from adasam_hf.glue.run import DataArguments, GlueTrainingArguments, ModelArguments, parse
from adasam_hf.glue.tasks import get_task

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"output_dir", "configs", "arguments", "when", "axes", "choose", "scale_learning_rate_from", "keep_models"}
ARGUMENTS = {f.name for c in (ModelArguments, DataArguments, GlueTrainingArguments) for f in fields(c)}
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
    content: dict = field(init=False)

    def __post_init__(self):
        if not self.path.is_file():
            raise FileNotFoundError(f"sweep={str(self.path)!r} does not exist; see configs/sweeps")
        self.content = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        if not isinstance(self.content, dict) or not {"output_dir", "configs", "axes"} <= set(self.content):
            raise ValueError(f"{self.path}: must be a mapping with output_dir, configs and axes")
        if unknown := sorted(set(self.content) - KEYS):
            raise ValueError(f"{self.path}: unknown keys {unknown}; known are {sorted(KEYS)}")
        if self.output_dir is None:
            self.output_dir = Path(self.content["output_dir"])
        if self.seeds is not None:
            self.axes["seed"] = self.seeds
        for axis, values in self.axes.items():
            if not isinstance(values, list) or not values or len({str(v) for v in values}) < len(values):
                raise ValueError(
                    f"{self.path}: axis {axis} is {values!r}; it takes a list of one or more different values"
                )
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
        if isinstance(self.choose, dict):
            if set(self.choose) != {"arguments", "grid"}:
                raise ValueError(f"{self.path}: choose has {sorted(self.choose)}; it takes arguments and grid")
            if not self.choose["arguments"].get("held_out_samples"):
                raise ValueError(
                    f"{self.path}: choose.arguments has no held_out_samples, so that trials would be judged on what is "
                    "reported; give a number of training rows"
                )
            grids = self.choose["grid"]
            for method, grid in grids.items():
                if wrong := [name for name, values in grid.items() if not isinstance(values, list) or not values]:
                    raise ValueError(f"{self.path}: choose.grid.{method} has {wrong} without a list of values")
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
    def chooser(self) -> "Sweep":
        """The sweep whose trials choose for this one."""
        if isinstance(self.choose, str):
            return Sweep(self.path.with_name(f"{self.choose}.yaml"), self.output_dir)
        return self

    def records(self) -> Path:
        return self.output_dir / "records" / self.name

    def runs(self) -> Path:
        """Where logs and, if they are kept, models of all sweeps of the output_dir lie."""
        place = self.output_dir
        if place.is_absolute():
            inside = place.is_relative_to(ROOT)
            place = place.relative_to(ROOT) if inside else Path(f"{place.name}-{crc32(bytes(place)):08x}")
        return Path("runs/sweeps") / Path(*(part for part in place.parts if part != "results"))

    def trials(self) -> list[Run]:
        """The trials of this sweep's own grid. Axes besides task and method are at their first value."""
        if not isinstance(self.choose, dict):
            return []
        first = {name: values[0] for name, values in self.axes.items()}
        first |= {name: value for name, value in self.choose["arguments"].items() if name in first}
        runs = []
        for task, method in itertools.product(self.axes["task_name"], self.axes["method"]):
            grid = self.choose["grid"][method]
            for values in itertools.product(*grid.values()):
                trial = dict(zip(grid, values, strict=True))
                shown = ",".join(f"{k}={v}" for k, v in trial.items())
                point = first | {"task_name": task, "method": method}
                runs.append(self._run(point, f"{task}-{method}-{shown}", self.choose["arguments"] | trial, trial))
        return runs

    def finals(self, choose: Callable[[str, str], dict]) -> list[Run]:
        """One run for each point of the axes, with what `choose` says for its task and method."""
        points = [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]
        return [self._run(p, "-".join(map(str, p.values())), choose(p["task_name"], p["method"])) for p in points]

    def chosen(self, task: str, method: str) -> dict:
        """The point of the grid whose trial has the best score on the held-out rows, of equal ones the one with the
        lowest loss there; {} without trials to choose from.

        Raises:
            ValueError: if a trial has no record or one of other arguments, or if all have diverged.
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
        metrics = [load(run.record)["metrics"] for run in runs]
        # Of a model that is NaN all over, accuracy is that of the first class; only the loss tells.
        ranks = {i: (get_task(task).score(found), -found["eval_loss"]) for i, found in enumerate(metrics)}
        ranks = {i: rank for i, rank in ranks.items() if all(map(math.isfinite, rank))}
        if not ranks:
            raise ValueError(f"{self.path}: all trials of {method} on {task} have diverged; give it lower rates")
        return runs[max(ranks, key=ranks.get)].trial

    def _run(self, point: dict, name: str, more: dict, trial: dict | None = None) -> Run:
        arguments = dict(self.content.get("arguments") or {})
        for case in self.content.get("when") or []:
            if all(point[axis] in values for axis, values in case.items() if axis != "arguments"):
                arguments |= case["arguments"]
        arguments |= more
        arguments |= {name: value for name, value in point.items() if name in ARGUMENTS}  # an axis wins
        places = {**point, "runs": self.runs()}
        words = [f"--config={config.format(**places)}" for config in self.content["configs"]]
        for key, value in arguments.items():
            text = value.format(**places) if isinstance(value, str) else value
            words.append(f"--{key}={json.dumps(text) if isinstance(text, dict) else text}")
        base = self.content.get("scale_learning_rate_from")
        if base is not None:
            _, _, args = parse_run(words)
            words.append(f"--learning_rate={args.learning_rate * math.sqrt(args.per_device_train_batch_size / base)!r}")
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


def parse_run(words: Iterable[str]) -> tuple[ModelArguments, DataArguments, GlueTrainingArguments]:
    """The arguments of run_glue.py, as it reads them."""
    return parse([*words, "--output_dir=unused", *device_flags()])


def device_flags() -> list[str]:
    return [] if torch.accelerator.is_available() else ["--use_cpu"]  # bf16 on a CPU must be asked for


def load(path: Path) -> dict:
    """A record."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["arguments"], record["axes"], record["metrics"], record["seconds_per_row"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of a run ({error!r}); delete it, and repeat the command") from None
    return record


def comparable(arguments: dict) -> dict:
    """Arguments as JSON has them, without what is the machine's own."""
    return {k: v for k, v in json.loads(json.dumps(arguments, default=str)).items() if k not in MACHINE}


def check(runs: list[Run]) -> list[str]:
    """Every run's arguments before anything runs, and that the records that are there are those of these runs.

    Returns: the runs that must be finished first.
    """
    missing: set[str] = set()
    for run in runs:
        wanted = run.arguments
        if run.finished:
            _refuse_other(comparable(load(run.record)["arguments"]), wanted, run.record)
        elif wanted["init_from"] and not Path(wanted["init_from"], "record.json").is_file():
            missing.add(wanted["init_from"])
    return sorted(missing)


def _refuse_other(found: dict, wanted: dict, where: Path) -> None:
    different = {k: found.get(k) for k in sorted(found | wanted) if found.get(k) != wanted.get(k)}
    if different:
        raise ValueError(f"{where} is of a run with other arguments: {different}; move it away, and {where.parent} too")


def execute(run: Run, machine: list[str], threads: int | None = None) -> dict:
    """Do one run, in a process of its own, and once more if it fails.

    Args:
        machine: arguments that say where the data is.
        threads: OMP_NUM_THREADS of the process.

    Returns: its record.

    Raises:
        RuntimeError: if it failed twice, with the end of its log, or was interrupted.
        ValueError: if its folder has checkpoints of a run with other arguments.
    """
    folder, log = run.folder, run.folder / "log.txt"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        # Runs of a sweep that was killed may still be going on. They inherited the lock; wait for them.
        fcntl.flock(lock, fcntl.LOCK_EX)
        plan, record = folder / "plan.json", folder / "record.json"
        state = json.loads(plan.read_text()) if plan.exists() else {}
        if state.get("arguments") != run.arguments:
            if last_complete(str(folder)) is not None:
                _refuse_other(state.get("arguments", {}), run.arguments, plan)
            record.unlink(missing_ok=True)
            state = {"arguments": run.arguments, "failures": 0, "resumed": False}
        environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        for _ in range(2):
            if record.exists():
                break
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
                write_json(plan, state)
                tqdm.write(f"{run.name} failed, see {log}", file=sys.stderr)
        if not record.exists():
            raise RuntimeError(f"failed twice; {log} ends in\n{log.read_text()[-800:]}")
        content = json.loads(record.read_text())
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        if not run.keep_model:
            for path in folder.glob("*.safetensors"):
                path.unlink()
    # train_runtime is that of the last session
    speed = None if state["resumed"] else content["metrics"]["train_runtime"] / work(run)
    own = {"sweep": run.sweep, "run": run.name, "axes": run.axes, "trial": run.trial}
    return content | own | {"attempts": state["failures"] + 1, "resumed": state["resumed"], "seconds_per_row": speed}


# ---- how long ----


def work(run: Run) -> float:
    """Rows that pass through the model, forward and backward."""
    _, data_args, args = parse_run(run.words)
    rows = data_args.max_train_samples or TRAIN_ROWS[data_args.task_name]
    seen = rows * args.num_train_epochs if args.max_steps < 0 else args.max_steps * args.per_device_train_batch_size
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
        return self.pool.submit(execute, run, machine, max(1, (os.cpu_count() or 1) // self.jobs))

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
            return execute(run, machine, threads) | {"node": ray.get_runtime_context().get_node_id()}

        self.remote, self.threads = remote, max(1, int(cpus))

    def submit(self, run: Run, machine: list[str]) -> Future:
        return self.remote.remote(run, machine, str(ROOT), self.threads).future()

    def close(self) -> None:
        self.ray.shutdown()


def do(runs: list[Run], engine: Local | Ray, machine: list[str]) -> list[str]:
    """Do the runs that have no record. Returns what failed, in words."""
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
                write_json(run.record, future.result())
                if not run.keep_model:
                    (run.folder / "record.json").unlink(missing_ok=True)  # of no use any more, if that one is deleted
            except Exception as error:  # of whatever kind: the others go on
                failures.append(f"{run.name}: {error}")
            bar.set_postfix_str(f"{count} of {len(open_runs)} runs, {len(failures)} failed", refresh=False)
            bar.update(weights[run])
    return failures


def show(title: str, runs: list[Run], jobs: int | None, settled: Callable[[str, str], bool]) -> None:
    """The plan: what is done and what is left, by task and method. Without `jobs` the time is that of all runs."""
    left = [run for run in runs if not run.finished]
    seconds = list(estimate(left).values())
    time = "none" if not left else "unknown until a first run has finished"
    if left and None not in seconds:
        how = f"with {jobs} at once" if jobs else "over the runs that the cluster does at once"
        time = f"about {sum(seconds) / (jobs or 1) / 3600:.1f} hours {how}"
    print(f"{title}: {len(runs)} runs, {len(runs) - len(left)} finished; time left: {time}")
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.axes["task_name"], run.axes["method"]), []).append(run)
    for (task, method), mine in groups.items():
        words = " ".join(mine[0].words) + ("" if settled(task, method) else " (a trial's; to be chosen)")
        print(f"  {task:<6}{method:<9}{sum(run.finished for run in mine)}/{len(mine)}  {words}")


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
    if args.dry_run:
        jobs = args.jobs if args.engine == "local" else None
        show("trials", trials, jobs, lambda *key: True)
        show("runs", finals, jobs, settled)
        if missing:
            print(f"to be finished first: {', '.join(missing)}")
        return []
    if missing:
        raise ValueError(f"{sweep.path} starts from {', '.join(missing)}, which is no finished run; do its sweep first")
    local = args.engine == "local"
    engine = Local(args.jobs) if local else Ray(args.ray_address, args.cpus_per_run, args.gpus_per_run)
    try:
        failures = do(trials, engine, machine)
        if failures:
            return [*failures, "without all trials nothing is chosen; repeat the command"]
        finals = sweep.finals(sweep.chosen)
        check(finals)
        return do(finals, engine, machine)
    finally:
        engine.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="a file of configs/sweeps")
    parser.add_argument("--dataset_name_or_path", default="nyu-mll/glue", help="as in run_glue.py")
    parser.add_argument("--output_dir", type=Path, help="instead of the file's")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
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
    machine = [f"--dataset_name_or_path={data.resolve() if data.is_dir() else args.dataset_name_or_path}"]
    output_dir = args.output_dir and args.output_dir.resolve()
    path = args.sweep.resolve()
    os.chdir(ROOT)  # the paths in sweep files begin there
    try:
        sweep = Sweep(path, output_dir, args.seeds)
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
