"""Capture and replay randomness, so that both passes draw the same dropout masks.

A pass may draw from torch (the host's generator and the current accelerator's), from Python's `random`
and from NumPy; the model files of Transformers use all of them.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class RandomState(NamedTuple):
    """The states of all generators at one instant."""

    host: Tensor
    device: Tensor | None
    python: tuple[Any, ...]
    numpy: dict[str, Any] | tuple[Any, ...]


def _device_module() -> Any:
    """The module of the current accelerator, if it has been used; asking must not initialize it."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return None
    module = torch.get_device_module(accelerator)
    return module if getattr(module, "is_initialized", lambda: True)() else None


def capture() -> RandomState:
    """Snapshot every generator. Costs microseconds."""
    module = _device_module()
    return RandomState(
        torch.get_rng_state(),
        None if module is None else module.get_rng_state(),
        random.getstate(),
        np.random.get_state(),
    )


def rewind(state: RandomState) -> None:
    """Go back to `state`, and on from there."""
    torch.set_rng_state(state.host)
    if state.device is not None:
        _device_module().set_rng_state(state.device)
    random.setstate(state.python)
    np.random.set_state(state.numpy)


@contextmanager
def replay(state: RandomState) -> Iterator[None]:
    """Draw again inside the block what was drawn after `state` was captured; go on outside as if it had not run.

    For the same dropout masks in both passes:

        masks = rng.capture()
        loss_fn(model(x), y).backward()
        with optimizer.perturbed(), rng.replay(masks):
            loss_fn(model(x), y).backward()
    """
    resume = capture()
    rewind(state)
    try:
        yield
    finally:
        rewind(resume)
