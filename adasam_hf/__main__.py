"""python -m adasam_hf [FLAGS] SCRIPT [ARGUMENTS]: an unmodified script with sharpness-aware trainers.

    python -m adasam_hf run_clm.py --optim adasam --sam_rho 0.05 ...
    torchrun --nproc_per_node 2 -m adasam_hf run_clm.py --optim adasam ...
    accelerate launch -m adasam_hf run_clm.py --optim adasam ...

The script is run as python would run it, with the Trainer, Seq2SeqTrainer, TrainingArguments and
Seq2SeqTrainingArguments of Transformers replaced by their sharpness-aware forms (adasam_hf.patch). Its arguments, exit
code and traceback are its own; SCRIPT --help shows the new arguments too, if it parses TrainingArguments. For a script
that does not, give --optim and --sam_… before its name: they become the defaults of all its TrainingArguments.
"""

import io
import os
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType


def main() -> None:
    """Run the script that the command line names."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    words = sys.argv[1:]
    begin = next((i for i, word in enumerate(words) if os.path.isfile(word)), 0) if words[0].startswith("--") else 0
    before, sys.argv = words[:begin], words[begin:]
    script = sys.argv[0]
    if not os.path.isfile(script):
        raise SystemExit(f"adasam_hf: SCRIPT={script!r} is no file; give the path of a Python file")
    path = os.path.abspath(script)
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(script))  # as for `python SCRIPT`, and before other imports
    from .patching import give, patch, watch_flags

    if before:
        give(before)

    # Threads and processes that outlive the script look for its names there.
    module = ModuleType("__main__")
    module.__dict__.update(__file__=path, __loader__=SourceFileLoader("__main__", path), __package__=None)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    patch()
    watch_flags(sys.argv[1:])
    try:
        with io.open_code(path) as file:
            exec(compile(file.read(), path, "exec"), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:  # Ctrl-C, too
        _show_from(error, path)
        raise


def _show_from(error: BaseException, path: str) -> None:
    """Have the traceback printed from where the script begins; all of it, if it does not (a syntax error)."""
    found = error.__traceback__
    while found is not None and found.tb_frame.f_code.co_filename != path:
        found = found.tb_next
    show, begin = sys.excepthook, found or error.__traceback__

    def hook(kind: type[BaseException], value: BaseException, _: TracebackType | None) -> None:
        show(kind, value.with_traceback(begin), begin)

    sys.excepthook = hook


if __name__ == "__main__":
    main()
