"""Along what the weights ascend. A new direction is one class here and its name at the end."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .kernels import shard, sharded_like


def innermost(optimizer: Any) -> Any:
    """The optimizer that updates, out of wrappers such as Accelerate's (``.optimizer``) and ZeRO's (``.optim``)."""
    for name in ("optimizer", "optim"):
        inner = getattr(optimizer, name, None)
        if hasattr(inner, "param_groups"):
            return innermost(inner)
    return optimizer


class Direction(ABC):
    """d_p for each parameter p; the weights go to w + ρ·d/‖d‖ with one norm over all of them.

    Attributes:
        first_pass: whether d needs a forward/backward at w first, whose gradients are then used up.
        sign: of the move along `__call__`'s vectors.
    """

    first_pass: bool
    sign = 1.0

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @abstractmethod
    def __call__(self, p: Tensor) -> Tensor | None:
        """sign · d_p, of p's shape, or None where p is to stay. To be asked twice makes no difference."""

    def ascended(self, params: Sequence[Tensor], norm: Tensor) -> None:  # noqa: B027  # most keep nothing
        """Called once in each ascent along it, when the weights have moved and the gradients are still there.

        Args:
            params: those that had a vector.
            norm: ‖d‖; where it is not finite, neither are the gradients.
        """

    # What a resumed training could not know otherwise.

    def state(self) -> dict[str, Any]:
        """To be kept in a checkpoint, as JSON; empty if there is nothing to keep."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from what `state` has returned."""


class Gradient(Direction):
    """The gradient at w: SAM, arXiv:2010.01412, and Algorithm 1 of AdaSAM, arXiv:2303.00565."""

    first_pass = True

    def __call__(self, p: Tensor) -> Tensor | None:
        return p.grad


class Momentum(Direction):
    """Where the last update went: w − ρ·m/‖m‖ with the optimizer's own first moment m (Momentum-SAM, arXiv:2401.12033).

    It needs no pass of its own, so a step costs what a plain one does; useful radii are many times those of SAM. Before
    the first update, and after somebody has cleared the optimizer's state, there is no m, and the step is a plain one.

    Raises:
        RuntimeError: where m has another shape than its parameter (GaLore, APOLLO) or is quantized. (Where an update
            has left no m at all, as that of SGD without momentum, the planner raises it.)
    """

    first_pass = False
    sign = -1.0
    KEYS = ("exp_avg", "momentum_buffer")

    def __call__(self, p: Tensor) -> Tensor | None:
        state = self.optimizer.state.get(p, {})
        moment = next((state[key] for key in self.KEYS if state.get(key) is not None), None)
        if moment is not None:
            check_moment(moment, p, self.optimizer, "first")
        return moment


