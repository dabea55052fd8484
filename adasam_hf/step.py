"""One optimizer step in two passes. It knows windows and gradients; the stock step is handed in."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from transformers.utils import logging

from . import rng
from .buffers import ModelState
from .containers import copy_containers, leaves, modules_in
from .directions import PreviousAscent
from .frozen import FrozenOutputs, Trust, frozen_modules
from .functional import LogitGradients
from .parameters import add_gradients, gradients_only_for, optimized, reached, take_gradients
from .perturbation import Perturbation
from .step_metrics import NO_GRADIENT, SKIPPED, StepMetrics
from .synchronization import Synchronization
from .window import Pass, StepPlan, Window, version

logger = logging.get_logger(__name__)

StockStep = Callable[[Any], Tensor]
"""Forward and backward for one micro-batch: leaves gradients in ``.grad``, as the update wants them scaled; returns the
loss, detached, scaled alike, so that those of a window add up to its mean."""


class StepSettings(NamedTuple):
    """How the two passes are taken; a step that has begun ends as it has begun.

    Attributes:
        scope: ``batch`` or ``microbatch``.
        same_masks: whether the descent repeats the random numbers of the ascent.
        adaptive: see `Perturbation.ascend`.
        functional: whether the descent takes the loss's derivative at the logits from the ascent (`LogitGradients`).
        cache_frozen: whether the descent takes from the ascent what frozen modules have computed (`FrozenOutputs`).
    """

    scope: str
    same_masks: bool
    adaptive: bool
    functional: bool = False
    cache_frozen: bool = False


class TwoPassStep:
    r"""The sharpness-aware step for one micro-batch after another (Algorithm 1 of arXiv:2303.00565).

    With weights w, one step over a window of k micro-batches is

    1. ascent: the stock step at w for each of them gives s, the gradient that a stock step would use;
    2. perturb: w + δ with δ = ρ s/‖s‖₂ (`Perturbation`);
    3. descent: the stock step again on the same micro-batches, from the same random state and buffers, gives g;
    4. restore: w, bit for bit; g is in ``.grad`` for whoever clips and updates.

    In scope ``batch`` 2 to 4 happen in the call for the last micro-batch, along the gradient of the whole window; in
    scope ``microbatch`` each call does them for its own micro-batch. A direction without a first pass (the momentum)
    leaves 2, one stock step at w + δ, and 4. Where nothing can be perturbed the step is the stock one.

    Args:
        model: whose buffers and generators a pass moves, and whose gradients count beside the optimizer's.
        optimizer: whose parameter groups are perturbed; read at every step.
        settings: may be replaced between two steps.
        metrics: where what happens is counted.
        around_descent: a context for the stock steps of the descent, such as `counters.unchanged`.
        beside: things beside `model` in which there may be modules that its loss runs through; asked at every window.
        loss_scale: by which the gradients are larger than those of the loss (a gradient scaler's).
        owner: who takes the micro-batches, as messages name it.
        prefix: of the arguments' names in messages.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        settings: StepSettings,
        *,
        metrics: StepMetrics,
        around_descent: Callable[[], AbstractContextManager[object]] = nullcontext,
        beside: Callable[[], Iterable[Any]] = tuple,
        loss_scale: Callable[[], float | Tensor] = lambda: 1.0,
        owner: str = "the loop",
        prefix: str = "sam_",
    ) -> None:
        self.perturbation = Perturbation(optimizer)
        self.previous: PreviousAscent | None = None
        """Where the vectors of the last ascent are copied to, if they are to be used again."""
        self.settings, self.metrics = settings, metrics
        self._model, self._optimizer = model, optimizer
        self._around_descent, self._loss_scale, self._owner = around_descent, loss_scale, owner
        self._prefix = prefix
        self._beside = beside
        self._trust = Trust()
        self._logits_seen = False  # whether a gradient has come to the logits of any micro-batch
        self._restrict = True  # whether the ascent may leave out the gradients of parameters that are not chosen
        self._warned_of_inputs = False

    def __call__(
        self,
        window: Window,
        inputs: Any,
        stock_step: StockStep,
        sync: Synchronization,
        ascent_step: StockStep | None = None,
    ) -> Tensor:
        """Take the micro-batch at hand, `inputs` of `window`, and return its loss at w, as the stock step does.

        (That of what the ascent sees; at w + δ, if the direction needs no first pass.)

        Args:
            stock_step: for the descent, and for a plain step.
            sync: of the gradients between processes.
            ascent_step: for the ascent, if it sees something else than the descent does.
        """
        if not window.plan.perturbs:
            return stock_step(inputs)
        if not window.plan.ascends:
            return self._single_pass(window, inputs, stock_step)
        position = window.position_of(inputs)
        self._refuse_repetition(window, position)
        if window.passes:
            self._look_at_gradients(window)
        else:
            self._refuse_hooks()
            self._look_around(window)
            window.leftover = take_gradients(self._reached())
            self.perturbation.forget_spent_gradients()
        loss = self._ascent(window, position, inputs, ascent_step or stock_step, sync)
        if self.settings.scope == "microbatch" or position >= window.size - 1:
            self._descent(window, stock_step, sync)
        else:
            window.note_gradients(self._reached())
        return loss

    def finish(self, window: Window, stock_step: StockStep, sync: Synchronization) -> None:
        """Before the update: what is left of a window that has not been gone through is a plain step.

        ``.grad`` has the ascent's gradients, which are the stock step's, unless the ascent saw only a part of it all,
        or a descent has failed and taken them.
        """
        passes = window.take_passes()
        partial_ascent = window.ascent_inputs is not None or window.plan.chosen is not None
        if passes and partial_ascent and not window.descended:
            take_gradients(self._reached())
        if partial_ascent or window.descended:
            for one in passes:
                with sync.of_descent(last=False), self._replay(one):
                    stock_step(one.inputs)
        add_gradients(window.leftover)
        window.leftover = {}
        if not window.complete and window.plan.perturbs:
            self.metrics.reasons.add(SKIPPED)

    # ---- the passes ----

    def _single_pass(self, window: Window, inputs: Any, stock_step: StockStep) -> Tensor:
        self._refuse_hooks()
        with self._perturbed(window.plan) as norm:
            loss = stock_step(inputs)
        self.metrics.perturbed(norm, 1 / window.size, self.perturbation.applied)
        window.complete = True
        return loss

    def _ascent(
        self, window: Window, position: int, inputs: Any, ascent_step: StockStep, sync: Synchronization
    ) -> Tensor:
        """The stock step at w, on what the ascent sees and for the parameters that may move. Returns its loss."""
        frozen = FrozenOutputs(window.frozen, self._trust, window.models, window.generators)
        logits = LogitGradients(self._model) if self.settings.functional else None
        state = ModelState(window.modules, like=window.passes[-1].state if window.passes else None)
        one = Pass(copy_containers(inputs), rng.capture(window.generators), state, position, frozen, logits)
        weights = _weights_beside(self._optimizer, window.modules)
        window.passes.append(one)
        try:
            seen = inputs if window.ascent_inputs is None else window.ascent_inputs[position]
            if seen is None:
                loss = torch.zeros((), device=next(self._model.parameters()).device)
            else:
                loss = self._restricted(window, seen, ascent_step, sync)
        except BaseException:
            # A trainer may catch it and go on; then this micro-batch is one that it skips, as in stock.
            window.passes.pop()
            if self.settings.scope == "microbatch" or not window.passes:
                add_gradients(window.leftover)
                window.leftover = {}
            window.note_gradients(self._reached())
            raise
        window.losses.append(loss)
        if any(p.was_written_to() for p in weights):
            raise NotImplementedError(
                "the first pass has written to parameters that are not in the optimizer, such as a moving average of "
                "others, or what a second optimizer trains, and the second pass would do so once more, from the "
                f"perturbed weights; do that in a callback (on_step_end), or set {self._prefix}rho=0"
            )
        if logits is not None:
            self._logits_seen |= logits.found
            if not self._logits_seen:
                raise NotImplementedError(
                    f"{self._prefix}descent='functional' takes the loss's derivative at the logits, and none has come "
                    f"to an output of {type(self._model).__qualname__} that is called so (its loss may be computed "
                    f"without them, or compiled together with them); set {self._prefix}descent='loss'"
                )
        return loss

    def _restricted(self, window: Window, seen: Any, ascent_step: StockStep, sync: Synchronization) -> Tensor:
        chosen = window.plan.chosen if self._restrict else None
        versions = _versions(seen)
        start = window.passes[-1]
        with sync.of_ascent():
            try:
                with gradients_only_for(chosen, self._reached()), start.record():
                    loss = ascent_step(seen)
            except RuntimeError as error:
                if chosen is None or "does not require grad" not in str(error):
                    raise
                # No chosen parameter takes part in this micro-batch, so its loss has no graph; all others have one.
                rng.rewind(start.random)
                start.state.restore()
                with start.record():
                    loss = ascent_step(seen)
        changed = [key for key, (tensor, number) in versions.items() if tensor._version != number]
        if changed and window.ascent_inputs is None and not self._warned_of_inputs:
            self._warned_of_inputs = True
            logger.warning(
                f"compute_loss, or the model, changes {', '.join(f'inputs{path}' for path in changed)} in place. If "
                "making that change twice gives other inputs, the second pass sees another batch; in that case change "
                "a copy"
            )
        return loss

    def _descent(self, window: Window, stock_step: StockStep, sync: Synchronization) -> None:
        """Perturb, take the stock step at w + δ for each micro-batch of the window, and restore w."""
        plan, passes = window.plan, window.take_passes()
        leftover, window.leftover = window.leftover, {}
        losses, window.losses = window.losses, []
        trainable = [p for p in (optimized(self._optimizer) if plan.chosen is None else plan.chosen) if p.requires_grad]
        sync.finish_ascent(trainable)
        have_gradient = {p for p in trainable if p.grad is not None}
        if self.previous is not None and plan.direction is not None:
            self.previous.remember(plan.direction)
        after_ascent = ModelState(window.modules)
        repeat = self.settings.same_masks and window.ascent_inputs is None
        if self.settings.same_masks and not repeat:
            # There are no masks to repeat, as those of the ascent had fewer rows: draw what a plain step would draw.
            rng.rewind(passes[0].random)
        sam_losses = []
        with self._perturbed(plan) if have_gradient else nullcontext() as norm, self._around_descent():
            take_gradients(self._reached())  # of parameters outside the optimizer
            add_gradients(leftover)
            window.descended = True
            try:
                for i, one in enumerate(passes, 1):
                    # If it fails and the trainer goes on, this micro-batch is one that it skips, as in stock.
                    window.passes = passes[i:]
                    with sync.of_descent(last=i == len(passes)), self._replay(one, repeat):
                        sam_losses.append(stock_step(one.inputs))
            finally:
                after_ascent.restore()
        self._trust.end_step()
        window.complete = True
        window.reused = set[nn.Module]().union(*(one.frozen.reused for one in passes))
        window.reused_bytes = sum(one.frozen.nbytes for one in passes) if window.reused else 0
        if norm is None:
            self.metrics.reasons.add(NO_GRADIENT)
            return
        if plan.chosen is not None and self._restrict:
            self._look_for_hidden(set(trainable) - have_gradient - set(leftover))
        share = len(passes) / window.size if self.settings.scope == "microbatch" else 1.0
        self.metrics.perturbed(
            norm / self._loss_scale(),
            share,
            self.perturbation.applied,
            clean=_total(losses, norm),
            sam=_total(sam_losses, norm),
        )

    def _look_around(self, window: Window) -> None:
        """Before the first pass: which modules, generators and hooks take part."""
        beside = list(self._beside())
        window.models = list(dict.fromkeys(modules_in((self._model, *beside))))
        window.modules = list(dict.fromkeys(module for model in window.models for module in model.modules()))
        window.generators = [*rng.generators_of(window.modules), *rng.generators_in(beside)]
        if self.settings.cache_frozen and self.settings.same_masks and window.ascent_inputs is None:
            window.frozen = frozen_modules(window.models)

    def _refuse_repetition(self, window: Window, position: int) -> None:
        """In scope batch each micro-batch of several comes once, and none after the descent of them all has begun."""
        if self.settings.scope != "batch" or window.size == 1:
            return
        if window.descended or any(one.position == position for one in window.passes):
            raise RuntimeError(
                f"{self._owner} takes one micro-batch of an accumulated step twice, which "
                f"{self._prefix}scope='batch' cannot replay: whatever changed between the two calls has changed back "
                "by the second pass; set "
                f"{self._prefix}scope='microbatch', gradient_accumulation_steps=1, or {self._prefix}rho=0"
            )

    def _refuse_hooks(self) -> None:
        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in self._reached()):
            raise NotImplementedError(
                "a parameter has a hook of register_post_accumulate_grad_hook, such as an optimizer that updates "
                "inside backward, which would run in both passes, the first time on the ascent's gradient; remove it, "
                f"or set {self._prefix}rho=0"
            )

    def _perturbed(self, plan: StepPlan) -> AbstractContextManager[Tensor]:
        only = None if plan.chosen is None else set(plan.chosen)
        return self.perturbation.perturbed(plan.radii, plan.direction, adaptive=self.settings.adaptive, only=only)

    @staticmethod
    @contextmanager
    def _replay(one: Pass, same_numbers: bool = True) -> Iterator[None]:
        """Inside it, the buffers and, unless the numbers are to be others, the generators are as `one` found them."""
        random = rng.replay(one.random) if same_numbers else nullcontext()
        with one.state.replay(), random, one.replay():
            yield

    # ---- what others do to the gradients ----

    def _reached(self) -> list[nn.Parameter]:
        return reached(self._model, self._optimizer)

    def _look_at_gradients(self, window: Window) -> None:
        """That nobody has changed what the ascent of this window has gathered so far, but for clearing it."""
        if not window.others_changed_gradients():
            return
        if not window.others_cleared_gradients():
            raise RuntimeError(
                f"gradients have changed between two micro-batches of one step, in {self._owner} or a callback; in "
                f"{self._prefix}scope='batch' they belong to the ascent and are discarded. Add to the loss instead, "
                f"set {self._prefix}scope='microbatch', or set {self._prefix}rho=0"
            )
        window.take_passes()
        window.losses, window.leftover = [], {}

    def _look_for_hidden(self, without: set[nn.Parameter]) -> None:
        """That no chosen parameter that the descent has reached was out of the ascent's reach."""
        if any(p.grad is not None for p in without):
            self._restrict = False
            logger.warning(
                f"{self._prefix}parameters: some chosen parameters had a gradient in the second pass and none in the "
                "first: reentrant gradient checkpointing hides them where its inputs need no gradient. From now on the "
                "first pass computes the gradients of all parameters, which takes longer; use_reentrant=False avoids "
                "that"
            )


