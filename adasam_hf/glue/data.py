"""Load a GLUE task, or your own files, as checked splits with integer labels."""

import csv
import math
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, get_dataset_config_names, load_dataset
from datasets.exceptions import DatasetGenerationError

from .tasks import Task

FILE_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}


def resolve_path(name: str) -> str:
    """`pip:PACKAGE/PATH` → that path inside the installed package, without importing it; other names stay as they are.

    Raises:
        FileNotFoundError: if the package or the path in it is missing.
    """
    if not name.startswith("pip:"):
        return name
    package, _, inside = name.removeprefix("pip:").partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{name!r}: the package {package!r} is not installed; pip install -e '.[quickstart]'")
    path = Path(spec.origin).parent / inside
    if not path.exists():
        raise FileNotFoundError(f"{name!r}: the package {package!r} has no {inside!r}")
    return str(path)


def load_task(
    task: Task, name_or_path: str, splits: Iterable[str], cache_dir: str | None = None, token: str | None = None
) -> DatasetDict:
    """A GLUE task from a repository on the Hub or a local folder with the same layout.

    Raises:
        FileNotFoundError: for a folder that does not exist.
        ValueError: if the task or one of the `splits` is missing, or a label is out of range.
    """
    if name_or_path.startswith((".", "/", "~")) and not Path(name_or_path).expanduser().is_dir():
        raise FileNotFoundError(
            f"dataset_name_or_path={name_or_path!r} is not a folder; give a local copy of nyu-mll/glue, or its name on "
            "the Hub"
        )
    name_or_path = str(Path(name_or_path).expanduser()) if name_or_path.startswith("~") else name_or_path
    try:
        available = get_dataset_config_names(name_or_path, token=token)
    except OSError as error:
        raise FileNotFoundError(
            f"dataset_name_or_path={name_or_path!r} is not a folder, and cannot be loaded from the Hub ({error}); "
            "give a local copy of nyu-mll/glue, or its name on the Hub and a connection"
        ) from error
    if task.name not in available:
        raise ValueError(
            f"dataset_name_or_path={name_or_path!r} has no task {task.name!r}, only {available}; "
            "nyu-mll/glue on the Hub has them all"
        )
    data = load_dataset(name_or_path, task.name, cache_dir=cache_dir, token=token)
    return _checked(data, task, splits, f"dataset_name_or_path={name_or_path!r}")


def load_files(
    task: Task | None, files: dict[str, str], text_columns: list[str] | None, label_column: str, splits: Iterable[str]
) -> tuple[Task, DatasetDict]:
    """Splits from CSV, TSV, JSON or JSON-lines files: split name → path.

    Without a `task`, one is inferred from the training file: its texts are `text_columns` (by default the only text
    column besides the label), its labels the sorted label names; fractions as labels make it a regression.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for an unknown format or column, an empty or broken file, a missing split, or a bad label.
    """
    data = DatasetDict()
    for split, name in files.items():
        path = Path(resolve_path(name)).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{split}_file={name!r} does not exist")
        if path.suffix not in FILE_FORMATS:
            raise ValueError(f"{split}_file={name!r} must end in one of {', '.join(FILE_FORMATS)}")
        data[split] = _read_file(path, f"{split}_file={name!r}")
    if "train" not in data:
        raise ValueError("train_file is not set, but it defines the labels; pass it even if nothing is trained")

    texts = text_columns or (list(task.texts) if task else None)
    for split, rows in data.items():
        missing = {*(texts or []), *([label_column] if split != "test" else [])} - set(rows.column_names)
        if missing:
            raise ValueError(
                f"{split}_file={files[split]!r} has no column {sorted(missing)}, only {rows.column_names}; "
                "set text_column_names and label_column_name"
            )
    if not texts:
        texts = [c for c, f in data["train"].features.items() if c != label_column and _is_text(f)]
        if len(texts) != 1:  # of two, one may be an id
            raise ValueError(f"text_column_names is not set, and the text columns are {texts}; name one or two of them")
    data = DatasetDict({s: _named_label(rows, label_column) for s, rows in data.items()})
    task = _infer_task(data["train"], tuple(texts)) if task is None else replace(task, texts=tuple(texts))
    data = DatasetDict(
        {
            split: _indexed(rows, task, f"{split}_file={files[split]!r}", hidden=split == "test")
            for split, rows in data.items()
        }
    )
    return task, _checked(data, task, splits, "the files")


