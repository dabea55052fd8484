"""What the two-pass step refuses, before anything is trained. What is not shown to work is refused."""

import inspect
from types import CodeType
from typing import Any

from accelerate.utils import DistributedType
from transformers import Trainer
from transformers.utils import logging

from .interfaces import SharpnessAwareTrainer
from .synchronization import ascends_per_process
from .training_args import SharpnessAwareArgumentsMixin

logger = logging.get_logger(__name__)


_DDP = "use DistributedDataParallel (torchrun), or FSDP2 if the model is too large for it"
# One process, and the kinds that Accelerate wraps in DistributedDataParallel.
_REPLICATED = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU}


def _obstacle(trainer: SharpnessAwareTrainer) -> tuple[str, str] | None:
    """(what stands in the way, what to do instead), or None."""
    args, accelerator = trainer.args, trainer.accelerator
    kind = accelerator.distributed_type
    partial = args.sam_parameters != "all"
    alone = ascends_per_process(args)
    name = str(getattr(args.optim, "value", args.optim))
    if "lomo" in name or "layerwise" in name:
        return f"optim={name!r}, which updates the weights inside backward", "choose another optimizer"
    if args.resolved_direction == "momentum" and name.startswith(("galore", "apollo")):
        return (
            f"optim={name!r} along its momentum, which has another shape than the weights",
            "use sam_direction='gradient' (sam_preset='full' or 'fast')",
        )
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
        if alone:
            return (
                "FSDP2 and an ascent of each process by itself, whose gradients it does not hand out",
                "use sam_scope='batch' with sam_sync=True",
            )
        if partial:
            return f"FSDP2 and sam_parameters={args.sam_parameters!r}", "use sam_parameters='all'"
    elif kind not in _REPLICATED:
        return f"{args.world_size} processes ({kind.value})", _DDP
    elif args.ddp_static_graph and args.world_size > 1 and (alone or partial or args.gradient_accumulation_steps > 1):
        return (
            "ddp_static_graph and backward passes without synchronization",
            "leave ddp_static_graph unset, or use scope batch with sam_sync, all parameters and no accumulation",
        )
    return None


def _checkpoints_reentrantly(args: SharpnessAwareArgumentsMixin) -> bool:
    kwargs: Any = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs
    return bool(kwargs and kwargs.get("use_reentrant"))


def refuse_unsupported(trainer: SharpnessAwareTrainer) -> None:
    """Raise NotImplementedError if a sharpness-aware `trainer` runs on something that is not supported."""
    if obstacle := _obstacle(trainer):
        problem, remedy = obstacle
        raise NotImplementedError(
            f"sam_rho={trainer.args.sam_rho!r} with optim={str(trainer.args.optim)!r} is sharpness-aware, which is "
            f"not supported with {problem}: {remedy}, or set sam_rho=0"
        )


# Their training_step keeps nothing for a micro-batch that the second pass reads.
_KNOWN = ("trl", "sentence_transformers", "setfit", __package__)
# Where an override that does not go on to the Trainer's leaves nothing that could ascend, and what to do instead.
_SEAMS = {
    "training_step": "move the change to compute_loss",
    "get_batch_samples": "leave it as it is",
    "train": "leave the loop to the Trainer",
    "_inner_training_loop": "leave the loop to the Trainer",
    "_run_epoch": "leave the loop to the Trainer",
}


def refuse_overrides(kind: type[Trainer], mixin: type, args: SharpnessAwareArgumentsMixin) -> None:
    """Refuse trainers whose own code, in front of `mixin`, would make another thing of the two passes in silence.

    Raises:
        NotImplementedError: naming the class, the method and the remedy.
    """
    for cls in kind.__mro__[: kind.__mro__.index(mixin)]:
        functions = {name: inspect.unwrap(f) for name, f in vars(cls).items() if inspect.isfunction(inspect.unwrap(f))}
        names = [_names(f.__code__) for f in functions.values()]
        ways_up = {"super", *(base.__name__ for base in cls.__mro__[1:])}
        for name, remedy in _SEAMS.items():
            if name in functions and not any(name in called and called & ways_up for called in names):  # or a helper
                raise NotImplementedError(
                    f"{cls.__module__}.{cls.__qualname__} overrides {name} without super().{name}(...), so no step "
                    f"would be perturbed as it should; call it there, {remedy}, or set sam_rho=0"
                )
        window = args.gradient_accumulation_steps > 1 and args.sam_scope == "batch"
        if window and "training_step" in vars(cls) and cls.__module__.partition(".")[0] not in _KNOWN:
            logger.warning(
                f"{cls.__module__}.{cls.__qualname__} overrides training_step: with gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps} all second passes are taken inside the call for the last "
                "micro-batch. If it keeps something for each micro-batch that compute_loss reads, they see the last "
                "one's; then set sam_scope='microbatch'"
            )
    if kind._prepare_inputs is not Trainer._prepare_inputs:
        # As in trl's GRPOTrainer, which makes new completions there: the second pass would see other data.
        raise NotImplementedError(
            f"{kind.__module__}.{kind.__qualname__} overrides _prepare_inputs, which would run in both passes, the "
            "second time at the perturbed weights; set sam_rho=0"
        )


def _names(code: CodeType) -> set[str]:
    """What a function refers to, with the functions inside it."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
