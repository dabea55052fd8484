"""When, along what and how far the weights are perturbed: from the arguments, the optimizer's groups and progress."""

from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.utils import logging

from .directions import (
    DIRECTIONS,
    Direction,
    DirectionName,
    PreviousAscent,
    call_after_updates,
    innermost,
    just_updated,
)
from .optim import AdaSAM
from .parameters import choose_parameters, optimized
from .schedule import PeakRates, Schedule
from .step_metrics import FROZEN
from .training_args import RADIUS_ZERO
from .window import StepPlan

logger = logging.get_logger(__name__)


class PlanArguments(Protocol):
    """What is read of the arguments: a Trainer's, or those of a loop."""

    optim: Any

    @property
    def sam_rho(self) -> float | None: ...
    @property
    def sam_rho_schedule(self) -> str: ...
    @property
    def sam_reuse(self) -> bool: ...
    @property
    def sam_parameters(self) -> str: ...
    @property
    def sam_schedule(self) -> Schedule: ...
    @property
    def resolved_rho(self) -> float: ...
    @property
    def resolved_direction(self) -> DirectionName: ...


def base_radii(args: PlanArguments, optimizer: Optimizer) -> list[float]:
    """The radius of each parameter group, before any schedule.

    That of the arguments; where `sam_rho` is unset, an `AdaSAM` in use brings its own.
    """
    groups = getattr(optimizer, "param_groups", [{}])  # DeepSpeed may put a dummy there
    if args.sam_rho is None and args.optim not in RADIUS_ZERO and isinstance(innermost(optimizer), AdaSAM):
        return [group["rho"] for group in groups]
    return [args.resolved_rho] * len(groups)


class Planner:
    """Plans the steps of one training. The optimizer's groups are read at every step, never stored.

    Args:
        args: read at every step, too.
        model: whose parameters have names.
        optimizer: as the trainer holds it.

    Attributes:
        previous: what was ascended along last, for `sam_reuse`.
    """

    def __init__(self, args: PlanArguments, model: nn.Module, optimizer: Optimizer) -> None:
        self.args, self._model, self._optimizer = args, model, optimizer
        # (From the start, as a direction may count updates.)
        self._directions: dict[DirectionName, Direction] = {args.resolved_direction: self._new_direction()}
        self.previous = PreviousAscent(optimizer)
        if isinstance(adasam := innermost(optimizer), AdaSAM):
            adasam.warn_without_ascent = False  # here that is reported with its reasons
        self._peak_rates = PeakRates()
        self._first_ascent: int | None = None  # the step of the first one of this training
        self._without_vectors = False
        call_after_updates(optimizer, self._look)

    def _look(self) -> None:
        """After an update: whether it has left nothing to go along, for a direction that needs no first pass."""
        direction = self.own_direction
        if not any(self.radii):
            return  # a stock run, whatever the direction makes of this optimizer
        found = direction.first_pass or not just_updated(self._optimizer) or self._has_vectors(direction)
        self._without_vectors = not found

    @property
    def own_direction(self) -> Direction:
        """That of the arguments, as they are now; each keeps what it knows as long as the training lasts."""
        name = self.args.resolved_direction
        if name not in self._directions:
            self._directions[name] = self._new_direction()
        return self._directions[name]

    def _new_direction(self) -> Direction:
        return DIRECTIONS[self.args.resolved_direction](self._optimizer)

    @property
    def radii(self) -> list[float]:
        """Before any schedule, one for each group."""
        return base_radii(self.args, self._optimizer)

    def settle_radii(self) -> None:
        """Write the radii of the arguments into an `AdaSAM` that was given, or loaded, with others."""
        adasam = innermost(self._optimizer)
        if isinstance(adasam, AdaSAM):
            replaced: dict[tuple[float, float], None] = {}  # in the groups' order
            for group, rho in zip(adasam.param_groups, self.radii, strict=True):
                if group["rho"] != rho:
                    replaced[rho, group["rho"]] = None
                group["rho"] = rho
            for rho, other in replaced:
                logger.warning(f"sam_rho={rho} replaces the radius {other} of the optimizer or checkpoint")

    def chosen(self) -> list[nn.Parameter] | None:
        """Those of the optimizer's parameters that may move now, or None for all.

        Raises:
            ValueError: if `sam_parameters` names none of them.
        """
        named = choose_parameters(self._model, self.args.sam_parameters, optimized(self._optimizer))
        return None if named is None else [p for p in named if p.requires_grad]

    def plan(self, step: int, total: int) -> StepPlan:
        """Of the optimizer step `step` of `total`."""
        radii = self.radii
        plain = StepPlan([0.0] * len(radii))
        if not any(radii):
            return plain
        shares = self._rate_shares(len(radii))
        schedule = self.args.sam_schedule
        total = max(total, 1)  # 0 if steps are taken by hand
        step = min(step, total - 1)
        if step not in schedule.steps(total):
            return plain
        # (A training that uses an ascent again begins with one, and every process in the same step.)
        if schedule.ascends(step, total) or (self.args.sam_reuse and self._first_ascent in (None, step)):
            direction = self.own_direction
            if self._first_ascent is None:
                self._first_ascent = step
        elif self.args.sam_reuse:
            direction = self.previous
        else:
            return plain
        if direction is self.own_direction and not direction.first_pass and not self._has_vectors(direction):
            if self._without_vectors:
                raise RuntimeError(
                    f"sam_direction={self.args.resolved_direction!r}: after an update the optimizer has no first "
                    "moment; choose one that has (adasam, adamw_torch, sam with sgd_momentum above 0), or "
                    "sam_direction='gradient'"
                )
            return plain
        chosen = self.chosen()
        if chosen is not None and not chosen:
            return plain._replace(obstacle=FROZEN)
        scheduled = [rho * schedule.factor(step, total, share) for rho, share in zip(radii, shares, strict=True)]
        return StepPlan(scheduled, direction, chosen)

    def _rate_shares(self, groups: int) -> list[float]:
        """Of each group, its learning rate as a share of its peak so far. (Asked in every step, to see the peaks.)"""
        if self.args.sam_rho_schedule != "lr":
            return [1.0] * groups
        return [
            self._peak_rates.share(i, float(group["lr"]), group.get("initial_lr"))
            for i, group in enumerate(self._optimizer.param_groups)
        ]

    def _has_vectors(self, direction: Direction) -> bool:
        # (The smallest first, as a direction may draw its vectors.)
        return any(direction(p) is not None for p in sorted(optimized(self._optimizer), key=Tensor.numel))

    # What a resumed training could not know otherwise.

    def state(self) -> dict[str, Any]:
        """To be kept in a checkpoint, as JSON; empty if there is nothing to keep."""
        state = {"peak_rates": self._peak_rates.state()} if self.args.sam_rho_schedule == "lr" else {}
        direction = self.own_direction.state()
        return {**state, "direction": direction} if direction else state

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` has returned."""
        if "peak_rates" in state:
            self._peak_rates.load(state["peak_rates"])
        if "direction" in state:
            self.own_direction.load_state(state["direction"])
