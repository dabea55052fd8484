"""GLUE's metrics for a Trainer."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import evaluate
import numpy as np
from scipy.special import log_softmax
from transformers import EvalPrediction

BINS = 15  # of confidence, equally wide


def predictions_of(logits: np.ndarray | tuple[np.ndarray, ...], is_regression: bool) -> np.ndarray:
    """Model output → one prediction per row: the score for regression, otherwise the index of the largest logit."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.reshape(-1) if is_regression else logits.argmax(axis=-1)


def make_compute_metrics(names: Sequence[str], is_regression: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` for the named metrics; if there are several, `combined_score` is their mean, as in GLUE."""
    module = str(Path(__file__).with_name("glue_metric.py"))
    metrics = [evaluate.load(module, name, keep_in_memory=True) for name in names]

    def compute_metrics(output: EvalPrediction) -> dict[str, float]:
        predictions = predictions_of(output.predictions, is_regression)
        scores: dict[str, float] = {}
        for metric in metrics:
            scores |= metric.compute(predictions=predictions, references=output.label_ids)
        if len(scores) > 1:
            scores["combined_score"] = float(np.mean(list(scores.values())))
        return scores

    return compute_metrics


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p(label), in nats. Unlike the training loss, it never has label smoothing."""
    return float(-log_softmax(np.asarray(logits, dtype=np.float64), axis=-1)[np.arange(len(labels)), labels].mean())


def reliability(logits: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """Rows in `BINS` bins by the probability of the predicted class; for each bin that has rows, their count, mean
    confidence and accuracy."""
    probabilities = np.exp(log_softmax(np.asarray(logits, dtype=np.float64), axis=-1))
    confidence, right = probabilities.max(axis=-1), probabilities.argmax(axis=-1) == labels
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        {
            "count": int((place == i).sum()),
            "confidence": float(confidence[place == i].mean()),
            "accuracy": float(right[place == i].mean()),
        }
        for i in range(BINS)
        if (place == i).any()
    ]


def calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """Expected calibration error, in [0, 1]: |accuracy - confidence| by bin of `reliability`, averaged over rows."""
    rows = sum(found["count"] for found in bins)
    return sum(found["count"] * abs(found["accuracy"] - found["confidence"]) for found in bins) / rows


def merged(bins: Iterable[dict[str, float]]) -> list[dict[str, float]]:
    """The bins of several runs' `reliability`, merged, lowest confidence first."""
    found: dict[int, list[dict[str, float]]] = {}
    for one in bins:
        found.setdefault(min(int(one["confidence"] * BINS), BINS - 1), []).append(one)
    out = []
    for _, same in sorted(found.items()):
        count = sum(one["count"] for one in same)
        means = {key: sum(one["count"] * one[key] for one in same) / count for key in ("confidence", "accuracy")}
        out.append({"count": count, **means})
    return out


def constant_loss(labels: Sequence[float], is_regression: bool) -> float:
    """The loss of the best constant answer: the entropy of the labels in nats or, for regression, their variance. A
    model whose loss is not below it has learned nothing."""
    if is_regression:
        return float(np.var(labels))
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(shares * np.log(shares)).sum())


class Evaluation:
    """`compute_metrics` of a run: the task's official metrics and, for a classifier with finite logits, `cross_entropy`
    and `calibration_error`. `reliability` keeps the bins of the latest call."""

    def __init__(self, names: Sequence[str], is_regression: bool):
        self.official = make_compute_metrics(names, is_regression)
        self.is_regression = is_regression
        self.reliability: list[dict[str, float]] = []

    def __call__(self, output: EvalPrediction) -> dict[str, float]:
        scores = self.official(output)
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        labels = np.asarray(output.label_ids)
        self.reliability = []
        if not self.is_regression and np.isfinite(logits).all():
            self.reliability = reliability(logits, labels)
            scores["cross_entropy"] = cross_entropy(logits, labels)
            scores["calibration_error"] = calibration_error(self.reliability)
        return scores
