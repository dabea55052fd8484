"""Dictionaries, lists and dataclasses, as things are handed around in them."""

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def copy_containers(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """Other mutable mappings, lists, tuples, dataclasses and namespaces, with the same things in them."""
    memo = {} if memo is None else memo  # what is in two places, or inside itself, is so in the copy
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MutableMapping):
        memo[id(value)] = result = copy.copy(value)
        for key, item in value.items():
            result[key] = copy_containers(item, memo)
        return result
    if type(value) is list:
        memo[id(value)] = items = list[Any]()
        items.extend(copy_containers(item, memo) for item in value)
        return items
    if type(value) is tuple:
        return tuple(copy_containers(item, memo) for item in value)
    if (named := _fields(value)) is None:
        return value
    memo[id(value)] = result = copy.copy(value)
    for name, item in named.items():
        object.__setattr__(result, name, copy_containers(item, memo))  # which a frozen dataclass allows, too
    return result


def leaves(value: Any, path: tuple[str, ...] = (), above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """The tensors and arrays in `value` and its containers, with the path to each."""
    if isinstance(value, (Tensor, np.ndarray)):
        yield "".join(path), value
        return
    if isinstance(value, Mapping):
        inside: Iterable[tuple[str, Any]] = ((f"[{key!r}]", item) for key, item in value.items() if _may_hold(item))
    elif isinstance(value, (list, tuple)):
        inside = ((f"[{i}]", item) for i, item in enumerate(value) if _may_hold(item))
    else:
        inside = ((f".{key}", item) for key, item in (_fields(value) or {}).items() if _may_hold(item))
    if id(value) not in above:
        for step, item in inside:
            yield from leaves(item, (*path, step), (*above, id(value)))


def _may_hold(value: Any) -> bool:
    return not isinstance(value, (int, float, str, bytes, type(None)))


def _fields(value: Any) -> dict[str, Any] | None:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value) if hasattr(value, field.name)}
    return vars(value) if isinstance(value, SimpleNamespace) else None


def modules_in(values: Iterable[Any]) -> Iterator[nn.Module]:
    """The modules among `values`, and those in mappings, lists and tuples of modules; not what is inside modules.

    In the place of a wrapper that distributes a model, the model.

    What begins with something else than a module (or such a collection) is left alone: it may be long.
    """
    for value in values:
        if isinstance(value, (DataParallel, DistributedDataParallel)):
            yield value.module  # what such a wrapper keeps is about its processes, and nothing that a pass moves
        elif isinstance(value, nn.Module):
            yield value
        elif isinstance(value, (Mapping, list, tuple)) and _begins_with_module(value):
            yield from modules_in(_items(value))


def _begins_with_module(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return True
    if not isinstance(value, (Mapping, list, tuple)) or not value:
        return False
    return _begins_with_module(value[0] if isinstance(value, (list, tuple)) else next(iter(value.values())))


def _items(value: Mapping[Any, Any] | list[Any] | tuple[Any, ...]) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


def own_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes of a module, without torch's own, of which only ``training`` is state."""
    return ((name, value) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE)
