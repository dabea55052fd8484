"""Functional-SAM: the second pass takes the loss's derivative at the logits from the first one (arXiv:2502.02407)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class LogitGradients:
    r"""∂L/∂F at w of one micro-batch, for the descent that regularizes the geometry of the function F alone:

        g = J(w + δ)ᵀ ∇_F L(w)        in the place of        J(w + δ)ᵀ ∇_F L(w + δ),

    with the logits F(w) and their Jacobian J = ∂F/∂w. The logits are the outputs of `model` that have ``logits`` in
    their names (``logits``, ``start_logits``, …). The gradient is the one that reaches them in the stock step's
    backward pass, scaled as it is there by accumulation, label smoothing or a gradient scaler. Parts of the loss that
    do not depend on the logits contribute their ordinary gradient at w + δ.

    Memory: the gradients, in the logits' dtype, from the first pass to the end of the second: batch · classes numbers
    for a micro-batch, batch · length · vocabulary for a language model.

    Args:
        model: the module itself, not a wrapper around it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._gradients: list[Tensor | None] = []

    @contextmanager
    def record(self) -> Iterator[None]:
        """Around the first pass."""
        gradients = self._gradients = []

        def keep(index: int) -> Callable[[Tensor | None], None]:
            gradients.append(None)

            def hook(gradient: Tensor | None) -> None:
                gradients[index] = None if gradient is None else gradient.detach().clone()  # others may write to it

            return hook

        with self._at_logits(keep):
            yield

    @property
    def found(self) -> bool:
        """Whether the first pass has brought a gradient to any logits."""
        return any(gradient is not None for gradient in self._gradients)

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Around the second pass."""

        def put(index: int) -> Callable[[Tensor | None], Tensor | None]:
            known = self._gradients[index] if index < len(self._gradients) else None
            return lambda gradient: gradient if known is None else known

        with self._at_logits(put):
            yield

    @contextmanager
    def _at_logits(self, hook_of: Callable[[int], Callable[[Tensor | None], Tensor | None]]) -> Iterator[None]:
        """Call ``hook_of(i)`` with the gradient of the i-th logits that the model puts out inside the block."""
        count = 0

        def after_forward(_: nn.Module, __: Any, outputs: Any) -> None:
            nonlocal count
            for logits in _logits_of(outputs):
                _hook_at(logits, hook_of(count))
                count += 1

        handle = self._model.register_forward_hook(after_forward)
        try:
            yield
        finally:
            handle.remove()


def _logits_of(outputs: Any) -> list[Tensor]:
    """The logits that need a gradient. (A router's are not the model's answer, but decide how it is computed.)"""
    if hasattr(outputs, "_asdict"):  # a named tuple
        outputs = outputs._asdict()
    named = outputs if isinstance(outputs, Mapping) else getattr(outputs, "__dict__", {})
    tensors = [value for name, value in named.items() if "logits" in str(name) and "router" not in str(name)]
    return [value for value in tensors if isinstance(value, Tensor) and value.grad_fn is not None]


def _hook_at(logits: Tensor, hook: Callable[[Tensor | None], Tensor | None]) -> None:
    """Let `hook` see, or replace, the whole gradient of `logits`.

    With mixed precision Accelerate hands out a copy in float32, while the loss in the model comes from the original.
    """
    node, index = logits.grad_fn, logits.output_nr
    while node is not None and node.name().startswith("ToCopyBackward"):
        node, index = node.next_functions[0]

    def before(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        replaced = hook(gradients[index])
        return None if replaced is None else (*gradients[:index], replaced, *gradients[index + 1 :])

    if node is not None:
        node.register_prehook(before)
