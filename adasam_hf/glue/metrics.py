"""GLUE's metrics for a Trainer."""

from collections.abc import Callable, Sequence
from pathlib import Path

import evaluate
import numpy as np
from transformers import EvalPrediction


def predictions_of(logits: np.ndarray | tuple, is_regression: bool) -> np.ndarray:
    """Model output → one prediction per row: the score for regression, otherwise the index of the largest logit."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.reshape(-1) if is_regression else logits.argmax(axis=-1)


def make_compute_metrics(names: Sequence[str], is_regression: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for the named metrics; with several, `combined_score` is their mean, as in GLUE."""
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
