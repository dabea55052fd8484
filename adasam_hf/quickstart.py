"""`adasam quickstart`: AdaSAM beside AMSGrad on real sentences."""

import argparse
import itertools
import math
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch

from .console import CommandParser
from .glue.configs import find_config
from .glue.metrics import Evaluation, merged
from .glue.record import provenance, write_json
from .glue.run import main as run_glue
from .glue.sentences import write_sentences
from .sharpness import sam_gap

DESCRIPTION = """Compare AdaSAM with AMSGrad (the same at radius 0) on real sentences, from packages alone.

    adasam quickstart
    adasam quickstart --seeds 1 2 3 --sam_rho 0.02 --output_dir runs/quickstart

Fine-tunes MiniLM on Rotten Tomatoes as configs/quickstart.yaml says, once with each, and prints what came out. Data,
models, records, results.json and, with matplotlib, reliability.png go to --output_dir. Further arguments go to
`adasam glue`, but for those that make the comparison. Needs pip install 'adasam_hf[quickstart]'.
"""
CONFIG = "configs/quickstart.yaml"
OPTIMIZERS = ("amsgrad", "adasam")
GAP_BATCHES = 10
FIXED = {"--optim", "--seed", "--config", "--train_file", "--validation_file"}
"""What the comparison sets itself."""
Row: TypeAlias = dict[str, Any]
"""One run and its scores."""


def fine_tune(optim: str, seed: int, rho: float, files: dict[str, Path], output_dir: Path, more: list[str]) -> Row:
    """One run; its scores, and `sam_gap` of the final weights on the same training batches for every optimizer."""
    trainer = run_glue(
        [
            f"--config={find_config(CONFIG)}",
            f"--train_file={files['train']}",
            f"--validation_file={files['validation']}",
            f"--output_dir={output_dir / f'{optim}-{seed}'}",
            f"--optim={optim}",
            f"--sam_rho={rho if optim == 'adasam' else 0}",
            f"--seed={seed}",
            f"--use_cpu={not torch.accelerator.is_available()}",  # bf16 on a CPU must be asked for
            *more,
        ]
    )
    metrics = {m: v for entry in trainer.state.log_history for m, v in entry.items()}
    evaluation = cast(Evaluation, trainer.compute_metrics)
    batches = itertools.islice(trainer.get_train_dataloader(), GAP_BATCHES)
    return {
        "optim": optim,
        "seed": seed,
        "accuracy": metrics["eval_accuracy"],
        "loss": metrics["eval_cross_entropy"],
        "calibration": metrics["eval_calibration_error"],
        "reliability": evaluation.reliability,
        "sam_gap": sam_gap(trainer.model, batches, rho),
        "seconds": metrics["train_runtime"],
    }


COLUMNS = ("accuracy", "loss", "calibration", "sam_gap")


def table(rows: list[Row]) -> str:
    """One line for each optimizer: means, and standard deviations where there are several seeds."""
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
    """Accuracy against confidence, bin by bin, over all seeds; the diagonal is what would be right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(4.5, 4))
    axis.plot([0.5, 1], [0.5, 1], "--", color="gray", label="as sure as right")
    for optim in OPTIMIZERS:
        means = merged(found for row in rows if row["optim"] == optim for found in row["reliability"])
        axis.plot([f["confidence"] for f in means], [f["accuracy"] for f in means], "o-", label=optim)
    axis.set(xlabel="confidence", ylabel="accuracy", title="On held-out sentences")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Its own arguments, and those for `adasam glue`."""
    parser = CommandParser("quickstart", DESCRIPTION)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--sam_rho", type=float, default=0.05, help="AdaSAM's radius, at which sam_gap is taken too")
    args, more = parser.parse_known_args(argv)
    if not 0 < args.sam_rho < math.inf:
        parser.error(f"--sam_rho={args.sam_rho} must be a finite number > 0; try 0.05")
    if taken := sorted(FIXED & {word.partition("=")[0] for word in more}):
        parser.error(f"{', '.join(taken)}: set by this comparison itself; for a run of your own: adasam glue")
    return args, more


EXPLANATION = """
accuracy, loss (cross-entropy) and calibration (expected error of the probabilities): on held-out sentences;
sam_gap: how much the loss rises one gradient step of the radius away, lower is flatter; seconds: of training."""


def main(argv: Sequence[str] | None = None) -> int:
    """`adasam quickstart`."""
    args, more = parse(argv)
    files = write_sentences(args.output_dir / "data")
    rows = [
        fine_tune(optim, seed, args.sam_rho, files, args.output_dir, more)
        for seed in args.seeds
        for optim in OPTIMIZERS
    ]
    config = find_config(CONFIG).read_text(encoding="utf-8")
    content = {"config": config, "sam_rho": args.sam_rho, "more": more, "rows": rows}
    write_json(args.output_dir / "results.json", {**provenance(), **content})
    print(f"\n{table(rows)}\n{EXPLANATION}")
    print(f"Written to {args.output_dir}/results.json")
    if find_spec("matplotlib") is not None:
        plot_reliability(rows, args.output_dir / "reliability.png")
        print(f"How sure and how right the two are: {args.output_dir}/reliability.png")
    return 0
