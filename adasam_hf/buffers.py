"""What a forward pass leaves behind in a model, beside gradients: buffers, and plain tensors kept as attributes.

BatchNorm's running statistics, the vectors of spectral normalization, the ranges of quantization observers, codebooks
and counters all move with every forward pass in training mode. A second pass must start from what the first one started
from, and what it leaves behind must not count.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Slot(NamedTuple):
    """A tensor of a module, and its values at one instant."""

    holder: dict[str, Any]  # of the module: its buffers, or its attributes
    name: str
    tensor: Tensor | None
    values: Tensor | None  # None where only the reference is kept, as for a tensor inside an autograd graph


class ModelState:
    """The buffers of some modules at one instant; `restore` may be called any number of times."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._slots = [_slot(holder, name, tensor) for holder, name, tensor in _tensors(modules)]

    @torch.no_grad()
    def restore(self) -> None:
        """Put every tensor back: the same object, with the values that it had."""
        for slot in self._slots:
            if slot.holder.get(slot.name) is not slot.tensor:  # the pass has put another one there
                slot.holder[slot.name] = slot.tensor
            if slot.tensor is not None and slot.values is not None:
                slot.tensor.copy_(slot.values)

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Start the block from this state; afterwards things are as they were before the block."""
        now = ModelState([])
        now._slots = [_slot(slot.holder, slot.name, slot.holder.get(slot.name)) for slot in self._slots]
        self.restore()
        try:
            yield
        finally:
            now.restore()


def _tensors(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Tensor | None]]:
    for module in modules:
        for name, buffer in module._buffers.items():
            yield module._buffers, name, buffer
        for name, value in vars(module).items():
            if type(value) is Tensor:
                yield vars(module), name, value


def _slot(holder: dict[str, Any], name: str, tensor: Tensor | None) -> _Slot:
    # Versions cannot tell what has changed: codebooks are often written through `.data`, which counts nothing.
    plain = tensor is not None and not tensor.requires_grad and not tensor.is_inference()
    return _Slot(holder, name, tensor, tensor.detach().clone() if plain and tensor is not None else None)


@contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """Leave the buffers of `models` as they are now, whatever the block's forward passes do to them.

    In a loop written by hand they then move once per step, at the unperturbed weights:

        loss_fn(model(x), y).backward()
        with optimizer.perturbed(), buffers.unchanged(model):
            loss_fn(model(x), y).backward()
    """
    state = ModelState(module for model in models for module in model.modules())
    try:
        yield
    finally:
        state.restore()