class _Weight(NamedTuple):
    """A parameter, and what tells whether somebody has written to it since."""

    parameter: nn.Parameter
    pointer: int
    version: int | None
    kind: tuple[torch.dtype, torch.device]

    @classmethod
    def of(cls, p: nn.Parameter) -> "_Weight":
        return cls(p, p.data_ptr(), version(p), (p.dtype, p.device))

    def was_written_to(self) -> bool:
        now = self.of(self.parameter)
        # (Teachers are cast, and moved to and fro.)
        moved = now.pointer != self.pointer and now.kind == self.kind and not self.parameter.requires_grad
        return moved or now.version != self.version


def _weights_beside(optimizer: Optimizer, modules: Iterable[nn.Module]) -> list[_Weight]:
    """Parameters of `modules` that `optimizer` does not have. (Without those that a forward pass keeps below a norm,
    `nn.Embedding(max_norm=...)`: once is as often as twice.)"""
    own = {p for m in modules if getattr(m, "max_norm", None) is None for p in m._parameters.values() if p is not None}
    others = own - set(optimized(optimizer))
    return [_Weight.of(p) for p in others if not is_lazy(p) and type(p.data) is Tensor]


def _total(losses: list[Tensor], like: Tensor) -> Tensor:
    """Their sum, no less precise than `like`: half precision would lose most of a long log interval."""
    return reduce(torch.add, [loss.to(torch.promote_types(loss.dtype, like.dtype)) for loss in losses])


def _versions(inputs: Any) -> dict[str, tuple[Tensor, int]]:
    tensors = ((path, leaf) for path, leaf in leaves(inputs) if isinstance(leaf, Tensor) and not leaf.is_inference())
    return {path: (tensor, tensor._version) for path, tensor in tensors}
