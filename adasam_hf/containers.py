"""Dictionaries, lists and dataclasses, as things are handed around in them."""

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def copy_containers(value: Any) -> Any:
    """Other mutable mappings, lists, tuples, dataclasses and namespaces, with the same things in them."""
    if isinstance(value, MutableMapping):
        result = copy.copy(value)
        result.update({key: copy_containers(item) for key, item in value.items()})
        return result
    if type(value) in (list, tuple):
        return type(value)(map(copy_containers, value))
    if (named := _fields(value)) is None:
        return value
    result = copy.copy(value)
    for name, item in named.items():
        object.__setattr__(result, name, copy_containers(item))  # which a frozen dataclass allows, too
    return result


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What is in `value` and its containers, with the path to each."""
    if isinstance(value, Mapping):
        inside = {f"{name}[{key!r}]": item for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        inside = {f"{name}[{i}]": item for i, item in enumerate(value)}
    elif (named := _fields(value)) is not None:
        inside = {f"{name}.{key}": item for key, item in named.items()}
    else:
        yield name, value
        return
    for path, item in inside.items():
        yield from leaves(path, item)


def _fields(value: Any) -> dict[str, Any] | None:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
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


def own_attributes(holder: Any) -> Iterator[tuple[str, Any]]:
    """Attributes of a module, without torch's own, of which only ``training`` is state; or of any other object."""
    return ((name, value) for name, value in vars(holder).items() if name not in _OF_EVERY_MODULE)
