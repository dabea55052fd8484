"""Which ways of spreading a run over devices the two-pass step supports. What is not shown to work is refused."""

from accelerate.utils import DistributedType
from transformers import Trainer

_ONE_PROCESS = "run it in one process on one device"


def _obstacle(trainer: Trainer) -> tuple[str, str] | None:
    """(what stands in the way, what to do instead), or None."""
    args, accelerator = trainer.args, trainer.accelerator
    kind = accelerator.distributed_type
    if kind is DistributedType.DEEPSPEED:
        return "DeepSpeed, whose engine updates the weights inside backward", _ONE_PROCESS
    if kind is not DistributedType.NO or args.world_size > 1:
        return f"{args.world_size} processes ({kind.value})", _ONE_PROCESS
    if args.n_gpu > 1:
        return f"torch.nn.DataParallel over {args.n_gpu} devices", "show it one device (CUDA_VISIBLE_DEVICES=0)"
    if trainer.is_model_parallel or getattr(trainer, "is_distributed_loading_by_transformers", False):
        return "a model spread over several devices", "load it on one device (without device_map)"
    if accelerator.scaler is not None:
        return "fp16 with a gradient scaler", "use bf16=True, or float32"
    name = str(getattr(args.optim, "value", args.optim))
    if "lomo" in name or "layerwise" in name:
        return f"optim={name!r}, which updates the weights inside backward", "choose another optimizer"
    return None


def refuse_unsupported(trainer: Trainer) -> None:
    """Raise NotImplementedError if a sharpness-aware `trainer` runs on something that is not supported yet."""
    if obstacle := _obstacle(trainer):
        problem, remedy = obstacle
        raise NotImplementedError(
            f"sam_rho={trainer.args.sam_rho!r} with optim={str(trainer.args.optim)!r} is sharpness-aware, which is "
            f"not supported with {problem}: {remedy}, or set sam_rho=0"
        )
