"""What the two-pass step refuses before training: everything that no test has shown to work."""

import inspect
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple, Self

from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import Trainer
from transformers.utils import logging

from .interfaces import SharpnessAwareTrainer
from .microbatch import outer_variables
from .synchronization import ascends_per_process
from .training_args import SharpnessAwareArgumentsMixin

logger = logging.get_logger(__name__)


_DDP = "use DistributedDataParallel (torchrun), or FSDP2 if the model is too large for it"
# One process, and the kinds that Accelerate wraps in DistributedDataParallel.
_REPLICATED = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU}


@dataclass(frozen=True)
class Setup:
    """What a sharpness-aware training runs on, as far as it decides whether that is supported.

    Attributes:
        rho: the radius, as the user gave it.
        optimizer: its name.
        direction, parameters: those of the ascent.
        per_process: whether each process ascends along its own gradient.
        accelerator: with its kind of distribution.
        processes: how many there are.
        devices: of this process, for `torch.nn.DataParallel`.
        accumulates: whether a step has several micro-batches.
        static_graph: whether DistributedDataParallel takes the graph to be the same in every pass.
        reentrant: whether activations are checkpointed by a backward pass inside another.
        split: whether the model is spread over several devices.
        sharded_when_loaded: whether Transformers has sharded the model.
        prefix: of the arguments' names.
    """

    rho: float | None
    optimizer: str
    direction: str
    parameters: str
    per_process: bool
    accelerator: Accelerator
    processes: int
    devices: int
    accumulates: bool
    static_graph: bool
    reentrant: bool
    split: bool
    sharded_when_loaded: bool = False
    prefix: str = "sam_"

    @classmethod
    def of_trainer(cls, trainer: SharpnessAwareTrainer) -> Self:
        """That of a Trainer."""
        args = trainer.args
        return cls(
            rho=args.sam_rho,
            optimizer=str(getattr(args.optim, "value", args.optim)),
            direction=args.resolved_direction,
            parameters=args.sam_parameters,
            per_process=ascends_per_process(args),
            accelerator=trainer.accelerator,
            processes=args.world_size,
            devices=args.n_gpu,
            accumulates=args.gradient_accumulation_steps > 1,
            static_graph=bool(args.ddp_static_graph),
            reentrant=_checkpoints_reentrantly(args),
            split=trainer.is_model_parallel,
            sharded_when_loaded=getattr(trainer, "is_distributed_loading_by_transformers", False),
        )


class Obstacle(NamedTuple):
    """What stands in the way of a sharpness-aware training."""

    problem: str
    remedy: str


def obstacle(setup: Setup) -> Obstacle | None:
    """What `setup` has that is not supported, or None."""
    kind, sam = setup.accelerator.distributed_type, setup.prefix
    partial = setup.parameters != "all"
    if "lomo" in setup.optimizer or "layerwise" in setup.optimizer:
        return Obstacle(
            f"optim={setup.optimizer!r}, which updates the weights inside backward", "choose another optimizer"
        )
    if setup.direction in ("momentum", "preconditioned") and setup.optimizer.startswith(("galore", "apollo")):
        return Obstacle(
            f"optim={setup.optimizer!r} and {sam}direction={setup.direction!r}, as the shape of its moments differs "
            "from that of the weights",
            "use sam_direction='gradient' (sam_preset='full' or 'fast')",
        )
    if kind is DistributedType.DEEPSPEED:
        return Obstacle("DeepSpeed, whose engine updates the weights inside backward", _DDP)
    if setup.sharded_when_loaded:
        return Obstacle("a model sharded when it was loaded (distributed_config)", _DDP)
    if setup.split:
        return Obstacle("a model spread over several devices", "load it on one device (without device_map), or " + _DDP)
    if parallelism := getattr(setup.accelerator, "parallelism_config", None):
        for kind_of, flag in (("tensor", "tp"), ("context", "cp"), ("sequence", "sp")):
            if getattr(parallelism, f"{flag}_enabled", False):
                return Obstacle(f"{kind_of} parallelism", _DDP)
    if setup.devices > 1:
        return Obstacle(
            f"torch.nn.DataParallel over {setup.devices} devices",
            "start it with torchrun, or make one device visible (CUDA_VISIBLE_DEVICES=0)",
        )
    if partial and setup.reentrant:
        return Obstacle(
            f"{sam}parameters={setup.parameters!r} and reentrant gradient checkpointing, which drops gradients then",
            "use gradient_checkpointing_kwargs={'use_reentrant': False}",
        )
    if kind is DistributedType.FSDP:
        if not setup.accelerator.is_fsdp2:
            return Obstacle("FSDP version 1", "use version 2 (fsdp_config={'version': 2}), or DistributedDataParallel")
        if setup.per_process:
            return Obstacle(
                "FSDP2 and a separate ascent on each process, whose gradients it does not expose",
                f"use {sam}scope='batch' with {sam}sync=True",
            )
        if partial:
            return Obstacle(f"FSDP2 and {sam}parameters={setup.parameters!r}", f"use {sam}parameters='all'")
    elif kind not in _REPLICATED:
        return Obstacle(f"{setup.processes} processes ({kind.value})", _DDP)
    elif setup.static_graph and setup.processes > 1 and (setup.per_process or partial or setup.accumulates):
        return Obstacle(
            "ddp_static_graph and backward passes without synchronization",
            f"leave ddp_static_graph unset, or use scope batch with {sam}sync, all parameters and no accumulation",
        )
    return None


