"""What a sweep file may have. Each check raises `ValueError` that names the file and the key."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..configs import read_text
from ..tasks import TASKS
from .run import ARGUMENTS, LISTS

KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "output_dir": (str, "a folder"),
    "configs": (list, "a list of files"),
    "arguments": (dict, "a mapping"),
    "when": (list, "a list of mappings"),
    "axes": (dict, "a mapping"),
    "tasks": (dict, "a mapping of mappings"),
    "choose": ((dict, str), "a mapping, or the name of a sweep"),
    "scale_learning_rate_from": ((int, float), "a number of rows above 0"),
    "keep_models": (bool, "true or false"),
}
"""Key of a sweep file → the types of its value, and those in words."""


def read_sweep(path: Path) -> dict[str, Any]:
    """The file's content, its keys and the kinds of their values checked."""
    if not path.is_file():
        raise FileNotFoundError(f"sweep={str(path)!r} does not exist; see configs/sweeps")
    try:
        content = yaml.safe_load(read_text(path, str(path)))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not {"output_dir", "configs", "axes"} <= set(content):
        raise ValueError(f"{path}: must be a mapping with output_dir, configs and axes")
    if unknown := sorted(set(map(str, content)) - set(KINDS)):
        raise ValueError(f"{path}: unknown keys {unknown}; known are {sorted(KINDS)}")
    for key, (kinds, what) in KINDS.items():
        if content.get(key) is not None and not isinstance(content[key], kinds):
            raise ValueError(f"{path}: {key} is {content[key]!r}; it takes {what}")
    _check_inside(path, content)
    return content


def _check_inside(path: Path, content: Mapping[str, Any]) -> None:
    """The kinds of what is inside lists and mappings."""
    for key in ("output_dir", "configs", "axes"):
        if content[key] is None:
            raise ValueError(f"{path}: {key} is empty; it takes {KINDS[key][1]}")
    if wrong := [config for config in content["configs"] if not isinstance(config, str)]:
        raise ValueError(f"{path}: configs has {wrong}; it takes a list of files")
    for case in content.get("when") or []:
        if not isinstance(case, dict) or not isinstance(case.get("arguments", {}), dict):
            raise ValueError(f"{path}: when has {case!r}; it takes mappings of axes, and of arguments")
    for name, arguments in (content.get("tasks") or {}).items():
        if not isinstance(arguments, dict):
            raise ValueError(f"{path}: tasks.{name} is {arguments!r}; it takes arguments of `adasam glue`")
    base = content.get("scale_learning_rate_from")
    if base is not None and not 0 < base < math.inf:
        raise ValueError(f"{path}: scale_learning_rate_from is {base!r}; it takes a number of rows above 0")
    choose = content.get("choose")
    for key in ("arguments", "grid"):
        if isinstance(choose, dict) and not isinstance(choose.get(key, {}), dict):
            raise ValueError(f"{path}: choose.{key} is {choose[key]!r}; it takes a mapping")


def check_axes(path: Path, content: Mapping[str, Any]) -> None:
    """Each axis has values and is used somewhere; tasks are GLUE's or described."""
    axes = content["axes"]
    own_tasks = content.get("tasks") or {}
    for axis, values in axes.items():
        _check_values(values, f"{path}: axis {axis}")
    missing = {"task_name", "method", "seed"} - set(axes)
    if missing:
        raise ValueError(f"{path}: axes has no {sorted(missing)}; each sweep has tasks, methods and seeds")
    idle = [a for a in axes if a not in ARGUMENTS and f"{{{a}}}" not in str(content)]
    if idle:
        raise ValueError(f"{path}: axes {idle} are no arguments of `adasam glue`, and no config has them in its name")
    for case in content.get("when") or []:
        if wrong := sorted(set(case) - set(axes) - {"arguments"}) or ({"arguments"} - set(case)):
            raise ValueError(f"{path}: a case of when has {wrong}; it takes axes and arguments")
        for axis in set(case) - {"arguments"}:
            _check_values(case[axis], f"{path}: when.{axis}")
    if both := sorted(set(own_tasks) & set(TASKS)):
        raise ValueError(f"{path}: tasks has {both}, which are GLUE's; give your own another name")
    if unknown := [t for t in axes["task_name"] if t not in TASKS and t not in own_tasks]:
        raise ValueError(f"{path}: axis task_name has {unknown}, not of GLUE; describe them under tasks")


def check_arguments(path: Path, content: Mapping[str, Any]) -> None:
    """No argument has several values that takes one."""
    choose = content.get("choose")
    own_tasks = content.get("tasks") or {}
    given = [content.get("arguments") or {}, *own_tasks.values()]
    given += [case["arguments"] for case in content.get("when") or []]
    given += [choose.get("arguments") or {}] if isinstance(choose, dict) else []
    for name, value in itertools.chain.from_iterable(arguments.items() for arguments in given):
        if isinstance(value, list) and name not in LISTS:
            raise ValueError(f"{path}: {name} is {value!r}; it takes one value; for several, make it an axis")


def check_trials(path: Path, content: Mapping[str, Any]) -> None:
    """Trials are judged on held-out rows, with seeds of their own, and each method has as many."""
    choose, axes = content["choose"], content["axes"]
    if not {"arguments", "grid"} <= set(choose) <= {"arguments", "grid", "seeds"}:
        raise ValueError(f"{path}: choose has {sorted(choose)}; it takes arguments and grid, and seeds")
    if not choose["arguments"].get("held_out_samples"):
        raise ValueError(
            f"{path}: choose.arguments has no held_out_samples, so that trials would be judged on what is "
            "reported; give a number of training rows"
        )
    if "seeds" in choose:
        _check_values(choose["seeds"], f"{path}: choose.seeds")
        if "seed" in choose["arguments"]:
            raise ValueError(f"{path}: choose has seeds and arguments.seed; take the second out")
        if common := sorted(set(choose["seeds"]) & set(axes["seed"])):
            raise ValueError(f"{path}: seeds {common} are of trials and of runs; give the trials others")
    grids = choose["grid"]
    for method, grid in grids.items():
        if not isinstance(grid, dict):
            raise ValueError(f"{path}: choose.grid.{method} is {grid!r}; it takes arguments and their values")
        for name, values in grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"{path}: choose.grid.{method} has {[name]} without a list of values")
            _check_values(values, f"{path}: choose.grid.{method}.{name}")
        if both := sorted(set(grid) & set(axes)):
            raise ValueError(f"{path}: {both} are axes and in choose.grid.{method}, where an axis wins; take one out")
    if absent := [m for m in axes["method"] if m not in grids]:
        raise ValueError(f"{path}: choose.grid has no {absent}; give each method its trials")
    sizes = {m: math.prod(len(v) for v in grids[m].values()) for m in axes["method"]}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{path}: choose.grid is unfair: trials by method are {sizes}; make them equal")


def is_number(value: Any) -> bool:
    """Whether it is one, or text that is read as one."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _check_values(values: Any, where: str) -> None:
    """A list of one or more different values; 0.01 and "1e-2" are the same."""
    seen = {float(v) if is_number(v) else str(v) for v in values} if isinstance(values, list) else set()
    if not seen or len(seen) < len(values):
        raise ValueError(f"{where} is {values!r}; it takes a list of one or more different values")
