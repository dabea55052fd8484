"""Functions that several files of tests use, and that are not fixtures."""

import torch
from conftest import InOrder, make_rows
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


class RunsOutOfMemory(InOrder):
    """Catches what an accelerator without memory raises, as training scripts do, and goes on.

    It is raised at the third micro-batch of `make_rows`, by those of its forward passes that are in `failing`, counted
    from 1, or by all.
    """

    failing = None
    clears = True  # the gradients, when it goes on
    forward_passes = 0

    def training_step(self, model, inputs, *args, **kwargs):
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            if self.clears:
                model.zero_grad()
            return torch.zeros((), dtype=torch.float64)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if torch.equal(inputs["input_ids"][0], make_rows()[8]["input_ids"]):
            self.forward_passes += 1
            if self.failing is None or self.forward_passes in self.failing:
                raise RuntimeError("CUDA out of memory")
        return super().compute_loss(model, inputs, *args, **kwargs)
