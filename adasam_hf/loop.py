"""The two-pass step for a training loop of one's own, with Accelerate."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, get_args

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from .directions import DIRECTIONS, DirectionName, innermost
from .hyperparameters import check_radius
from .microbatch import LossFunction, MicroBatch
from .monitor import RadiusMonitor
from .optim import AdaSAM
from .parameters import optimized, reached
from .plan import Planner
from .reading import read_choice, read_pattern, read_truth_value
from .refusals import Setup, refuse_unsupported
from .schedule import Schedule
from .step import StepSettings, TwoPassStep
from .step_metrics import SKIPPED, StepMetrics, loss_scale
from .synchronization import Synchronization, ascends_per_process
from .training_args import Descent, Dropout, Scope
from .window import StepPlan, Window


class SharpnessAwareLoop:
    r"""Makes a training loop with Accelerate sharpness-aware: call its `backward` instead of the accelerator's.

        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        sam = SharpnessAwareLoop(accelerator, model, optimizer, rho=0.05)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = sam.backward(lambda batch: model(**batch).loss, batch)   # at w, detached
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step(); scheduler.step(); optimizer.zero_grad()

    An optimizer step is that of `step.TwoPassStep`, as in this package's Trainer. In scope ``batch``, the calls for all
    micro-batches of a step except the last run only the first pass and hold on to their inputs. The last call perturbs
    the weights along the gradient of all of them, takes the second pass for each with the same dropout masks and
    buffers, and restores w. Then ``.grad`` holds the gradient at w + δ, scaled as in the plain loop, because
    `accelerator.backward` does the work: it divides by ``gradient_accumulation_steps`` and knows the gradient scaler.
    In scope ``microbatch`` every call does all of this for its micro-batch. Radius 0 is the plain loop, bit for bit.

    The weights differ from w only inside `backward`, and are back at w if it raises. To resume, nothing has to be saved
    besides model, optimizer and generators.

    Without `Accelerator.prepare`, a plain PyTorch loop uses ``SharpnessAwareLoop(Accelerator(), model, optimizer)``,
    divides the loss itself, and says which micro-batch is the `last` of a step.

    Args:
        accelerator: whose `backward`, scaler and processes are used.
        model: as returned by `prepare`: one module with all parameters of the optimizer, and whatever else the loss
            runs through in training mode.
        optimizer: a torch optimizer, or what `prepare` returned for it. Its groups are read at every step.
        rho: radius ρ >= 0 in weight units, for all groups; 0 for the plain loop. It is written into the groups of an
            `AdaSAM`. None: the radius of each of the `AdaSAM`'s groups.
        scope: whose gradient the perturbation follows: that of the whole optimizer step (``batch``), or each
            micro-batch's own (``microbatch``).
        sync: with several processes in scope ``batch``: whether the ascent gradient is averaged over them, so that a
            run on two processes matches a single-process run with the same global batch; otherwise each follows its
            own.
        dropout: masks of the second pass: the ``same`` as in the first, or ``fresh``.
        direction: ``gradient``, or the optimizer's ``momentum``, which needs no first pass.
        descent: what the second pass takes the gradient of: the ``loss``, or (``functional``) the logits, weighted by
            the loss's derivative from the first pass (`functional.LogitGradients`).
        adaptive: radius relative to the size of each weight (ASAM, arXiv:2102.11600).
        parameters: those that are perturbed: ``all``, ``norm``, or a regular expression over their names.

    Raises:
        TypeError: if `optimizer` is not a torch optimizer.
        ValueError: for a value out of range, or a `model` that does not have the optimizer's parameters.
        NotImplementedError: where no test shows the two-pass step to be right (see the compatibility table).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        rho: float | None = None,
        scope: Scope = "batch",
        sync: bool = True,
        dropout: Dropout = "same",
        direction: DirectionName = "gradient",
        descent: Descent = "loss",
        adaptive: bool = False,
        parameters: str = "all",
    ) -> None:
        self._accelerator, self._model = accelerator, model
        # Accelerate's wrapper does not take hooks.
        self._optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        self._inner = accelerator.unwrap_model(model)
        self._settings = _Settings(
            read_choice("scope", scope, get_args(Scope)),
            read_truth_value("sync", sync),
            read_pattern("parameters", parameters, "'all', 'norm' or a regular expression over parameter names"),
            read_choice("direction", direction, DIRECTIONS),
        )
        self._planner = Planner(self._settings, self._inner, self._optimizer)
        self.rho = rho
        self._check_parts()
        self._step = TwoPassStep(
            self._inner,
            self._optimizer,
            StepSettings(
                scope,
                same_masks=read_choice("dropout", dropout, get_args(Dropout)) == "same",
                adaptive=read_truth_value("adaptive", adaptive),
                functional=self._is_functional(descent),
                cache_frozen=not accelerator.is_fsdp2,
            ),
            metrics=StepMetrics(),
            loss_scale=partial(loss_scale, accelerator),
            prefix="",
        )
        self._monitor = RadiusMonitor(max(self._planner.radii, default=0.0), name="rho")
        self._plan: StepPlan | None = None  # of the optimizer step that has begun
        self._open: _OpenWindow | None = None  # its micro-batches, if they are to have a second pass together
        self._closed: _OpenWindow | None = None  # those of the step before, until an update has taken their gradients
        self._optimizer.register_step_pre_hook(lambda *_: self._before_update())
        self._optimizer.register_step_post_hook(lambda *_: self._after_update())

    def _check_parts(self) -> None:
        kind, processes = type(self._optimizer).__name__, self._accelerator.num_processes
        if not isinstance(self._optimizer, Optimizer):
            raise TypeError(f"optimizer={kind} must be a torch.optim.Optimizer, or a prepared one")
        if self.rho is None and not isinstance(innermost(self._optimizer), AdaSAM):
            raise ValueError(
                f"rho=None means the radii of an AdaSAM, but the optimizer is {kind}; pass rho=0.05, or rho=0 for "
                "the plain loop"
            )
        if beside := len(set(optimized(self._optimizer)) - set(self._inner.parameters())):
            raise ValueError(
                f"model={type(self._inner).__name__} lacks {beside} of the optimizer's parameters, and the second pass "
                "restores the gradients and buffers of one module only; put them all into one (before prepare)"
            )
        if any(self._planner.radii):
            self._planner.chosen()  # raises if there are none
        if processes > 1 and not (self._accelerator.is_fsdp2 or hasattr(self._model, "no_sync")):
            raise ValueError(
                f"model={type(self._model).__name__} does not average gradients over the {processes} processes; pass "
                "what accelerator.prepare(model) has returned"
            )

    def _is_functional(self, descent: Descent) -> bool:
        choice: Descent = read_choice("descent", descent, get_args(Descent))
        functional = choice == "functional"
        if functional and not DIRECTIONS[self._settings.resolved_direction].first_pass:
            raise ValueError(
                f"direction={self._settings.resolved_direction!r} contradicts descent='functional', which takes the "
                "gradient at the logits from a first pass; set direction='gradient', or descent='loss'"
            )
        return functional

    @property
    def rho(self) -> float | None:
        """The radius; None for those of an `AdaSAM`'s groups. Set it between two steps for a schedule of your own."""
        return self._settings.sam_rho

    @rho.setter
    def rho(self, rho: float | None) -> None:
        self._settings.sam_rho = rho = None if rho is None else check_radius(rho)
        if rho is not None and isinstance(innermost(self._optimizer), AdaSAM):
            for group in self._optimizer.param_groups:
                group["rho"] = rho
        if any(self._planner.radii):
            refuse_unsupported(self._setup())

    def _setup(self) -> Setup:
        model = self._model
        return Setup(
            rho=self.rho,
            optimizer=type(self._optimizer).__name__.lower(),
            direction=self._settings.resolved_direction,
            parameters=self._settings.sam_parameters,
            per_process=ascends_per_process(self._settings),
            accelerator=self._accelerator,
            processes=self._accelerator.num_processes,
            devices=len(model.device_ids) if isinstance(model, nn.DataParallel) else 1,
            accumulates=self._accelerator.gradient_accumulation_steps > 1,
            static_graph=getattr(model, "static_graph", False),
            reentrant=False,  # which is not known
            split=len({p.device for p in model.parameters()}) > 1,
            prefix="",
        )

    # ---- one micro-batch ----

    def backward(self, loss_fn: LossFunction, *inputs: Any, last: bool | None = None) -> Tensor:
        """Does what ``accelerator.backward(loss_fn(*inputs))`` does in a plain loop, in both passes.

        Args:
            loss_fn: computes the loss, a tensor of one element, from `inputs`. Both passes call it, the second in scope
                ``batch`` after other micro-batches: whatever differs between micro-batches must be an input.
            inputs: of this micro-batch, at least one. They are held until the second pass.
            last: whether the update follows this micro-batch. Unset: ``accelerator.sync_gradients``, which
                `accelerator.accumulate` maintains; without `accumulate` it is always true.

        Returns: what `loss_fn` returned at w, detached (along the momentum: at w + δ).

        Raises:
            TypeError: if `loss_fn` cannot be called in both passes, or does not return a tensor.
            RuntimeError: if `last` contradicts Accelerate, what is to be replayed has changed, or the gradients of the
                step before are still there and no update has used them.
        """
        micro_batch = MicroBatch(loss_fn, inputs)
        last = self._is_last(last)
        window = self._window_of(micro_batch, last)
        share = 1 / (len(window.passes) + 1)  # of the window's mean loss
        losses: list[Tensor] = []

        def stock_step(one: MicroBatch) -> Tensor:
            loss = one.loss()
            self._accelerator.backward(loss)
            losses.append(loss.detach())
            return losses[-1] * share

        alone = ascends_per_process(self._settings)
        sync = Synchronization(self._accelerator, self._model, alone, window.plan.chosen is not None)
        try:
            self._step(window, micro_batch, stock_step, sync)
        finally:
            self._step.perturbation.restore()  # Ctrl-C may have cut the step's own short
            if losses and last:  # the first pass has come to its end, if not the second
                self._close()
            elif losses and self._open is not None:
                micro_batch.note(losses[0])
        return losses[0]

    def _is_last(self, last: bool | None) -> bool:
        if last and not self._accelerator.sync_gradients:
            raise RuntimeError(
                "last=True, but accelerator.accumulate() is not at the end of a step, so that optimizer.step() will do "
                "nothing; leave `last` unset inside accumulate()"
            )
        return bool(self._accelerator.sync_gradients) if last is None else last

    def _window_of(self, micro_batch: MicroBatch, last: bool) -> Window:
        """That of the whole step, with one micro-batch more, if its second passes come together; or one of its own."""
        if self._open is not None and self._open.given_up:
            self._open = self._plan = None
        if self._plan is None or len(self._plan.radii) != len(self._optimizer.param_groups):
            self._plan = self._planner.plan(0, 1)  # any step of any number, as there is no schedule
        if not (self._plan.ascends and self._settings.sam_scope == "batch"):
            self._note_planned(self._plan)
            return Window([micro_batch], self._plan)
        if self._open is None:
            self._refuse_second_step()
            self._open = _OpenWindow([], self._plan)
        self._open.plan = self._plan
        self._open.add(micro_batch, last)
        if last:
            self._note_planned(self._plan)
        return self._open

    def _note_planned(self, plan: StepPlan) -> None:
        if plan.perturbs:
            self._step.metrics.plan(max(plan.radii))

    def _close(self) -> None:
        self._closed, self._open, self._plan = self._open, None, None
        if self._closed is not None:
            self._closed.closed = True
            self._closed.note_gradients(reached(self._inner, self._optimizer))

    def _refuse_second_step(self) -> None:
        if self._closed is not None and not self._closed.others_cleared_gradients():
            raise RuntimeError(
                "a step begins while the gradients of the one before are still there, and no update has used them; "
                "with gradient accumulation use accelerator.accumulate(model), or pass last=False with all micro-"
                "batches of a step but its last (scope='microbatch' needs neither); to abandon a step, call "
                "optimizer.zero_grad()"
            )

    # ---- the update ----

    def _before_update(self) -> None:
        for window in (self._open, self._closed):
            if window is None or not window.unfinished:
                continue
            # (Where a second pass has failed before it left a gradient, nobody can have cleared any.)
            if not (window.has_gradients and window.others_cleared_gradients()):  # for which a device is waited for
                raise RuntimeError(
                    f"optimizer.step() before {sum(one is not None for one in window)} micro-batches have had their "
                    "second pass: none of them was the last of the step, or the pass failed; pass last=True with "
                    "the last one, or call optimizer.zero_grad() and leave step() out to abandon the step"
                )

    def _after_update(self) -> None:
        self._closed = None

    # ---- numbers ----

    def metrics(self) -> dict[str, float]:
        """The ``sam_*`` entries of the Trainer's log, since the last call; none if nothing was to be perturbed.

        ``sam_loss``, ``sam_gap`` (and their difference, the loss at w) are means of what `loss_fn` returned. In scope
        ``microbatch``, and along the momentum, each micro-batch counts as a step. Every process must call it; it waits
        for the device.
        """
        metrics, self._step.metrics = self._step.metrics, StepMetrics()
        if not metrics.planned:
            return {}
        values, steps = metrics.read(self._accelerator)
        if self._accelerator.is_main_process:
            self._monitor(values, steps, warm=False)  # it is not known whether
            if "sam_perturbed_steps" in values:
                self._monitor.plain_steps(steps, metrics.planned, metrics.reasons or {SKIPPED})
        return values


