"""AdaSAM as a `torch.optim.Optimizer`, usable without Transformers."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from types import FrameType
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import Optimizer, ParamsT

from .gradients import GradientRecord
from .hyperparameters import check_epsilon, check_group
from .kernels import DEVICE, DTYPE, LAYOUT, have_fused, split
from .perturbation import Perturbation

Loss = TypeVar("Loss", Tensor, float)
Row = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # parameter, gradient, the state's m, v, v̂ and step
OPERANDS = 5  # of a row: those that an update reads or writes element by element

STATE_KEYS = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


class AdaSAM(Optimizer):
    r"""Sharpness-aware minimization with AMSGrad's adaptive learning rate and momentum (Sun et al., arXiv:2303.00565).

    Algorithm 1 of the paper, with m₋₁ = 0, v₋₁ = 0, v̂₋₁ = ε² and all operations but ‖·‖₂ element-wise:

        s_t = ∇f_B(x_t)                         first pass
        δ_t = ρ · s_t / ‖s_t‖₂                  one norm over all parameters
        g_t = ∇f_B(x_t + δ_t)                   second pass, same batch B
        m_t = β₁ m_{t-1} + (1 - β₁) g_t
        v_t = β₂ v_{t-1} + (1 - β₂) g_t²
        v̂_t = max(v̂_{t-1}, v_t)
        x_{t+1} = x_t - γ m_t / √v̂_t

    Unlike `torch.optim.Adam` there is no bias correction and nothing is added to √v̂: ε enters through v̂₋₁
    alone. Without bias correction, steady gradients make the very first step (1 - β₁)/√(1 - β₂) = 0.7 times the
    learning rate, and the largest, near the 12th, about 1.5 times (3.2 and 6.6 at β₂ = 0.999): warm it up. With
    ``rho=0`` this is the paper's AMSGrad and needs one pass. A weight decay λ is decoupled: x ← (1 - γλ) x before the
    update.

    Either hand `step` a closure, as `torch.optim.LBFGS` takes it:

        def closure():
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss

        for x, y in loader:
            loss = optimizer.step(closure)      # calls it twice; returns the loss at x_t

    or write both passes out:

        for x, y in loader:
            loss_fn(model(x), y).backward()
            with optimizer.perturbed():         # ascend(), then restore() however the block ends
                loss_fn(model(x), y).backward()
            optimizer.step(); optimizer.zero_grad()

    Dropout draws new masks in the second pass unless the randomness is replayed: see `adasam_hf.rng`.

    Args:
        params: parameters or parameter groups; lr, betas, eps, weight_decay and rho may differ by group.
        lr: γ >= 0, a float or a one-element tensor.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε > 0; ε² must be representable in the dtype of the parameters.
        weight_decay: λ >= 0.
        rho: radius ρ >= 0, in weight units.
        foreach, fused: choose one of torch's implementations (False alone means the loop, and a tensor lr turns
            foreach into it); by default the fastest that the parameters allow, i.e. the fused kernel, which
            reads and writes each tensor once. Slices, and whatever else it would get wrong, take the loop either way.

    Bytes of a fused update for each float32 parameter: 20 read (x, g, m, v, v̂) and 16 written; torch's AdamW reads 16
    and writes 12. With perturbing and restoring (see `Perturbation`) a sharpness-aware step moves 68 bytes outside its
    passes, 2.4 times an AdamW update's 28.

    The state of a parameter is what `torch.optim.Adam(amsgrad=True)` keeps, under the same names.

    Numbers may be NumPy's; groups hold them as Python floats.

    Raises:
        ValueError: for a value of another type or out of range.
    """

    corrects_bias = False
    """Whether the moments in the state are to be divided by 1 - βᵗ, as Adam's are."""

    warn_without_ascent = True
    """Whether `step` is still to warn, once, that nothing has ascended; to be set to False where that is intended."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-5,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rho: float = 0.05,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        if foreach and fused:
            raise ValueError("foreach=True and fused=True exclude each other; set at most one")
        self._is_shard = _is_called_from("torch.distributed.optim.zero_redundancy_optimizer")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rho": rho,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, check_group(defaults))

    _is_shard = False  # of a ZeroRedundancyOptimizer, which gives each process some of the parameters
    _ascended_by: Perturbation | None = None  # since the last step

    @cached_property
    def _perturbation(self) -> Perturbation:
        return Perturbation(self)  # outside `state`, and rebuilt after unpickling

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, with the group's values checked."""
        if isinstance(param_group, dict):
            param_group.update(check_group({**self.defaults, **param_group}))
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                check_epsilon(self.param_groups[-1]["eps"], p.dtype)
        except ValueError:
            self.param_groups.pop()
            raise

    # ---- the ascent ----

    def ascend(self) -> Tensor:
        """w ← w + δ from the gradients in ``.grad``, which are then taken away. Returns ‖s‖₂ (see `Perturbation`)."""
        self._refuse_shard()
        return self._perturbation.ascend(self._radii)

    def restore(self) -> None:
        """w + δ → w, bit for bit; safe to call at any time, for example on KeyboardInterrupt."""
        self._perturbation.restore()

    def perturbed(self) -> AbstractContextManager[Tensor]:
        """`ascend` on entry and `restore` on exit, also when the block raises."""
        self._refuse_shard()
        return self._perturbation.perturbed(self._radii)

    def note_ascent(self, perturbation: Perturbation) -> None:
        """Called by every `Perturbation` of this optimizer, also through a wrapper, when it ascends."""
        self._ascended_by = perturbation
        self.warn_without_ascent = False

    @property
    def _radii(self) -> list[float]:
        return [group["rho"] for group in self.param_groups]

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _has_gradient(self) -> bool:
        return any(p.grad is not None for p in self._parameters())

    def _moves_weights(self) -> bool:
        """Whether a step can; at rate 0 torch's distributed checkpoints take one, to have the state made."""
        return any(group["lr"] > 0 for group in self.param_groups)

    def _refuse_shard(self) -> None:
        if self._is_shard:
            raise RuntimeError(
                "ZeroRedundancyOptimizer gives AdaSAM a shard of the parameters, so this would ascend along a part of "
                "the gradient; use `with Perturbation(zero_optimizer).perturbed(rho):` for the second pass, and then "
                "zero_optimizer.step() without a closure"
            )

    # ---- the step ----

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Update the weights from the gradients in ``.grad``.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss. It is
                called at x_t and, if a radius is above 0, again at x_t + δ_t. One that changes no gradient (as
                Lightning's in manual optimization) is called once, and the update takes the gradients that are there.

        Returns: the loss at x_t, or None without a closure.

        Raises:
            RuntimeError: if the weights are still perturbed, nothing was backpropagated while they were, the closure
                adds to gradients that it does not clear, or its second call would not be what the first one was; and
                inside a CUDA graph, as there is no ``capturable``.
        """
        _refuse_capture()
        if self._perturbation.active:
            raise RuntimeError("the weights are still perturbed; call restore() (or leave `perturbed()`) before step()")
        loss = None
        if closure is not None:
            two_passes = any(self._radii) or self._ascended_by is not None
            loss = self._both_passes(closure) if two_passes else _call(closure)
        ascended_by, self._ascended_by = self._ascended_by, None
        if ascended_by is self._perturbation and not self._has_gradient():
            raise RuntimeError("no parameter has a gradient; call loss.backward() inside `with optimizer.perturbed():`")
        if self.warn_without_ascent and any(self._radii) and self._has_gradient() and self._moves_weights():
            self._warn_without_ascent()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _both_passes(self, closure: Callable[[], Loss]) -> Loss:
        record = GradientRecord(self._parameters())
        ascended = self._ascended_by is not None and self._has_gradient()
        try:
            loss = _call(closure)
            if not record.replaced() or not self._has_gradient():  # as the second is where it has skipped its batch
                return loss
            self._refuse_shard()
            _refuse_accumulation_by_accelerate()
            if ascended:
                raise RuntimeError(
                    "step(closure) after an ascent: the closure computes gradients, but those of the second pass are "
                    "already there; call step() without a closure, or leave both passes to the closure"
                )
            if not any(self._radii):
                return loss
            if record.uncleared():
                raise RuntimeError(
                    "the closure adds to gradients that were there before, whose batches would have no second pass; "
                    "call zero_grad() in it or, to accumulate over micro-batches, take all second passes inside one "
                    "`with optimizer.perturbed():` and call step() without a closure"
                )
        finally:
            record.close()
        with self.perturbed():
            _call(closure)
        return loss

    def _warn_without_ascent(self) -> None:
        self.warn_without_ascent = False
        warnings.warn(
            f"rho={max(self._radii)} but no ascent has come before step(), so this is a step of plain AMSGrad; hand "
            "step() a closure, take the second pass inside `with optimizer.perturbed():`, or set rho=0",
            stacklevel=5,  # past step() and torch's two wrappers of it
        )

    def _update(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for dtype in set(map(DTYPE, params)):  # model.half() may have come after the optimizer, or a checkpoint
            check_epsilon(group["eps"], dtype)
        gradients = [p.grad for p in params]
        if set(map(LAYOUT, gradients)) != {torch.strided}:
            raise RuntimeError("AdaSAM does not support sparse gradients; use nn.Embedding(..., sparse=False)")
        # The update is elementwise, so that each shard of a sharded parameter needs no other.
        rows = [self._row(p, gradient, group["eps"]) for p, gradient in zip(params, gradients, strict=True)]
        together, apart = split(rows, OPERANDS)
        for row in apart:
            _refuse_other_dtypes(row)
        fused, foreach = _implementation(group, together)
        _adam(together, group, fused, foreach)
        _adam(apart, group, False, False)
        _count([row[OPERANDS] for row in rows])

    def _row(self, p: Tensor, gradient: Tensor, eps: float) -> Row:
        state = self.state[p]
        if not state:
            state = self.state[p] = _new_state(p, eps)
        return p, gradient, state["exp_avg"], state["exp_avg_sq"], state["max_exp_avg_sq"], state["step"]

    def __getstate__(self) -> dict[str, Any]:
        # Torch's has the state and the groups alone.
        return {
            **super().__getstate__(),
            "_is_shard": self._is_shard,
            "warn_without_ascent": self.warn_without_ascent,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, after checking that AdaSAM wrote it; what its groups lack is as in this optimizer's defaults.

        Raises:
            ValueError: for another optimizer's checkpoint, which would fail late or train something else, and for a
                value of another type or out of range.
        """
        foreign = [{"betas", "eps", "rho"} - set(group) for group in state_dict["param_groups"]]
        foreign += [STATE_KEYS - set(state) for state in state_dict["state"].values()]
        if missing := sorted(set().union(*foreign)):
            raise ValueError(
                f"this optimizer state was not written by AdaSAM: it lacks {missing}. Load the model's weights "
                "alone, or go on with the optimizer that wrote the checkpoint"
            )
        groups = [{**group, **check_group({**self.defaults, **group})} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})


