"""The two-pass training step as a mixin for any Transformers `Trainer`."""

import functools
import inspect
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from . import activity, card, doctor, rng, running_stats
from .checkpoints import last_complete
from .directions import DIRECTIONS, Direction, Last
from .distributed import average_gradients, climbs_locally, refuse_unsupported, unsynced
from .optim import AdaSAM
from .perturbation import Perturbation
from .selection import choose_parameters, gradients_only_for, take_rows
from .training_args import (
    RADIUS_ZERO,
    AdaSAMSeq2SeqTrainingArguments,
    AdaSAMTrainingArguments,
    SharpnessAwareArgumentsMixin,
)

logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    _Base = Trainer  # or a class of it, behind the mixin
else:
    _Base = object


class SharpnessAwareTrainerMixin(_Base):
    r"""Makes a `Trainer` class sharpness-aware; combine it in front:

        class MyAdaSAMTrainer(SharpnessAwareTrainerMixin, MyTrainer): ...

    One optimizer step over a window of k micro-batches, with weights w and radius ρ:

    1. ascent: the stock `training_step` at w gives s, the gradient that a stock step would use;
    2. climb: w + δ with δ = ρ s/‖s‖₂ (`Perturbation`);
    3. descent: the stock `training_step` again on the same micro-batches with the same dropout masks gives g;
    4. w is restored bit for bit, and the Trainer goes on (clipping, update) with g.

    In scope ``batch`` steps 2–4 happen inside the call for the last micro-batch and use the gradient of the whole
    window, so k micro-batches equal one k times larger batch; in scope ``microbatch`` each call does them for its own
    micro-batch (m-sharpness, arXiv:2010.01412). Either way the weights are away from w only inside one call:
    callbacks, evaluations and checkpoints see w. BatchNorm's running statistics move in the ascent only, at w, by the
    rows that it sees (in a step of one pass, at w + δ). With radius 0 nothing is added and a stock run results, bit
    for bit.

    With several processes s is averaged over them (``sam_sync``), so that the run follows one process with the same
    global batch; in scope ``microbatch``, or with ``sam_sync=False``, each process climbs its own and the ascent has no
    gradient traffic. g is averaged as ever, so that the processes' weights stay the same bits.

    The radius is ``args.sam_rho``; unset, it is that of the `AdaSAM` instance in use, that of the preset for
    ``optim="sam"`` (``full`` 0.05, ``fast`` 0.1, ``free`` 0.4) and 0 for all else. Logged beside the loss at w:
    ``sam_loss`` (at w + δ), ``sam_gap`` (their difference, over the steps that climb), ``sam_grad_norm`` (‖s‖₂ of the
    last such step; the processes' mean of it, where each climbs its own), ``sam_rho`` (its radius) and, if weights are
    float16 or bfloat16, ``sam_applied``: the share of the perturbation that rounding left over.

    Raises:
        TypeError: if `args` lacks the sharpness-aware arguments.
        NotImplementedError: before training, where the two-pass step is not shown to be right.
    """

    args: SharpnessAwareArgumentsMixin
    # These are None only in a Trainer that has not begun.
    model: PreTrainedModel | nn.Module
    optimizer: torch.optim.Optimizer

    _default_arguments: type[SharpnessAwareArgumentsMixin] = AdaSAMTrainingArguments
    _passes: list[tuple[dict[str, Any], rng.RandomState]]
    _carry: dict[nn.Parameter, Tensor]
    _left: list[tuple[nn.Parameter, Tensor | None, int | None]]  # gradients as the ascent has left them

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: SharpnessAwareArgumentsMixin | None = None,
        *more: Any,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = self._default_arguments("tmp_trainer")  # as in Transformers
        if not isinstance(args, SharpnessAwareArgumentsMixin):
            raise TypeError(
                f"args={type(args).__name__} has no sharpness-aware arguments; pass AdaSAMTrainingArguments, or a "
                "class that combines SharpnessAwareArgumentsMixin with your own arguments"
            )
        self._perturbation: Perturbation | None = None
        self._radii: list[float] = []  # one for each parameter group, fixed when training starts
        self._chosen: list[nn.Parameter] | None = None  # that may climb; None for all
        self._direction: Direction | None = None  # of the coming step; None for a plain one
        self._rho_share = 1.0  # of the radii, in the coming step
        self._told_of_inputs = False
        self._refused = False  # whether `refuse_unsupported` has looked at this trainer
        self._window_size, self._window_step = 0, 0  # micro-batches of the present window, and its global step
        self._due = False  # whether the present window is to climb and our training_step has not been called yet
        self._ascent_items: Tensor | int | None = None  # `num_items_in_batch` of the rows that the ascent sees
        self._tally = doctor.Tally()
        self._forget_window()
        super().__init__(model, args, *more, **kwargs)

    # ---- the optimizer and the radius ----

    @classmethod  # static in Transformers; only so can it go on to the class that it is combined with
    def get_optimizer_cls_and_kwargs(  # type: ignore[override]  # with the arguments that __init__ insists on
        cls, args: SharpnessAwareArgumentsMixin, model: PreTrainedModel | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As in Transformers, with the names of this package. (A plain Trainer does not know them and fails.)"""
        return args.own_optimizer() or super().get_optimizer_cls_and_kwargs(args.stock(), model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in Transformers; refuses what is not supported before anything is wrapped or trained."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self._refused = False
        if any(self._resolve_radii()):
            self._refuse()
        return optimizer

    def _refuse(self) -> None:
        if not self._refused:  # a create_optimizer of one's own may not have come here
            refuse_unsupported(self)
            choose_parameters(self.model, self.args.sam_parameters)  # or say now that there are none
        self._refused = True

    def used_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that updates, out of Accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _own_adasam(self) -> AdaSAM | None:
        optimizer = self.used_optimizer()
        return optimizer if isinstance(optimizer, AdaSAM) else None

    def _resolve_radii(self) -> list[float]:
        groups = getattr(self.optimizer, "param_groups", [{}])  # DeepSpeed may put a dummy there
        if self.args.sam_rho is None and self.args.optim not in RADIUS_ZERO and self._own_adasam():
            return [group["rho"] for group in groups]
        return [self.args.resolved_rho] * len(groups)

    def _start_perturbing(self) -> None:
        """Fix the radii. Runs before the first step, when a checkpoint may have brought another radius along."""
        self._radii = self._resolve_radii()
        if any(self._radii):
            self._refuse()
            _refuse_overrides(type(self), self.args)
        self._chosen = choose_parameters(self.model, self.args.sam_parameters) if any(self._radii) else None
        self._perturbation = Perturbation(self.optimizer, self._chosen)
        self._own_direction = DIRECTIONS[self.args.resolved_direction](self.optimizer)
        self._last = Last(self.optimizer)
        self._first_step, self._updated = self.state.global_step, False
        self._tally = doctor.Tally()
        own, used = self.args.own_optimizer(), self.used_optimizer()
        if own and not isinstance(used, own[0]):
            logger.warning(f"optim={self.args.optim} is not in use: the trainer was given a {type(used).__qualname__}")
        if adasam := self._own_adasam():
            for group, rho in zip(adasam.param_groups, self._radii, strict=True):
                if group["rho"] != rho:
                    logger.warning(f"sam_rho={rho} replaces the radius {group['rho']} of the optimizer or checkpoint")
                group["rho"] = rho
            # get_warmup_steps(100): a number of steps, or its share of training, above 0 either way
            if adasam.param_groups[0]["betas"][1] >= 0.999 and self.args.get_warmup_steps(100) == 0:
                logger.warning(
                    f"betas={adasam.param_groups[0]['betas']} without warm-up: AdaSAM has no bias correction, so its "
                    "first steps are several times the learning rate; use adam_beta2=0.98 or warmup_steps"
                )
        if any(self._radii) and not self.args.sam_schedule.steps(max(self.state.max_steps, 1)):
            logger.warning(
                f"sam_start={self.args.sam_start} and sam_end={self.args.sam_end} leave no step to climb in, of "
                f"{self.state.max_steps}; train longer, or move them apart"
            )
        if not any(self._radii) and (idle := self.args.idle_arguments()):
            logger.warning(f"{', '.join(idle)}: without effect at radius 0; pass --optim adasam, or --sam_rho 0.05")
        self._watch = doctor.Watch(max(self._radii))
        if self.is_world_process_zero():
            doctor.logger.warning_advice(doctor.describe(self, self._radii, self._chosen))
        self._plan_step()

    def _plan_step(self) -> None:
        """Decide whether, along what and how far the coming step climbs."""
        self._direction, self._rho_share = None, 0.0
        if not any(self._radii):
            return
        schedule = self.args.sam_schedule
        total = max(self.state.max_steps, 1)  # 0 if steps are taken by hand
        step = min(self.state.global_step, total - 1)
        if self.state.global_step > self._first_step and not self.accelerator.optimizer_step_was_skipped:
            self._updated = True
        if step not in schedule.steps(total):
            return
        if schedule.climbs(step, total) or (self.args.sam_reuse and not self._last.vectors):
            self._direction = self._own_direction
        elif self.args.sam_reuse:
            self._direction = self._last
        else:
            return
        if self._updated and not self._own_direction.first_pass:
            self._check_momentum()
        group = self.optimizer.param_groups[0]
        lr_share = float(group["lr"]) / (group.get("initial_lr") or self.args.learning_rate or 1.0)
        self._rho_share = schedule.factor(step, total, lr_share)

    @property
    def _has_first_pass(self) -> bool:
        """Whether the coming step climbs along what a pass of its own finds."""
        return bool(self._rho_share and self._direction is not None and self._direction.first_pass)

    def _check_momentum(self) -> None:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        if all(self._own_direction(p) is None for p in params):
            raise RuntimeError(
                f"sam_direction={self.args.resolved_direction!r}: after an update the optimizer keeps no first moment; "
                "choose one that does (adasam, adamw_torch, sam with sgd_momentum above 0), or sam_direction='gradient'"
            )

    # ---- the two passes ----

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._perturbation = None
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            # An interrupt can strike between any two instructions of training_step, its own `finally` included.
            if self._perturbation is not None:
                self._perturbation.release()
            self._window_size, self._due = 0, False
            self._forget_window()
            activity.record(int(self._perturbation is not None and any(self._radii)))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Tensor | int | None]:
        """As in Transformers; notes how many micro-batches make up the coming optimizer step."""
        if self._perturbation is None:
            self._start_perturbing()
        self._check_climbed()
        samples, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self._window_size, self._window_step = len(samples), self.state.global_step
        self._forget_window()
        self._plan_step()
        # An unsized dataset that has run out goes on to give windows without a micro-batch.
        self._due = bool(samples and self._rho_share)
        self._tally.steps += bool(samples and self._has_first_pass)
        if (share := self.args.resolved_ascent_fraction) < 1 and self._rho_share:
            rows = [take_rows(batch, share) for batch in samples]
            self._ascent_items = self._get_num_items_in_batch(rows, self.args.device)
        return samples, num_items_in_batch

    def _check_climbed(self) -> None:
        """After a window: whether it has been gone through to its end."""
        if self.state.global_step <= self._window_step:
            return
        if self._passes and self._window_size:
            raise RuntimeError(
                f"{type(self).__qualname__} called the training_step of SharpnessAwareTrainerMixin for "
                f"{len(self._passes)} of the {self._window_size} micro-batches of a step, which so has no second pass; "
                "call it for each, set sam_scope='microbatch', or set sam_rho=0"
            )
        if self._due:
            raise RuntimeError(
                f"{type(self).__qualname__} did not call the training_step of SharpnessAwareTrainerMixin in a step "
                "that was to climb; call super().training_step(...), or set sam_rho=0"
            )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The double forward/backward (see the class). Returns the loss at w, as the stock step does.

        (Of the ascent's rows, if `sam_ascent_fraction` is below 1; at w + δ, if the direction needs no first pass.)
        """
        if self._perturbation is None:  # called by hand, outside train()
            if self.optimizer is None:
                self.create_optimizer()
            self._start_perturbing()
        self._due = False
        if not self._rho_share:
            return super().training_step(model, inputs, *args, **kwargs)
        if not self._has_first_pass:
            assert self._perturbation is not None  # since `_start_perturbing`
            with self._perturbed():
                loss = super().training_step(model, inputs, *args, **kwargs)
            self._tally.climbed(max(self._radii) * self._rho_share, self._perturbation.applied)
            return loss

        if self._passes:
            self._check_gradients()
        else:
            # Gradients from before this window (an unsized dataset can end in a window without an update, in stock
            # too) belong to the coming update, not to the ascent.
            self._carry = _take_gradients(model)
        loss = self._ascent_pass(model, inputs, *args, **kwargs)
        if self.args.sam_scope == "microbatch" or len(self._passes) >= self._window_size:
            self._descent_passes(model, *args, **kwargs)
        else:
            self._left = [(p, p.grad, _version(p.grad)) for p in model.parameters()]
        return loss

    def _check_gradients(self) -> None:
        """That nobody has changed what the ascent of this window has gathered so far."""
        if any(p.grad is not grad or _version(grad) != version for p, grad, version in self._left):
            raise RuntimeError(
                f"gradients have changed between two micro-batches of one step, in {type(self).__qualname__}."
                "training_step or a callback; in sam_scope='batch' they are the ascent's, which is thrown away. Add to "
                "the loss in compute_loss, set sam_scope='microbatch', or set sam_rho=0"
            )

    def _ascent_pass(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The stock step at w, on the rows and for the parameters that the ascent looks at. Returns its loss."""
        self._passes.append((inputs, rng.capture()))
        whole, before = inputs, _versions(inputs)
        if (share := self.args.resolved_ascent_fraction) < 1:
            inputs, args, kwargs = take_rows(inputs, share), (), {"num_items_in_batch": self._ascent_items}
        # DistributedDataParallel would wait for gradients that are not computed: the chosen go by themselves, later.
        alone = climbs_locally(self) or self._chosen is not None
        try:
            with unsynced(self, model) if alone else nullcontext(), gradients_only_for(self._chosen, model):
                loss = super().training_step(model, inputs, *args, **kwargs)
        except BaseException:
            self._forget_window()  # or a later call by hand would replay this micro-batch
            raise
        changed = [
            key for key, (tensor, version) in before.items() if whole.get(key) is tensor and _version(tensor) != version
        ]
        if changed and not self._told_of_inputs:
            self._told_of_inputs = True
            logger.warning(
                f"compute_loss of {type(self).__qualname__}, or the model, changes inputs {changed} in place. If the "
                "change is another one when it is done twice, the second pass sees another batch; change a copy then"
            )
        self._tally.clean_loss += loss
        return loss

    def _descent_passes(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Climb, take the stock step at w + δ for each micro-batch of the window, and restore w."""
        passes, carry = self._passes, self._carry
        self._forget_window()
        if self._chosen is not None and not climbs_locally(self):
            average_gradients(self._chosen)
        if self.args.sam_reuse:
            self._last.remember(self._own_direction, model.parameters())
        same_masks = self.args.sam_dropout == "same" and self.args.resolved_ascent_fraction == 1
        if self.args.sam_dropout == "same" and not same_masks:
            # There are no masks to repeat, those of the ascent had fewer rows: draw what a plain step would have drawn.
            rng.rewind(passes[0][1])
        with running_stats.kept(model), self._perturbed() as norm:
            _give_gradients(model, carry)
            for i, (micro_batch, state) in enumerate(passes, 1):
                # The last backward sends the whole window's gradient, as in stock.
                with (
                    nullcontext() if i == len(passes) else unsynced(self, model),
                    rng.replay(state) if same_masks else nullcontext(),
                ):
                    self._tally.sam_loss += super().training_step(model, micro_batch, *args, **kwargs)
        if (scaler := self.accelerator.scaler) is not None:
            norm = norm / scaler.scale(torch.ones_like(norm))
        assert self._perturbation is not None  # since `_start_perturbing`
        self._tally.climbed(max(self._radii) * self._rho_share, self._perturbation.applied, norm)

    def _perturbed(self) -> AbstractContextManager[Tensor]:
        radii = [rho * self._rho_share for rho in self._radii]
        assert self._perturbation is not None  # since `_start_perturbing`
        return self._perturbation.perturbed(radii, self._direction, adaptive=self.args.sam_adaptive)

    def _forget_window(self) -> None:
        self._passes = []
        self._carry = {}
        self._left = []

    # ---- checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in Transformers, but ``True`` passes over checkpoints that a run killed while saving left behind."""
        if resume_from_checkpoint is True:
            found = [last_complete(self.args.output_dir) if self.is_world_process_zero() else None]
            resume_from_checkpoint = broadcast_object_list(found)[0]
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint=True: output_dir={self.args.output_dir!r} has no checkpoint that was "
                    "saved to its end; leave it unset to start anew"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # of a full disk, most do not say where
            folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            error.add_note(f"{folder} is not complete; resume_from_checkpoint=True takes the last one that is")
            raise

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Next, process 0 declares the checkpoint complete (trainer_state.json) and may delete older ones.
        self.accelerator.wait_for_everyone()

    # ---- what people see ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in Transformers, with the ``sam_*`` values beside a training loss."""
        training = "loss" in logs or {"grad_norm", "learning_rate"} <= logs.keys()  # setfit renames the loss
        if training or "train_loss" in logs:  # callbacks may log in the middle of a step
            self._check_climbed()
        # All processes are here, as for the mean of `loss` that the Trainer has just taken.
        if any(self._radii) and (training or ("train_loss" in logs and self._tally.climbs)):
            values, steps = self._tally.means(self.accelerator), self._tally.steps
            self._tally = doctor.Tally()
            if self.is_world_process_zero():
                warm = self.state.global_step > self.args.get_warmup_steps(self.state.max_steps)
                self._watch(values, steps, warm)
            if training:
                logs |= values
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in Transformers, for both passes."""
        first_pass = 0.0
        if self._has_first_pass:
            # without weight gradients backward is half as much, thus a pass two thirds
            first_pass = self.args.resolved_ascent_fraction * (2 / 3 if self._chosen else 1)
        return int(super().floating_point_ops(inputs) * (1 + first_pass))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in Transformers, with the optimizer and the ascent as they were used, and whom to cite."""
        super().create_model_card(*args, **kwargs)
        self._complete_card()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        write = vars(cls).get("create_model_card")
        if write is not None:  # trl and sentence-transformers write cards of their own, without Transformers'

            @functools.wraps(write)
            def create_model_card(self: SharpnessAwareTrainerMixin, *args: Any, **kwargs: Any) -> None:
                write(self, *args, **kwargs)
                self._complete_card()

            cls.create_model_card = create_model_card  # type: ignore[method-assign]

    def _complete_card(self) -> None:
        if self.is_world_process_zero():
            rho = max(self._radii, default=self.args.resolved_rho)
            card.complete(Path(self.args.output_dir, "README.md"), self, self._own_adasam(), rho)


# Their training_step keeps nothing for a micro-batch that the second pass reads.
_KNOWN = ("trl", "sentence_transformers", "setfit", __package__)


def _refuse_overrides(kind: type[SharpnessAwareTrainerMixin], args: SharpnessAwareArgumentsMixin) -> None:
    """Trainers whose own code would make another thing of the two passes, and say nothing."""
    for cls in kind.__mro__[: kind.__mro__.index(SharpnessAwareTrainerMixin)]:
        functions = {name: f for name, f in vars(cls).items() if inspect.isfunction(inspect.unwrap(f))}
        called = {name for f in functions.values() for name in _names(inspect.unwrap(f).__code__)}  # or a helper
        for name, remedy in (("training_step", "move the change to compute_loss"), ("get_batch_samples", "leave it")):
            if name in functions and name not in called:
                raise NotImplementedError(
                    f"{cls.__module__}.{cls.__qualname__} overrides {name} without super().{name}(...), so no step "
                    f"would climb as it should; call it there, {remedy}, or set sam_rho=0"
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


def _version(tensor: Tensor | None) -> int | None:
    """A number that rises with every change in place."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _versions(inputs: Any) -> dict[str, tuple[Tensor, int | None]]:
    tensors = inputs.items() if isinstance(inputs, Mapping) else ()
    return {k: (v, _version(v)) for k, v in tensors if isinstance(v, Tensor)}


def _names(code: CodeType) -> set[str]:
    """What a function refers to, with the functions inside it."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _take_gradients(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    gradients = {p: p.grad for p in model.parameters() if p.grad is not None}
    _give_gradients(model, {})
    return gradients


def _give_gradients(model: nn.Module, gradients: dict[nn.Parameter, Tensor]) -> None:
    for p in model.parameters():
        p.grad = gradients.get(p)


class AdaSAMTrainer(SharpnessAwareTrainerMixin, Trainer):
    """`transformers.Trainer` with the two-pass step; takes `AdaSAMTrainingArguments`."""


class AdaSAMSeq2SeqTrainer(SharpnessAwareTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with the two-pass step; takes `AdaSAMSeq2SeqTrainingArguments`."""

    _default_arguments = AdaSAMSeq2SeqTrainingArguments
