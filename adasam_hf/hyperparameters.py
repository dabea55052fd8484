"""What the values of a parameter group may be. Each error is one sentence with the value, the range and a remedy."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .reading import read_number


def check_radius(rho: Any, name: str = "rho") -> float:
    """Return `rho` as a float if it is a finite number >= 0; raise ValueError otherwise."""
    return _number(name, rho, ">= 0 (0 switches the perturbation off; try 0.05)")


def check_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """The values of AdaSAM's group, numbers as Python floats.

    Raises:
        ValueError: for a value of another type or out of range.
    """
    return {
        "lr": _learning_rate(group["lr"]),
        "betas": _betas(group["betas"]),
        "eps": _number("eps", group["eps"], "> 0, since eps² seeds the denominator; try 1e-6", zero=False),
        "weight_decay": _number("weight_decay", group["weight_decay"], ">= 0; 0 switches it off"),
        "rho": check_radius(group["rho"]),
        "foreach": _choice("foreach", group["foreach"]),
        "fused": _choice("fused", group["fused"]),
    }


def check_epsilon(eps: float, dtype: torch.dtype) -> None:
    """Raise ValueError if ε² underflows in `dtype`, which would make the first update 0/0."""
    if not dtype.is_floating_point:
        raise ValueError(f"a parameter has dtype {dtype}; AdaSAM takes real floating-point parameters")
    smallest = torch.finfo(dtype).tiny ** 0.5
    if eps < smallest:
        raise ValueError(
            f"eps={eps!r} is too small for {dtype} parameters: eps² must not underflow, so eps >= {smallest:.1e}; "
            "raise eps or keep the weights in float32"
        )


def _number(name: str, value: Any, allowed: str, *, zero: bool = True) -> float:
    return read_number(
        name,
        value,
        f"a finite number {allowed}",
        lambda number: math.isfinite(number) and number >= 0 and bool(number or zero),
        text=False,
    )


def _learning_rate(lr: Any) -> float | Tensor:
    if not isinstance(lr, Tensor):
        return _number("lr", lr, ">= 0; fine-tuning starts around 1e-5")
    if lr.numel() != 1:
        raise ValueError(f"lr has {lr.numel()} elements; a tensor learning rate has one")
    _number("lr", lr.item(), ">= 0; fine-tuning starts around 1e-5")
    return lr


def _betas(betas: Any) -> tuple[float, float]:
    if isinstance(betas, Sequence) and len(betas) == 2:
        with suppress(ValueError):
            first, second = (
                read_number("beta", beta, "in [0, 1)", lambda number: 0.0 <= number < 1.0, text=False) for beta in betas
            )
            return first, second
    raise ValueError(f"betas={betas!r} must be two numbers in [0, 1); the paper's recipe has (0.9, 0.98)")


def _choice(name: str, value: Any) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise ValueError(f"{name}={value!r} must be True, False, or None for the fastest that the parameters allow")
