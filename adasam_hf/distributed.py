"""Which ways of spreading a run over devices the two-pass step supports. What is not shown to work is refused."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import nn

if TYPE_CHECKING:
    from .trainer import SharpnessAwareTrainerMixin
    from .training_args import SharpnessAwareArgumentsMixin

_DDP = "use DistributedDataParallel (torchrun), or FSDP2 if the model is too large for it"
# One process, and the kinds that Accelerate wraps in DistributedDataParallel.
_REPLICATED = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU}


def climbs_locally(trainer: SharpnessAwareTrainerMixin) -> bool:
    """Whether each process climbs its own gradient, so that the ascent's needs no averaging."""
    return trainer.args.sam_scope == "microbatch" or not trainer.args.sam_sync


def unsynced(trainer: SharpnessAwareTrainerMixin, model: nn.Module) -> AbstractContextManager:
    """Inside it backward leaves gradients on their process, as during accumulation.

    As there, Accelerate's ``sync_each_batch`` (less memory with FSDP2, more traffic) has the last word.
    """
    if trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        return nullcontext()
    return trainer.accelerator.no_sync(model)


def average_gradients(params: Collection[nn.Parameter]) -> None:
    """Make each ``.grad`` its mean over the processes, if there are several, in one all-reduce for each dtype.

    A process without a gradient for a parameter contributes 0, as with `DistributedDataParallel`.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    for dtype in dict.fromkeys(p.dtype for p in params):
        alike = [p for p in params if p.dtype is dtype]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
        flat = torch.cat([part.reshape(-1) for part in parts]) / dist.get_world_size()
        dist.all_reduce(flat)
        for p, mean in zip(alike, flat.split([p.numel() for p in alike]), strict=True):
            p.grad = mean.view_as(p)


def _obstacle(trainer: SharpnessAwareTrainerMixin) -> tuple[str, str] | None:
    """(what stands in the way, what to do instead), or None."""
    args, accelerator = trainer.args, trainer.accelerator
    kind = accelerator.distributed_type
    local, partial = climbs_locally(trainer), args.sam_parameters != "all"
    name = str(getattr(args.optim, "value", args.optim))
    if "lomo" in name or "layerwise" in name:
        return f"optim={name!r}, which updates the weights inside backward", "choose another optimizer"
    if kind is DistributedType.DEEPSPEED:
        return "DeepSpeed, whose engine updates the weights inside backward", _DDP
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        return "a model sharded when it was loaded (distributed_config)", _DDP
    if trainer.is_model_parallel:
        return "a model spread over several devices", "load it on one device (without device_map), or " + _DDP
    if parallelism := getattr(accelerator, "parallelism_config", None):
        for kind_of, flag in (("tensor", "tp"), ("context", "cp"), ("sequence", "sp")):
            if getattr(parallelism, f"{flag}_enabled", False):
                return f"{kind_of} parallelism", _DDP
    if args.n_gpu > 1:
        return (
            f"torch.nn.DataParallel over {args.n_gpu} devices",
            "start it with torchrun, or show it one device (CUDA_VISIBLE_DEVICES=0)",
        )
    if partial and _checkpoints_reentrantly(args):
        return (
            f"sam_parameters={args.sam_parameters!r} and reentrant gradient checkpointing, which drops gradients then",
            "use gradient_checkpointing_kwargs={'use_reentrant': False}",
        )
    if kind is DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            return "FSDP version 1", "use version 2 (fsdp_config={'version': 2}), or DistributedDataParallel"
        if local:
            return "FSDP2 and a local ascent, which it does not hand out", "use sam_scope='batch' with sam_sync=True"
        if partial:
            return f"FSDP2 and sam_parameters={args.sam_parameters!r}", "use sam_parameters='all'"
    elif kind not in _REPLICATED:
        return f"{args.world_size} processes ({kind.value})", _DDP
    elif args.ddp_static_graph and args.world_size > 1 and (local or partial or args.gradient_accumulation_steps > 1):
        return (
            "ddp_static_graph and backward passes without synchronization",
            "leave ddp_static_graph unset, or use scope batch with sam_sync, all parameters and no accumulation",
        )
    return None


def _checkpoints_reentrantly(args: SharpnessAwareArgumentsMixin) -> bool:
    kwargs: Any = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs
    return bool(kwargs and kwargs.get("use_reentrant"))


def refuse_unsupported(trainer: SharpnessAwareTrainerMixin) -> None:
    """Raise NotImplementedError if a sharpness-aware `trainer` runs on something that is not supported."""
    if obstacle := _obstacle(trainer):
        problem, remedy = obstacle
        raise NotImplementedError(
            f"sam_rho={trainer.args.sam_rho!r} with optim={str(trainer.args.optim)!r} is sharpness-aware, which is "
            f"not supported with {problem}: {remedy}, or set sam_rho=0"
        )
