"""Compare AdaSAM with AMSGrad on the same rows with the same seeds."""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch

from ..sharpness import sam_gap
from .configs import find_config
from .metrics import Evaluation, merged
from .record import provenance, write_json
from .run import main as run_glue
from .sentences import write_sentences

CONFIG = "configs/quickstart.yaml"
OPTIMIZERS = {"amsgrad": {"learning_rate": 5.6e-5}, "adasam": {"learning_rate": 1e-4, "sam_rho": 0.02}}
"""Name → what was chosen for it on held-out rows: results/evidence/REPORT.md."""
GAP_RADIUS, GAP_BATCHES = 0.05, 4
Row: TypeAlias = dict[str, Any]
"""One run and its scores."""


def fine_tune(optim: str, seed: int, files: dict[str, Path], output_dir: Path, more: list[str]) -> Row:
    """One run; its scores, and `sam_gap` of the final weights on training batches, the same ones for every optimizer.

    `more`: arguments of `adasam glue`, which win over all but `optim` and `seed`.
    """
    trainer = run_glue(
        [
            f"--config={find_config(CONFIG)}",
            f"--train_file={files['train']}",
            f"--validation_file={files['validation']}",
            f"--output_dir={output_dir / f'{optim}-{seed}'}",
            f"--optim={optim}",
            *(f"--{name}={value}" for name, value in OPTIMIZERS[optim].items()),
            f"--seed={seed}",
            f"--subset_seed={seed}",
            f"--use_cpu={not torch.accelerator.is_available()}",  # bf16 needs it on a CPU
            *more,
        ]
    )
    metrics = {m: v for entry in trainer.state.log_history for m, v in entry.items()}
    evaluation = cast(Evaluation, trainer.compute_metrics)
    batches = itertools.islice(trainer.get_train_dataloader(), GAP_BATCHES)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # without autocast
    return {
        "optim": optim,
        "seed": seed,
        "accuracy": metrics["eval_accuracy"],
        "loss": metrics["eval_cross_entropy"],
        "calibration": metrics["eval_calibration_error"],
        "reliability": evaluation.reliability,
        "sam_gap": sam_gap(model, batches, GAP_RADIUS),
        "seconds": metrics["train_runtime"],
    }


COLUMNS = ("accuracy", "loss", "calibration", "sam_gap")


def table(rows: list[Row]) -> str:
    """One line for each optimizer: means, and with several seeds standard deviations."""
    out = [f"{'optimizer':<12}" + "".join(f"{name:>18}" for name in COLUMNS) + f"{'seconds':>10}"]
    for optim in OPTIMIZERS:
        mine = [row for row in rows if row["optim"] == optim]
        cells = []
        for name in COLUMNS:
            values = [row[name] for row in mine]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        seconds = statistics.mean(row["seconds"] for row in mine)
        out.append(f"{optim:<12}" + "".join(f"{cell:>18}" for cell in cells) + f"{seconds:>10.0f}")
    return "\n".join(out)


def plot_reliability(rows: list[Row], path: Path) -> None:
    """Accuracy against confidence, bin by bin, over all seeds; the diagonal is perfect calibration."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(4.5, 4))
    axis.plot([0.5, 1], [0.5, 1], "--", color="gray", label="perfect calibration")
    for optim in OPTIMIZERS:
        means = merged(found for row in rows if row["optim"] == optim for found in row["reliability"])
        axis.plot([f["confidence"] for f in means], [f["accuracy"] for f in means], "o-", label=optim)
    axis.set(xlabel="confidence", ylabel="accuracy", title="On held-out sentences")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def compare(seeds: Iterable[int], output_dir: Path, more: Sequence[str]) -> list[Row]:
    """Fine-tune with each optimizer and seed, and write results.json."""
    files = write_sentences(output_dir / "data")
    rows = [fine_tune(optim, seed, files, output_dir, list(more)) for seed in seeds for optim in OPTIMIZERS]
    config = find_config(CONFIG).read_text(encoding="utf-8")
    content = {"config": config, "optimizers": OPTIMIZERS, "more": list(more), "rows": rows}
    write_json(output_dir / "results.json", {**provenance(), **content})
    return rows
