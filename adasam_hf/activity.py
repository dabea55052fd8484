"""What the trainings of this process and of those that it has started have done. Needs neither torch nor Transformers.

A launched program and its children share a file, whose name the environment carries; each training adds a line to it.
"""

import os
import tempfile
from collections import Counter

FILE = "ADASAM_HF_ACTIVITY"  # the environment variable

_here: Counter[str] = Counter()
_owner: int | None = None  # the process that reads the file


def record(perturbed_steps: int) -> None:
    """Note that a training has ended, in whatever way, `perturbed_steps` of whose steps had a radius above 0."""
    _add("trainings", 1)
    _add("perturbed_steps", perturbed_steps)


def record_ascent() -> None:
    """Note that weights have been perturbed, in whoever's training loop. Costs nothing after the first time."""
    if not _here["ascents"]:
        _add("ascents", 1)


def record_radius_zero() -> None:
    """Note that somebody has asked for a training at radius 0."""
    _add("radius_zero", 1)


def collect() -> None:
    """From now on, count what children record, too."""
    global _owner
    _owner = os.getpid()
    # Made by the first child that has something to say.
    os.environ[FILE] = os.path.join(tempfile.gettempdir(), f"adasam_hf-{os.urandom(8).hex()}")


def totals() -> Counter[str]:
    """The sums of what was recorded: ``trainings``, ``perturbed_steps``, ``radius_zero``."""
    found = Counter(_here)
    if _owner == os.getpid():
        try:
            with open(os.environ[FILE], encoding="ascii") as file:
                for name, count in map(str.split, file):
                    found[name] += int(count)
        except (FileNotFoundError, KeyError):  # no child has trained; or the program has emptied its environment
            pass
    return found


def forget() -> None:
    """Remove the file."""
    if os.path.exists(path := os.environ.get(FILE, "")):
        os.unlink(path)


def _add(name: str, count: int) -> None:
    _here[name] += count
    if (path := os.environ.get(FILE)) and os.getpid() != _owner:
        # One short write to a file that is open for appending: lines of several processes do not mix.
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(file, f"{name} {count}\n".encode("ascii"))
            finally:
                os.close(file)
        except OSError:  # another machine's folder, a full disk: a line at the end is not worth a training
            del os.environ[FILE]
