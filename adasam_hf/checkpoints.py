"""From which checkpoint a run can go on, after one that was killed or ran out of disk while it was saving."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.get_logger(__name__)

# As Transformers, Accelerate (pytorch_model_fsdp*), PEFT (one adapter or several) and DeepSpeed (global_step*) have it.
_WEIGHTS = ("*.safetensors", "*/*.safetensors", "*model*.bin", "*/*model*.bin", "pytorch_model*", "global_step*")
# All of it, or none with `save_only_model`.
_TRAINING_STATE = {
    "optimizer": ("*optimizer*", "global_step*"),
    "scheduler": ("scheduler.pt", "global_step*"),
    "random state": ("rng_state*.pth",),
}


class CompleteCheckpointsMixin(_Base):
    """``resume_from_checkpoint=True`` passes over checkpoints that a run killed while saving left behind."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in Transformers, but ``True`` takes the last checkpoint that was saved to its end."""
        if resume_from_checkpoint is True:
            folder, usual = str(self.args.output_dir), type(self)._save is Trainer._save
            found = [last_complete(folder, usual) if self.is_world_process_zero() else None]
            resume_from_checkpoint = broadcast_object_list(found)[0]
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint=True: output_dir={self.args.output_dir!r} has no completely saved "
                    "checkpoint; leave it unset to start from the beginning"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # of a full disk, most do not say where
            folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            error.add_note(f"{folder} is not complete; resume_from_checkpoint=True takes the last one that is")
            raise

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Next, process 0 declares the checkpoint complete (trainer_state.json) and may delete older ones.
        self.accelerator.wait_for_everyone()


def last_complete(folder: str | Path, usual_weights: bool = True) -> str | None:
    """The newest ``checkpoint-N`` in `folder` that was saved to its end, or None. Warns of newer ones that were not.

    (Transformers' `get_last_checkpoint` takes the newest folder as it is.)

    Args:
        usual_weights: whether the weights are in files that Transformers, Accelerate or PEFT write; False for a trainer
            with a `_save` of its own, whose files have names that nobody else knows.
    """
    names = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(folder).glob("checkpoint-*")}
    steps = {path: int(name[1]) for path, name in names.items() if name and path.is_dir()}
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        fault = _fault(path, usual_weights)
        if fault is None:
            return str(path)
        logger.warning(f"{path} is skipped, as it was not completely saved: {fault}")
    return None


def _fault(checkpoint: Path, usual_weights: bool) -> str | None:
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
    needed = set(parts) if any(parts[name] for name in _TRAINING_STATE) else {"weights"}
    if not usual_weights:
        needed.remove("weights")
    if missing := [name for name in parts if name in needed and not parts[name]]:
        return f"no {', '.join(missing)}"
    if empty := {path.name for paths in parts.values() for path in paths if path.is_file() and not path.stat().st_size}:
        return f"nothing in {', '.join(sorted(empty))}"
    ranks = {int(rank[1]) for path in parts["random state"] if (rank := re.search(r"_(\d+)$", path.stem))}
    if lost := set(range(max(ranks, default=0))) - ranks:
        return f"no random state of process {', '.join(map(str, sorted(lost)))}"
    return None
