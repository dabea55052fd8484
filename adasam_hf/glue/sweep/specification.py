"""A sweep file as the runs that it describes."""

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from .run import ARGUMENTS, Run, parse_run
from .validation import check_arguments, check_axes, check_trials, read_sweep

Choice = Callable[[str, str], Mapping[str, Any]]
"""Task and method → the arguments that are chosen for their runs."""


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
    content: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.content = read_sweep(self.path)
        if self.seeds is not None:
            self.axes["seed"] = self.seeds
        check_axes(self.path, self.content)
        check_arguments(self.path, self.content)
        if isinstance(self.choose, dict):
            check_trials(self.path, self.content)
        for axis, wanted in (("task_name", self.tasks), ("method", self.methods)):
            if wanted is not None:
                if unknown := [value for value in wanted if value not in self.axes[axis]]:
                    raise ValueError(f"{self.path} has no {axis} {unknown}; it has {self.axes[axis]}")
                self.axes[axis] = wanted

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def axes(self) -> dict[str, list[Any]]:
        return self.content["axes"]

    @property
    def choose(self) -> dict[str, Any] | str | None:
        return self.content.get("choose")

    @property
    def own_tasks(self) -> dict[str, dict[str, Any]]:
        return self.content.get("tasks") or {}

    @property
    def chooser(self) -> "Sweep":
        """The sweep whose trials choose for this one."""
        if isinstance(self.choose, str):
            return Sweep(self.path.with_name(f"{self.choose}.yaml"), self.output_dir, scratch=self.scratch)
        return self

    @property
    def grid(self) -> dict[str, dict[str, list[Any]]]:
        """Method → argument → the values that are tried."""
        return self.choose["grid"] if isinstance(self.choose, dict) else {}

    @property
    def place(self) -> Path:
        """The output_dir: the caller's, or the file's."""
        return self.output_dir or Path(self.content["output_dir"])

    def records(self) -> Path:
        """Where the records of this sweep are."""
        return self.place / "records" / self.name

    def runs(self) -> Path:
        """Where logs and, if they are kept, models of all sweeps of the output_dir lie."""
        place, here = self.place, Path.cwd()
        if place.is_absolute():
            inside = place.is_relative_to(here)
            place = place.relative_to(here) if inside else Path(f"{place.name}-{crc32(bytes(place)):08x}")
        return self.scratch / Path(*(part for part in place.parts if part != "results"))

    def trials(self) -> list[Run]:
        """The trials of this sweep's own grid, one seed after the other. Other axes are at their first value."""
        if not isinstance(self.choose, dict):
            return []
        first = {name: values[0] for name, values in self.axes.items()}
        first |= {name: value for name, value in self.choose["arguments"].items() if name in first}
        seeds, runs = self.choose.get("seeds"), list[Run]()
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

    def finals(self, choose: Choice) -> list[Run]:
        """One run for each point of the axes, with what `choose` says for its task and method; one seed after the
        other, so that what is finished are pairs."""
        points = [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]
        points.sort(key=lambda point: self.axes["seed"].index(point["seed"]))
        return [self._run(p, "-".join(map(str, p.values())), choose(p["task_name"], p["method"])) for p in points]

    def _run(
        self, point: Mapping[str, Any], name: str, more: Mapping[str, Any], trial: dict[str, Any] | None = None
    ) -> Run:
        arguments = dict(self.content.get("arguments") or {})
        for case in self.content.get("when") or []:
            if all(point[axis] in values for axis, values in case.items() if axis != "arguments"):
                arguments |= case["arguments"]
        own = self.own_tasks.get(point["task_name"])
        arguments |= {**(own or {}), **more}
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
            dict(point),
            tuple(words),
            self.records() / place.with_name(f"{place.name}.json"),
            self.runs() / self.name / place,
            trial,
            trial is None and bool(self.content.get("keep_models")),
        )
