"""The line that describes a run when it starts."""

from collections.abc import Collection, Sequence

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from .directions import DIRECTIONS, innermost
from .kernels import shard
from .synchronization import ascends_per_process
from .training_args import SharpnessAwareArgumentsMixin
from .window import Window


def describe(
    args: SharpnessAwareArgumentsMixin,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    radii: Sequence[float],
    chosen: Collection[nn.Parameter] | None = None,
    ascent_share: float | None = None,
) -> str:
    """One line: radius, scope, parameters, processes, precision, extra memory and compute.

    Args:
        radii: one for each parameter group.
        chosen: the parameters that may be perturbed; None for all.
        ascent_share: the share of the first optimizer step's rows that the ascent sees; None if not known yet.
    """
    name = type(innermost(optimizer)).__name__
    groups = optimizer.param_groups
    moving = [p for g, rho in zip(groups, radii, strict=True) if rho > 0 for p in g["params"] if p.requires_grad]
    if chosen is not None:
        moving = list(set(moving) & set(chosen))
    which = "" if chosen is None else f" (sam_parameters={args.sam_parameters})"
    total = sum(p.numel() for p in model.parameters())
    held = [sum(shard(p).numel() * p.element_size() for p in moving)]
    copies = ["a copy of them"]
    if args.sam_reuse:
        held.append(held[0])
        copies.append("the last gradient")
    if args.sam_scope == "microbatch" and args.gradient_accumulation_steps > 1 and _ascends(args):
        trained = {p for group in groups for p in group["params"] if p.requires_grad}
        held.append(sum(shard(p).numel() * p.element_size() for p in trained))
        copies.append("the gradient of the micro-batches before")
    each = " on each process" if args.world_size > 1 else ""
    return (
        f"{name} with {_how(args, max(radii))}: "
        f"perturbs {len(moving)} tensors{which} with {sum(p.numel() for p in moving):,} of {total:,} parameters; "
        f"{_processes(args, accelerator)}; {_precision(accelerator, moving)}; +{sum(held) / 2**20:.1f} MiB for "
        f"{' and '.join(copies)}{each}; {_passes(args, ascent_share)}"
    )


def _how(args: SharpnessAwareArgumentsMixin, rho: float) -> str:
    schedule, k = args.sam_schedule, args.gradient_accumulation_steps
    over = "the whole optimizer step" if args.sam_scope == "batch" else "each micro-batch by itself"
    parts = [f"sam_rho={rho:g}", f"sam_scope={args.sam_scope} ({over}, {k} micro-batch{'es' if k > 1 else ''})"]
    if args.sam_adaptive:
        parts[0] += " relative to the weights"
    if schedule.shape != "constant":
        parts[0] += f" times its {schedule.shape} schedule"
    if (schedule.start, schedule.end) != (0.0, 1.0):
        parts.append(f"from {schedule.start:.0%} to {schedule.end:.0%} of training")
    if schedule.interval > 1:
        parts.append(f"in one step of {schedule.interval}{', again in the others' if args.sam_reuse else ''}")
    return ", ".join(parts)


def _processes(args: SharpnessAwareArgumentsMixin, accelerator: Accelerator) -> str:
    size = args.world_size
    if size == 1:
        return "1 process"
    who = "each ascends along its own gradient" if ascends_per_process(args) else "all ascend along their mean gradient"
    return f"{size} processes ({accelerator.distributed_type.value}), {who}"


def _precision(accelerator: Accelerator, moving: Collection[nn.Parameter]) -> str:
    dtypes = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in moving}))
    autocast = accelerator.mixed_precision
    return f"{dtypes} weights" + (f", {autocast} autocast" if autocast != "no" else "")


def _ascends(args: SharpnessAwareArgumentsMixin) -> bool:
    return DIRECTIONS[args.resolved_direction].first_pass


def _passes(args: SharpnessAwareArgumentsMixin, ascent_share: float | None) -> str:
    if not _ascends(args):
        return f"along the {args.resolved_direction}: 1 forward/backward pass per micro-batch, as in a plain step"
    first = []
    if (asked := args.resolved_ascent_fraction) < 1:
        share = asked if ascent_share is None else ascent_share
        first.append(f"on {100 * share:.3g}% of a step's rows")
        if ascent_share is not None and ascent_share > asked:
            first.append(
                f"({100 * asked:.3g}% would be fewer than sam_ascent_min_rows={args.sam_ascent_min_rows} allows)"
            )
    if args.sam_parameters != "all":
        first.append("without gradients of the other weights")
    return "2 forward/backward passes per micro-batch instead of 1" + (f", the first {' '.join(first)}" * bool(first))


def describe_reuse(model: nn.Module, window: Window) -> str:
    """One line after the first step: how much of the model the second pass takes from the first."""
    own = set(model.parameters())
    reused = {p for module in window.reused for p in module.parameters()}
    count, total, beside = (sum(p.numel() for p in params) for params in (reused & own, own, reused - own))
    others = f" and {beside:,} of other models" if beside else ""
    return (
        f"sam_cache_frozen: the second pass takes from the first what frozen modules with {count:,} of {total:,} "
        f"parameters{others} computed; this holds {window.reused_bytes / 2**20:.1f} MiB of outputs during a step"
    )
