"""Warnings during training about a radius that does not work."""

import math
from collections.abc import Collection

from transformers.utils import logging

logger = logging.get_logger(__name__)

_PATIENCE = 20  # steps in a row
_FAR = 2.0  # times the highest loss of the run so far
_STRETCH = 25  # steps in each stretch whose mean loss is compared with the first one's
_STUCK = 0.98  # times the mean loss of the first stretch
_STEEP = 0.05  # times the loss


class RadiusMonitor:
    """Warns, once each, about a radius that is far too large, a perturbation lost to rounding, and plain steps.

    A radius is too large (in runs with a first pass) if for 20 steps in a row the loss at w + δ is more than twice the
    highest loss at w so far, so that the perturbed weights know less than the untrained model; or if, after warm-up,
    the mean loss of two successive stretches of 25 steps has not fallen below that of the first stretch, while the loss
    at w + δ is more than 5 % higher: the run may have collapsed to chance.

    Args:
        rho: the radius of the arguments, before any schedule.
        name: the name of that argument.
    """

    def __init__(self, rho: float, name: str = "sam_rho") -> None:
        self._rho, self._name = rho, name
        self._highest = 0.0
        self._steps_far = 0.0
        self._stretch = [0.0, 0.0, 0.0]  # steps, sum of the loss, sum of the gap
        self._first: float | None = None
        self._stuck = 0
        self._warned: set[str] = set()

    def __call__(self, values: dict[str, float], steps: float, warm: bool = True) -> None:
        """Look at the means of `steps` perturbed steps; `warm`: whether the learning rate has reached its peak."""
        if values.get("sam_applied", 1.0) < 0.5:
            self._warn_once(
                "lost",
                f"rounding to half-precision weights leaves {values['sam_applied']:.0%} of the perturbation of radius "
                f"{values['sam_rho']:g}; load the model in float32 (dtype=torch.float32), with bf16=True for speed",
            )
        if "sam_loss" not in values:
            return
        sam_loss, loss = values["sam_loss"], values["sam_loss"] - values["sam_gap"]
        self._highest = max(self._highest, loss)
        far = sam_loss > _FAR * self._highest or math.isnan(sam_loss)
        self._steps_far = self._steps_far + steps if far else 0
        if self._steps_far >= _PATIENCE:
            self._warn_once(
                "large",
                f"{self._name}={self._rho:g} looks far too large: for {self._steps_far:g} steps the perturbed loss "
                f"({sam_loss:.3g}) has been more than {_FAR:g} times the highest loss of this run "
                f"({self._highest:.3g}); try {self._name}={self._rho / 4:.1g}",
            )
        if warm:
            self._look_for_collapse(steps, loss, values["sam_gap"])

    def plain_steps(self, steps: float, planned: int, reasons: Collection[str]) -> None:
        """Warn that only `steps` of `planned` steps were perturbed."""
        for reason in sorted(reasons):
            self._warn_once(
                reason,
                f"{planned - steps:g} of {planned} sharpness-aware steps were plain steps: {reason}; "
                "sam_perturbed_steps in the log counts the perturbed ones",
            )

    def never(self, planned: int, reasons: Collection[str]) -> None:
        """Warn at the end of a training in which none of the `planned` steps was perturbed."""
        if not planned:
            logger.warning(
                f"{self._name}={self._rho:g}, but this was plain training, as no step was planned to be perturbed: it "
                "ended outside sam_start to sam_end, or its loop does not call training_step"
            )
            return
        why = f" ({'; '.join(sorted(reasons))})" if reasons else ""
        logger.warning(
            f"{self._name}={self._rho:g}, but this was plain training: none of the {planned} steps planned to be "
            f"perturbed could be{why}"
        )

    def _look_for_collapse(self, steps: float, loss: float, gap: float) -> None:
        self._stretch = [a + b for a, b in zip(self._stretch, (steps, steps * loss, steps * gap), strict=True)]
        count = self._stretch[0]
        if count < _STRETCH:
            return
        loss, gap = self._stretch[1] / count, self._stretch[2] / count
        self._stretch = [0.0, 0.0, 0.0]
        if self._first is None:
            self._first = loss
            return
        self._stuck = self._stuck + 1 if loss > _STUCK * self._first and gap > _STEEP * loss else 0
        if self._stuck == 2:
            self._warn_once(
                "large",
                f"{self._name}={self._rho:g} may be too large: the loss ({loss:.3g}) is where it began, and the "
                f"perturbed loss is {gap / loss:.0%} higher; if the run does not learn, try "
                f"{self._name}={self._rho / 4:.1g}",
            )

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning(message)
