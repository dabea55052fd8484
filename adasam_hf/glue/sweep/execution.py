"""One run in a process of its own, once more if it fails, and its record."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...checkpoints import last_complete
from ..record import write_json
from .cost import Budget, OutOfTime, work
from .records import check, load, refuse_other
from .run import Run, device_flags


class RunFailed(RuntimeError):
    """A run failed twice; `same`: for the same reason, so that it will again."""

    def __init__(self, message: str, same: bool) -> None:
        super().__init__(message)
        self.same = same

    def __reduce__(self) -> tuple[Any, ...]:  # Ray sends it
        return type(self), (*self.args, self.same)


def _reason(log: Path, start: int = 0) -> str:
    """The last line of a log from this byte on: of a Python program that failed, the error."""
    lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def execute(
    run: Run,
    machine: Sequence[str],
    threads: int | None = None,
    node: str | None = None,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Do one run, in a process of its own, and once more if it fails, and write its record.

    Args:
        machine: arguments that say where the data is.
        threads: OMP_NUM_THREADS of the process.
        node: of the cluster, for the record.

    Returns: its record; that of another sweep in the same folder, if that has done the run meanwhile.

    Raises:
        OutOfTime: if the budget was spent before it had come to its end.
        RunFailed: if it failed twice, with the end of its log.
        RuntimeError: if it was interrupted.
        ValueError: if its folder has checkpoints of a run with other arguments.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "lock", "w") as lock:
        # Runs of a sweep that was killed may still be going on. They inherited the lock; wait for them.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if run.finished:
            check([run])
            return load(run.record)
        state = _state(run)
        environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        reasons: list[str] = []
        while not (run.folder / "record.json").exists():
            if len(reasons) == 2:
                log = run.folder / "log.txt"
                raise RunFailed(f"failed twice; {log} ends in\n{log.read_text()[-800:]}", len(set(reasons)) == 1)
            reasons.append(_attempt(run, machine, state, environment, lock.fileno(), budget))
        return _finish(run, state, node)


def _state(run: Run) -> dict[str, Any]:
    """What an earlier session has noted of this run; a new note if that was of other arguments."""
    plan = run.folder / "plan.json"
    state: dict[str, Any] = json.loads(plan.read_text()) if plan.exists() else {}
    if state.get("arguments") == run.arguments:
        return state
    if last_complete(str(run.folder)) is not None:
        refuse_other(state.get("arguments", {}), run.arguments, plan)
    (run.folder / "record.json").unlink(missing_ok=True)
    return {"arguments": run.arguments, "failures": 0, "resumed": False}


def _attempt(
    run: Run,
    machine: Sequence[str],
    state: dict[str, Any],
    environment: dict[str, str],
    lock: int,
    budget: Budget | None,
) -> str:
    """One process, from the last checkpoint if there is one. Returns why it failed, or nothing."""
    log, plan = run.folder / "log.txt", run.folder / "plan.json"
    start = log.stat().st_size if log.exists() else 0
    resume = ["--resume_from_checkpoint=last"] if last_complete(str(run.folder)) is not None else []
    state["resumed"] = bool(resume)
    write_json(plan, state)
    words = [*run.words, f"--output_dir={run.folder}", "--disable_tqdm=true", *device_flags(), *machine, *resume]
    command = [sys.executable, "-m", "adasam_hf", "--debug", "glue", *words]  # the log has the whole traceback
    with open(log, "a") as out:
        options: dict[str, Any] = {} if budget is None else {"timeout": budget.rest}
        try:
            done = subprocess.run(
                command, stdout=out, stderr=out, env=environment, pass_fds=[lock], check=False, **options
            )
        except subprocess.TimeoutExpired:  # it has been killed, and goes on from its last checkpoint another time
            raise OutOfTime(run.name) from None
    if done.returncode in (-signal.SIGINT, 128 + signal.SIGINT):
        raise RuntimeError("interrupted")
    if done.returncode == 0:
        return ""
    state["failures"] += 1
    write_json(plan, state)
    tqdm.write(f"{run.name} failed, see {log}", file=sys.stderr)
    return _reason(log, start)


def _finish(run: Run, state: dict[str, Any], node: str | None) -> dict[str, Any]:
    """Write the record to its place, and delete what is of no use any more."""
    record = run.folder / "record.json"
    content: dict[str, Any] = json.loads(record.read_text())
    for checkpoint in run.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    if not run.keep_model:
        for path in run.folder.glob("*.safetensors"):
            path.unlink()
    # train_runtime is that of the last session
    speed = None if state["resumed"] else content["metrics"]["train_runtime"] / work(run)
    content |= {"sweep": run.sweep, "run": run.name, "axes": run.axes, "trial": run.trial}
    content |= {} if node is None else {"node": node}
    content |= {"attempts": state["failures"] + 1, "resumed": state["resumed"], "seconds_per_row": speed}
    write_json(run.record, content)  # while the lock is held: another sweep sees either the lock or the record
    if not run.keep_model:
        record.unlink()
    return content
