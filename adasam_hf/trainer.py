"""The two-pass training step as a mixin for any Transformers `Trainer`."""

import copy
import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from . import activity
from .card import ModelCardMixin
from .checkpoints import CompleteCheckpointsMixin
from .internals import check_internals, show_signatures
from .monitor import RadiusMonitor
from .perturbation import Perturbation
from .plan import base_radii
from .refusals import Setup, refuse_overrides, refuse_unsupported
from .run import SharpnessAwareRun
from .training_args import (
    AdaSAMSeq2SeqTrainingArguments,
    AdaSAMTrainingArguments,
    SharpnessAwareArgumentsMixin,
)

if TYPE_CHECKING:
    _Base = Trainer  # or a class of it, behind the mixin
else:
    _Base = object

_STATE_FILE = "sharpness_aware_state.json"  # of a checkpoint


class _OptimizerChoice:
    """`get_optimizer_cls_and_kwargs` is static in Transformers, and a method of instances in sentence-transformers.
    Whatever is behind the mixin is called as this is: through the class, or through an instance."""

    def __get__(self, trainer: Trainer | None, kind: type[Trainer]) -> Callable[..., tuple[Any, dict[str, Any]]]:
        behind: Any = super(SharpnessAwareTrainerMixin, kind if trainer is None else trainer)
        return partial(_optimizer_cls_and_kwargs, behind.get_optimizer_cls_and_kwargs)


def _optimizer_cls_and_kwargs(
    behind: Callable[..., tuple[Any, dict[str, Any]]],
    args: SharpnessAwareArgumentsMixin,
    model: PreTrainedModel | None = None,
) -> tuple[Any, dict[str, Any]]:
    """As in Transformers, with this package's optimizers for this package's names. (A plain Trainer fails on them.)

    The parameter groups that a library makes here (weights of the loss, rates by layer) are kept.
    """
    ours = args.package_optimizer()
    if ours is None:
        return behind(args, model)
    stock = copy.copy(args)
    stock.optim, stock.optim_args = TrainingArguments.optim, None
    _, theirs = behind(stock, model)
    groups = {key: theirs[key] for key in ("params", "model", "optimizer_dict") if key in theirs}
    return ours[0], ours[1] | groups


