"""Many runs at once: processes of this machine, or of a Ray cluster."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from .cost import OVERHEAD, Budget, OutOfTime, estimate, work
from .execution import execute
from .run import Run


class Engine(Protocol):
    """Where runs are done."""

    def submit(self, run: Run, machine: Sequence[str]) -> Future[dict[str, Any]]:
        """Have `execute` do the run, now or when there is room for it."""

    def close(self) -> None:
        """Begin no more runs."""


class Processes:
    """So many processes on this machine, which share its cores and, if it has one, its GPU.

    Args:
        budget: within which runs begin; those that are at work when it is spent are stopped.
    """

    def __init__(self, jobs: int, budget: Budget | None = None) -> None:
        if torch.cuda.device_count() > 1:
            raise ValueError(
                f"--engine local gives each run all {torch.cuda.device_count()} GPUs; use --engine ray --gpus_per_run 1"
            )
        self.jobs, self.budget = jobs, budget
        self.pool = ThreadPoolExecutor(jobs)

    def submit(self, run: Run, machine: Sequence[str]) -> Future[dict[str, Any]]:
        asked = os.environ.get("OMP_NUM_THREADS")  # by the user, who may want to leave cores to others
        threads = None if asked else max(1, (os.cpu_count() or 1) // self.jobs)
        if self.budget is None:
            return self.pool.submit(execute, run, machine, threads)
        return self.pool.submit(self._in_time, self.budget, run, machine, threads)

    @staticmethod
    def _in_time(budget: Budget, run: Run, machine: Sequence[str], threads: int | None) -> dict[str, Any]:
        budget.check(run, estimate([run])[run] if budget.rest else None)
        start = time.monotonic()
        record = execute(run, machine, threads, None, budget)
        budget.note(time.monotonic() - start)
        return record

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


class RayCluster:
    """A Ray cluster: the one at --ray_address, or else this machine. The working directory lies at the same path
    on each node (a shared folder), as do runs/ and the data."""

    def __init__(self, address: str | None, cpus: float, gpus: float | None) -> None:
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
        def remote(run: Run, machine: Sequence[str], folder: str, threads: int) -> dict[str, Any]:
            os.chdir(folder)
            return execute(run, machine, threads, ray.get_runtime_context().get_node_id())

        self.remote, self.threads = remote, max(1, int(cpus))

    def submit(self, run: Run, machine: Sequence[str]) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = self.remote.remote(run, machine, os.getcwd(), self.threads).future()
        return future

    def close(self) -> None:
        self.ray.shutdown()


def do(runs: Sequence[Run], engine: Engine, machine: Sequence[str], needed: bool = False) -> list[str]:
    """Do the runs that have no record. Returns what failed, in words.

    needed: without one of them the others are of no use, so none begins after one that failed twice for one reason.
    """
    open_runs = [run for run in runs if not run.finished]
    seconds = estimate(open_runs)
    weights = {run: seconds[run] or OVERHEAD + work(run) for run in open_runs}
    failures: list[str] = []
    futures = {engine.submit(run, machine): run for run in open_runs}
    shape = "{percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
    with tqdm(total=sum(weights.values()), bar_format=shape, postfix=f"0 of {len(open_runs)} runs") as bar:
        for count, future in enumerate(as_completed(futures), 1):
            run = futures[future]
            try:
                future.result()
            except OutOfTime:
                pass  # it has no record, and is left for the next time
            except Exception as error:  # of whatever kind: the others go on
                failures.append(f"{run.name}: {error}")
                if needed and getattr(getattr(error, "cause", error), "same", False):  # Ray wraps it
                    break
            bar.set_postfix_str(f"{count} of {len(open_runs)} runs, {len(failures)} failed", refresh=False)
            bar.update(weights[run])
    return failures
