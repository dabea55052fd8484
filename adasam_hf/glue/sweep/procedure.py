"""A whole sweep: its trials, what they choose, then the runs with every seed."""

import argparse
from collections.abc import Sequence
from typing import Any

from .choice import blind_grids, chosen, edges
from .cost import show
from .engines import Engine, Local, Ray, do
from .preparation import prepare
from .records import check
from .run import Run
from .specification import Sweep


def run_sweep(sweep: Sweep, args: argparse.Namespace, machine: Sequence[str]) -> list[str]:
    """The trials, then the runs. Returns what failed, in words."""
    trials = sweep.trials()
    choosing: dict[tuple[str, str], list[Run]] = {}
    for run in sweep.chooser.trials():
        choosing.setdefault((run.axes["task_name"], run.axes["method"]), []).append(run)

    def settled(task: str, method: str) -> bool:
        return all(run.finished for run in choosing.get((task, method), []))

    def foreseen(task: str, method: str) -> dict[str, Any]:
        """What is chosen, or stands for it as long as it is not."""
        if settled(task, method) and (task, method) in choosing:
            return chosen(sweep, task, method)
        return (choosing[task, method][0].trial or {}) if (task, method) in choosing else {}

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
        if (blind := blind_grids(sweep)) and not args.accept_edge:
            raise ValueError(blind[0])
        prepare(open_runs, machine, [sweep.records(), sweep.runs()])
    local = args.engine == "local"
    engine: Engine = Local(args.jobs) if local else Ray(args.ray_address, args.cpus_per_run, args.gpus_per_run)
    try:
        failures = do(trials, engine, machine, needed=True)
        if failures:
            return [*failures, "without all trials nothing is chosen; repeat the command"]
        finals = sweep.finals(lambda task, method: chosen(sweep, task, method))
        check(finals)
        if not args.accept_edge and not all(run.finished for run in finals):
            found = [edge for key in choosing for edge in edges(sweep, *key) if key in places_of(finals)]
            if found:
                return found
        return do(finals, engine, machine)
    finally:
        engine.close()


def places_of(runs: Sequence[Run]) -> set[tuple[str, str]]:
    return {(run.axes["task_name"], run.axes["method"]) for run in runs}