class SharpnessAwareTrainerMixin(ModelCardMixin, CompleteCheckpointsMixin, _Base):
    r"""Makes a `Trainer` class sharpness-aware; combine it in front:

        class MyAdaSAMTrainer(SharpnessAwareTrainerMixin, MyTrainer): ...

    `step.TwoPassStep` describes one optimizer step: its weights, gradients and random numbers. The weights differ from
    w only inside one call of `training_step`: callbacks, evaluations and checkpoints see w. Radius 0 is the stock run,
    bit for bit. A step that cannot be perturbed is a stock step, and is counted.

    With several processes the ascent's gradient is averaged over them (``sam_sync``), so that the run matches a
    single-process run with the same global batch; in scope ``microbatch``, or with ``sam_sync=False``, each process
    perturbs along its own, without gradient traffic. The descent's gradient is averaged as in a stock run, so that the
    processes' weights stay the same bits.

    The radius is ``args.sam_rho``; unset, it is that of the `AdaSAM` instance in use, that of the preset for
    ``optim="sam"`` (``full`` 0.05, ``fast`` 0.1, ``free`` 0.4) and 0 otherwise. Logged with the Trainer's own loss,
    which is the one at w:

    - ``sam_loss``, at w + δ, and ``sam_gap``, their difference: means over the steps that were perturbed;
    - ``sam_grad_norm``: ‖s‖₂ of the last of them (the processes' mean, where each ascends along its own);
    - ``sam_rho``: the radius of the last step planned to be perturbed;
    - ``sam_perturbed_steps``: how many of the planned steps were perturbed, if not all;
    - ``sam_ascent_share``: the share of the rows that the ascent saw, if not all;
    - ``sam_applied``: the share of the perturbation that rounding preserved, if weights are float16 or bfloat16.

    Raises:
        ImportError: if Transformers has lost a method that is extended here.
        TypeError: if `args` lacks the sharpness-aware arguments.
        NotImplementedError: before training, where no test shows the two-pass step to be right.
    """

    args: SharpnessAwareArgumentsMixin
    # These are None only in a Trainer that has not begun.
    model: PreTrainedModel | nn.Module
    optimizer: torch.optim.Optimizer

    _sam_default_arguments: type[SharpnessAwareArgumentsMixin] = AdaSAMTrainingArguments

    def __init__(self, *positional: Any, **named: Any) -> None:
        check_internals()
        positional, named = self._sam_complete_arguments(super().__init__, positional, named)
        self._sam_run: SharpnessAwareRun | None = None  # while a training lasts
        self._sam_log_entries: dict[str, float] = {}  # for the Trainer's own next log entry
        super().__init__(*positional, **named)
        self._sam_check_arguments(self.args)  # which a class behind may have made itself

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        behind = super().__init__  # (unbound, as `cls` is a class)
        combined = SharpnessAwareTrainerMixin in cls.__bases__ and behind is not object.__init__
        if combined and "__init__" not in vars(cls):
            # Scripts look at signatures, to see which arguments a Trainer takes: show that of the class behind.
            cls.__init__ = _initializer(cls, inspect.signature(behind))  # type: ignore[method-assign]

    @classmethod
    def _sam_complete_arguments(
        cls, initialize: Callable[..., None], positional: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the class behind is called with: with arguments in any case, and those of the right kind.

        They are second in Transformers, third in trl's DPOTrainer, and anywhere in ``*args, **kwargs``.
        """
        parameters = inspect.signature(initialize).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        by_name = {**dict(zip(names, positional, strict=False)), **named}
        anywhere = (value for value in (*positional, *named.values()) if isinstance(value, TrainingArguments))
        args = by_name.get("args") or next(anywhere, None)
        if args is None and any(p.name == "args" or p.kind is p.VAR_KEYWORD for p in parameters):
            args = cls._sam_default_arguments("tmp_trainer")  # as in Transformers
            place = names.index("args") if "args" in names else 1
            if place < len(positional) and positional[place] is None:
                positional = (*positional[:place], args, *positional[place + 1 :])
            else:
                named = {**named, "args": args}
        if args is not None:
            cls._sam_check_arguments(args)
        return positional, named

    @staticmethod
    def _sam_check_arguments(args: Any) -> None:
        if not isinstance(args, SharpnessAwareArgumentsMixin):
            raise TypeError(
                f"args={type(args).__name__} has no sharpness-aware arguments; pass AdaSAMTrainingArguments, or a "
                "class that combines SharpnessAwareArgumentsMixin with your own arguments"
            )

    # ---- the optimizer ----

    get_optimizer_cls_and_kwargs = _OptimizerChoice()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in Transformers; refuses what is not supported before anything is wrapped or trained."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if any(base_radii(self.args, self.optimizer)):
            self._sam_refuse()
        return optimizer

    def _sam_refuse(self) -> None:
        refuse_unsupported(Setup.of_trainer(self))
        refuse_overrides(type(self), SharpnessAwareTrainerMixin, self.args)

    @property
    def _perturbation(self) -> Perturbation | None:
        """That of the present training, or of the steps taken by hand; None before the first."""
        return None if self._sam_run is None else self._sam_run.step.perturbation

    # ---- one training ----

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self._sam_run is not None:  # of steps taken by hand
            self._sam_run.step.perturbation.release()
        self._sam_run = None
        self.args.check_together()  # arguments set one after another are looked at together here
        try:
            output = super()._inner_training_loop(*args, **kwargs)
            resumed = inspect.signature(Trainer._inner_training_loop).bind_partial(self, *args, **kwargs).arguments
            self._sam_end_training(bool(resumed.get("resume_from_checkpoint")))
            return output
        finally:
            if self._sam_run is not None:
                # An interrupt can strike between any two instructions of training_step, its own `finally` included.
                run, self._sam_run = self._sam_run, None
                run.step.perturbation.release()
                activity.record(run.perturbed_here)

    def _sam_end_training(self, resumed: bool) -> None:
        """Look back at a finished training, or at one whose loop has bypassed us from the start."""
        if self._sam_run is None and not resumed:  # (A training that was resumed may have had nothing left to do.)
            radius = max(base_radii(self.args, self.optimizer), default=0.0)
            if radius and self.state.global_step and self.is_world_process_zero():
                RadiusMonitor(radius).never(0, ())
        elif self._sam_run is not None:
            self._sam_run.end(self)

    def _sam_running(self) -> SharpnessAwareRun:
        """The present run. It begins before the first step, when a checkpoint may have brought a radius along."""
        if self._sam_run is None:
            if self.optimizer is None:  # training_step is called by hand, outside train()
                self.create_optimizer()
            if any(base_radii(self.args, self.optimizer)):
                self._sam_refuse()  # a create_optimizer of a subclass may not have come to ours
            self._sam_run = SharpnessAwareRun(self)
        return self._sam_run

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        """As in Transformers; plans the coming optimizer step, whose micro-batches these are."""
        run = self._sam_running()
        samples, items = super().get_batch_samples(*args, **kwargs)
        ours = type(self).get_batch_samples is SharpnessAwareTrainerMixin.get_batch_samples
        return run.begin_step(self, samples, passed_on=not ours), items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The double forward/backward (`step.TwoPassStep`). Returns the loss at w, as the stock step does."""
        run = self._sam_running()
        stock_step = partial(self._sam_stock_step, model, args, kwargs)
        return run.take(self, model, inputs, stock_step, partial(self._sam_ascent_step, model))

    def _sam_stock_step(self, model: nn.Module, args: Any, kwargs: Any, inputs: Any) -> Tensor:
        return super().training_step(model, inputs, *args, **kwargs)

    def _sam_ascent_step(self, model: nn.Module, items: Tensor | int | None, micro_batches: int, inputs: Any) -> Tensor:
        """The stock step for an ascent over fewer rows: its loss is a mean over them."""
        every = getattr(self, "current_gradient_accumulation_steps", micro_batches)
        self.current_gradient_accumulation_steps = micro_batches
        try:
            return super().training_step(model, inputs, num_items_in_batch=items)
        finally:
            self.current_gradient_accumulation_steps = every

    # What is left of a window that a trainer has broken off; both come before every update.

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._sam_finish_step()
        return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]  # Transformers' types lack it

    def _get_grad_norm(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self._sam_finish_step()
        return super()._get_grad_norm(model, *args, **kwargs)  # type: ignore[no-untyped-call]  # Transformers' types lack it

    def _sam_finish_step(self) -> None:
        if self._sam_run is not None:
            self._sam_run.finish_step()

    # ---- what people see ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # As the Trainer does for its own loss, and with a collective as there: all processes are here.
        if (
            self._sam_run is not None
            and self.control.should_log
            and self.state.global_step > self._globalstep_last_logged
        ):
            self._sam_log_entries = self._sam_run.read_metrics(self)
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._sam_log_entries = {}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in Transformers, with the ``sam_*`` values beside the Trainer's own training loss."""
        logs.update(self._sam_log_entries)  # in place: the Trainer goes on with this dictionary
        self._sam_log_entries = {}
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in Transformers, for both passes."""
        plain = super().floating_point_ops(inputs)
        first_pass = 0.0 if self._sam_run is None else self._sam_run.first_pass_cost
        return plain + int(plain * first_pass)

    # ---- checkpoints ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._sam_run is not None and self.is_world_process_zero() and (state := self._sam_run.planner.state()):
            Path(output_dir, _STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = Path(checkpoint or "", _STATE_FILE)
        if checkpoint is not None and path.is_file():
            self._sam_running().planner.load_state(json.loads(path.read_text(encoding="utf-8")))


def _initializer(cls: Any, signature: inspect.Signature) -> Callable[..., None]:
    def __init__(self: Any, *positional: Any, **named: Any) -> None:
        super(cls, self).__init__(*positional, **named)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    return __init__


show_signatures(ModelCardMixin, CompleteCheckpointsMixin, SharpnessAwareTrainerMixin)


class AdaSAMTrainer(SharpnessAwareTrainerMixin, Trainer):
    """`transformers.Trainer` with the two-pass step; takes `AdaSAMTrainingArguments`."""


class AdaSAMSeq2SeqTrainer(SharpnessAwareTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with the two-pass step; takes `AdaSAMSeq2SeqTrainingArguments`."""

    _sam_default_arguments = AdaSAMSeq2SeqTrainingArguments
