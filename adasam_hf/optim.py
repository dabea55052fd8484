"""AdaSAM as a `torch.optim.Optimizer`, usable without Transformers."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from .perturbation import Perturbation, check_radius, local

Loss = TypeVar("Loss", Tensor, float)

STATE_KEYS = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


class AdaSAM(Optimizer):
    r"""Sharpness-aware minimization with AMSGrad's adaptive rate and momentum (Sun et al., arXiv:2303.00565).

    Algorithm 1 of the paper, with m₋₁ = 0, v₋₁ = 0, v̂₋₁ = ε² and all operations but ‖·‖₂ element-wise:

        s_t = ∇f_B(x_t)                         first pass
        δ_t = ρ · s_t / ‖s_t‖₂                  one norm over all parameters
        g_t = ∇f_B(x_t + δ_t)                   second pass, same mini-batch B
        m_t = β₁ m_{t-1} + (1 - β₁) g_t
        v_t = β₂ v_{t-1} + (1 - β₂) g_t²
        v̂_t = max(v̂_{t-1}, v_t)
        x_{t+1} = x_t - γ m_t / √v̂_t

    Unlike `torch.optim.Adam` there is no bias correction and nothing is added to √v̂: ε enters through v̂₋₁
    alone. Without bias correction the first steps are (1 - β₁)/√(1 - β₂) times the rate: warm it up, more so
    at β₂ = 0.999. With ``rho=0`` this is the paper's AMSGrad and needs one pass. A weight decay λ is decoupled:
    x ← (1 - γλ) x before the update.

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
            reads and writes each tensor once.

    Bytes of a fused update for each float32 parameter: 20 read (x, g, m, v, v̂) and 16 written; torch's AdamW reads 16
    and writes 12. With the climb and the way back (see `Perturbation`) a sharpness-aware step moves 68 bytes outside
    its passes, 2.4 times an AdamW update's 28.

    The state of a parameter is what `torch.optim.Adam(amsgrad=True)` keeps, under the same names.

    Raises:
        ValueError: for a value out of range.
    """

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
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "rho": rho,
                "foreach": foreach,
                "fused": fused,
            },
        )

    @cached_property
    def _perturbation(self) -> Perturbation:
        return Perturbation(self)  # outside `state`, and rebuilt after unpickling

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, with the group's values checked."""
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        eps = self.param_groups[-1]["eps"]
        for p in self.param_groups[-1]["params"]:
            smallest = torch.finfo(p.dtype).tiny ** 0.5 if p.is_floating_point() else None
            if smallest is None:
                raise ValueError(f"a parameter has dtype {p.dtype}; AdaSAM takes real floating-point parameters")
            if eps < smallest:
                raise ValueError(
                    f"eps={eps!r} is too small for {p.dtype} parameters: eps² must not underflow, so eps >= "
                    f"{smallest:.1e}; raise eps or keep the weights in float32"
                )

    def ascend(self) -> Tensor:
        """w ← w + δ from the gradients in ``.grad``, which are then taken away. Returns ‖s‖₂ (see `Perturbation`)."""
        self._climbed = True
        return self._perturbation.ascend(self._radii)

    def restore(self) -> None:
        """w + δ → w, bit for bit; safe to call at any time, for example on KeyboardInterrupt."""
        self._perturbation.restore()

    def perturbed(self) -> AbstractContextManager[Tensor]:
        """`ascend` on entry and `restore` on exit, also when the block raises."""
        self._climbed = True
        return self._perturbation.perturbed(self._radii)

    _climbed = False  # since the last step

    @property
    def _radii(self) -> list[float]:
        return [group["rho"] for group in self.param_groups]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Update the weights from the gradients in ``.grad``.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss. It is
                called at x_t and, if a radius is above 0, again at x_t + δ_t.

        Returns: the loss at x_t, or None without a closure.

        Raises:
            RuntimeError: if the weights are still perturbed, or nothing was backpropagated while they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if any(self._radii):
                with self.perturbed(), torch.enable_grad():
                    closure()
        if self._perturbation.active:
            raise RuntimeError("the weights are still perturbed; call restore() (or leave `perturbed()`) before step()")
        climbed, self._climbed = self._climbed, False
        if climbed and all(p.grad is None for group in self.param_groups for p in group["params"]):
            raise RuntimeError("no parameter has a gradient; call loss.backward() inside `with optimizer.perturbed():`")
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self._init_state(p, group["eps"])
        # The update is elementwise, so that each shard of a sharded parameter needs no other.
        states = [{name: local(value) for name, value in self.state[p].items()} for p in params]
        gradients, params = [local(p.grad) for p in params], [local(p) for p in params]
        fused, foreach = _implementation(group, params)
        adam(
            params,
            gradients,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["max_exp_avg_sq"] for s in states],
            _endless_steps(params, fused),
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
        torch._foreach_add_([s["step"] for s in states], 1)

    def _init_state(self, p: Tensor, eps: float) -> None:
        assert p.grad is not None  # `_update` leaves the others out
        if p.grad.is_sparse:
            raise RuntimeError("AdaSAM does not support sparse gradients; use nn.Embedding(..., sparse=False)")
        self.state[p] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            "max_exp_avg_sq": torch.full_like(p, eps**2, memory_format=torch.preserve_format),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, after checking that AdaSAM wrote it.

        Raises:
            ValueError: for another optimizer's checkpoint, which would fail late or train something else.
        """
        foreign = [{"betas", "eps", "rho"} - set(group) for group in state_dict["param_groups"]]
        foreign += [STATE_KEYS - set(state) for state in state_dict["state"].values()]
        if missing := sorted(set().union(*foreign)):
            raise ValueError(
                f"this optimizer state was not written by AdaSAM: it lacks {missing}. Load the model's weights "
                "alone, or go on with the optimizer that wrote the checkpoint"
            )
        super().load_state_dict(state_dict)


def _check_group(group: dict) -> None:
    lr, betas, eps, weight_decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr has {lr.numel()} elements; a tensor learning rate has one")
    if not 0.0 <= lr < float("inf"):
        raise ValueError(f"lr={lr!r} must be finite and >= 0; fine-tuning starts around 1e-5")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas={betas!r} must be two numbers in [0, 1); the paper's recipe has (0.9, 0.98)")
    if not 0.0 < eps < float("inf"):
        raise ValueError(f"eps={eps!r} must be finite and > 0, since eps² seeds the denominator; try 1e-6")
    if not 0.0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay={weight_decay!r} must be finite and >= 0")
    check_radius(group["rho"])


def _implementation(group: dict, params: list[Tensor]) -> tuple[bool, bool]:
    """(fused, foreach): what the group asks for, otherwise the fastest that its parameters allow."""
    fused, foreach = group["fused"], group["foreach"]
    if fused is None and foreach is None:
        devices = _get_fused_kernels_supported_devices()
        fused = all(p.device.type in devices for p in params)
        foreach = not fused
    fused, foreach = bool(fused), bool(foreach)
    # torch's foreach path refuses a tensor learning rate outside graph capture; its loop takes it.
    return fused, foreach and not isinstance(group["lr"], Tensor)


def _endless_steps(params: list[Tensor], fused: bool) -> list[Tensor]:
    """Step counts so large that both of Adam's bias corrections, 1 - βᵗ, are exactly 1: the paper has none."""
    steps: dict[torch.device, Tensor] = {}
    for p in params:
        device = p.device if fused else torch.device("cpu")
        if device not in steps:
            steps[device] = torch.full((), 1e30, dtype=torch.float32, device=device)
    return [steps[p.device if fused else torch.device("cpu")] for p in params]
