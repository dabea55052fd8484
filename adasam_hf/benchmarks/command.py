"""`adasam benchmark`: the command lines of both benchmarks."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..console import CommandParser
from .settings import FLATNESS_MODES, FLATNESS_TASKS, FREEZES, MODES, PEERS, SIZES

DESCRIPTION = """Measure AdaSAM beside its peers.

    adasam benchmark step --model minilm --dtype float32     time and memory of a step
    adasam benchmark flatness --dataset_name_or_path glue    score, flatness and time of each mode
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


def step(argv: Sequence[str]) -> int:
    """`adasam benchmark step`."""
    parser = CommandParser("benchmark step", STEP_DESCRIPTION)
    parser.add_argument("--model", default="minilm", choices=["minilm", *SIZES])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bf16"])
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


BENCHMARKS = {"step": step, "flatness": flatness}


def main(argv: Sequence[str] | None = None) -> int:
    """`adasam benchmark`: which of the two."""
    parser = CommandParser("benchmark", DESCRIPTION)
    parser.add_argument("what", choices=BENCHMARKS)
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words[:1])
    return BENCHMARKS[args.what](words[1:])
