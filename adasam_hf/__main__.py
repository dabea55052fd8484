"""python -m adasam_hf SCRIPT [ARGUMENTS]: an unmodified script with sharpness-aware trainers.

    python -m adasam_hf run_clm.py --optim adasam --sam_rho 0.05 ...
    torchrun --nproc_per_node 2 -m adasam_hf run_clm.py --optim adasam ...
    accelerate launch -m adasam_hf run_clm.py --optim adasam ...

The script is run as python would run it, with the Trainer, Seq2SeqTrainer, TrainingArguments and
Seq2SeqTrainingArguments of Transformers replaced by their sharpness-aware forms (adasam_hf.patch). Its arguments, exit
code and traceback are its own; SCRIPT --help shows the new arguments too, if it parses TrainingArguments.
"""

import os
import runpy
import sys
from types import TracebackType


def main() -> None:
    """Run the script that the command line names."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    del sys.argv[0]
    script = sys.argv[0]
    if not os.path.isfile(script):
        raise SystemExit(f"adasam_hf: SCRIPT={script!r} does not exist; give the path of a Python file")
    from .patching import patch

    patch()
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.abspath(script))  # as for `python SCRIPT`
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception as error:
        error.with_traceback(_from(error.__traceback__, script))
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(1) from None


def _from(traceback: TracebackType | None, script: str) -> TracebackType | None:
    """What of the traceback begins in the script; all of it, if nothing does (a syntax error)."""
    found = traceback
    while found is not None and found.tb_frame.f_code.co_filename != script:
        found = found.tb_next
    return found or traceback


if __name__ == "__main__":
    main()
