"""Numbers that a trainer's `compute_loss` counts for its log, which a second pass would count twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

# Of trl (tokens, entropies, rewards) and of sentence-transformers (the parts of a loss).
COUNTERS = ("_metrics", "_stored_metrics", "_total_train_tokens", "accum_loss_components")


def _copy(value: Any) -> Any:
    """A copy of dicts, lists and the tensors in them."""
    if isinstance(value, dict):
        copy = value.copy()  # a defaultdict stays one
        copy.update({key: _copy(item) for key, item in value.items()})
        return copy
    if isinstance(value, Tensor):
        return value.clone()
    return [_copy(item) for item in value] if isinstance(value, list) else value


@contextmanager
def unchanged(trainer: object) -> Iterator[None]:
    """Leave the `COUNTERS` of `trainer` as they are now, so that what it logs is of the ascent: of the weights w."""
    before = {name: _copy(value) for name, value in vars(trainer).items() if name in COUNTERS}
    try:
        yield
    finally:
        vars(trainer).update(before)
