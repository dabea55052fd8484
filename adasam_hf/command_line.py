"""Split the launcher's command line into its own flags and the program, and refuse what is wrong.

Needs neither torch nor Transformers: `launcher_flags` reads the values of the flags, once the program itself has
imported Transformers.
"""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import activity

PROGRAM_VARIABLE = "ADASAM_HF_PROGRAM"  # environment variable: the name that messages begin with
PROGRAM = "python -m adasam_hf"

# Flags that need no value.
SWITCHES = ("sam_adaptive", "sam_reuse", "sam_sync", "no_sam_sync", "sam_cache_frozen", "no_sam_cache_frozen")
BOOLEANS = ("true", "false", "yes", "no", "t", "f", "y", "n", "1", "0")


def fail(message: str) -> NoReturn:
    """Exit with one line on stderr and the exit code of a wrong command line."""
    activity.discard()  # no program has run whose trainings could be reported
    print(f"{os.environ.get(PROGRAM_VARIABLE, PROGRAM)}: {message}", file=sys.stderr)
    raise SystemExit(2)


def split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sharpness-aware flags before the program's name, and the program with its own arguments.

    Raises:
        SystemExit: with code 2 for any other flag there, a missing value or a missing program.
    """
    end = 0
    while end < len(words) and words[end].startswith("--"):
        flag, has_value, _ = words[end].partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if name not in ("optim", "sgd_momentum") and not name.removeprefix("no_").startswith("sam_"):
            fail(f"before the script's name there can be --optim, --sgd_momentum and --sam_…, not {name}")
        end += 1
        following = words[end] if end < len(words) else "--"
        if has_value:
            continue
        if name in SWITCHES:
            end += following.lower() in BOOLEANS
        elif following.startswith("--") or following.endswith(".py"):
            fail(f"{flag} needs a value; try {flag}={'adasam' if name == 'optim' else 'VALUE'}")
        else:
            end += 1
    flags, program = list(words[:end]), list(words[end:])
    if not program or program == ["-m"]:
        fail(f"there is no {'module' if program else 'script'} after {words[-1]}; give one to run")
    return flags, program


def asks_for_radius_zero(words: Sequence[str]) -> bool:
    """Whether a command line asks for radius 0, anywhere in it."""
    values: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, has_value, value = word.partition("=")
        values[name.replace("-", "_")] = value if has_value else following
    try:
        return values.get("__optim") in ("amsgrad", "sgdm") or float(values["__sam_rho"]) == 0
    except (KeyError, ValueError):
        return False
