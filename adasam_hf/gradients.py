"""Which gradients are there, and whether anybody has computed others or cleared them since."""

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.weak import TensorWeakRef

from .kernels import DTensor, shard


class GradientRecord:
    """The gradients of some parameters at one moment, without keeping them in memory.

    Clearing them is setting ``.grad`` to None or to another tensor, or zeroing it in place. After the latter the tensor
    is the same one, and the number of its changes tells nothing (clipping and DistributedDataParallel change it, too).
    Therefore a hook looks at the largest one when the next backward pass begins to deliver, before it adds anything.
    Nothing is read back from the device until `uncleared` is asked, and then only if the tensor was still the same.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = list(params)
        self._before = [_Identity(p.grad) for p in self._params]
        held = [i for i, p in enumerate(self._params) if p.grad is not None]
        self._largest = max(held, key=lambda i: self._params[i].numel(), default=None)
        self._at_arrival: Tensor | bool | None = None  # whether the largest was still there, None if nothing arrived
        this = weakref.ref(self)  # so that the parameters' hooks do not keep the record

        def on_arrival(_: Tensor) -> None:
            record = this()
            if record is not None and record._at_arrival is None:
                record._at_arrival = record._largest_is_there()

        self._hooks = register_multi_grad_hook([p for p in self._params if p.requires_grad], on_arrival, mode="any")

    def replaced(self) -> bool:
        """Whether a backward pass has delivered anything, or any gradient has come, gone or become another tensor.

        Changes in place alone, such as clipping, do not count.
        """
        pairs = zip(self._params, self._before, strict=True)
        return self._at_arrival is not None or not all(before.is_that_of(p.grad) for p, before in pairs)

    def uncleared(self) -> bool:
        """Whether what was there at that moment is part of the gradients that are there now."""
        return bool(self._largest_is_there() if self._at_arrival is None else self._at_arrival)

    def close(self) -> None:
        """Take the hooks away."""
        self._hooks.remove()

    def _largest_is_there(self) -> Tensor | bool:
        if self._largest is None:
            return False
        gradient = self._params[self._largest].grad
        if gradient is None or not self._before[self._largest].same_tensor(gradient):
            return False
        return True if gradient.is_sparse else shard(gradient.detach()).any()


class _Identity:
    """Which tensor a gradient is, without keeping it."""

    def __init__(self, gradient: Tensor | None) -> None:
        self._tensor = None if gradient is None else TensorWeakRef(gradient)
        self._version = _version(gradient)

    def same_tensor(self, gradient: Tensor) -> bool:
        return self._tensor is not None and self._tensor() is gradient

    def is_that_of(self, gradient: Tensor | None) -> bool:
        if gradient is None:
            return self._tensor is None
        return self.same_tensor(gradient) and _version(gradient) == self._version


def _version(gradient: Tensor | None) -> int | None:
    """How often FSDP2, which adds to gradients without a hook, has changed one; None for all else."""
    return shard(gradient)._version if isinstance(gradient, DTensor) else None
