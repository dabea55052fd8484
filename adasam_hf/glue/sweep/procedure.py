"""A whole sweep: its trials, what they choose, then the runs with every seed."""

import argparse
from collections.abc import Sequence
from typing import Any

from .cards import describe_cards
from .choice import blind_grids, chosen, edges
from .cost import Budget, fitting, show
from .engines import Engine, Processes, RayCluster, do
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
        print("\n".join(describe_cards([run for run in [*trials, *finals] if not run.finished])))
        if args.minutes is not None:
            print(_foreseen([*trials, *finals], args))
        if missing:
            print(f"to be finished first: {', '.join(missing)}")
        return []
    if missing:
        raise ValueError(
            f"{sweep.path} starts from {', '.join(missing)}, which is not a finished run; do its sweep first"
        )
    open_runs = [run for run in [*trials, *finals] if not run.finished]
    if open_runs:
        if (blind := blind_grids(sweep)) and not args.accept_edge:
            raise ValueError(blind[0])
        prepare(open_runs, machine, [sweep.records(), sweep.runs()])
    engine: Engine
    if args.engine == "local":
        budget = None if args.minutes is None else Budget(args.minutes, args.started)
        if budget is not None:
            print(_foreseen([*trials, *finals], args))
        engine = Processes(args.jobs, budget)
    else:
        engine = RayCluster(args.ray_address, args.cpus_per_run, args.gpus_per_run)
    try:
        failures = do(trials, engine, machine, needed=True)
        if failures:
            return [*failures, "without all trials nothing is chosen; repeat the command"]
        if not all(run.finished for run in trials):  # in time
            return _left_for_later(trials, "trials")
        finals = sweep.finals(lambda task, method: chosen(sweep, task, method))
        check(finals)
        if not args.accept_edge and not all(run.finished for run in finals):
            found = [edge for key in choosing for edge in edges(sweep, *key) if key in places_of(finals)]
            if found:
                return found
        return do(finals, engine, machine) or _left_for_later(finals, "runs")
    finally:
        engine.close()


def _foreseen(runs: Sequence[Run], args: argparse.Namespace) -> str:
    """What of the rest fits into the budget, in words."""
    rest = [run for run in runs if not run.finished]
    count = fitting(rest, args.jobs, args.minutes)
    if count is None:
        return (
            f"{args.minutes:g} minutes: no run of this hardware has finished, so it is not known what fits; it begins"
        )
    return f"{args.minutes:g} minutes: {count} of {len(rest)} runs fit, {args.jobs} at once"


def _left_for_later(runs: Sequence[Run], what: str) -> list[str]:
    """Nothing has failed; say what had no time."""
    if rest := sum(not run.finished for run in runs):
        print(f"the time is over: {rest} of {len(runs)} {what} are left; repeat the command to go on")
    return []


def places_of(runs: Sequence[Run]) -> set[tuple[str, str]]:
    return {(run.axes["task_name"], run.axes["method"]) for run in runs}
