"""One training run each, in this process or in each process of a torchrun job:

    torchrun --standalone --nproc_per_node 2 tests/distributed/cases.py FOLDER [--fsdp]

runs every case of DDP (or FSDP2) and leaves FOLDER/<case>-<rank>.pt.
"""

import hashlib
import os
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from conftest import SIZE, Sharp, make_model, make_rows
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from adasam_hf import AdaSAMTrainingArguments
from adasam_hf.perturbation import shard

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
COMBINED = {"gradient_accumulation_steps": 2, "bf16": True, "max_grad_norm": 0.05}

# name: arguments. Two processes with k micro-batches of 2 rows see the rows that one process sees with 2k of them.
DDP = {
    "plain": {"sam_rho": 0.0, "gradient_accumulation_steps": 2},
    "local": {"sam_sync": False, "gradient_accumulation_steps": 2},
    "static graph": {"ddp_static_graph": True, "ddp_find_unused_parameters": False},
    "local, synced each batch": {"sam_sync": False, "gradient_accumulation_steps": 2, "sync_each_batch": True},
    "process 0 logs": {"logs": True, "gradient_accumulation_steps": 2},
    "batchnorm plain": {"sam_rho": 0.0, "model": "batchnorm"},
    **{
        f"{case} {scope}": {**more, "sam_scope": scope}
        for scope in ("batch", "microbatch")
        for case, more in {
            "one micro-batch": {},
            "accumulation": {"gradient_accumulation_steps": 2},
            "causal": {"gradient_accumulation_steps": 2, "model": "causal"},
            "unused": {"gradient_accumulation_steps": 2, "model": "unused", "ddp_find_unused_parameters": True},
            "bucket view": {"gradient_accumulation_steps": 2, "bucket_view": True},
            "combined": COMBINED,
            "batchnorm": {"model": "batchnorm", "sam_rho": 1e-30},
            "fraction": {
                "gradient_accumulation_steps": 2,
                "sam_ascent_fraction": 0.5,
                "sam_ascent_min_rows": 1,
                "model": "causal",
            },
            "norm": {"gradient_accumulation_steps": 2, "sam_parameters": "norm"},
            "channels last": {"model": "channels last", "sam_parameters": "conv", "sam_rho": 0.5},
            "momentum": {"gradient_accumulation_steps": 2, "sam_direction": "momentum"},
            "adaptive": {"sam_adaptive": True},
            "frozen": {"gradient_accumulation_steps": 2, "model": "frozen"},
            "functional": {"gradient_accumulation_steps": 2, "sam_descent": "functional"},
            "preconditioned": {"gradient_accumulation_steps": 2, "sam_direction": "preconditioned"},
            "friendly": {"gradient_accumulation_steps": 2, "sam_direction": "friendly"},
            "noise": {"gradient_accumulation_steps": 2, "sam_direction": "noise"},
            "reuse": {"sam_interval": 2, "sam_reuse": True, "bucket_view": True},
        }.items()
    },
}
FSDP = {
    "one micro-batch": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "causal": {"gradient_accumulation_steps": 2, "model": "causal"},
    "any optimizer": {"optim": "adamw_torch", "sam_rho": 0.05},
    "clipping": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05},
    "fraction": {
        "gradient_accumulation_steps": 2,
        "sam_ascent_fraction": 0.5,
        "sam_ascent_min_rows": 1,
        "model": "causal",
    },
    "momentum": {"gradient_accumulation_steps": 2, "sam_direction": "momentum"},
    "adaptive": {"sam_adaptive": True},
    "reuse": {"sam_interval": 2, "sam_reuse": True},
    "combined": COMBINED,
    "combined plain": {**COMBINED, "sam_rho": 0.0},
}


class Unused(nn.Module):
    """A classifier with parameters that no loss reaches."""

    def __init__(self):
        super().__init__()
        self.inner = make_model("bert", **NO_DROPOUT)
        self.idle = nn.Linear(3, 3).double()

    def forward(self, input_ids, labels):
        return self.inner(input_ids=input_ids, labels=labels)


