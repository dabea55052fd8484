"""The frozen table of GLUE's nine tasks, as the hub's `nyu-mll/glue` and the leaderboard define them."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Task:
    """One task.

    name: configuration name on the hub.
    texts: the one or two text columns.
    labels: label names by index; empty for regression.
    metrics: the official metrics; the first one ranks models where a single metric must.
    evaluations: validation split → suffix of its metrics (MNLI has two).
    submissions: test split → name of its file on the leaderboard.
    named_labels: whether the submission has label names rather than numbers.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    submissions: tuple[tuple[str, str], ...]
    evaluations: tuple[tuple[str, str], ...] = (("validation", ""),)
    named_labels: bool = False

    @property
    def is_regression(self) -> bool:
        return not self.labels

    def score(self, metrics: Mapping[str, float]) -> float:
        """The task's score as GLUE averages it: the mean over its metrics and its evaluation splits."""
        name = self.metrics[0] if len(self.metrics) == 1 else "combined_score"
        values = [metrics[f"eval_{name}{suffix}"] for _, suffix in self.evaluations]
        return sum(values) / len(values)


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

TASKS = MappingProxyType(
    {
        task.name: task
        for task in (
            Task(
                "cola",
                ("sentence",),
                ("unacceptable", "acceptable"),
                ("matthews_correlation",),
                (("test", "CoLA.tsv"),),
            ),
            Task("sst2", ("sentence",), ("negative", "positive"), ("accuracy",), (("test", "SST-2.tsv"),)),
            Task("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy"), (("test", "MRPC.tsv"),)),
            Task("stsb", _PAIR, (), ("pearson", "spearmanr"), (("test", "STS-B.tsv"),)),
            Task(
                "qqp",
                ("question1", "question2"),
                ("not_duplicate", "duplicate"),
                ("f1", "accuracy"),
                (("test", "QQP.tsv"),),
            ),
            Task(
                "mnli",
                ("premise", "hypothesis"),
                ("entailment", "neutral", "contradiction"),
                ("accuracy",),
                (("test_matched", "MNLI-m.tsv"), ("test_mismatched", "MNLI-mm.tsv")),
                evaluations=(("validation_matched", ""), ("validation_mismatched", "_mm")),
                named_labels=True,
            ),
            Task(
                "qnli",
                ("question", "sentence"),
                _ENTAILMENT,
                ("accuracy",),
                (("test", "QNLI.tsv"),),
                named_labels=True,
            ),
            Task("rte", _PAIR, _ENTAILMENT, ("accuracy",), (("test", "RTE.tsv"),), named_labels=True),
            Task("wnli", _PAIR, ("not_entailment", "entailment"), ("accuracy",), (("test", "WNLI.tsv"),)),
        )
    }
)


def get_task(name: str) -> Task:
    """The task called `name`; if there is none, a ValueError that lists the names."""
    if name not in TASKS:
        raise ValueError(f"task_name={name!r} is not a GLUE task; choose one of {', '.join(TASKS)}")
    return TASKS[name]


def score(name: str, metrics: Mapping[str, float]) -> float:
    """`Task.score` of the task called `name`. Any other name means your own files, whose score is the accuracy or, for
    regression, the mean of the two correlations."""
    if name in TASKS:
        return TASKS[name].score(metrics)
    return metrics["eval_accuracy"] if "eval_accuracy" in metrics else metrics["eval_combined_score"]
