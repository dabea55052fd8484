"""The record of a run: what ran and what came of it, in one JSON file."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

import adasam_hf

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "numpy", "scikit-learn", "scipy")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


BUNDLE = "bundle.json"
"""Beside a copy of the package that `adasam benchmark bundle` has made: the commit that it is of."""


def provenance() -> dict[str, Any]:
    """Commit (and whether the files differ from it), versions and hardware."""
    # An installed copy may lie inside the repository of someone else's project.
    tracked = _git("ls-files", "--error-unmatch", "__init__.py") is not None
    # (Records that a run overwrites do not change the code that runs.)
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results")
    added = _git("ls-files", "--others", "--exclude-standard", "--full-name", ":/*.py", ":/*.yaml")  # not records
    bundle = Path(adasam_hf.__file__).parents[1] / BUNDLE
    if tracked or not bundle.is_file():
        origin = {"commit": _git("rev-parse", "HEAD"), "dirty": bool(changed or added)} if tracked else None
    else:
        origin = json.loads(bundle.read_text(encoding="utf-8"))
    return {
        **(origin or {"commit": None, "dirty": None}),
        "versions": {
            "adasam_hf": adasam_hf.__version__,
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in PACKAGES},
        },
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def write_record(
    path: Path, origin: dict[str, Any], trainer: Trainer, arguments: Iterable[Any], metrics: dict[str, Any]
) -> None:
    """Write the record of a run of `trainer`, with tokens blanked. `origin` is the `provenance` when the run started,
    `arguments` are dataclasses besides the trainer's own."""
    write_json(
        path,
        {
            **origin,
            "command": [_program(), *_without_tokens(sys.argv[1:])],
            "seed": trainer.args.seed,
            "arguments": {k: v for a in arguments for k, v in dataclasses.asdict(a).items()} | trainer.args.to_dict(),
            "metrics": metrics,
            "log_history": trainer.state.log_history,
        },
    )


def _program() -> str:
    """The name of the program; `python -m adasam_hf` counts as `adasam`."""
    name = Path(sys.argv[0]).name
    return "adasam" if name == "__main__.py" else name


def _without_tokens(argv: list[str]) -> list[str]:
    hidden = False
    out = []
    for word in argv:
        name, equals, _ = word.partition("=")
        out.append("<TOKEN>" if hidden else f"{name}=<TOKEN>" if name.endswith("token") and equals else word)
        hidden = name.startswith("--") and name.endswith("token") and not equals
    return out


def _git(*words: str) -> str | None:
    folder = Path(adasam_hf.__file__).parent
    try:
        found = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
