"""The logged values of the two passes, summed on the device for steps that were perturbed."""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

# Why a step that was to perturb the weights was a plain one.
SKIPPED = "the trainer did not finish all micro-batches of the step (it skipped or abandoned a batch)"
NO_GRADIENT = "the batch has no gradient for any parameter that may be perturbed"
FROZEN = "all parameters that sam_parameters names are frozen"
NO_NORM = "the gradient was 0 or not finite (rows without labels, or an overflow)"


def loss_scale(accelerator: Accelerator) -> float | Tensor:
    """By which gradients are larger than those of the loss: a gradient scaler's factor, without waiting for it."""
    if accelerator.scaler is None:
        return 1.0
    # `get_scale` would wait for the device.
    factor: Tensor = accelerator.scaler.scale(torch.ones((), device=accelerator.device))
    return factor


@dataclass
class StepMetrics:
    """Sums over the steps between two log entries. A step counts when its weights have been perturbed.

    Attributes:
        planned: steps that were to be perturbed.
        radius: of the last of them.
        reasons: why steps were plain ones instead, as far as the host knows.
    """

    planned: int = 0
    radius: float = 0.0
    reasons: set[str] = field(default_factory=set)
    _shares: list[float] = field(default_factory=list)  # of the planned steps whose ascent sees a share of the rows
    _sums: dict[str, Tensor] = field(default_factory=dict)

    def plan(self, radius: float, ascent_share: float | None = None) -> None:
        """Note a step that is to be perturbed, and the share of its rows that the ascent will see, unless it is all."""
        self.planned += 1
        self.radius = radius
        if ascent_share is not None:
            self._shares.append(ascent_share)

    def perturbed(self, norm: Tensor, share: float, applied: Tensor | None, **losses: Tensor) -> None:
        """Note a perturbation.

        Args:
            norm: ‖s‖₂, 0-d. If it is 0 or not finite nothing has moved, and nothing but that is counted.
            share: of an optimizer step that this is: 1, or 1/k in scope microbatch.
            applied: share of δ that rounding left over, where weights are half-precision.
            losses: ``clean`` and ``sam``, sums over micro-batches at w and at w + δ.
        """
        moved = torch.isfinite(norm) & (norm > 0)
        # (In float64, so that 500 times a sixth of a step are whole steps.)
        wide = torch.float32 if norm.device.type == "mps" else torch.float64
        values: dict[str, Any] = {"steps": torch.full_like(norm, share, dtype=wide), **losses}
        if losses:  # the direction is a gradient
            values["ascents"] = values["steps"]
        if applied is not None:
            values |= {"applied": applied * share}
        for name, value in values.items():
            value = torch.where(moved, value.detach().to(norm.device), 0.0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        if losses:  # the direction is a gradient
            last = self._sums.get("norm", torch.zeros_like(norm))
            self._sums["norm"] = torch.where(moved, norm, last)
        self._sums["still"] = self._sums.get("still", 0) + (~moved).to(norm.dtype)

    @property
    def perturbed_here(self) -> float:
        """Steps that were perturbed, in this process. Waits for the device."""
        return float(self._sums.get("steps", 0.0))

    def read(self, accelerator: Accelerator) -> tuple[dict[str, float], float]:
        """The log's entries, means over steps and processes, and how many steps were perturbed.

        Every process must be here, as for the mean of the loss that the Trainer takes. Waits for the device.
        """
        names = ("steps", "ascents", "clean", "sam", "norm", "applied", "still", "has_norm", "has_applied", "share")
        zero = torch.zeros((), device=accelerator.device)
        sums: dict[str, Any] = dict(self._sums)
        sums["has_norm"] = (sums["norm"] > 0) if "norm" in sums else zero
        sums["has_applied"] = sums["steps"] if "applied" in sums else zero
        sums["share"] = zero + (sum(self._shares) / len(self._shares) if self._shares else 1.0)
        wide = torch.float64 if accelerator.device.type == "cpu" else torch.float32
        row = torch.stack([torch.as_tensor(sums.get(name, zero)).to(zero.device, wide) for name in names])
        total = dict(zip(names, accelerator.reduce(row, "sum").tolist(), strict=True))
        values: dict[str, float] = {}
        if total["has_norm"] and total["ascents"]:
            loss, sam_loss = total["clean"] / total["ascents"], total["sam"] / total["ascents"]
            values = {"sam_loss": sam_loss, "sam_gap": sam_loss - loss}
            values["sam_grad_norm"] = total["norm"] / total["has_norm"]
        if total["has_applied"]:
            values["sam_applied"] = total["applied"] / total["has_applied"]
        if total["still"]:
            self.reasons.add(NO_NORM)
        values["sam_rho"] = self.radius
        if self._shares:
            values["sam_ascent_share"] = total["share"] / accelerator.num_processes
        steps = round(total["steps"] / accelerator.num_processes, 2)
        if steps < self.planned:
            values["sam_perturbed_steps"] = steps
        return values, steps
