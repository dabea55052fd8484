"""Values of arguments as Python, a command line, JSON and YAML bring them, read or refused in one sentence.

Each function takes the argument's name and value, returns the value in its own type, and raises ValueError with the
name, the value, what it must be and an example. Text counts as what it spells, as YAML takes 1e-5 for text.
"""

import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection
from contextlib import suppress
from numbers import Integral, Real
from typing import Any


def read_number(
    name: str, value: object, must_be: str, allowed: Callable[[float], bool] = lambda x: True, *, text: bool = True
) -> float:
    """A real number, NumPy's included, or with `text` one that is spelled, that `allowed` accepts. True is none.

    A float is returned as it is.
    """
    if isinstance(value, (Real, str) if text else Real) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            if allowed(number := float(value)):
                return number
    raise ValueError(f"{name}={value!r} must be {must_be}")


def read_whole_number(name: str, value: object, must_be: str, least: int) -> int:
    """A whole number of at least `least`; neither True nor 2.0."""
    if isinstance(value, (Integral, str)) and not isinstance(value, bool):
        with suppress(ValueError):
            if (number := int(value)) >= least:
                return number
    raise ValueError(f"{name}={value!r} must be {must_be}")


def read_truth_value(name: str, value: object) -> bool:
    """A truth value, or a word that `HfArgumentParser` reads as one, so that "false" is not true for being text."""
    from transformers.hf_argparser import string_to_bool  # for the arguments of a Trainer; the optimizer does without

    try:
        truth: bool = string_to_bool(str(value))
    except ArgumentTypeError:
        raise ValueError(f"{name}={value!r} must be true or false") from None
    return truth


def read_choice(name: str, value: object, choices: Collection[str]) -> Any:
    """One of `choices`."""
    if isinstance(value, str) and value in choices:
        return value
    raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")


def read_pattern(name: str, value: object, must_be: str) -> str:
    """A regular expression, as text."""
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r} must be {must_be}")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name}={value!r} must be {must_be} ({error})") from None
    return value
