"""What the trainer tells its user: what it will do, and what looks wrong while it does it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils import logging

from .directions import DIRECTIONS
from .distributed import climbs_locally
from .perturbation import local

if TYPE_CHECKING:
    from .trainer import SharpnessAwareTrainerMixin
    from .training_args import SharpnessAwareArgumentsMixin

logger = logging.get_logger(__name__)

_PATIENCE = 20  # steps in a row
_FAR = 2.0  # times the highest loss of the run so far
_STRETCH = 25  # steps whose mean loss is compared with that of the first so many
_STUCK = 0.98  # of the mean loss of the first stretch
_STEEP = 0.05  # of the loss


def describe(trainer: SharpnessAwareTrainerMixin, radii: list[float], chosen: list[nn.Parameter] | None = None) -> str:
    """One line: radius, scope, parameters, processes, precision, extra memory and compute.

    Args:
        radii: one for each parameter group.
        chosen: the parameters that may climb; None for all.
    """
    name = type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__  # Accelerate wraps it
    if not any(radii):
        return f"{name} with sam_rho=0: plain steps, one forward/backward per micro-batch and no ascent"
    groups = trainer.optimizer.param_groups
    moving = [p for g, rho in zip(groups, radii, strict=True) if rho > 0 for p in g["params"] if p.requires_grad]
    if chosen is not None:
        moving = list(set(moving) & set(chosen))
    which = "" if chosen is None else f" (sam_parameters={trainer.args.sam_parameters})"
    total = sum(p.numel() for p in trainer.model.parameters())
    held = sum(local(p).numel() * p.element_size() for p in moving) / 2**20
    copies = "a copy of them"
    if trainer.args.sam_reuse:
        held, copies = 2 * held, "copies of them and of the last gradient"
    each = " on each process" if trainer.args.world_size > 1 else ""
    return (
        f"{name} with {_how(trainer.args, max(radii))}: "
        f"climbs {len(moving)} tensors{which} with {sum(p.numel() for p in moving):,} of {total:,} parameters; "
        f"{_processes(trainer)}; {_precision(trainer, moving)}; +{held:.1f} MiB for {copies}{each}; "
        f"{_passes(trainer.args)}"
    )


def _how(args: SharpnessAwareArgumentsMixin, rho: float) -> str:
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


def _processes(trainer: SharpnessAwareTrainerMixin) -> str:
    size = trainer.args.world_size
    if size == 1:
        return "1 process"
    who = "each climbs its own gradient" if climbs_locally(trainer) else "all climb their mean gradient"
    return f"{size} processes ({trainer.accelerator.distributed_type.value}), {who}"


def _precision(trainer: SharpnessAwareTrainerMixin, moving: list[nn.Parameter]) -> str:
    dtypes = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in moving}))
    autocast = trainer.accelerator.mixed_precision
    return f"{dtypes} weights" + (f", {autocast} autocast" if autocast != "no" else "")


def _passes(args: SharpnessAwareArgumentsMixin) -> str:
    if not DIRECTIONS[args.resolved_direction].first_pass:
        return f"along the {args.resolved_direction}: 1 forward/backward pass per micro-batch, as ever"
    first = []
    if args.resolved_ascent_fraction < 1:
        first.append(f"on {100 * args.resolved_ascent_fraction:g}% of its rows")
    if args.sam_parameters != "all":
        first.append("without gradients of the other weights")
    return "2 forward/backward passes per micro-batch instead of 1" + (f", the first {' '.join(first)}" * bool(first))


class Tally:
    """What is logged of the steps since the last entry: sums, kept on the device."""

    def __init__(self) -> None:
        self.steps = 0  # that climbed after a first pass
        self.climbs = 0
        self.clean_loss: float | Tensor = 0.0
        self.sam_loss: float | Tensor = 0.0
        self.applied: float | Tensor = 0.0
        self.norm: Tensor | None = None  # of the last climb
        self.rho = 0.0  # of the last climb

    def climbed(self, rho: float, applied: Tensor | None, norm: Tensor | None = None) -> None:
        """Note a climb; `norm` is that of its first pass, if it had one."""
        self.climbs += 1
        self.rho = rho
        if applied is not None:
            self.applied += applied
        if norm is not None:
            self.norm = norm

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over steps and processes. Every process must be here."""
        values: dict[str, Any] = {}
        if self.steps and self.norm is not None:
            gap = self.sam_loss - self.clean_loss
            values = {"sam_loss": self.sam_loss / self.steps, "sam_gap": gap / self.steps, "sam_grad_norm": self.norm}
        if isinstance(self.applied, Tensor):
            values["sam_applied"] = self.applied / self.climbs
        if values:
            together = torch.stack([v.float().to(accelerator.device) for v in values.values()])
            values = dict(zip(values, accelerator.reduce(together, "mean").tolist(), strict=True))
        return values | {"sam_rho": self.rho}


