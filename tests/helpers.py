"""Functions that several files of tests use, and that are not fixtures."""

from datasets import ClassLabel, Dataset, Features, Value


def snapshot(folder, task, labels=(0, 1, 0), test_labels=(-1, -1), texts=None, names=None):
    """A small GLUE task in the hub's layout."""
    columns = {c: Value("string") for c in texts or task.texts}
    label = Value("float32") if task.is_regression else ClassLabel(names=list(names or task.labels))
    features = Features({**columns, "label": label, "idx": Value("int32")})

    def rows(values):
        values = [float(v) for v in values] if task.is_regression else list(values)
        content = {c: [f"{c} {i}" for i in range(len(values))] for c in columns}
        return Dataset.from_dict({**content, "label": values, "idx": list(range(len(values)))}, features=features)

    splits = {"train": rows(labels)}
    splits |= {split: rows(labels) for split, _ in task.evaluations}
    splits |= {split: rows(test_labels) for split, _ in task.submissions}
    lines = ["---", "configs:", f"- config_name: {task.name}", "  data_files:"]
    for split, content in splits.items():
        path = folder / task.name / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        content.to_parquet(path)
        lines += [f"  - split: {split}", f"    path: {task.name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(folder)
