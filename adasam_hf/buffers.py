"""What a forward pass leaves behind in a model, beside gradients: buffers, and what modules keep as attributes.

BatchNorm's running statistics, the vectors of spectral normalization, the ranges of quantization observers, codebooks
and counters all move with every forward pass in training mode. A second pass must start from what the first one started
from, and what it leaves behind must not count.
"""

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .containers import own_attributes

PLAIN = (bool, int, float, complex, str, type(None), np.generic)
"""Types of attributes that are state by themselves, such as counters and lengths."""
_ABSENT = object()


class _Slot(NamedTuple):
    """A tensor of a module, and its values at one instant."""

    holder: dict[str, Any]  # of the module: its buffers, or its attributes
    name: str
    tensor: Tensor | None
    values: Tensor | None  # None where only the reference is kept, as for a tensor inside an autograd graph


class _Collection(NamedTuple):
    """An attribute that is a list, dictionary, set or deque, and what was in it at one instant."""

    attributes: dict[str, Any]
    name: str
    collection: Any
    content: Any

    def is_present(self) -> bool:
        """Whether it is there, with the same things in it."""
        if self.attributes.get(self.name) is not self.collection:
            return False
        now, before = _items(self.collection), _items(self.content)
        return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))

    def restore(self) -> None:
        if not self.is_present():
            self.attributes[self.name] = self.collection
            self.collection.clear()
            (self.collection.extend if isinstance(self.collection, (list, deque)) else self.collection.update)(
                self.content
            )


def _items(collection: Any) -> list[Any]:
    return [*collection, *collection.values()] if isinstance(collection, dict) else list(collection)


COLLECTIONS = (list, dict, set, deque)
_COPIED = {*COLLECTIONS, defaultdict, OrderedDict, Counter}
_STATE = (*PLAIN, tuple, Tensor, *COLLECTIONS)


