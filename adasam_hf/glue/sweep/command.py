"""`adasam sweep`: the command line."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ...console import CommandParser
from ..configs import PACKAGE, find_config

DESCRIPTION = """Do a grid of fine-tuning runs: choose rates and radii on held-out rows, then run every seed.

    adasam sweep configs/sweeps/small/table1.yaml --dataset_name_or_path ../shared/glue --dry_run
    adasam sweep configs/sweeps/small/table1.yaml --dataset_name_or_path ../shared/glue --jobs 2
    adasam sweep configs/sweeps/table1.yaml --engine ray --gpus_per_run 1
    adasam sweep configs/sweeps/evidence/few_labels.yaml --dataset_name_or_path glue --minutes 20 --jobs 6

Each finished run leaves one file, <output_dir>/records/<sweep>/<run>.json (trials: in its folder trials), whole or not
at all, and is skipped from then on: stop the command whenever you like, and repeat it. A run that fails is tried once
more; a trial that fails twice for the same reason stops the sweep. Data, model and folders are checked before the first
run. `adasam report` makes the report. With --minutes no run begins that would end too late, by the times of those
that have finished on such hardware, and one that is still at work then is stopped; several --jobs share one GPU.

A sweep file has

    output_dir   where records go
    configs      YAML files for `adasam glue`, in which {axis} stands for the run's value on that axis
    arguments    arguments of `adasam glue` for all runs; they win over the configs
    when         more arguments for some runs: [{axis: [values], arguments: {…}}]. In values, too, {axis} stands for the
                 run's value, and {runs} for the folder that has all sweeps' runs
    axes         the grid: axis → values. An axis that is an argument of `adasam glue` is passed on, and wins over all
    tasks        tasks that are not GLUE's: name → arguments of `adasam glue` (train_file, validation_file, …)
    choose       {arguments, grid: {method: {argument: [values]}}, seeds: [three or more]}: for each task and method a
                 trial for each point of its grid and each of the seeds, as many for each method. The point with the
                 best mean over the seeds is taken. If that is at an edge of its grid (0 is none: nothing is below) the
                 sweep stops, and the grid is to be widened. Or the name of a sweep whose trials are taken
    scale_learning_rate_from   b₀: the rate is multiplied by √(rows of an optimizer step / b₀)
    keep_models  whether weights stay in the scratch folder; otherwise only logs do

Paths in the file begin at the working directory; those of a file below a folder configs/ at the folder that has it.
"""


def parser() -> CommandParser:
    """All flags, without anything of Transformers imported."""
    out = CommandParser("sweep", DESCRIPTION)
    out.add_argument("sweep", type=Path, help="a file of configs/sweeps, or your own")
    out.add_argument("--dataset_name_or_path", default="nyu-mll/glue", help="as in `adasam glue`")
    out.add_argument("--output_dir", type=Path, help="instead of the file's")
    out.add_argument(
        "--scratch_dir", type=Path, help="where logs, checkpoints and kept models go; runs/sweeps if unset"
    )
    out.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
    out.add_argument("--tasks", nargs="+", help="of the file's tasks only these")
    out.add_argument("--methods", nargs="+", help="of the file's methods only these")
    out.add_argument(
        "--accept_edge", action="store_true", help="run the seeds also where the trials chose an edge of their grid"
    )
    out.add_argument("--dry_run", action="store_true", help="show the plan and the time it takes, and do nothing")
    out.add_argument("--engine", default="local", choices=["local", "ray"])
    out.add_argument("--jobs", type=int, default=1, help="runs at once (local)")
    out.add_argument("--minutes", type=float, help="(local) a budget: do what fits into it, and stop in time")
    out.add_argument("--ray_address", help="of a running cluster, or auto; a cluster of this machine by default")
    out.add_argument("--cpus_per_run", type=float, default=1, help="(ray)")
    out.add_argument(
        "--gpus_per_run", type=float, help="(ray) 1 by default, or 0 if the cluster has no GPU; below 1 they share"
    )
    return out


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """
    Raises:
        ValueError: for what can be seen without the sweep file.
    """
    args = parser().parse_args(argv)
    if args.jobs < 1:
        raise ValueError(f"--jobs={args.jobs} must be at least 1")
    if args.minutes is not None and not 0 < args.minutes < float("inf"):
        raise ValueError(f"--minutes={args.minutes!r} must be above 0 and finite; without it there is no limit")
    if args.minutes is not None and args.engine != "local":
        raise ValueError(f"--minutes={args.minutes!r} is for --engine local; a cluster's queue has limits of its own")
    data = Path(args.dataset_name_or_path).expanduser()
    if args.dataset_name_or_path.startswith((".", "/", "~")) and not data.is_dir() and not args.dry_run:
        raise FileNotFoundError(
            f"--dataset_name_or_path={args.dataset_name_or_path!r} is not a folder; give a snapshot of nyu-mll/glue, "
            "or the hub's name"
        )
    if not args.sweep.is_file() and args.sweep.parts[:1] != ("configs",):
        raise FileNotFoundError(f"sweep={str(args.sweep)!r} does not exist; see configs/sweeps")
    if data.is_dir():
        args.dataset_name_or_path = str(data.resolve())
    return args


def base_of(sweep: Path) -> Path:
    """The folder where the paths in a sweep file begin."""
    above = [folder.parent for folder in sweep.parents if folder.name == "configs"]
    return above[0] if above and not sweep.is_relative_to(PACKAGE) else Path.cwd()


def main(argv: Sequence[str] | None = None) -> int:
    """`adasam sweep`: 1 if a run has failed."""
    started = time.monotonic()  # a budget counts from here on
    args = parse(argv)
    args.started = started
    from .procedure import run_sweep
    from .specification import Sweep

    machine = [f"--dataset_name_or_path={args.dataset_name_or_path}"]
    output_dir = args.output_dir and args.output_dir.resolve()
    scratch = args.scratch_dir.resolve() if args.scratch_dir else Sweep.scratch
    path = find_config(args.sweep).resolve()
    os.chdir(base_of(path))  # for good: runs that are at work when this returns have paths that begin here
    try:
        failures = run_sweep(Sweep(path, output_dir, args.seeds, args.tasks, args.methods, scratch), args, machine)
    except KeyboardInterrupt:
        print(
            "\ninterrupted; repeat the command to go on. Runs that did not see Ctrl-C go on to their end",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(130)  # the threads of runs that go on would be waited for
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0
