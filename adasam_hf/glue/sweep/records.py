"""The records of finished runs: whether they are whole, and of the runs that the sweep file describes.

What counts as finished is `Run.finished`, in `run.py`.
"""

import json
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from .run import FIELDS, Run, comparable, parse_run


def load(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
        ValueError: for a file that is none.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        record["arguments"].items(), record["axes"]["task_name"], record["seconds_per_row"]
        float(record["metrics"]["eval_loss"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a record of a run ({error!r}); delete it, and repeat the command") from None
    return record


def check(runs: Sequence[Run], arguments: bool = True) -> list[str]:
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
                refuse_other(comparable(found), wanted, run.record)
            continue
        source = parse_run(run.words)[0].init_from
        if source and not Path(source, "record.json").is_file():
            missing.add(source)
    return sorted(missing)


def refuse_other(found: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """
    Raises:
        ValueError: if the arguments of a record are not those that are wanted.
    """
    # An argument that is younger than the record had its default.
    younger = [FIELDS[k] for k in wanted if k in FIELDS and k not in found]
    found = {f.name: f.default for f in younger if f.default is not MISSING} | found
    different = {k: found.get(k) for k in sorted(found | wanted) if found.get(k) != wanted.get(k)}
    if different:
        raise ValueError(f"{where} is of a run with other arguments: {different}; move it away, and {where.parent} too")