def _checkpoints_reentrantly(args: SharpnessAwareArgumentsMixin) -> bool:
    kwargs: Any = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs
    return bool(kwargs and kwargs.get("use_reentrant"))


def refuse_unsupported(setup: Setup) -> None:
    """Raise NotImplementedError if a sharpness-aware training would run on something that is not supported."""
    if found := obstacle(setup):
        sam = setup.prefix
        raise NotImplementedError(
            f"{sam}rho={setup.rho!r} with optim={setup.optimizer!r} is sharpness-aware, which is not supported with "
            f"{found.problem}: {found.remedy}, or set {sam}rho=0"
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
    """Refuse trainers whose own code, in front of `mixin`, would silently break the two passes.

    Raises:
        NotImplementedError: naming the class, the method and the remedy.
    """
    place = kind.__mro__.index(mixin)
    for cls in kind.__mro__[:place]:
        for name, remedy in _SEAMS.items():
            if name in vars(cls) and not _goes_on(cls, name, mixin):
                raise NotImplementedError(
                    f"{cls.__module__}.{cls.__qualname__} overrides {name} without super().{name}(...), so no step "
                    f"would be perturbed correctly; call it there, {remedy}, or set sam_rho=0"
                )
        window = args.gradient_accumulation_steps > 1 and args.sam_scope == "batch"
        if window and "training_step" in vars(cls) and not _is_known(cls):
            logger.warning(
                f"{cls.__module__}.{cls.__qualname__} overrides training_step: with gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps} all second passes are taken inside the call for the last "
                "micro-batch. If it stores something for each micro-batch that compute_loss reads, all of them see "
                "that of the last one; in that case set sam_scope='microbatch'"
            )
    for cls in kind.__mro__[place + 1 : kind.__mro__.index(Trainer)]:
        if "training_step" in vars(cls) and (not _is_known(cls) or cls.__module__.startswith("trl.experimental")):
            logger.warning_once(
                f"{cls.__module__}.{cls.__qualname__} overrides training_step behind {mixin.__name__}, so both passes "
                "run it: what it does besides the loss happens twice, the second time at the perturbed weights. If it "
                "generates data, counts, or averages weights there, derive the class from AdaSAMTrainer instead"
            )
    if kind._prepare_inputs is not Trainer._prepare_inputs:
        # As in trl's GRPOTrainer, which makes new completions there: the second pass would see other data.
        raise NotImplementedError(
            f"{kind.__module__}.{kind.__qualname__} overrides _prepare_inputs, which would run in both passes, the "
            "second time at the perturbed weights; set sam_rho=0"
        )


def _is_known(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in _KNOWN


def _goes_on(cls: type, name: str, mixin: type) -> bool:
    """Whether the override of `name` in `cls` comes to the next one, as far as its code tells; a helper may do it."""
    if not inspect.isfunction(inspect.unwrap(vars(cls)[name])):  # a partialmethod, a decorator that is an object
        return True
    functions = [f for f in vars(cls).values() if inspect.isfunction(inspect.unwrap(f))]
    ways_up = {"super", *(base.__name__ for base in cls.__mro__[1:])}
    called = [_names(inspect.unwrap(f).__code__) for f in functions]
    return any(name in names and names & ways_up for names in called) or _leads_to(vars(cls)[name], name, cls, mixin)


def _leads_to(function: Any, name: str, cls: type, mixin: type, depth: int = 3) -> bool:
    """Whether what somebody has put in the place of a method refers to the one that was there, or to that of a base."""
    if function is vars(mixin).get(name):
        return True
    if not inspect.isfunction(function) or not depth:
        return False
    around = [*outer_variables(function).values(), getattr(function, "__wrapped__", None)]
    if name in _names(function.__code__) and any(one in cls.__mro__[1:] for one in around if inspect.isclass(one)):
        return True
    ours = any(
        one is getattr(base, name, None) for base in cls.__mro__[1:] for one in around if inspect.isfunction(one)
    )
    return ours or any(_leads_to(one, name, cls, mixin, depth - 1) for one in around if one is not function)


def _names(code: CodeType) -> set[str]:
    """What a function refers to, with the functions inside it."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
