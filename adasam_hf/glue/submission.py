"""The files that the GLUE leaderboard takes: written by a run, checked, and put into one zip."""

import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..console import CommandParser
from .configs import read_text
from .tasks import TASKS, Task, get_task

DESCRIPTION = """Make the zip that the GLUE leaderboard takes, from runs with --do_predict on the nine test sets.

    for task in cola sst2 mrpc stsb qqp mnli qnli rte; do
        adasam glue --config configs/glue/$task.yaml --config configs/optim/adasam.yaml --do_predict \\
            --output_dir runs/submission/$task
    done
    adasam glue --task_name wnli --model_name_or_path roberta-large --do_predict ...   # not in the paper
    adasam submit runs/submission/* --output submission.zip

Each file is checked before anything is written: its header, its number of rows, its indices and its labels.

A submission also has the diagnostic set AX, which is not a task and does not count for the score. If no folder has an
AX.tsv of yours, one that says "entailment" throughout stands in for it.
"""

# Of the nine tasks' test sets, and of the diagnostic set.
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


def write_submission(path: Path, task: Task, predictions: Iterable) -> None:
    """A TSV file as the GLUE leaderboard takes it: index and prediction; scores of STS-B are cut to [0, 5]."""
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
        raise ValueError(f"{path}: its first line is {header!r}, not 'index\\tprediction'; make it with run_glue.py")
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
        ValueError: for a file that is missing, comes twice, or is not as it must be.
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
    """A file that gives each row the task's first label."""
    return "".join(["index\tprediction\n", *(f"{index}\t{task.labels[0]}\n" for index in range(rows))])


def write_zip(files: dict[str, Path], output: Path) -> None:
    """The files at the top of a zip, whole or not at all; without an AX.tsv its stand-in."""
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
    parser.add_argument("folders", type=Path, nargs="+", help="output_dirs of the runs")
    parser.add_argument("--output", type=Path, default=Path("submission.zip"))
    args = parser.parse_args(argv)
    files = collect(args.folders)
    write_zip(files, args.output)
    made_up = "" if "AX.tsv" in files else "; AX.tsv, which counts nothing, is made up"
    print(f"{args.output}: {', '.join(files)}{made_up}")
    return 0
