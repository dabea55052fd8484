"""What the trainings of this process and of those that it has started have done. Needs neither torch nor Transformers.

A launched program and its children share a file, whose name the environment carries; each training adds a line to it.
A program that is killed, or replaces itself by another one, leaves the file behind, and the next launcher removes it.
"""

import glob
import os
import platform
import tempfile
from collections import Counter
from contextlib import suppress

FILE_VARIABLE = "ADASAM_HF_ACTIVITY"  # the environment variable

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
    # (The machine's name, for a folder that several machines or containers share: each knows its own processes only.)
    start = os.path.join(tempfile.gettempdir(), f"adasam_hf-{platform.node()}-")
    _remove_stale(start)
    # Made by the first child that has something to say.
    os.environ[FILE_VARIABLE] = f"{start}{_owner}-{os.urandom(8).hex()}"


def totals() -> Counter[str]:
    """The sums of what was recorded: ``trainings``, ``perturbed_steps``, ``ascents``, ``radius_zero``."""
    found = Counter(_here)
    if _owner == os.getpid():
        # Without a file no child has trained; without the variable the program has emptied its environment.
        with suppress(OSError, KeyError), open(os.environ[FILE_VARIABLE], encoding="ascii") as file:
            for name, count in map(str.split, file):
                found[name] += int(count)
    return found


def collecting() -> bool:
    """Whether this process is the one that reports at its end."""
    return _owner == os.getpid()


def discard() -> None:
    """Report nothing at the end, and remove the file."""
    global _owner
    if collecting():
        _owner = None
        forget()


def forget() -> None:
    """Remove the file, if that is possible: nothing at a program's end is worth an error of ours."""
    with suppress(OSError, KeyError):
        os.unlink(os.environ[FILE_VARIABLE])


def _add(name: str, count: int) -> None:
    _here[name] += count
    if (path := os.environ.get(FILE_VARIABLE)) and not collecting():
        # One short write to a file that is open for appending: lines of several processes do not mix.
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(file, f"{name} {count}\n".encode("ascii"))
            finally:
                os.close(file)
        except OSError:  # another machine's folder, a full disk: a line at the end is not worth a training
            del os.environ[FILE_VARIABLE]


def _remove_stale(start: str) -> None:
    """Files of launchers on this machine that have ended."""
    if os.name != "posix":  # elsewhere, to ask for a process by signal 0 is to interrupt it
        return
    for path in glob.glob(f"{glob.escape(start)}*"):
        process = path.removeprefix(start).partition("-")[0]
        if not process.isdecimal():
            continue
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            with suppress(OSError):  # somebody else's
                os.unlink(path)
        except (OSError, OverflowError):  # alive, and somebody else's; or no process's number
            pass