class Watch:
    """Warns, once each, of a radius that is far too large and of one that rounding swallows.

    Too large, with a first pass: for 20 steps on end the loss at w + δ is more than twice the highest loss at w so
    far, so that the neighbourhood knows less than the untrained model; or, once the warm-up is over, the mean loss of
    two stretches of 25 steps running is that of the first stretch, while at w + δ it is more than 5 % higher: the run
    may have collapsed to chance.

    Args:
        rho: the radius of the arguments, before any schedule.
    """

    def __init__(self, rho: float) -> None:
        self._rho = rho
        self._highest = 0.0
        self._steps_far = 0
        self._stretch = [0, 0.0, 0.0]  # steps, sum of the loss, sum of the gap
        self._first: float | None = None
        self._stuck = 0
        self._told: set[str] = set()

    def __call__(self, values: dict[str, float], steps: int, warm: bool = True) -> None:
        """Look at the means of `steps` steps; `warm`: whether the learning rate has reached its peak."""
        if values.get("sam_applied", 1.0) < 0.5:
            self._tell(
                "lost",
                f"rounding to half-precision weights leaves {values['sam_applied']:.0%} of the perturbation of radius "
                f"{values['sam_rho']:g}; load the model in float32 (dtype=torch.float32), with bf16=True for speed",
            )
        if not steps:
            return
        sam_loss, loss = values["sam_loss"], values["sam_loss"] - values["sam_gap"]
        self._highest = max(self._highest, loss)
        far = sam_loss > _FAR * self._highest or math.isnan(sam_loss)
        self._steps_far = self._steps_far + steps if far else 0
        if self._steps_far >= _PATIENCE:
            self._tell(
                "large",
                f"sam_rho={self._rho:g} looks far too large: for {self._steps_far} steps the perturbed loss "
                f"({sam_loss:.3g}) has been more than {_FAR:g} times the highest loss of this run "
                f"({self._highest:.3g}); try sam_rho={self._rho / 4:.1g}",
            )
        if warm:
            self._look_for_collapse(steps, loss, values["sam_gap"])

    def _look_for_collapse(self, steps: int, loss: float, gap: float) -> None:
        self._stretch = [a + b for a, b in zip(self._stretch, (steps, steps * loss, steps * gap), strict=True)]
        count = self._stretch[0]
        if count < _STRETCH:
            return
        loss, gap = self._stretch[1] / count, self._stretch[2] / count
        self._stretch = [0, 0.0, 0.0]
        if self._first is None:
            self._first = loss
            return
        self._stuck = self._stuck + 1 if loss > _STUCK * self._first and gap > _STEEP * loss else 0
        if self._stuck == 2:
            self._tell(
                "large",
                f"sam_rho={self._rho:g} may be too large: the loss ({loss:.3g}) is where it began, and the perturbed "
                f"loss is {gap / loss:.0%} higher; if the run does not learn, try sam_rho={self._rho / 4:.1g}",
            )

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning(message)
