"""When gradients travel between processes."""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn


def ascends_per_process(args: Any) -> bool:
    """Whether, by these arguments, each process ascends along its own gradient."""
    return args.sam_scope == "microbatch" or not args.sam_sync


class Synchronization:
    """Decides when the gradients of one model are averaged over processes.

    Args:
        per_process: whether each process ascends along its own gradient, and those of the ascent are never averaged.
        restricted: whether only some parameters have a gradient in the ascent. DistributedDataParallel would wait for
            the others, so the few that exist are averaged separately, before the weights are perturbed.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, per_process: bool, restricted: bool = False) -> None:
        self._accelerator, self._model = accelerator, model
        self._per_process, self._restricted = per_process, restricted

    def of_ascent(self) -> AbstractContextManager[None]:
        """Around a backward pass of the ascent: as the Trainer has it, or without traffic."""
        # Whatever Accelerate's `sync_each_batch` says, which is about accumulation: this gradient is this process's.
        alone = self._per_process or self._restricted
        return self._accelerator.no_sync(self._model) if alone else nullcontext()

    def finish_ascent(self, parameters: Collection[nn.Parameter]) -> None:
        """Average what `of_ascent` has left on its process and should not stay there."""
        if self._restricted and not self._per_process:
            average_gradients(parameters)

    def of_descent(self, last: bool) -> AbstractContextManager[None]:
        """Around a backward pass of the descent: the last one sends the gradient of them all, as in stock."""
        # With `sync_each_batch` (less memory with FSDP2, more traffic) every one does, as in stock.
        sends = last or self._accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        return nullcontext() if sends else self._accelerator.no_sync(self._model)


def average_gradients(parameters: Collection[nn.Parameter]) -> None:
    """Make each ``.grad`` its mean over the processes, if there are several, in one all-reduce for each dtype.

    A process without a gradient for a parameter contributes 0, as with `DistributedDataParallel`.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        alike = [p for p in parameters if p.dtype is dtype]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
        flat = torch.cat([part.reshape(-1) for part in parts]) / dist.get_world_size()
        dist.all_reduce(flat)
        for p, mean in zip(alike, flat.split([p.numel() for p in alike]), strict=True):
            p.grad = torch.empty_like(p, requires_grad=False).copy_(mean.view(p.shape))  # in the layout of p
