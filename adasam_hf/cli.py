"""The command `adasam`: it launches training scripts, and runs the commands of this package."""

import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from ._version import __version__
from .console import is_mistake, refuse, sentence

USAGE = """{program}: sharpness-aware fine-tuning (AdaSAM, arXiv:2303.00565) for the Hugging Face Trainer.

    {program} [FLAGS] SCRIPT [ARGUMENTS]        an unmodified training script with sharpness-aware trainers
    {program} [FLAGS] -m MODULE [ARGUMENTS]     the same for a module
    {program} [--debug] COMMAND [ARGUMENTS]     one of the commands below
    {program} --version

    {program} run_clm.py --optim adasam --sam_rho 0.01 ...
    {program} --optim adasam -m package.module ...
    torchrun --nproc_per_node 2 -m adasam_hf run_clm.py --optim adasam ...
    accelerate launch -m adasam_hf run_clm.py --optim adasam ...

The script (or, with -m, the module) runs as under python, but with the Trainer, Seq2SeqTrainer, TrainingArguments and
Seq2SeqTrainingArguments of Transformers replaced by their sharpness-aware forms (adasam_hf.patch), here and in the
Python processes that it starts. Its arguments, exit code and traceback stay the same. If it parses TrainingArguments,
SCRIPT --help also shows the new arguments. If it does not, give --optim and --sam_… before its name: they become the
defaults of all its TrainingArguments.

Commands:

{commands}

`{program} COMMAND --help` shows an example; `{program} --debug COMMAND …` shows the traceback of an error.
To run a script that has the name of a command, give its folder or suffix: ./sweep, sweep.py.
"""


@dataclass(frozen=True)
class Command:
    """The module whose `main` takes the command's arguments, and what the command does."""

    module: str
    summary: str


COMMANDS = {
    "quickstart": Command("quickstart", "compare AdaSAM with AMSGrad on real sentences, in a few minutes on a CPU"),
    "glue": Command("glue.command", "fine-tune a classifier on a GLUE task or on your own sentences"),
    "sweep": Command("glue.sweep.command", "run a grid of such fine-tunings from one file"),
    "report": Command("glue.report.command", "make a report from the records of sweeps"),
    "power": Command("glue.report.power", "show how many seeds a paired t test needs to detect a gain"),
    "submit": Command("glue.submission", "make the zip for the GLUE leaderboard"),
    "landscape": Command("benchmarks.landscape_command", "draw the loss around the weights of checkpoints"),
    "benchmark": Command("benchmarks.command", "measure what a step costs, what each mode keeps of AdaSAM, and a GPU"),
    "env": Command("environment", "print versions and devices for a bug report"),
}


def usage(program: str) -> str:
    """What --help prints."""
    commands = "\n".join(f"    {name:<12}{command.summary}" for name, command in COMMANDS.items())
    return USAGE.format(program=program, commands=commands)


def run_command(name: str, argv: Sequence[str] | None = None, debug: bool = False) -> int:
    """Run one command and return its exit code. Input that it cannot use gives one line on stderr and code 2.

    argv: the command's arguments; None for those of this process.
    debug: raise errors instead.
    """
    try:
        main = import_module(f".{COMMANDS[name].module}", __package__).main
        return int(main(sys.argv[1:] if argv is None else argv))
    except Exception as error:
        if debug or not is_mistake(error):
            raise
        return refuse(f"adasam {name}", sentence(error))
    except KeyboardInterrupt:
        if debug:
            raise
        return 130


def main(program: str = "adasam") -> None:
    """`adasam`, and `python -m adasam_hf`.

    program: the name that the help and the launcher's messages begin with.
    """
    words = sys.argv[1:]
    debug = words[:1] == ["--debug"]
    first = words[debug] if len(words) > debug else ""
    if first in COMMANDS:
        raise SystemExit(run_command(first, words[debug + 1 :], debug))
    if first == "--version":
        print(f"{program} {__version__}")
        return
    if debug:
        raise SystemExit(refuse(program, "--debug is for a command, and comes right before its name"))
    if _is_bare(first) and not os.path.exists(first):
        similar = difflib.get_close_matches(first, COMMANDS, n=1)
        meant = f"; did you mean {similar[0]}?" if similar else ""
        message = f"{first!r} is neither a command ({', '.join(COMMANDS)}) nor a script{meant}"
        raise SystemExit(refuse(program, message))
    from .launcher import main as launch

    launch(usage(program), program=program)


def _is_bare(word: str) -> bool:
    return bool(word) and not word.startswith("-") and os.path.basename(word) == word and not word.endswith(".py")
