"""python -m adasam_hf [FLAGS] SCRIPT [ARGUMENTS]: an unmodified script with sharpness-aware trainers.

    python -m adasam_hf run_clm.py --optim adasam --sam_rho 0.05 ...
    python -m adasam_hf --optim adasam -m package.module ...
    torchrun --nproc_per_node 2 -m adasam_hf run_clm.py --optim adasam ...
    accelerate launch -m adasam_hf run_clm.py --optim adasam ...

The script, or with -m the module, is run as python would run it, with the Trainer, Seq2SeqTrainer, TrainingArguments
and Seq2SeqTrainingArguments of Transformers replaced by their sharpness-aware forms (adasam_hf.patch), here and in the
Python processes that it starts. Its arguments, exit code and traceback are its own; SCRIPT --help shows the new
arguments too, if it parses TrainingArguments. For a script that does not, give --optim and --sam_… before its name:
they become the defaults of all its TrainingArguments.
"""

from .launcher import main

if __name__ == "__main__":
    main(__doc__)
