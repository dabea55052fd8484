"""From which checkpoint a run can go on, after one that was killed or ran out of disk while it was saving."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

# As Transformers, Accelerate (pytorch_model_fsdp*), PEFT (one adapter or several) and DeepSpeed (global_step*) have it.
_WEIGHTS = ("*.safetensors", "*/*.safetensors", "*model*.bin", "*/*model*.bin", "pytorch_model*", "global_step*")
# All of it, or none with `save_only_model`.
_TRAINING_STATE = {
    "optimizer": ("*optimizer*", "global_step*"),
    "scheduler": ("scheduler.pt", "global_step*"),
    "random state": ("rng_state*.pth",),
}


def last_complete(folder: str | Path) -> str | None:
    """The newest ``checkpoint-N`` in `folder` that was saved to its end, or None. Warns of newer ones that were not.

    (Transformers' `get_last_checkpoint` takes the newest folder as it is.)
    """
    names = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(folder).glob("checkpoint-*")}
    steps = {path: int(name[1]) for path, name in names.items() if name and path.is_dir()}
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        fault = _fault(path)
        if fault is None:
            return str(path)
        logger.warning(f"{path} is passed over, as it was not saved to its end: {fault}")
    return None


def _fault(checkpoint: Path) -> str | None:
    """What shows that `checkpoint` is partial, or None."""

    def found(patterns: Iterable[str]) -> list[Path]:
        return [path for pattern in patterns for path in checkpoint.glob(pattern)]

    if found(["checkpoint-is-incomplete.txt"]):  # Transformers' mark with `enable_jit_checkpoint`
        return "it is marked by checkpoint-is-incomplete.txt"
    try:
        # Process 0 writes it last, so what it cannot vouch for are the files of others, and files lost since.
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"no readable trainer_state.json ({error})"
    parts = {"weights": found(_WEIGHTS)} | {name: found(patterns) for name, patterns in _TRAINING_STATE.items()}
    needed = parts if any(parts[name] for name in _TRAINING_STATE) else ["weights"]
    if missing := [name for name in needed if not parts[name]]:
        return f"no {', '.join(missing)}"
    if empty := {path.name for paths in parts.values() for path in paths if path.is_file() and not path.stat().st_size}:
        return f"nothing in {', '.join(sorted(empty))}"
    ranks = {int(rank[1]) for path in parts["random state"] if (rank := re.search(r"_(\d+)$", path.stem))}
    if lost := set(range(max(ranks, default=0))) - ranks:
        return f"no random state of process {', '.join(map(str, sorted(lost)))}"
    return None
