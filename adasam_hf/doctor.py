"""What the trainer tells its user: what it will do, and what looks wrong while it does it."""

from torch import nn
from transformers import Trainer
from transformers.utils import logging

from .distributed import climbs_locally
from .perturbation import local

logger = logging.get_logger(__name__)

_PATIENCE = 20  # steps in a row
_FAR = 2.0  # times the highest loss of the run so far


def describe(trainer: Trainer, radii: list[float], chosen: list[nn.Parameter] | None = None) -> str:
    """One line: radius, scope, parameters, processes, precision, extra memory and compute.

    Args:
        radii: one for each parameter group.
        chosen: the parameters that may climb; None for all.
    """
    groups = trainer.optimizer.param_groups
    name = type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__  # Accelerate wraps it
    if not any(radii):
        return f"{name} with sam_rho=0: plain steps, one forward/backward per micro-batch and no ascent"
    moving = [p for g, rho in zip(groups, radii, strict=True) if rho > 0 for p in g["params"] if p.requires_grad]
    if chosen is not None:
        moving = list(set(moving) & set(chosen))
    total = sum(p.numel() for p in trainer.model.parameters())
    held = sum(local(p).numel() * p.element_size() for p in moving) / 2**20
    each = " on each process" if trainer.args.world_size > 1 else ""
    return (
        f"{name} with {_how(trainer.args, max(radii))}: "
        f"climbs {len(moving)} tensors with {sum(p.numel() for p in moving):,} of {total:,} parameters; "
        f"{_processes(trainer)}; {_precision(trainer, moving)}; +{held:.1f} MiB for a copy of them{each}; "
        f"{_passes(trainer.args)}"
    )


def _how(args, rho: float) -> str:
    schedule, k = args.sam_schedule, args.gradient_accumulation_steps
    over = "the whole optimizer step" if args.sam_scope == "batch" else "each micro-batch by itself"
    parts = [f"sam_rho={rho:g}", f"sam_scope={args.sam_scope} ({over}, {k} micro-batch{'es' if k > 1 else ''})"]
    if args.sam_adaptive:
        parts[0] += " relative to the weights"
    if schedule.shape != "constant":
        parts[0] += f" times its {schedule.shape} schedule"
    if (schedule.start, schedule.end) != (0.0, 1.0):
        parts.append(f"from {schedule.start:.0%} to {schedule.end:.0%} of training")
    if schedule.interval > 1:
        parts.append(f"in one step of {schedule.interval}{', again in the others' if args.sam_reuse else ''}")
    return ", ".join(parts)


def _processes(trainer: Trainer) -> str:
    size = trainer.args.world_size
    if size == 1:
        return "1 process"
    who = "each climbs its own gradient" if climbs_locally(trainer) else "all climb their mean gradient"
    return f"{size} processes ({trainer.accelerator.distributed_type.value}), {who}"


def _precision(trainer: Trainer, moving: list[nn.Parameter]) -> str:
    dtypes = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in moving}))
    autocast = trainer.accelerator.mixed_precision
    return f"{dtypes} weights" + (f", {autocast} autocast" if autocast != "no" else "")


def _passes(args) -> str:
    if args.resolved_direction != "gradient":
        return f"along the {args.resolved_direction}: 1 forward/backward pass per micro-batch, as ever"
    first = []
    if args.resolved_ascent_fraction < 1:
        first.append(f"on {args.resolved_ascent_fraction:.0%} of its rows")
    if args.sam_parameters != "all":
        first.append("without gradients of the other weights")
    return "2 forward/backward passes per micro-batch instead of 1" + (f", the first {' '.join(first)}" * bool(first))


class Watch:
    """Warns, once each, of a radius that is far too large and of one that rounding swallows.

    Too large: for many steps on end the loss at w + δ is more than twice the highest loss at w so far, which the run
    usually starts with. The neighbourhood of that radius then knows less than the untrained model.

    Args:
        rho: the radius of the arguments, before any schedule.
    """

    def __init__(self, rho: float):
        self._rho = rho
        self._highest = 0.0
        self._steps_far = 0
        self._told: set[str] = set()

    def __call__(self, logs: dict[str, float], steps: int) -> None:
        """Look at the values of `steps` steps that are about to be logged."""
        self._highest = max(self._highest, logs["loss"])
        far = logs["sam_loss"] > _FAR * self._highest or logs["sam_loss"] != logs["sam_loss"]
        self._steps_far = self._steps_far + steps if far else 0
        if self._steps_far >= _PATIENCE:
            self._tell(
                "far",
                f"sam_rho={self._rho:g} looks far too large: for {self._steps_far} steps the perturbed loss "
                f"({logs['sam_loss']:.3g}) has been more than {_FAR:g} times the highest loss of this run "
                f"({self._highest:.3g}); try sam_rho={self._rho / 4:.1g}",
            )
        if logs.get("sam_applied", 1.0) < 0.5:
            self._tell(
                "lost",
                f"rounding to half-precision weights leaves {logs['sam_applied']:.0%} of the perturbation of radius "
                f"{logs['sam_rho']:g}; load the model in float32 (dtype=torch.float32), with bf16=True for speed",
            )

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning(message)
