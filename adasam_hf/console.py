"""What the commands of `adasam` share: their parser, and one-line errors."""

import argparse
import sys
from typing import NoReturn

EXTRAS = {
    "matplotlib": "report",
    "ray": "ray",
    "pytorch_optimizer": "benchmark",
    "temperon": "benchmark",
    "peft": "benchmark",
}
"""Packages that only some commands need → the extra of adasam_hf that installs them."""


class CommandParser(argparse.ArgumentParser):
    """The parser of `adasam NAME`; it raises `ValueError` for a wrong command line."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(
            prog=f"adasam {name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def is_mistake(error: BaseException) -> bool:
    """Whether the error means input that the command cannot use. Any other is a bug, and shows its traceback."""
    return isinstance(error, ValueError | OSError | NotImplementedError) or _extra(error) is not None


def _extra(error: BaseException) -> tuple[str, str] | None:
    """The package that is missing, and the extra that installs it."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return (package, EXTRAS[package]) if package in EXTRAS else None


def sentence(error: BaseException) -> str:
    """An error in one line, for someone who does not know the code."""
    if (missing := _extra(error)) is not None:
        return f"the package {missing[0]} is not installed; pip install '.[{missing[1]}]' in a checkout"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{str(error.filename)!r}: {error.strerror}; give another path"
    return " ".join(str(error).split()) or type(error).__name__


def refuse(program: str, message: str) -> int:
    """Print one line on stderr. Returns the exit code of a wrong command line."""
    print(f"{program}: {message}", file=sys.stderr)
    return 2