class BatchNormed(nn.Module):
    """Running statistics move with every forward pass in training mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(SIZE["vocab_size"], 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, SIZE["num_labels"])
        self.double()

    def forward(self, input_ids, labels):
        logits = self.head(self.norm(self.embed(input_ids).mean(1)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Convolution(nn.Module):
    """A convolution over the nine words of a row, as an image of 3 by 3."""

    def __init__(self, memory_format):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(SIZE["vocab_size"], 3)
        self.conv = nn.Conv2d(3, 5, 2)
        self.head = nn.Linear(5, SIZE["num_labels"])
        self.double().to(memory_format=memory_format)

    def forward(self, input_ids, labels):
        images = self.embed(input_ids).view(-1, 3, 3, 3).movedim(-1, 1)
        logits = self.head(torch.tanh(self.conv(images)).mean((2, 3)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class LogsAlone(Sharp):
    """Process 0 logs a loss of its own, in the middle of a step."""

    def compute_loss(self, *args, **kwargs):
        if self.is_world_process_zero():
            self.log({"loss": 0.0, "mine": 1.0})
        return super().compute_loss(*args, **kwargs)


def causal():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(vocab_size=SIZE["vocab_size"], **sizes)).double()


def frozen():
    """A BERT of which only the upper half trains."""
    model = make_model("bert", **NO_DROPOUT)
    for part in (model.bert.embeddings, model.bert.encoder.layer[0]):
        part.requires_grad_(False)
    return model


def rows_for(kind: str):
    rows = make_rows(20)
    if kind == "causal":  # unequal numbers of labels
        for i, row in enumerate(rows):
            row["labels"] = row["input_ids"].clone()
            row["labels"][: i % 7] = -100
    return rows


MODELS = {
    "bert": lambda: make_model("bert", **NO_DROPOUT),
    "float32": lambda: make_model("bert", torch.float32, **NO_DROPOUT),
    "causal": causal,
    "frozen": frozen,
    "unused": Unused,
    "batchnorm": BatchNormed,
    "channels last": lambda: Convolution(torch.channels_last),
    "contiguous": lambda: Convolution(torch.contiguous_format),
}


class Record(TrainerCallback):
    """A digest of the weights that lie here, and the number of all-reduces of gradients, after each step."""

    def __init__(self):
        self.digests, self.reductions, self.count = [], [], 0
        self.stepping = False
        self.stock = torch.distributed.all_reduce

    def all_reduce(self, *args, **kwargs):
        """Counts those inside a training step; the reducer's come by way of a hook in Python."""
        self.count += self.stepping
        return self.stock(*args, **kwargs)

    def on_train_begin(self, args, state, control, **kwargs):
        if isinstance(self.trainer.model_wrapped, nn.parallel.DistributedDataParallel):
            self.trainer.model_wrapped.register_comm_hook(None, allreduce_hook)

    def on_step_end(self, args, state, control, model, **kwargs):
        digest = hashlib.sha256()
        for p in model.parameters():
            digest.update(shard(p.detach()).contiguous().view(torch.uint8).cpu().numpy().tobytes())
        self.digests.append(digest.hexdigest())
        self.reductions.append(self.count)
        self.count = 0


def train(
    folder,
    batch_size=2,
    model="bert",
    bucket_view=False,
    logs=False,
    sync_each_batch=False,
    on_cpu=True,
    **flags,
) -> dict:
    """Train and return what can be compared: weights, buffers, logs, digests, all-reduces."""
    if sync_each_batch:
        flags["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    if flags.get("bf16"):
        model = "float32"
    defaults = {"optim": "adasam", "adam_epsilon": 1e-3, "learning_rate": 1e-3, "max_grad_norm": 0.0}
    args = AdaSAMTrainingArguments(
        output_dir=str(folder / "out"),
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and torch.distributed.is_torchelastic_launched() else None,
        **(defaults | flags),
    )
    record = Record()
    trainer = (LogsAlone if logs else Sharp)(MODELS[model](), args, train_dataset=rows_for(model), callbacks=[record])
    record.trainer = trainer
    step = trainer.training_step

    def watched(*args, **kwargs):
        record.stepping = True
        try:
            return step(*args, **kwargs)
        finally:
            record.stepping = False

    trainer.training_step, torch.distributed.all_reduce = watched, record.all_reduce
    trainer.model_accepts_loss_kwargs = model == "causal"
    if bucket_view:
        trainer.accelerator.ddp_handler.gradient_as_bucket_view = True
    try:
        trainer.train()
    finally:
        torch.distributed.all_reduce = record.stock
    trained = trainer.model
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in trained.parameters()]
    return {
        "weights": torch.cat([p.detach().reshape(-1) for p in full]).cpu(),
        "buffers": {name: b.clone().cpu() for name, b in trained.named_buffers() if "running" in name},
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry and "mine" not in entry],
        "digests": record.digests,
        "reductions": record.reductions,
        "sharded": any(hasattr(p, "full_tensor") for p in trained.parameters()),
    }


@contextmanager
def force_fsdp2(case):
    """Accelerate turns FSDP on a CPU into DDP and says nothing, so its state is set by hand."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer" if case.get("model") == "causal" else "BertLayer"],
    )
    if case.get("bf16"):
        plugin.set_mixed_precision("bf16")  # as Accelerate does
    stock = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = plugin

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = stock


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, fsdp = Path(sys.argv[1]), "--fsdp" in sys.argv
    for name, case in (FSDP if fsdp else DDP).items():
        with force_fsdp2(case) if fsdp else nullcontext():
            result = train(target, **case)
        torch.save(result, target / f"{name}-{torch.distributed.get_rank()}.pt")
        AcceleratorState._reset_state(reset_partial_state=False)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch's threads sometimes abort the teardown of an interpreter that has had many reducers
