"""`adasam benchmark`: the command lines of all benchmarks."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..console import CommandParser
from .settings import ACCELERATOR_PARTS, FLATNESS_MODES, FLATNESS_TASKS, FREEZES, MODES, PEERS, SIZES

DESCRIPTION = """Measure AdaSAM beside its peers.

    adasam benchmark step --model minilm --dtype float32     time and memory of a step
    adasam benchmark flatness --dataset_name_or_path glue    score, flatness and time of each mode
    adasam benchmark accelerator                             all that is to be known of one GPU, in eight minutes
    adasam benchmark bundle --glue ../shared/glue            a file with all that a GPU without a network needs
    adasam benchmark step --help                             its arguments
"""
STEP_DESCRIPTION = """Measure what a step costs: AdaSAM in each mode and its peers, as ratios to AdamW (fused).

    adasam benchmark step --model minilm --dtype float32     one table
    adasam benchmark step --scan                             ratio against model and batch size, as a plot
    adasam benchmark step --against REVISION                 AdaSAM beside that of another commit
    adasam benchmark step --frozen half                      with the lower half of the layers frozen

All contenders share one model and see the same batches of real sentences. They take turns on each batch; a ratio is
the median over the batches of (time of the contender / time of AdamW on that batch), with its quartiles. Times are wall
seconds; with OMP_NUM_THREADS=1 they are CPU seconds, so that other jobs on the machine do not count. Peak memory is
that of a separate process. Writes results/benchmark_step/*.json, which the tables are made from.
"""
FLATNESS_DESCRIPTION = """Measure what each mode keeps of AdaSAM: score, flatness and time, with equal data and seeds.

Fine-tunes MiniLM on small GLUE tasks, once for each task, mode and seed, from a local copy of the data:

    adasam benchmark flatness --dataset_name_or_path ../shared/glue

Each run leaves results/benchmark_flatness/records/<task>-<mode>-<seed>.json; runs that have one are skipped, so that
the command can be stopped and repeated. From the records come table.md and pareto.png beside them.

Measured of the final weights, in float32 without dropout: `sam_gap` at radius 0.05 and the top eigenvalue of the
Hessian on training rows. Time: the process's CPU seconds in training (so that other jobs on the machine do not count;
set OMP_NUM_THREADS=1, as threads that wait would), as a ratio to AMSGrad's with the same seed.
"""
ACCELERATOR_DESCRIPTION = """Measure one accelerator, and run the tests that need one, in at most eight minutes.

    adasam benchmark accelerator                               everything
    adasam benchmark accelerator --only tests bandwidth        two parts of it
    ADASAM_DEVICE=cpu adasam benchmark accelerator             a rehearsal with small models on the CPU

Each part is a process with a time limit of its own, and writes its records at once: <output_dir>/*.json (of a rehearsal
in its folder rehearsal). From those that are there comes README.md beside them.

    bandwidth            the share of a plain copy's bandwidth that norm, copy, move, restore and update reach
    step-minilm, step-bert-base, step-roberta-large
                         time, tokens per second and peak memory of a step in bf16, float32 and fp16: AdamW, AMSGrad,
                         AdaSAM and its cheap forms, with a frozen half, and its peers (those that are installed)
    tests                the tests that take the device as it comes, and those that need one
"""
BUNDLE_DESCRIPTION = """Make one file with all that a machine with a GPU and no network needs beside Python packages.

    adasam benchmark bundle --glue ../shared/glue --output adasam_hf-bundle.tar.gz

In it: the checkout's tracked files, MiniLM in half precision, Rotten Tomatoes' sentences, and the GLUE tasks cola,
mrpc, rte, sst2, stsb and wnli of the folder. Unpack it and type `make accelerator` there; where torch or Transformers
is missing, wheels in a folder `wheels` beside the Makefile are installed. Above 64 MiB there is no bundle.
"""


def step(argv: Sequence[str]) -> int:
    """`adasam benchmark step`."""
    parser = CommandParser("benchmark step", STEP_DESCRIPTION)
    parser.add_argument("--model", default="minilm", choices=["minilm", *SIZES])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bf16", "fp16"])
    parser.add_argument("--rounds", type=int, default=20, help="batches that are timed")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--contenders", nargs="+", choices=[*MODES, *PEERS], help="all by default")
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--against", metavar="REVISION", help="compare with the package at another commit")
    parser.add_argument("--frozen", choices=FREEZES, help="freeze this part of the model")
    parser.add_argument("--output_dir", type=Path, default=Path("results/benchmark_step"))
    parser.add_argument("--only_memory", choices=[*MODES, *PEERS], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.rounds, args.batch_size) < 1:
        parser.error(f"--rounds={args.rounds} and --batch_size={args.batch_size} must be at least 1")
    from transformers.utils import logging

    from .step import against, compare, compare_frozen, measure_memory, scan

    logging.set_verbosity_error()
    if args.only_memory:
        measure_memory(args)
    elif args.scan:
        scan(args)
    elif args.against:
        against(args)
    elif args.frozen:
        compare_frozen(args)
    else:
        compare(args)
    return 0


def accelerator(argv: Sequence[str]) -> int:
    """`adasam benchmark accelerator`: 1 if a part has failed."""
    parser = CommandParser("benchmark accelerator", ACCELERATOR_DESCRIPTION)
    parser.add_argument("--only", nargs="+", choices=ACCELERATOR_PARTS, help="these parts; all by default")
    parser.add_argument("--output_dir", type=Path, default=Path("results/accelerator"))
    parser.add_argument("--report_only", action="store_true", help="the page from the records that are there")
    parser.add_argument("--part", choices=ACCELERATOR_PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    from transformers.utils import logging

    from .accelerator import LIMITS, run_part, run_parts
    from .accelerator_page import write_page
    from .device import REHEARSAL, chosen_device

    logging.set_verbosity_error()
    if args.part:
        run_part(args.part, args.output_dir)
        return 0
    if chosen_device().type == "cpu" and not REHEARSAL:
        raise ValueError(
            "torch sees no accelerator; for a rehearsal with small models on the CPU set ADASAM_DEVICE=cpu"
        )
    folder = (args.output_dir / "rehearsal" if REHEARSAL else args.output_dir).resolve()
    failures = [] if args.report_only else run_parts(args.only or ACCELERATOR_PARTS, folder)
    write_page(folder, LIMITS)
    print(f"{folder / 'README.md'}")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def bundle(argv: Sequence[str]) -> int:
    """`adasam benchmark bundle`."""
    parser = CommandParser("benchmark bundle", BUNDLE_DESCRIPTION)
    parser.add_argument("--glue", type=Path, required=True, help="a snapshot of nyu-mll/glue with the small tasks")
    parser.add_argument("--output", type=Path, default=Path("adasam_hf-bundle.tar.gz"))
    args = parser.parse_args(argv)
    from .bundle import write_bundle

    size = write_bundle(args.output, args.glue)
    print(f"{args.output}: {size / 2**20:.1f} MiB")
    return 0


def flatness(argv: Sequence[str]) -> int:
    """`adasam benchmark flatness`."""
    parser = CommandParser("benchmark flatness", FLATNESS_DESCRIPTION)
    parser.add_argument("--dataset_name_or_path", default="nyu-mll/glue", help="as in `adasam glue`")
    parser.add_argument("--tasks", nargs="+", default=list(FLATNESS_TASKS), choices=FLATNESS_TASKS)
    parser.add_argument("--modes", nargs="+", default=list(FLATNESS_MODES), choices=FLATNESS_MODES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--output_dir", type=Path, default=Path("results/benchmark_flatness"))
    parser.add_argument("--report_only", action="store_true", help="table and plot from the records that are there")
    args = parser.parse_args(argv)
    from .flatness import run_missing, write_table

    if not args.report_only:
        run_missing(args.output_dir / "records", args.tasks, args.modes, args.seeds, args.dataset_name_or_path)
    print(write_table(args.output_dir))
    return 0


BENCHMARKS = {"step": step, "flatness": flatness, "accelerator": accelerator, "bundle": bundle}


def main(argv: Sequence[str] | None = None) -> int:
    """`adasam benchmark`: which of them."""
    parser = CommandParser("benchmark", DESCRIPTION)
    parser.add_argument("what", choices=BENCHMARKS)
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words[:1])
    return BENCHMARKS[args.what](words[1:])
