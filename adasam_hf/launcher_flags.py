"""The flags before a launched program's name: how they are read, where they go, and which the program has overruled."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

import transformers
from transformers import HfArgumentParser, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from . import activity
from .command_line import PROGRAM, PROGRAM_VARIABLE, fail
from .optimizer_names import ADASAM_NAMES, SGD_NAMES
from .patching import patch
from .training_args import PACKAGE_DEFAULTS, RADIUS_ZERO, SharpnessAwareArgumentsMixin, set_launcher_defaults

logger = logging.get_logger(__name__)


class _FlagParser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def read(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The values that `words` give to sharpness-aware arguments, and the words that are none of theirs.

    Raises:
        ValueError: for a value of a wrong type.
    """
    mixin: Any = SharpnessAwareArgumentsMixin
    parser = _FlagParser(mixin, allow_abbrev=False, add_help=False)
    unset = object()
    namespace = argparse.Namespace(**{f.name: unset for f in fields(mixin)})
    found, others = parser.parse_known_args(list(words), namespace)
    return {name: value for name in PACKAGE_DEFAULTS if (value := getattr(found, name)) is not unset}, others


def patch_with(flags: Sequence[str]) -> None:
    """Patch this process; `flags` become the defaults of all sharpness-aware arguments, instead of earlier ones.

    Raises:
        SystemExit: with code 2 for flags that do not exist or have a value of a wrong type.
    """
    try:
        before, others = read(flags)
    except ValueError as error:
        fail(str(error))
    if others:
        fail(f"there is no argument {' '.join(others)}; docs/arguments.md lists those of the ascent")
    try:
        after, _ = read(sys.argv[1:])
    except ValueError:  # the program will say what is wrong with them, or has flags of the same names
        after = {}
    set_launcher_defaults(before)
    patch()
    callbacks: list[Any] = transformers.trainer.DEFAULT_CALLBACKS
    callbacks[:] = [callback for callback in callbacks if not isinstance(callback, LaunchCallback)]
    callbacks.append(LaunchCallback(before, after))


class LaunchCallback(TrainerCallback):
    """Warns once, at the start of training, of flags that the training does not follow.

    before: flags before the program's name, by argument; each stands unless the program sets the argument itself.
    after: those after it, which do nothing if the program does not parse them.
    """

    def __init__(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        self._before, self._after = before, after
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the arguments in force with the flags."""
        if getattr(args, "sam_rho", None) == 0 or args.optim in RADIUS_ZERO:
            activity.record_radius_zero()
        if self._warned or not state.is_world_process_zero:
            return
        overruled, unread = self._overruled(args), self._unread(args)
        if overruled:
            logger.warning(f"{'; '.join(overruled)} given before its name")
        if unread:
            logger.warning(
                f"the command line's arguments did not reach this training, which has {', '.join(unread)}: the script "
                "does not parse TrainingArguments. Give them before its name: "
                f"{os.environ.get(PROGRAM_VARIABLE, PROGRAM)} --optim adasam SCRIPT"
            )
        self._warned = bool(overruled or unread)

    def _overruled(self, args: TrainingArguments) -> list[str]:
        return [
            f"{name}={value!r} of the script wins over --{name} {wanted}"
            for name, wanted in self._before.items()
            if (value := getattr(args, name, None)) != wanted
        ]

    def _unread(self, args: TrainingArguments) -> list[str]:
        defaults = {f.name: f.default for f in fields(SharpnessAwareArgumentsMixin)}
        found = []
        for name, wanted in self._after.items():
            value = getattr(args, name, None)
            if name == "optim":
                missed = wanted in (*ADASAM_NAMES, *SGD_NAMES) and value != wanted
            else:
                missed = value == defaults[name] != wanted
            if missed:
                found.append(f"{name}={value!r} in place of {wanted}")
        return found