# ---- who calls ----


def _call(closure: Callable[[], Loss]) -> Loss:
    with torch.enable_grad():
        return closure()


def _is_called_from(module: str) -> bool:
    """Whether the code of the module `module` is among the callers."""
    if module not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False


def _refuse_capture() -> None:
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "AdaSAM has no capturable=True: a CUDA graph of its step() would replay today's learning rate and count no "
            "step; capture the forward and backward passes alone, and call step() outside the graph"
        )


def _refuse_accumulation_by_accelerate() -> None:
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state:  # nobody has made an Accelerator
        return
    steps = state.GradientState().num_steps
    if steps > 1 and _is_called_from("accelerate.optimizer"):
        raise RuntimeError(
            f"Accelerate accumulates gradients over {steps} micro-batches and calls the closure for the last one only, "
            "so the others would have no second pass; take all second passes inside one `perturbed()` and call step() "
            "without a closure"
        )


# ---- the update ----


def _new_state(p: Tensor, eps: float) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
        "max_exp_avg_sq": torch.full_like(p, eps**2, memory_format=torch.preserve_format),
    }


def _refuse_other_dtypes(row: Row) -> None:
    p, gradient, m = row[:3]
    if not gradient.dtype == m.dtype == p.dtype:
        raise RuntimeError(
            f"a parameter has dtype {p.dtype}, its gradient {gradient.dtype} and AdaSAM's state of it {m.dtype}; "
            "change the model (as by model.half()) before AdaSAM is constructed"
        )


