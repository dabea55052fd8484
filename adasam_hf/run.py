"""What lives for one training of a Trainer: planner, step, window, numbers and warnings."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from . import counters
from .description import describe, describe_reuse
from .directions import innermost
from .interfaces import SharpnessAwareTrainer
from .microbatch import within_reach
from .monitor import RadiusMonitor
from .optim import AdaSAM
from .plan import Planner
from .rows import AscentRows, choose_rows, is_paired
from .step import StepSettings, TwoPassStep
from .step_metrics import SKIPPED, StepMetrics, loss_scale
from .synchronization import Synchronization, ascends_per_process
from .window import Window, version

logger = logging.get_logger(__name__)

AscentStep = Callable[[Tensor | int | None, int, Any], Tensor]
"""The stock step for a share of the rows: with their `num_items_in_batch`, and the number of their micro-batches."""


class _Value(NamedTuple):
    """A tensor or a number that a trainer keeps, and how often the tensor has been written to."""

    value: Tensor | float
    version: int | None

    def differs(self, other: "_Value") -> bool:
        same = self.value is other.value or (not isinstance(self.value, Tensor) and self.value == other.value)
        return not same or self.version != other.version


class SharpnessAwareRun:
    """One training: made when it begins, and gone when it has ended.

    Args:
        trainer: with the arguments of `SharpnessAwareArgumentsMixin`, and with its optimizer.
    """

    def __init__(self, trainer: SharpnessAwareTrainer) -> None:
        self.args = trainer.args
        self._build(trainer, StepMetrics())
        self._window, self._window_step = Window([]), -1
        self._finish: Callable[[], None] | None = None  # of the window whose micro-batch was taken last
        self._first_step: int | None = None  # None until a step has begun
        self._monitor = RadiusMonitor(max(self.planner.radii, default=0.0))
        self._planned = 0  # steps of this training that were to be perturbed, as far as they have been logged
        self._perturbed = 0.0  # … and that were
        self._reasons: set[str] = set()
        self._told_of_reuse = self._told_of_state = False

    def _build(self, trainer: SharpnessAwareTrainer, metrics: StepMetrics) -> None:
        """What holds on to the optimizer."""
        self._optimizer = trainer.optimizer
        self.planner = Planner(self.args, trainer.model, trainer.optimizer)
        self.step = TwoPassStep(
            trainer.model,
            trainer.optimizer,
            self._settings(trainer),
            metrics=metrics,
            around_descent=partial(counters.unchanged, trainer),
            beside=lambda: [*vars(trainer).values(), *(v for f in _loss_functions(trainer) for v in within_reach(f))],
            loss_scale=partial(loss_scale, trainer.accelerator),
            owner=f"{type(trainer).__qualname__}.training_step",
        )

    def _settings(self, trainer: SharpnessAwareTrainer) -> StepSettings:
        """Of the step that begins, as callbacks may change arguments between two."""
        args = self.args
        return StepSettings(
            args.sam_scope,
            same_masks=args.sam_dropout == "same",
            adaptive=args.sam_adaptive,
            functional=args.sam_descent == "functional",
            # FSDP2 gathers weights in each forward pass, in which all processes take part.
            cache_frozen=args.sam_cache_frozen and not (trainer.accelerator.is_fsdp2 or args.torch_compile),
        )

    @property
    def metrics(self) -> StepMetrics:
        """Since the last log entry."""
        return self.step.metrics

    # ---- steps ----

    def begin_step(self, trainer: SharpnessAwareTrainer, samples: list[Any], *, passed_on: bool = False) -> Window:
        """Plan the optimizer step whose micro-batches `samples` are. Returns its window.

        Args:
            passed_on: whether the list goes to others, who may change it, before the step begins.
        """
        self._leave_window(trainer)
        self._follow_optimizer(trainer)
        self.step.settings = self._settings(trainer)
        self.step.previous = self.planner.previous if self.args.sam_reuse else None
        first = self._first_step is None
        if first:
            self._first_step = trainer.state.global_step
            self.planner.settle_radii()
        window = Window(samples)
        window.passed_on = passed_on
        if samples:  # an unsized dataset that has run out goes on to give windows without a micro-batch
            self._plan(trainer, window)
        if first:
            self._introduce(trainer, window)
        self._window, self._window_step = window, trainer.state.global_step
        return window

    def _leave_window(self, trainer: SharpnessAwareTrainer) -> None:
        """Finish a window that was not completed: without an update, its gradients belong to the next one."""
        window = self._window
        if not window.plan.perturbs or window.complete:
            return
        self.metrics.reasons.add(SKIPPED)
        if self._finish is not None and trainer.state.global_step == self._window_step:
            self._finish()

    def _follow_optimizer(self, trainer: SharpnessAwareTrainer) -> None:
        """A callback may have put another optimizer in the place of the one that the run began with."""
        if trainer.optimizer is not self._optimizer:
            metrics, direction = self.metrics, self.planner.own_direction.state()
            self.step.perturbation.release()
            self._build(trainer, metrics)
            if direction:  # which goes on; the rates' peaks are those of the other optimizer's groups
                self.planner.own_direction.load_state(direction)

    def _plan(self, trainer: SharpnessAwareTrainer, window: Window) -> None:
        """Look at the optimizer's groups, the schedule and the rows; once more when the step really begins."""
        known = window.plan.perturbs or window.plan.obstacle is not None
        window.plan = plan = self.planner.plan(trainer.state.global_step, trainer.state.max_steps)
        if plan.obstacle is not None:
            self.metrics.reasons.add(plan.obstacle)
        elif plan.ascends and window.ascent_inputs is None and self.args.resolved_ascent_fraction < 1:
            self._choose_rows(trainer, window)
        if (plan.perturbs or plan.obstacle is not None) and not known:
            self.metrics.plan(max(plan.radii), window.ascent_share)

    def _choose_rows(self, trainer: SharpnessAwareTrainer, window: Window) -> None:
        """Choose what the ascent sees of each micro-batch."""
        # In scope microbatch each micro-batch has an ascent of its own. FSDP2 gathers weights in every forward pass, so
        # that no process may leave one out.
        apart = self.args.sam_scope == "microbatch" or trainer.accelerator.is_fsdp2
        # (From the last micro-batch on.)
        parts = [[one] for one in reversed(window)] if apart else [list(reversed(window))]
        chosen = [self._rows_of(trainer, part) for part in parts]
        batches = [batch for part in chosen for batch in part.batches]
        cuts = [partial(part.take, i) for part in chosen for i in range(len(part.batches))]
        window.ascent_inputs = dict(zip(range(len(window)), reversed(batches), strict=True))
        window.ascent_cuts = dict(zip(range(len(window)), reversed(cuts), strict=True))
        window.ascent_share = sum(part.share * part.total for part in chosen) / sum(part.total for part in chosen)
        seen = [batch for batch in window.ascent_inputs.values() if batch is not None]
        window.ascent_items = trainer._get_num_items_in_batch(seen, trainer.args.device)

    def _rows_of(self, trainer: SharpnessAwareTrainer, batches: list[Any]) -> AscentRows:
        share, least = self.args.resolved_ascent_fraction, self.args.sam_ascent_min_rows
        return choose_rows(batches, share, least, paired=is_paired(trainer))

    def take(
        self,
        trainer: SharpnessAwareTrainer,
        model: nn.Module,
        inputs: Any,
        stock_step: Callable[[Any], Tensor],
        ascent_step: AscentStep,
    ) -> Tensor:
        """One micro-batch of the present window, or a window of one if there is none: a call by hand."""
        if not self._is_of_window(trainer, inputs):
            self.begin_step(trainer, [inputs])
        window = self._window
        if not window.begun:
            if window.plan.perturbs:
                # As the stock step does, and before the weights move: some optimizers (ScheduleFree) swap them here.
                model.train()
                if callable(train := getattr(trainer.optimizer, "train", None)):
                    train()
            # By now callbacks know that the step begins, and may have unfrozen layers or added a group.
            window.begun = True
            self._follow_optimizer(trainer)
            self._plan(trainer, window)
            if window.passed_on and window.iterating and window.ascent_inputs is not None:
                self._choose_rows(trainer, window)
            if not window.iterating and trainer.is_in_train:
                # A `get_batch_samples` in front of ours has made another list, of which the Trainer knows the length.
                window.size_elsewhere = getattr(trainer, "current_gradient_accumulation_steps", None)
                window.ascent_items = None
        if len(window.plan.radii) != len(trainer.optimizer.param_groups):
            self._plan(trainer, window)  # somebody has added a group in the middle of a step
        sync = self._synchronization(trainer, model, window)
        self._finish = partial(self.step.finish, window, stock_step, sync)
        ascent = None
        if window.ascent_inputs is not None:
            micro_batches, position = (
                sum(b is not None for b in window.ascent_inputs.values()),
                window.position_of(inputs),
            )
            if window.iterating:
                window.ascent_inputs[position] = window.ascent_cuts[position](inputs)
            else:
                (window.ascent_inputs[position],) = self._rows_of(trainer, [inputs]).batches
                micro_batches = window.size
            ascent = partial(ascent_step, window.ascent_items, micro_batches)
        before = _state_of(trainer)
        loss = self.step(window, inputs, stock_step, sync, ascent)
        if window.plan.ascends and not self._told_of_state:
            self._tell_of_state(before, _state_of(trainer))
        if window.reused and not self._told_of_reuse:
            self._tell_of_reuse(trainer, window)
        return loss

    def _is_of_window(self, trainer: SharpnessAwareTrainer, inputs: Any) -> bool:
        """Whether the micro-batch at hand is one of the present window, and not one that a loop has brought itself."""
        window = self._window
        here = bool(window) and trainer.is_in_train and trainer.state.global_step == self._window_step
        return here and window.expects(inputs)

    def finish_step(self) -> None:
        """Before the update: finish what a trainer has left of the window."""
        if self._finish is not None:
            self._finish()

    def _synchronization(self, trainer: SharpnessAwareTrainer, model: nn.Module, window: Window) -> Synchronization:
        # Which micro-batches take part in an ascent over a share of the rows is each process's own affair.
        some = window.ascent_inputs is not None and not trainer.accelerator.is_fsdp2
        partial_ascent = window.plan.chosen is not None or some
        return Synchronization(trainer.accelerator, model, ascends_per_process(self.args), partial_ascent)

    @property
    def first_pass_cost(self) -> float:
        """Of the present step's ascent, as a share of a whole pass."""
        if not self._window.plan.ascends:
            return 0.0
        # without weight gradients backward is half as much, thus a pass two thirds
        return (self._window.ascent_share or 1.0) * (2 / 3 if self._window.plan.chosen is not None else 1)

    # ---- numbers ----

    def read_metrics(self, trainer: SharpnessAwareTrainer) -> dict[str, float]:
        """The ``sam_*`` entries since the last call, none if nothing can be perturbed. Every process must be here."""
        if not any(self.planner.radii) and not self._planned:
            return {}
        metrics, self.step.metrics = self.metrics, StepMetrics()
        values, steps = metrics.read(trainer.accelerator)
        planned, reasons = metrics.planned, metrics.reasons
        self._planned += planned
        self._perturbed += steps
        if "sam_perturbed_steps" in values:
            reasons = reasons or {SKIPPED}
            self._reasons |= reasons
        if trainer.is_world_process_zero():
            warm = trainer.state.global_step > self.args.get_warmup_steps(trainer.state.max_steps)
            self._monitor(values, steps, warm)
            if "sam_perturbed_steps" in values:
                self._monitor.plain_steps(steps, planned, reasons)
        return values

    def end(self, trainer: SharpnessAwareTrainer) -> None:
        """The training has come to its end: look at the steps since the last log entry, and at all of them."""
        self.read_metrics(trainer)
        if any(self.planner.radii) and not self._perturbed and trainer.is_world_process_zero():
            self._monitor.never(self._planned, self._reasons)

    @property
    def perturbed_here(self) -> int:
        """Steps of this training that were perturbed, in this process, logged or not."""
        return math.ceil(self._perturbed + self.metrics.perturbed_here)

    # ---- words at the start ----

    def _tell_of_state(self, before: dict[str, _Value], now: dict[str, _Value]) -> None:
        if changed := [name for name, value in now.items() if name not in before or value.differs(before[name])]:
            self._told_of_state = True
            logger.warning(
                f"the trainer keeps what a pass changes ({', '.join(changed)}), and the second pass begins "
                "with what the first one has left there; if the loss reads them, keep them on the model, where they "
                "are put back between the passes"
            )

    def _tell_of_reuse(self, trainer: SharpnessAwareTrainer, window: Window) -> None:
        self._told_of_reuse = True
        if trainer.is_world_process_zero():
            logger.warning_advice(describe_reuse(trainer.model, window))

    def _introduce(self, trainer: SharpnessAwareTrainer, window: Window) -> None:
        args, radii, total = self.args, self.planner.radii, trainer.state.max_steps
        used = innermost(trainer.optimizer)
        ours = args.package_optimizer()
        if ours and not isinstance(used, ours[0]):
            logger.warning(f"optim={args.optim} is not in use: the trainer was given a {type(used).__qualname__}")
        # get_warmup_steps(100): a number of steps, or its share of training, above 0 either way
        if isinstance(used, AdaSAM) and used.param_groups[0]["betas"][1] >= 0.999 and not args.get_warmup_steps(100):
            logger.warning(
                f"betas={used.param_groups[0]['betas']} without warm-up: AdaSAM has no bias correction, so its first "
                "steps are several times the learning rate; use adam_beta2=0.98 or warmup_steps"
            )
        if any(radii) and not args.sam_schedule.steps(max(total, 1)):
            logger.warning(
                f"sam_start={args.sam_start} and sam_end={args.sam_end} leave no step in which to perturb the weights, "
                f"of {total}; train longer, or move them apart"
            )
        if not any(radii) and (idle := args.arguments_without_effect()):
            logger.warning(f"{', '.join(idle)}: without effect at radius 0; pass --optim adasam, or --sam_rho 0.05")
        if any(radii) and trainer.is_world_process_zero():
            chosen = self.planner.chosen()
            what = (args, trainer.accelerator, trainer.model, trainer.optimizer, radii, chosen, window.ascent_share)
            logger.warning_advice(describe(*what))


def _loss_functions(trainer: SharpnessAwareTrainer) -> list[Any]:
    """Those that compute its loss, by whoever wrote them."""
    method = getattr(type(trainer), "compute_loss", None)
    return [f for f in (trainer.compute_loss_func, method) if f is not None and f is not Trainer.compute_loss]


def _state_of(trainer: SharpnessAwareTrainer) -> dict[str, _Value]:
    """Its attributes that are tensors or numbers, but for what `counters` takes care of."""
    return {
        name: _Value(value, version(value) if isinstance(value, Tensor) else None)
        for name, value in vars(trainer).items()
        if type(value) in (Tensor, int, float) and name not in counters.COUNTERS
    }
