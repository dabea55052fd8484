"""The command `adasam`: the launcher of training scripts, and the commands of this package."""

import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from .console import is_mistake, refuse, sentence

USAGE = """{program}: sharpness-aware fine-tuning (AdaSAM, arXiv:2303.00565) for the Hugging Face Trainer.

    {program} [FLAGS] SCRIPT [ARGUMENTS]        an unmodified training script with sharpness-aware trainers
    {program} [FLAGS] -m MODULE [ARGUMENTS]     the same for a module
    {program} [--debug] COMMAND [ARGUMENTS]     one of the commands below

    {program} run_clm.py --optim adasam --sam_rho 0.05 ...
    {program} --optim adasam -m package.module ...
    torchrun --nproc_per_node 2 -m adasam_hf run_clm.py --optim adasam ...
    accelerate launch -m adasam_hf run_clm.py --optim adasam ...

The script, or with -m the module, is run as python would run it, with the Trainer, Seq2SeqTrainer, TrainingArguments
and Seq2SeqTrainingArguments of Transformers replaced by their sharpness-aware forms (adasam_hf.patch), here and in the
Python processes that it starts. Its arguments, exit code and traceback are its own; SCRIPT --help shows the new
arguments too, if it parses TrainingArguments. For a script that does not, give --optim and --sam_… before its name:
they become the defaults of all its TrainingArguments.

Commands:

{commands}

`{program} COMMAND --help` has an example of each; `{program} --debug COMMAND …` shows the traceback of an error.
A script whose name is that of a command is given with its folder or suffix: ./sweep, sweep.py.
"""


@dataclass(frozen=True)
class Command:
    """A command: the module whose `main` takes its arguments, and what it does."""

    module: str
    summary: str


COMMANDS = {
    "quickstart": Command("quickstart", "AdaSAM beside AMSGrad on real sentences, in a few minutes on a CPU"),
    "glue": Command("glue.command", "fine-tune a classifier on a GLUE task or on your own sentences"),
    "sweep": Command("glue.sweep.command", "do a grid of such runs from one file"),
    "report": Command("glue.report.command", "make the report on the records of sweeps"),
    "power": Command("glue.report.power", "how many seeds a paired test needs to see a gain"),
    "submit": Command("glue.submission", "make the zip that the GLUE leaderboard takes"),
    "landscape": Command("benchmarks.landscape_command", "draw the loss around the weights of checkpoints"),
    "benchmark": Command("benchmarks.command", "measure what a step costs, what each mode keeps of AdaSAM, and a GPU"),
    "env": Command("environment", "print versions and devices for a bug report"),
}


def usage(program: str) -> str:
    """What --help prints."""
    commands = "\n".join(f"    {name:<12}{command.summary}" for name, command in COMMANDS.items())
    return USAGE.format(program=program, commands=commands)


def run_command(name: str, argv: Sequence[str] | None = None, debug: bool = False) -> int:
    """Do one command, and return its exit code. Input that it cannot use is one line on stderr and the code 2.

    argv: its arguments; those of this process if None.
    debug: let errors through.
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
