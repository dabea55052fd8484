"""The files for the GLUE leaderboard: write them in a run, check them, and zip them."""

import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..console import CommandParser
from .configs import read_text
from .tasks import TASKS, Task, get_task

DESCRIPTION = """Make the zip for the GLUE leaderboard from runs with --do_predict on the nine test sets.

    for task in cola sst2 mrpc stsb qqp mnli qnli rte; do
        adasam glue --config configs/glue/$task.yaml --config configs/optim/adasam.yaml --do_predict \\
            --output_dir runs/submission/$task
    done
    adasam glue --task_name wnli --model_name_or_path roberta-large --do_predict ...   # not in the paper
    adasam submit runs/submission/* --output submission.zip

Each file is checked before anything is written: its header, its number of rows, its indices and its labels.

A submission also needs AX.tsv, for the diagnostic set, which does not count towards the score. If none of the folders
has one, the zip gets a placeholder that predicts "entailment" for every row.
"""

# Rows in the nine tasks' test sets and in the diagnostic set.
ROWS = {
    "CoLA.tsv": 1063,
    "SST-2.tsv": 1821,
    "MRPC.tsv": 1725,
    "STS-B.tsv": 1379,
    "QQP.tsv": 390965,
    "MNLI-m.tsv": 9796,
    "MNLI-mm.tsv": 9847,
    "QNLI.tsv": 5463,
    "RTE.tsv": 3000,
    "WNLI.tsv": 146,
    "AX.tsv": 1104,
}


def write_submission(path: Path, task: Task, predictions: Iterable[Any]) -> None:
    """Write a TSV file for the GLUE leaderboard: index and prediction, with scores of STS-B clipped to [0, 5]."""
    with open(path, "w", encoding="utf-8") as file:
        file.write("index\tprediction\n")
        for index, value in enumerate(predictions):
            if task.is_regression:
                text = f"{min(max(float(value), 0.0), 5.0) if task.name == 'stsb' else float(value):.3f}"
            else:
                text = task.labels[value] if task.named_labels else str(int(value))
            file.write(f"{index}\t{text}\n")


def check(path: Path, task: Task) -> None:
    """Refuse a file that the leaderboard would refuse.

    Raises:
        ValueError: naming the file, the line and what was expected there.
    """
    header, *lines = read_text(path, str(path)).splitlines() or [""]
    if header != "index\tprediction":
        raise ValueError(f"{path}: its first line is {header!r}, not 'index\\tprediction'; make it with adasam glue")
    if len(lines) != ROWS[path.name]:
        raise ValueError(
            f"{path}: {len(lines)} predictions, the test set has {ROWS[path.name]} rows; predict again without "
            "--max_predict_samples"
        )
    allowed = set(task.labels) if task.named_labels else {str(i) for i in range(len(task.labels))}
    for number, line in enumerate(lines):
        index, _, value = line.partition("\t")
        if index != str(number):
            raise ValueError(f"{path}: line {number + 2} has index {index!r}, not {number}")
        if not (_score(value) if task.is_regression else value in allowed):
            expected = "a number from 0 to 5" if task.is_regression else f"one of {sorted(allowed)}"
            raise ValueError(f"{path}: line {number + 2} predicts {value!r}, not {expected}")


def _score(text: str) -> bool:
    try:
        return 0.0 <= float(text) <= 5.0
    except ValueError:
        return False


def collect(folders: list[Path]) -> dict[str, Path]:
    """File name → the checked file. AX.tsv may be missing.

    Raises:
        ValueError: for a file that is missing, in several folders, or invalid.
    """
    found: dict[str, Path] = {}
    for task in TASKS.values():
        for _, name in task.submissions:
            paths = [folder / name for folder in folders if (folder / name).is_file()]
            if len(paths) != 1:
                where = f"is in {len(paths)} folders: {[str(p.parent) for p in paths]}" if paths else "is missing"
                raise ValueError(f"{name} {where}; give one folder of a run of task {task.name} with --do_predict")
            check(paths[0], task)
            found[name] = paths[0]
    for path in [folder / "AX.tsv" for folder in folders if (folder / "AX.tsv").is_file()][:1]:
        check(path, get_task("mnli"))  # its labels are MNLI's
        found[path.name] = path
    return found


def stand_in(task: Task, rows: int) -> str:
    """The text of a file that predicts the task's first label for every row."""
    return "".join(["index\tprediction\n", *(f"{index}\t{task.labels[0]}\n" for index in range(rows))])


def write_zip(files: dict[str, Path], output: Path) -> None:
    """Write a zip of the files, whole or not at all; without an AX.tsv, it gets a placeholder."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in files.items():
            archive.write(path, name)
        if "AX.tsv" not in files:
            archive.writestr("AX.tsv", stand_in(get_task("mnli"), ROWS["AX.tsv"]))
    os.replace(temporary, output)


def main(argv: Sequence[str] | None = None) -> int:
    """`adasam submit`."""
    parser = CommandParser("submit", DESCRIPTION)
    parser.add_argument("folders", type=Path, nargs="+", help="output_dirs of the runs, one for each task")
    parser.add_argument(
        "--output", type=Path, default=Path("submission.zip"), help="zip file to write (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    files = collect(args.folders)
    write_zip(files, args.output)
    made_up = "" if "AX.tsv" in files else "; AX.tsv, which counts nothing, is made up"
    print(f"{args.output}: {', '.join(files)}{made_up}")
    return 0
