"""Capture and replay randomness, so that both passes draw the same dropout masks.

A pass may draw from torch (the host's generator and the current accelerator's), from Python's `random`
and from NumPy; the model files of Transformers use all of them. A module may also hold a generator of its own.
"""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from .containers import own_attributes

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


class RandomState(NamedTuple):
    """The states of all generators at one instant."""

    host: Tensor
    device: Tensor | None
    python: tuple[Any, ...]
    numpy: dict[str, Any] | tuple[Any, ...]
    generators: tuple[tuple[Generator, Any], ...] = ()
    """Generators that modules hold, each with its state."""


def generators_of(modules: Iterable[nn.Module]) -> list[Generator]:
    """The generators that modules hold as attributes, by themselves or in a list, tuple or dict."""
    return generators_in(value for module in modules for _, value in own_attributes(module))


def generators_in(values: Iterable[Any]) -> list[Generator]:
    """The generators among `values`, and those in a list, tuple or dict that begins with one."""
    found: dict[int, Generator] = {}
    for value in values:
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        if inside and _is_generator(next(iter(inside))):
            items = (item for item in inside if _is_generator(item))
            found |= {id(item): item for item in items if not isinstance(item, random.SystemRandom)}  # it has no state
    return list(found.values())


_KINDS = set(get_args(Generator))


def _is_generator(value: Any) -> bool:
    # (As `isinstance` would say, which calls Python code for `torch.Generator`, and this is asked of every attribute.)
    return not _KINDS.isdisjoint(type(value).__mro__)


def _state_of(generator: Generator) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _device_module() -> Any:
    """The module of the current accelerator, if it has been used; asking must not initialize it."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return None
    module = torch.get_device_module(accelerator)
    return module if getattr(module, "is_initialized", lambda: True)() else None


def capture(generators: Iterable[Generator] = ()) -> RandomState:
    """Snapshot the global generators, and those given (`generators_of`). Costs microseconds."""
    module = _device_module()
    return RandomState(
        torch.get_rng_state(),
        None if module is None else module.get_rng_state(),
        random.getstate(),
        np.random.get_state(),
        tuple((generator, _state_of(generator)) for generator in generators),
    )


def same(a: RandomState, b: RandomState) -> bool:
    """Whether two states, of the same generators, are equal."""
    ours, theirs = ([s.host, s.device, s.python, s.numpy, *(state for _, state in s.generators)] for s in (a, b))
    return all(map(_equal, ours, theirs))


def _equal(a: Any, b: Any) -> bool:
    """Tuples and dictionaries of numbers, strings, arrays and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and a and not isinstance(a[0], int):  # Python's 625 numbers are compared at once
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


def rewind(state: RandomState) -> None:
    """Go back to `state`, and on from there."""
    torch.set_rng_state(state.host)
    if state.device is not None:
        _device_module().set_rng_state(state.device)
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    for generator, own in state.generators:
        _set_state(generator, own)


@contextmanager
def replay(state: RandomState) -> Iterator[None]:
    """Draw again inside the block what was drawn after `state` was captured; go on outside as if it had not run.

    For the same dropout masks in both passes:

        masks = rng.capture()
        loss_fn(model(x), y).backward()
        with optimizer.perturbed(), rng.replay(masks):
            loss_fn(model(x), y).backward()
    """
    resume = capture(generator for generator, _ in state.generators)
    rewind(state)
    try:
        yield
    finally:
        rewind(resume)
