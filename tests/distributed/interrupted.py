"""Runs that something happens to, in this process or in each process of a torchrun job:

    torchrun --standalone --nproc_per_node 2 --max_restarts 3 tests/distributed/interrupted.py FOLDER [--fsdp] [--whole]

trains each case of DDP (or FSDP2) twice, whole and killed: in attempt i the last process kills itself in case i, and in
attempt i + 1 the case goes on from its last complete checkpoint. (--whole: nothing is killed.) Leaves
FOLDER/<case>-<whole or killed>-<rank>.pt.
"""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate.state import AcceleratorState
from conftest import make_model, make_rows
from distributed.cases import force_fsdp2
from transformers import TrainerCallback

from adasam_hf import AdaSAMTrainer, AdaSAMTrainingArguments
from adasam_hf.checkpoints import last_complete

STEPS, SAVES = 12, 2  # optimizer steps in all, and from one checkpoint to the next
CASES = {
    "adasam batch": {"optim": "adasam"},
    "adasam microbatch": {"optim": "adasam", "sam_scope": "microbatch"},
    "adamw": {"optim": "adamw_torch"},
}


@dataclass(frozen=True)
class Strike:
    """A signal that a process sends to itself, in optimizer step `step` (counted from 1).

    Its instants: inside the ``ascent`` or the ``descent``, after the ``update``, and while saving, when nothing is
    there but the ``weights``, or all but the random state (``rng``) and the file that ends a checkpoint.
    """

    step: int
    instant: str
    signal: int = signal.SIGKILL

    @classmethod
    def at_random(cls, seed, instant: str, signal: int = signal.SIGKILL) -> "Strike":
        """In a step after the first checkpoint; while saving, in one that saves."""
        saving = instant in ("weights", "rng")
        return cls(random.Random(seed).randrange(4 if saving else 3, STEPS, SAVES if saving else 1), instant, signal)

    def __call__(self) -> None:
        os.kill(os.getpid(), self.signal)
        time.sleep(3.5)  # with enable_jit_checkpoint, SIGTERM asks for a checkpoint after 3 seconds


DDP = {
    "adasam batch": Strike.at_random(1, "descent"),
    "adasam microbatch": Strike.at_random(2, "rng"),
    "adamw": Strike.at_random(3, "ascent"),
}
FSDP = {"adasam batch": Strike.at_random(4, "descent")}


def weights_of(model) -> torch.Tensor:
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1).clone() for p in full])


class Run(AdaSAMTrainer):
    """Calls ``at[step, instant]`` when it gets there, once."""

    at: dict[tuple[int, str], Callable] = {}

    def arrive(self, instant: str, step: int) -> None:
        self.at.pop((step, instant), bool)()

    def _save_optimizer_and_scheduler(self, output_dir):
        self.arrive("weights", self.state.global_step)
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir):
        self.arrive("rng", self.state.global_step)
        super()._save_rng_state(output_dir)


class Watch(TrainerCallback):
    """Keeps the clean weights: now, and those with which each step began."""

    def __init__(self):
        self.begun, self.updating = [], False

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.now = weights_of(model)
        self.begun.append(self.now)
        self.updating = False

    def on_pre_optimizer_step(self, *_, **kwargs):
        self.updating = True

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.arrive("update", state.global_step + 1)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.now = weights_of(model)


def build(folder: Path, strike: Strike | None = None, callbacks=(), dropout=0.1, **flags) -> Run:
    defaults = {"save_steps": SAVES, "ddp_backend": "gloo" if torch.distributed.is_torchelastic_launched() else None}
    args = AdaSAMTrainingArguments(
        output_dir=str(folder),
        learning_rate=1e-3,
        num_train_epochs=2,
        per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)),
        gradient_accumulation_steps=2,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        **(defaults | flags),
    )
    model = make_model("bert", torch.float32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    rows, watch = make_rows(44), Watch()  # six windows an epoch, the last of a single micro-batch
    trainer = Run(model, args, train_dataset=rows, eval_dataset=rows[:4], callbacks=[watch, *callbacks])
    trainer.model_accepts_loss_kwargs = False
    trainer.watch, watch.trainer = watch, trainer
    if strike:
        trainer.at = {(strike.step, strike.instant): strike}

    def inside(*_):
        if model.training:
            trainer.arrive("descent" if trainer._perturbation.active else "ascent", trainer.state.global_step + 1)

    model.bert.encoder.layer[0].register_forward_hook(inside)
    return trainer


def train(folder: Path, result: Path, **options) -> None:
    """Train to the end, from the last complete checkpoint if there is one; leave in `result` what can be compared."""
    trainer = build(folder, **options)
    trainer.train(resume_from_checkpoint=last_complete(folder) is not None)
    outcome = {
        "weights": weights_of(trainer.model),
        "begun": trainer.watch.begun,
        "logs": [e for e in trainer.state.log_history if "loss" in e and trainer.is_world_process_zero()],
        "random": torch.get_rng_state(),
        "sharded": any(hasattr(p, "full_tensor") for p in trainer.model.parameters()),
    }
    torch.save(outcome, result)


def train_on_small_disk(disk: Path, result: Path, **flags) -> None:
    """On the mount `disk`, which has no room for two checkpoints: try; try when it is read-only; then train."""
    for change in (None, "ro,size=64m", "rw"):
        if change:
            subprocess.run(["mount", "-o", f"remount,{change}", disk], check=True)
        process = multiprocessing.get_context("fork").Process(target=train, args=(disk, result), kwargs=flags)
        process.start()
        process.join()
        print("exit status", process.exitcode, file=sys.stderr)


class Full(TrainerCallback):
    """From the first checkpoint on, no file can grow beyond `size` bytes."""

    def __init__(self, size: int):
        self.size = size

    def on_save(self, *args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def press_ctrl_c(folder: Path, result: Path, count: int, **flags) -> None:
    """`count` runs, each stopped by Ctrl-C at some instant after a second pass has begun.

    In `result`, for each that was stopped before the update: whether its weights are those with which the step began,
    and whether it was stopped inside `training_step`.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
    chance, found = random.Random(0), []
    for _ in range(count):
        delay, step = chance.uniform(0, 0.01), chance.randrange(1, 4)

        def press(delay=delay):
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGINT)

        key = threading.Thread(target=press)
        trainer = build(folder, save_strategy="no", **flags)
        trainer.at = {(step, "descent"): key.start}
        try:
            trainer.train()
        except KeyboardInterrupt as interrupt:
            if not trainer.watch.updating:
                inside = any(frame.name == "training_step" for frame in traceback.extract_tb(interrupt.__traceback__))
                found.append((torch.equal(weights_of(trainer.model), trainer.watch.begun[-1]), inside))
    torch.save(found, result)


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, fsdp, kinds = Path(sys.argv[1]), "--fsdp" in sys.argv, ("whole", "killed")
    rank, size, attempt = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    for i, (name, strike) in enumerate((FSDP if fsdp else DDP).items()):
        for kind in kinds[:1] if "--whole" in sys.argv else kinds:
            result = target / f"{name}-{kind}-{rank}.pt"
            if not result.exists():
                mine = kind == "killed" and attempt == i and rank == size - 1
                with force_fsdp2({}) if fsdp else nullcontext():
                    train(target / f"{name} {kind}", result, strike=strike if mine else None, **CASES[name])
                AcceleratorState._reset_state(reset_partial_state=False)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # as in cases.py
