"""What the trainer tells its user: what it will do, and what looks wrong while it does it."""

from transformers import Trainer
from transformers.utils import logging

from .distributed import climbs_locally
from .perturbation import local

logger = logging.get_logger(__name__)

_PATIENCE = 20  # steps in a row
_FAR = 2.0  # times the highest loss of the run so far


def describe(trainer: Trainer, radii: list[float]) -> str:
    """One line: radius, scope, parameters, processes, precision, extra memory and compute."""
    args, groups = trainer.args, trainer.optimizer.param_groups
    name = type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__  # Accelerate wraps it
    if not any(radii):
        return f"{name} with sam_rho=0: plain steps, one forward/backward per micro-batch and no ascent"
    moving = [p for g, rho in zip(groups, radii, strict=True) if rho > 0 for p in g["params"] if p.requires_grad]
    total = sum(p.numel() for p in trainer.model.parameters())
    held = sum(local(p).numel() * p.element_size() for p in moving)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in moving})
    autocast = trainer.accelerator.mixed_precision
    processes = f"{args.world_size} process" + ("es" if args.world_size > 1 else "")
    if args.world_size > 1:
        who = "each climbs its own gradient" if climbs_locally(trainer) else "all climb their mean gradient"
        processes += f" ({trainer.accelerator.distributed_type.value}), {who}"
    window = args.gradient_accumulation_steps
    over = "the whole optimizer step" if args.sam_scope == "batch" else "each micro-batch by itself"
    return (
        f"{name} with sam_rho={max(radii):g}, sam_scope={args.sam_scope} ({over}, {window} micro-batch"
        f"{'es' if window > 1 else ''}): climbs {len(moving)} tensors with {sum(p.numel() for p in moving):,} of "
        f"{total:,} parameters; {processes}; {'/'.join(dtypes)} weights"
        f"{f', {autocast} autocast' if autocast != 'no' else ''}; +{held / 2**20:.1f} MiB for a copy of them"
        f"{' on each process' if args.world_size > 1 else ''}; 2 forward/backward passes per micro-batch instead of 1"
    )


class Watch:
    """Warns, once each, of a radius that is far too large and of one that rounding swallows.

    Too large: for many steps on end the loss at w + δ is more than twice the highest loss at w so far, which the run
    usually starts with. The neighbourhood of that radius then knows less than the untrained model.
    """

    def __init__(self):
        self._highest = 0.0
        self._steps_far = 0
        self._told: set[str] = set()

    def __call__(self, logs: dict[str, float], steps: int) -> None:
        """Look at the values of `steps` steps that are about to be logged."""
        self._highest = max(self._highest, logs["loss"])
        far = logs["sam_loss"] > _FAR * self._highest or logs["sam_loss"] != logs["sam_loss"]
        self._steps_far = self._steps_far + steps if far else 0
        rho = logs["sam_rho"]
        if self._steps_far >= _PATIENCE:
            self._tell(
                "far",
                f"sam_rho={rho:g} looks far too large: for {self._steps_far} steps the perturbed loss "
                f"({logs['sam_loss']:.3g}) has been more than {_FAR:g} times the highest loss of this run "
                f"({self._highest:.3g}); try sam_rho={rho / 4:.1g}",
            )
        if logs.get("sam_applied", 1.0) < 0.5:
            self._tell(
                "lost",
                f"rounding to half-precision weights leaves {logs['sam_applied']:.0%} of the perturbation of radius "
                f"{rho:g}; load the model in float32 (dtype=torch.float32) and train with bf16=True instead",
            )

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning(message)