def _count(steps: list[Tensor]) -> None:
    if all(step.is_cpu for step in steps):  # where a number would become a tensor for each of them once more
        torch._foreach_add_(steps, [torch.ones(())] * len(steps))
    else:
        torch._foreach_add_(steps, 1)


def _adam(rows: Sequence[Row], group: Mapping[str, Any], fused: bool, foreach: bool) -> None:
    if not rows:
        return
    params, gradients, first_moments, second_moments, maxima, _ = map(list, zip(*rows, strict=True))
    adam(
        params,
        gradients,
        first_moments,
        second_moments,
        maxima,
        _uncorrected_steps(params, fused),
        amsgrad=True,
        decoupled_weight_decay=True,
        fused=fused,
        foreach=foreach,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=0.0,
        maximize=False,
    )


def _implementation(group: Mapping[str, Any], rows: Sequence[Row]) -> tuple[bool, bool]:
    """(fused, foreach): what the group asks for, otherwise the fastest that its parameters allow."""
    fused, foreach = group["fused"], group["foreach"]
    if fused is None and foreach is None:
        fused = have_fused(row[0] for row in rows)
        foreach = not fused
    fused, foreach = bool(fused), bool(foreach)
    # torch's foreach path refuses a tensor learning rate outside graph capture; its loop takes it.
    return fused, foreach and not isinstance(group["lr"], Tensor)


def _uncorrected_steps(params: list[Tensor], fused: bool) -> list[Tensor]:
    """Step counts so large that both of Adam's bias corrections, 1 - βᵗ, are exactly 1: the paper has none."""
    devices = list(map(DEVICE, params)) if fused else [torch.device("cpu")] * len(params)
    steps = {device: torch.full((), 1e30, dtype=torch.float32, device=device) for device in set(devices)}
    return [steps[device] for device in devices]