def _read_file(path: Path, where: str) -> Dataset:
    """
    Raises:
        ValueError: if the file has no rows, or is not in the format of its suffix.
    """
    # "NA" and "null" are words, and in TSV files like GLUE's a quotation mark is an ordinary character.
    options = {"keep_default_na": False, "na_values": [""]} if FILE_FORMATS[path.suffix] == "csv" else {}
    if path.suffix == ".tsv":
        options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    if not path.read_bytes().strip():
        raise ValueError(f"{where} is empty; it needs one row for each text, with its label")
    try:
        return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train", **options)
    except DatasetGenerationError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{where} cannot be read as {path.suffix[1:].upper()}: {reason}") from error
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"{where} has no rows; it needs one for each text, with its label") from error


def _is_text(feature: object) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _named_label(rows: Dataset, label_column: str) -> Dataset:
    if label_column == "label" or label_column not in rows.column_names:
        return rows
    if "label" in rows.column_names:
        rows = rows.remove_columns("label")
    return rows.rename_column(label_column, "label")


def _infer_task(train: Dataset, texts: tuple[str, ...]) -> Task:
    values = set(train["label"])
    if None in values:
        raise ValueError(f"{train['label'][:].count(None)} training labels are missing; remove or fill those rows")
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    if any(isinstance(v, float) for v in values):
        labels, metrics = (), ("pearson", "spearmanr")
    else:
        if none := sorted({str(v) for v in values if v == -1 or str(v).strip().lower() == "nan"}):
            raise ValueError(
                f"training labels have {', '.join(map(repr, none))}, which mostly stands for a label that is unknown; "
                "remove those rows or, if this is a class, rename it"
            )
        labels, metrics = tuple(str(v) for v in sorted(values)), ("accuracy",)
        if len(labels) < 2:
            raise ValueError(f"all training labels are {labels[0]!r}; there is nothing to learn from one class")
    return Task("custom", texts, labels, metrics, (("test", "predictions.tsv"),), named_labels=True)


def _indexed(rows: Dataset, task: Task, where: str, hidden: bool) -> Dataset:
    """Label names → indices.

    hidden: the labels are never read, so they may be anything.

    Raises:
        ValueError: for a label that the task does not have.
    """
    if "label" not in rows.column_names or task.is_regression:
        return rows
    if not (_is_text(rows.features["label"]) or task.name == "custom"):
        return rows
    index = {name: i for i, name in enumerate(task.labels)}
    names = rows["label"][:]
    for row, name in enumerate(names):
        if str(name) not in index and not hidden:
            raise ValueError(f"{where}: row {row} has label {name!r}, which is not one of {task.labels}")
    return rows.remove_columns("label").add_column("label", [index.get(str(name), -1) for name in names])


def _checked(data: DatasetDict, task: Task, splits: Iterable[str], where: str) -> DatasetDict:
    for split in splits:
        if split not in data:
            remedy = f"; pass --{split}_file" if where == "the files" else ""
            raise ValueError(f"{where}: no split {split!r} for task {task.name!r}, only {sorted(data)}{remedy}")
        rows = data[split]
        if missing := set(task.texts) - set(rows.column_names):
            raise ValueError(f"{where}: split {split!r} has no column {sorted(missing)}, only {rows.column_names}")
        for column in task.texts:
            if None in (texts := rows[column][:]):
                raise ValueError(f"{where}: row {texts.index(None)} of split {split!r} has no text in {column!r}")
        if split.startswith("test"):
            continue  # GLUE hides these labels; they are never read
        if len(rows) == 0:
            raise ValueError(f"{where}: split {split!r} is empty")
        names = getattr(rows.features["label"], "names", ())
        if isinstance(rows.features["label"], ClassLabel) and tuple(names) != task.labels:
            raise ValueError(f"{where}: labels {names} in split {split!r} are not those of the task, {task.labels}")
        for row, label in enumerate(rows["label"]):
            if task.is_regression:
                fine = isinstance(label, (int, float)) and math.isfinite(label)
                expected = "a finite number"
            else:
                fine = isinstance(label, int) and 0 <= label < len(task.labels)
                expected = f"one of {task.labels} (0 to {len(task.labels) - 1})"
            if not fine:
                raise ValueError(f"{where}: row {row} of split {split!r} has label {label!r}, which is not {expected}")
    return data
