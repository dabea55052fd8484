"""A loop with SharpnessAwareLoop, and AdaSAMTrainer on the same rows, in this process or in each of a torchrun job:

    torchrun --standalone --nproc_per_node 2 tests/distributed/loop_worker.py FOLDER MODEL GLUE

runs every case of CASES both ways, and examples/glue_no_trainer.py with that model and that folder of GLUE, and leaves
FOLDER/<case>-<rank>.pt.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import BETAS, EPS, LR, SeedSteps, Sharp, flat, load_script, make_model, make_rows
from distributed.cases import force_fsdp2
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, get_scheduler

from adasam_hf import AdaSAM, AdaSAMTrainingArguments, SharpnessAwareLoop
from adasam_hf.glue.data import load_task
from adasam_hf.glue.tasks import get_task

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ROWS = 20

# Two processes with k micro-batches of 2 rows see the rows that one process sees with 2k of them.
CASES = {
    "one micro-batch": {},
    "batch": {"k": 2},
    "microbatch": {"k": 2, "scope": "microbatch"},
    "local": {"k": 2, "sync": False},
    "clipping": {"k": 2, "clip": 0.05},
    "norm": {"k": 2, "parameters": "norm"},
    "momentum": {"k": 2, "direction": "momentum"},
    "plain": {"k": 2, "rho": 0.0},
    "dropout": {"k": 2, "clip": 0.05, "dropout": True},
    "by hand": {"k": 2, "accumulate": False},
    "fsdp": {"k": 2, "clip": 0.05},
}


def reset() -> None:
    """What Accelerate remembers of one run until the next."""
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()


def whole(model) -> torch.Tensor:
    """All weights, of a sharded model, too."""
    with torch.no_grad():
        return torch.cat([getattr(p, "full_tensor", p.clone)().reshape(-1) for p in model.parameters()])


def accelerator_for(k: int = 1, **kwargs) -> Accelerator:
    reset()
    return Accelerator(cpu=True, gradient_accumulation_steps=k, **kwargs)


def backward_in_both_passes(sam, accelerator):
    """The line of the loop that is not the plain loop's, and where that one would stand."""
    if sam is not None:
        return sam.backward

    def backward(loss_fn, *inputs, last=None):
        loss = loss_fn(*inputs)
        accelerator.backward(loss)
        return loss.detach()

    return backward


def by_loop(
    batch_size=2,
    k=1,
    rho=0.05,
    clip=0.0,
    dropout=False,
    accumulate=True,
    plain=False,
    accelerator=None,
    masks="same",
    **options,
) -> dict:
    """One epoch, as a script would have it. Returns weights after each step, losses and numbers.

    Args:
        accumulate: by `accelerator.accumulate`; otherwise the loop counts and divides itself.
        plain: without SharpnessAwareLoop.
    """
    accelerator = accelerator or accelerator_for(k if accumulate else 1)
    model = make_model("bert", options.pop("dtype", torch.float64), **({} if dropout else NO_DROPOUT)).train()
    optimizer = AdaSAM(model.parameters(), lr=LR, betas=BETAS, eps=EPS, rho=0.0 if plain else 0.05)
    # the library's own scripts count so: Accelerate steps a scheduler once for each process
    steps = accelerator.num_processes * -(-ROWS // (batch_size * accelerator.num_processes * k))
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    loader = DataLoader(make_rows(ROWS), batch_size=batch_size)
    inner = model
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    sam = None if plain else SharpnessAwareLoop(accelerator, model, optimizer, rho=rho, dropout=masks, **options)
    backward = backward_in_both_passes(sam, accelerator)

    def loss_fn(batch, scale):
        return model(**batch).loss * scale

    weights, losses, numbers, rates = [], [], [], []
    for i, batch in enumerate(loader):
        first = i - i % k
        size = min(k, len(loader) - first)  # of this window: the last one may be shorter
        last = i + 1 == first + size
        if i == first:
            torch.manual_seed(100 + i // k)
        if accumulate:
            with accelerator.accumulate(model):
                # The Trainer divides by the size of the window, Accelerate by k.
                losses.append(backward(loss_fn, batch, k / size) / (k / size))
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        else:
            losses.append(backward(loss_fn, batch, 1 / size, last=last) * size)
            if last:
                if clip:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        if last:
            weights.append(whole(inner))
            rates.append(optimizer.param_groups[0]["lr"])
            numbers.append({} if sam is None else sam.metrics())
            scale = k / size if accumulate else 1 / size
            numbers[-1] |= {n: numbers[-1][n] / scale for n in ("sam_loss", "sam_gap") if n in numbers[-1]}
    sharded = any(hasattr(p, "full_tensor") for p in inner.parameters())
    return {"weights": weights, "losses": torch.stack(losses), "logs": numbers, "rates": rates, "sharded": sharded}


def arguments(folder, batch_size, k, clip, **kwargs) -> AdaSAMTrainingArguments:
    reset()
    return AdaSAMTrainingArguments(
        output_dir=str(folder),
        optim="adasam",
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=k,
        max_grad_norm=clip,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo" if torch.distributed.is_torchelastic_launched() else None,
        **kwargs,
    )


class Steps(SeedSteps):
    """The weights after each step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights.append(whole(model))


def by_trainer(folder, batch_size=2, k=1, rho=0.05, clip=0.0, dropout=False, accumulate=True, **options) -> dict:
    """The same by AdaSAMTrainer."""
    numbers = {"adam_beta2": BETAS[1], "adam_epsilon": EPS, "learning_rate": LR, "sam_rho": rho}
    numbers |= {f"sam_{name}": value for name, value in options.items()}
    steps = Steps()
    model = make_model("bert", **({} if dropout else NO_DROPOUT))
    args = arguments(folder, batch_size, k, clip, **numbers)
    trainer = Sharp(model, args, train_dataset=make_rows(ROWS), callbacks=[steps])
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    return {"weights": steps.weights, "logs": [entry for entry in trainer.state.log_history if "loss" in entry]}


def with_zero(sharded: bool) -> torch.Tensor:
    """The weights after three steps of two micro-batches, with the optimizer's state on one process each or on all."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # whose import warns of torch's own deprecations

    accelerator = accelerator_for()
    model = make_model("bert", **NO_DROPOUT).train()
    numbers = {"lr": LR, "betas": BETAS, "eps": EPS, "rho": 0.05}
    if sharded:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), AdaSAM, **numbers)
    else:
        optimizer = AdaSAM(model.parameters(), **numbers)
    model, loader = accelerator.prepare(model, DataLoader(make_rows(24), batch_size=2))
    sam = SharpnessAwareLoop(accelerator, model, optimizer)
    for i, batch in enumerate(loader):
        sam.backward(lambda batch: model(**batch).loss / 2, batch, last=i % 2 == 1)
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    return whole(model)