class Preconditioned(Direction):
    r"""The gradient in the metric of the update: d = s / (√v̂ + ε), element by element (arXiv:2502.02407).

    v̂ is the optimizer's own second moment, as its last update left it: AMSGrad's maximum where there is one (as in
    `AdaSAM`), otherwise Adam's v or RMSprop's average; ε is the group's ``eps`` (1e-8 if it has none). Where the
    optimizer corrects the bias, v̂ = v/(1 - β₂ᵗ) with the parameter's own step count t, as in its update. One factor for
    all would cancel in d/‖d‖, but t and β₂ may differ among parameters, and ε is added. `AdaSAM` has no correction, and
    RMSprop none.

    Before its first update a parameter has no v̂, and d = s. Where v̂ is 0, as in the row of an embedding that no update
    has seen yet, d is s/ε, which may be most of d; `sam_parameters` can leave such parameters out. Useful radii are not
    those of the gradient: elements of d are about 1. Temporary memory: one copy of the model.

    Raises:
        RuntimeError: where the optimizer keeps no second moment (SGD), only a factored one (Adafactor), one of
            another shape (GaLore, APOLLO), or a quantized one.
    """

    first_pass = True
    KEYS = ("max_exp_avg_sq", "exp_avg_sq", "square_avg")

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self._missing = False
        call_after_updates(optimizer, self._look)
        self._groups: dict[Tensor, dict[str, Any]] = {}  # of the present ascent

    def _look(self) -> None:
        states = [self.optimizer.state.get(p, {}) for p in just_updated(self.optimizer)]
        self._missing = bool(states) and all(state.get(key) is None for state in states for key in self.KEYS)

    def __call__(self, p: Tensor) -> Tensor | None:
        if p.grad is None:
            return None
        state = self.optimizer.state.get(p, {})
        second: Tensor | None = next((state[key] for key in self.KEYS if state.get(key) is not None), None)
        if second is None:
            if state or self._missing:
                self._refuse()
            return p.grad
        check_moment(second, p, self.optimizer, "second")
        if p not in self._groups:
            self._groups = {q: group for group in self.optimizer.param_groups for q in group["params"]}
        group = self._groups[p]
        if "betas" in group and "step" in state and getattr(innermost(self.optimizer), "corrects_bias", True):
            step = state["step"]
            if not isinstance(step, Tensor) or step.is_cpu:  # others would make the host wait
                step = float(step)
            second = second / (1 - group["betas"][1] ** step)
        return p.grad / second.sqrt().add_(group.get("eps", 1e-8))

    def ascended(self, params: Sequence[Tensor], norm: Tensor) -> None:
        """Look at the groups once more in the next one."""
        self._groups = {}

    def _refuse(self) -> None:
        owner = type(innermost(self.optimizer))
        raise RuntimeError(
            f"sam_direction='preconditioned': {owner.__module__}.{owner.__qualname__} keeps no second moment of a "
            "parameter that it has updated; choose an optimizer that does (adasam, adamw_torch, rmsprop), or "
            "sam_direction='gradient'"
        )


class Friendly(Direction):
    r"""The batch's own part of the gradient: d_t = s_t - σ m_t (F-SAM, arXiv:2403.12350).

    m_t = λ m_{t-1} + (1 - λ) s_t is the running mean of the gradients that first passes have found, m₋₁ = 0; λ = 0.9
    and σ = 1, as is usual. So the first ascent is along s, and with σ = 1 every one is along s_t - m_{t-1}.

    It keeps m, one number for each parameter that moves, in float32 or the gradient's own wider dtype. Steps without a
    first pass do not change m, nor does one whose norm is not finite. m is in no
    checkpoint: after a resume it begins at 0 again. What scales s is followed within some 1/(1 - λ) ascents: a gradient
    scaler's new scale, or, in scope ``microbatch``, where s is a micro-batch's part of the step's mean gradient, a
    window of another length.
    """

    first_pass = True
    LAMBDA = 0.9
    SIGMA = 1.0

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.means: dict[Tensor, Tensor] = {}

    def __call__(self, p: Tensor) -> Tensor | None:
        if p.grad is None:
            return None
        d = _wide(p.grad) * (1 - self.SIGMA * (1 - self.LAMBDA))
        return d if p not in self.means else d.sub_(self.means[p], alpha=self.SIGMA * self.LAMBDA)

    def ascended(self, params: Sequence[Tensor], norm: Tensor) -> None:
        """m ← λ m + (1 - λ) s."""
        finite = torch.isfinite(norm)
        for p in params:
            s = _wide(p.grad)  # type: ignore[arg-type]  # those with a vector have a gradient
            if p not in self.means:
                self.means[p] = torch.zeros_like(s)
            m = shard(self.means[p])
            m.lerp_(torch.where(finite.to(m.device), shard(s), m), 1 - self.LAMBDA)