class _OpenWindow(Window):
    """A window whose micro-batches come one by one. While more are to come, it ends with None in place of the next.

    Attributes:
        closed: whether the second pass has been taken, or has failed.
    """

    closed = False

    def position_of(self, micro_batch: Any) -> int:
        """Those whose first pass has failed do not count."""
        return len(self.passes)

    @property
    def unfinished(self) -> bool:
        """Whether a first pass has been taken, and not all of the second."""
        return bool(self.passes) or (self.closed and not self.complete)

    @property
    def given_up(self) -> bool:
        """Whether somebody has cleared the gradients that the first pass has gathered so far."""
        return bool(self.passes) and self.others_changed_gradients() and self.others_cleared_gradients()

    def add(self, micro_batch: MicroBatch, last: bool) -> None:
        """Take one more; with the last one see that all others are still what they were.

        Raises:
            RuntimeError: if they are not.
        """
        ahead = [one.inputs for one in self.passes]  # without those whose first pass has failed
        changes = [change for one in ahead for change in one.changes()] if last else []
        if changes:
            raise RuntimeError(
                f"{changes[0]} of loss_fn is no longer what the first pass of its micro-batch saw, so the second pass "
                "would see something else; whatever differs between micro-batches must be an input, and stay unchanged "
                "until the update: sam.backward(loss_fn, batch)"
            )
        self[:] = [*ahead, micro_batch] if last else [*ahead, micro_batch, None]
        if last:
            self.losses = [one.clean_loss / len(self) for one in ahead]


@dataclass
class _Settings:
    """What the planner reads of a Trainer's arguments."""

    sam_scope: Scope
    sam_sync: bool
    sam_parameters: str
    resolved_direction: DirectionName
    sam_rho: float | None = None
    # The radius is an attribute that a loop may set, and needs no schedule beside.
    sam_schedule: ClassVar = Schedule()
    sam_rho_schedule: ClassVar = "constant"
    sam_reuse: ClassVar = False
    optim: str = ""

    @property
    def resolved_rho(self) -> float:
        return self.sam_rho or 0.0