# ---- examples/glue_no_trainer.py ----

GLUE = {"batch_size": 4, "k": 3}
GLUE_FLAGS = ["--task_name=mrpc", "--num_train_epochs=1", "--learning_rate=1e-3", "--max_grad_norm=0.5"]


def glue_by_example(model: str, glue: str, *flags: str, batch_size=4, k=3) -> torch.Tensor:
    """The weights that the example ends with, with the rows in their order."""
    reset()
    example = load_script("glue_no_trainer")
    example.DataLoader = lambda data, batch_size, shuffle, collate_fn: DataLoader(
        data, batch_size, collate_fn=collate_fn
    )
    words = [f"--model_name_or_path={model}", f"--dataset_name_or_path={glue}", *GLUE_FLAGS, *flags]
    words += [f"--per_device_train_batch_size={batch_size}", f"--gradient_accumulation_steps={k}"]
    sys.argv, before = ["glue_no_trainer.py", *words], sys.argv
    try:
        return flat(example.main())
    finally:
        sys.argv = before


def glue_by_trainer(folder, model: str, glue: str, batch_size=4, k=3, **kwargs) -> torch.Tensor:
    """The same by AdaSAMTrainer."""
    args = arguments(folder, batch_size, k, clip=0.5, learning_rate=1e-3, **kwargs)
    task = get_task("mrpc")
    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenize(row):
        return {**tokenizer(*(row[column] for column in task.texts)), "labels": row["label"]}

    rows = load_task(task, glue, ["train"])["train"]
    rows = rows.map(tokenize, remove_columns=rows.column_names)
    collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
    trainer = Sharp(AutoModelForSequenceClassification.from_pretrained(model), args, collate, rows)
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    return flat(trainer.model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, name, glue = Path(sys.argv[1]), *sys.argv[2:]
    results = {}
    for case, options in CASES.items():
        with force_fsdp2({}) if case == "fsdp" else nullcontext():
            results[f"{case} loop"] = by_loop(**options)
            results[f"{case} trainer"] = by_trainer(target / "out", **options)
    results |= {"zero": with_zero(True), "not zero": with_zero(False)}
    results["glue loop"] = glue_by_example(name, glue, **GLUE)
    results["glue trainer"] = glue_by_trainer(target / "out", name, glue, **GLUE)
    torch.save(results, target / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # as in cases.py
