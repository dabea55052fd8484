"""One call of a loss function that can be made a second time, and whether it would be the same call."""

import dis
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from types import CodeType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .containers import copy_containers, leaves

LossFunction = Callable[..., Tensor]


class MicroBatch:
    """`loss_fn` with its inputs, for both passes.

    Raises:
        TypeError: if `loss_fn` cannot be called, there is no input, or an input is already a result of the model.
    """

    def __init__(self, loss_fn: LossFunction, inputs: tuple[Any, ...]) -> None:
        if not callable(loss_fn):
            raise TypeError(
                f"loss_fn={type(loss_fn).__name__} must be a function, as both passes call it: "
                "sam.backward(lambda batch: model(**batch).loss, batch)"
            )
        if not inputs:
            raise TypeError(
                "loss_fn has no inputs, so a second pass that comes after other micro-batches would see the last one's "
                "(a function reads the variables around it when it is called); pass them as arguments: "
                "sam.backward(loss_fn, batch)"
            )
        self._loss_fn, self._inputs = loss_fn, copy_containers(inputs)
        for name, tensor in self.items():
            if tensor.grad_fn is not None:
                raise TypeError(
                    f"input {name} of loss_fn has been computed from weights, whose gradient the second pass could not "
                    "take again; pass what the model takes, and call the model inside loss_fn"
                )
        self._seen: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        self.clean_loss: Tensor | None = None
        """What the first pass has returned, detached."""

    def loss(self) -> Tensor:
        """Call the function. Dictionaries and lists are copies, so that what it takes out of them is there again."""
        loss = self._loss_fn(*copy_containers(self._inputs))
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn returned {type(loss).__name__}; it must return the loss, a tensor of one element")
        return loss

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors among the inputs, with a name for each."""
        return ((name, leaf) for name, leaf in leaves(self._inputs) if isinstance(leaf, Tensor))

    def note(self, clean_loss: Tensor) -> None:
        """The first pass has been taken: note its loss, and what it depended on, for `changes`."""
        self.clean_loss = clean_loss
        self._seen = outer_variables(self._loss_fn), self._contents()

    def changes(self) -> list[str]:
        """What has changed since `note`: variables that the function reads from around it, and inputs."""
        variables, contents = self._seen
        now = outer_variables(self._loss_fn)
        rebound = [f"the variable {name!r}" for name, value in variables.items() if now.get(name) is not value]
        written = [f"input {name}" for name, content in self._contents().items() if contents.get(name) != content]
        return rebound + written

    def _contents(self) -> dict[str, tuple[int, int]]:
        return {name: _content(value) for name, value in leaves(self._inputs)}


def _content(value: Tensor | NDArray[Any]) -> tuple[int, int]:
    """How often a tensor has been written to and, of numbers that lie on the host, a checksum.

    A loader that fills one NumPy buffer again and again changes the tensor over it, and counts nothing.
    """
    if isinstance(value, np.ndarray):
        return 0, 0 if value.dtype == object else zlib.crc32(np.ascontiguousarray(value).tobytes())
    version = 0 if value.is_inference() else value._version
    if type(value) is not Tensor or not value.is_cpu or value.layout is not torch.strided:
        return version, 0
    flat = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return version, zlib.crc32(flat.view(torch.uint8).numpy().data)


def outer_variables(function: Callable[..., object]) -> dict[str, Any]:
    """What `function` reads by name from around it, as of now: enclosing functions' variables, and globals."""
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)  # of a bound method
    code = getattr(function, "__code__", None)
    if code is None:  # an object with `__call__`, such as a module
        return {}
    scope = function.__globals__
    found = {name: scope[name] for name in _globals_of(code) if name in scope}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return found


def within_reach(function: Any) -> list[Any]:
    """What a function holds on to by itself: variables around it, defaults, arguments of a `partial`, its object and
    that one's attributes."""
    found = [*outer_variables(function).values(), *getattr(function, "__dict__", {}).values()]
    while isinstance(function, partial):
        found += [*function.args, *function.keywords.values()]
        function = function.func
    holder = getattr(function, "__self__", None)
    if holder is not None:
        found += [holder, *getattr(holder, "__dict__", {}).values()]
    function = getattr(function, "__func__", function)
    defaults = getattr(function, "__defaults__", None) or ()
    return [*found, *defaults, *(getattr(function, "__kwdefaults__", None) or {}).values()]


@lru_cache(maxsize=256)
def _globals_of(code: CodeType) -> frozenset[str]:
    # `co_names` would not do: it has the names of attributes, too, and `.loss` is not the variable `loss`.
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return frozenset(names).union(*(_globals_of(one) for one in inner))