class Noise(Direction):
    r"""A uniform direction on the sphere: d ~ N(0, I) over all parameters, so that δ = ρ d/‖d‖.

    The gradient at w + δ is that of E_u L(w + ρu) with one sample, which penalizes the trace of the Hessian
    (arXiv:2406.03682). It needs no pass of its own, so a step costs what a plain one does.

    d is the same for all micro-batches of an optimizer step and another one after each update: it follows from the seed
    (torch's at the first ascent; the Trainer sets ``seed``), the number of updates and the parameter's place in the
    groups. Processes with the same seed draw the same, sharded parameters (`DTensor`) the shards of it, and torch's
    generators, which draw the dropout masks, are left alone. Devices of another type draw other numbers. Temporary
    memory: one copy of the model (of a sharded one, of its largest parameter and the shards).
    """

    first_pass = False

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self._updates = 0
        call_after_updates(optimizer, self._count)
        self._seed: int | None = None
        self._places: dict[Tensor, int] = {}

    def __call__(self, p: Tensor) -> Tensor | None:
        if self._seed is None:
            self._seed = torch.initial_seed()
        if p not in self._places:
            params = (q for group in self.optimizer.param_groups for q in group["params"])
            self._places = {q: place for place, q in enumerate(params)}
        words = np.random.SeedSequence((abs(self._seed), self._updates, self._places[p])).generate_state(1)
        generator = torch.Generator(p.device).manual_seed(int(words[0]))
        dtype = torch.promote_types(p.dtype, torch.float32)
        return sharded_like(torch.randn(p.shape, generator=generator, dtype=dtype, device=p.device), p)

    def _count(self) -> None:
        self._updates += 1

    def state(self) -> dict[str, Any]:
        return {"seed": self._seed, "updates": self._updates}

    def load_state(self, state: dict[str, Any]) -> None:
        self._seed, self._updates = state["seed"], state["updates"]


def call_after_updates(optimizer: Optimizer, method: Callable[[], None]) -> None:
    """Call a bound `method` after each update of `optimizer`, while its object lives."""
    reference = weakref.WeakMethod(method)

    def on_step(*_: Any) -> None:
        if (alive := reference()) is not None:
            alive()

    inner = innermost(optimizer)
    if isinstance(inner, Optimizer):
        owner = method.__self__  # type: ignore[attr-defined]  # of a bound method
        weakref.finalize(owner, inner.register_step_post_hook(on_step).remove)


def just_updated(optimizer: Optimizer) -> list[Tensor]:
    """Right after an update: its parameters that had a gradient."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def check_moment(moment: Tensor, p: Tensor, optimizer: Optimizer, which: str) -> None:
    """Raise RuntimeError unless the `which` moment that `optimizer` keeps for `p` has a number for each of p's."""
    part, whole = shard(moment), shard(p)
    if moment.shape != p.shape or part.shape != whole.shape:
        problem = f"of shape {tuple(moment.shape)} for a parameter of shape {tuple(p.shape)}"
    elif not part.is_floating_point() or part.is_quantized or is_traceable_wrapper_subclass(part):
        problem = f"as {type(part).__name__} of dtype {part.dtype}, which is quantized"
    elif part.layout is not torch.strided:
        problem = f"with layout {part.layout}"
    else:
        return
    owner = type(innermost(optimizer))
    raise RuntimeError(
        f"{owner.__module__}.{owner.__qualname__} keeps its {which} moment {problem}, so it is of no use for the "
        "direction of the perturbation; use sam_direction='gradient' (or sam_preset='full'), or an optimizer with a "
        f"full {which} moment such as adamw_torch"
    )


class PreviousAscent(Direction):
    """Along what the weights ascended last, once more, without a pass of its own."""

    first_pass = False

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.vectors: dict[Tensor, Tensor] = {}

    def remember(self, direction: Direction) -> None:
        """Copy its vectors; DistributedDataParallel may go on using the memory of gradients."""
        self.sign = direction.sign
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.vectors = {p: d.detach().clone() for p in params if (d := direction(p)) is not None}

    def __call__(self, p: Tensor) -> Tensor | None:
        return self.vectors.get(p)


Last = PreviousAscent  # its name up to 0.1

DirectionName = Literal["gradient", "momentum", "preconditioned", "friendly", "noise"]
DIRECTIONS: dict[DirectionName, type[Direction]] = {
    "gradient": Gradient,
    "momentum": Momentum,
    "preconditioned": Preconditioned,
    "friendly": Friendly,
    "noise": Noise,
}