class ModelState:
    """Buffers of some modules at one instant, and their attributes: tensors, numbers, strings, None, tuples, and the
    things in lists, dictionaries, sets and deques.

    `restore` may be called any number of times. Tensors that share memory with parameters are put back as references
    alone, for it is not this that moves parameters; likewise views that repeat one number (`Tensor.expand`).

    Args:
        modules: without those that are inside them.
        like: an earlier state of the same modules, whose copies are shared where nothing has changed. (Only on the
            host; to compare, an accelerator would have to be waited for.)
    """

    def __init__(self, modules: Iterable[nn.Module], like: "ModelState | None" = None) -> None:
        self._holders = list(modules)
        self._plain: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = []
        self._collections: list[_Collection] = []
        tensors = [one for holder in self._holders for one in _buffers(holder)]
        for holder in self._holders:
            attributes, plain = vars(holder), dict[str, Any]()
            for name, value in own_attributes(holder):
                if type(value) is Tensor:
                    tensors.append((attributes, name, value))
                elif isinstance(value, (*PLAIN, tuple)):
                    plain[name] = value
                elif type(value) in _COPIED:
                    self._collections.append(_Collection(attributes, name, value, copy.copy(value)))
            self._plain.append((attributes, plain, tuple(attributes)))
        weights = _memory_of_parameters(self._holders) if tensors else set()
        known = {} if like is None else {(id(slot.holder), slot.name): slot.values for slot in like._slots}
        self._slots: list[_Slot] = [
            _slot(holder, name, tensor, weights, known.get((id(holder), name))) for holder, name, tensor in tensors
        ]

    @torch.no_grad()
    def restore(self, *, compare: bool = False) -> None:
        """Put everything back: the same tensors, with the values that they had.

        Args:
            compare: write to no tensor that has them already, even if an accelerator must be waited for.
        """
        for attributes, plain, names in self._plain:
            for name in _new(attributes, names):
                if isinstance(attributes[name], _STATE):
                    del attributes[name]
            for name, value in plain.items():
                # (An object made on first use in the place of None, such as a module, is not state, and stays.)
                now = attributes.get(name, _ABSENT)
                made = name in attributes.get("_modules", ()) if now is _ABSENT else not isinstance(now, _STATE)
                if now is not value and not made:
                    attributes[name] = value
        for collection in self._collections:
            collection.restore()
        for slot in self._slots:
            if slot.holder.get(slot.name) is not slot.tensor:  # the pass has put another one there
                slot.holder[slot.name] = slot.tensor
            if slot.tensor is None or slot.values is None:
                continue
            if not ((compare or slot.tensor.device.type == "cpu") and same_bits(slot.tensor, slot.values)):
                slot.tensor.copy_(slot.values)

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Start the block from this state; afterwards things are as they were before the block."""
        now = ModelState(self._holders, like=self)
        self.restore()
        try:
            yield
        finally:
            now.restore()

    def is_present(self) -> bool:
        """Whether everything is as it was at that instant, bit for bit."""
        for attributes, plain, names in self._plain:
            if any(isinstance(attributes[name], _STATE) for name in _new(attributes, names)):
                return False
            if not all(_same_value(attributes.get(name, _ABSENT), value) for name, value in plain.items()):
                return False
        if not all(collection.is_present() for collection in self._collections):
            return False
        return all(
            slot.holder.get(slot.name) is slot.tensor
            and (slot.tensor is None or slot.values is None or same_bits(slot.tensor, slot.values))
            for slot in self._slots
        )


def _new(attributes: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    if len(attributes) == len(names) and tuple(attributes) == names:
        return []
    known = set(names)
    return [name for name in attributes if name not in known]


def _same_value(now: Any, before: Any) -> bool:
    return now is before or (type(now) is type(before) and not isinstance(before, tuple) and bool(now == before))


def _buffers(holder: nn.Module) -> list[tuple[dict[str, Any], str, Tensor | None]]:
    # (A scripted module hands out its buffers, but nobody can put others there.)
    scripted = isinstance(holder, torch.jit.ScriptModule)
    buffers = dict(holder.named_buffers(recurse=False)) if scripted else holder._buffers
    return [(buffers, name, buffer) for name, buffer in buffers.items()]


def _memory_of_parameters(modules: Iterable[nn.Module]) -> set[int]:
    parameters = {p for module in modules for p in module._parameters.values() if p is not None and not is_lazy(p)}
    return {p.untyped_storage().data_ptr() for p in parameters if type(p.data) is Tensor}


def _slot(holder: dict[str, Any], name: str, tensor: Any, weights: set[int], known: Tensor | None = None) -> _Slot:
    """`weights`: the memory of parameters; `known`: a copy of values that it may still have."""
    if not isinstance(tensor, Tensor) or not _is_plain(tensor, weights):
        return _Slot(holder, name, tensor, None)
    if known is not None and tensor.device.type == "cpu" and same_bits(tensor, known):
        return _Slot(holder, name, tensor, known)
    # Versions cannot tell what has changed: codebooks are often written through `.data`, which counts nothing.
    return _Slot(holder, name, tensor, tensor.detach().clone())


def _is_plain(tensor: Tensor, weights: set[int]) -> bool:
    if tensor.requires_grad or tensor.is_inference() or tensor.is_nested:
        return False
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_meta:
        return True
    repeats = any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
    return not repeats and tensor.untyped_storage().data_ptr() not in weights


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype, device, strides and bits; 0 and -0 are different ones."""
    layouts = [(t.shape, t.dtype, t.device, t.layout, t.is_conj(), t.is_neg()) for t in (a, b)]
    if layouts[0] != layouts[1] or a.layout is not torch.strided or a.stride() != b.stride():
        return False
    bits = _BITS.get(a.element_size())
    return torch.equal(a, b) if bits is None or not a.dim() else torch.equal(a.view(bits), b.view(bits))


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
