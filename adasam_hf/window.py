"""What lives for one optimizer step: its micro-batches, and what the ascent has gathered from them so far."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import rng
from .buffers import ModelState
from .containers import copy_containers
from .directions import Direction
from .frozen import FrozenOutputs
from .functional import LogitGradients


class StepPlan(NamedTuple):
    """How one optimizer step perturbs the weights."""

    radii: list[float]
    """One for each parameter group of the optimizer."""
    direction: Direction | None = None
    """None for a plain step."""
    chosen: list[nn.Parameter] | None = None
    """The parameters that may be perturbed; None for all."""
    obstacle: str | None = None
    """Why this is a plain step although it was planned to perturb the weights."""

    @property
    def perturbs(self) -> bool:
        """Whether any weight is to be perturbed."""
        return self.direction is not None and any(self.radii)

    @property
    def ascends(self) -> bool:
        """Whether the direction takes a first pass, the ascent."""
        return self.direction is not None and self.direction.first_pass and any(self.radii)


class Pass(NamedTuple):
    """One micro-batch that has been through the ascent, and what that pass started from."""

    kept_inputs: Any
    random: rng.RandomState
    state: ModelState
    position: int
    frozen: FrozenOutputs
    logits: LogitGradients | None

    @property
    def inputs(self) -> Any:
        """As they were before the pass: a `training_step` may remove entries from its inputs."""
        return copy_containers(self.kept_inputs)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Around the ascent: keep what the descent will reuse."""
        with self.frozen.record(), nullcontext() if self.logits is None else self.logits.record():
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Around the descent: let it reuse that."""
        with self.frozen.replay(), nullcontext() if self.logits is None else self.logits.replay():
            yield


class Window(list[Any]):
    """The micro-batches of one optimizer step.

    The Trainer iterates over it, so it knows which micro-batch is current, whatever a `training_step` does: skip one,
    take one twice, or pass on a copy. If a trainer's `get_batch_samples` has made another list of it, the micro-batches
    are counted as they come.

    Args:
        micro_batches: as they come from the loader.
        plan: of this step; a plain one until it is known.

    Attributes:
        size_elsewhere: of the list that somebody has made of it, if he has.
        ascent_inputs: by position, what the ascent sees of each micro-batch, where that is not all of it; None for one
            that takes no part.
        ascent_cuts: by position, what takes these rows of a micro-batch that a trainer may have changed by then.
        ascent_items: `num_items_in_batch` of all that.
        ascent_share: the share of the window that this is, by rows (of packed rows, by tokens); None if it is all.
        passed_on: whether others may change the list before its first micro-batch is taken.
        begun: whether its first micro-batch has been taken.
        descended: whether a descent has begun, which took the ascent's gradients; `passes` are those still to come.
        complete: whether the window, or in scope microbatch one micro-batch of it, has been through the descent.
    """

    def __init__(self, micro_batches: Iterable[Any], plan: StepPlan | None = None) -> None:
        super().__init__(micro_batches)
        self.plan = plan or StepPlan([])
        self.size_elsewhere: int | None = None
        self.ascent_inputs: dict[int, Any | None] | None = None
        self.ascent_cuts: dict[int, Callable[[Any], Any | None]] = {}
        self.ascent_items: Tensor | int | None = None
        self.ascent_share: float | None = None
        self.begun = self.passed_on = False
        self.passes: list[Pass] = []
        self.losses: list[Tensor] = []  # of the passes, at w
        self.leftover: dict[nn.Parameter, Tensor] = {}
        """Gradients from before the window: they belong to the coming update, not to the ascent."""
        self.descended = self.complete = False
        self.models: list[nn.Module] = []
        """Those that its passes run through, as far as they are known, when the first of them begins."""
        self.modules: list[nn.Module] = []
        """They, and all that are inside them."""
        self.generators: list[rng.Generator] = []
        """Those that they hold, or whoever calls them."""
        self.frozen: list[nn.Module] = []
        """Those of them whose outputs the descent may take from the ascent."""
        self.reused: set[nn.Module] = set()
        """Those of them whose outputs it has taken."""
        self.reused_bytes = 0  # that were kept for it
        self._at: int | None = None
        self._counted, self._latest = 0, None
        self._gradients: list[tuple[nn.Parameter, Tensor | None, int | None]] = []

    def __iter__(self) -> Iterator[Any]:
        before = self._at  # of another iteration
        try:
            for self._at, micro_batch in enumerate(super().__iter__()):
                yield micro_batch
        finally:
            self._at = before

    @property
    def size(self) -> int:
        """How many micro-batches there are to come in all."""
        return len(self) if self.size_elsewhere is None else self.size_elsewhere

    @property
    def iterating(self) -> bool:
        """Whether the window is being iterated over."""
        return self._at is not None

    def position_of(self, micro_batch: Any) -> int:
        """The position of the current micro-batch, the same however often it is asked for."""
        if self._at is not None:
            return self._at
        if not self._counted or micro_batch is not self._latest:
            self._counted, self._latest = self._counted + 1, micro_batch
        return self._counted - 1

    def expects(self, micro_batch: Any) -> bool:
        """Whether this can be one of its micro-batches."""
        return self.iterating or self._counted < self.size or micro_batch is self._latest

    def take_passes(self) -> list[Pass]:
        """The passes so far, which are then the descent's."""
        passes, self.passes = self.passes, []
        self._gradients = []
        return passes

    def note_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Remember the gradients that the ascent has gathered, for `others_changed_gradients`."""
        self._gradients = [(p, p.grad, version(p.grad)) for p in parameters]

    @property
    def has_gradients(self) -> bool:
        """Whether there were any to remember."""
        return any(gradient is not None for _, gradient, _ in self._gradients)

    def others_changed_gradients(self) -> bool:
        """Whether they have been changed since."""
        return any(p.grad is not gradient or version(p.grad) != number for p, gradient, number in self._gradients)

    def others_cleared_gradients(self) -> bool:
        """Whether what the ascent had gathered is gone: a trainer that abandons a batch calls `zero_grad`."""
        return not any(p.grad is not None and bool(p.grad.any()) for p, _, _ in self._gradients)


def version(tensor: Tensor | None) -> int | None:
    """A number that rises with every change in place."""
    return None if tensor is None or tensor.is_inference() else tensor._version
