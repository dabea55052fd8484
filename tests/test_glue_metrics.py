import math

import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from adasam_hf.glue import glue_metric
from adasam_hf.glue.metrics import make_compute_metrics, predictions_of
from adasam_hf.glue.tasks import TASKS, get_task

# true positives 3, false positives 1, false negatives 2, true negatives 4
REFERENCES = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
PREDICTIONS = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
BY_HAND = {
    "accuracy": 7 / 10,
    "f1": 2 * 3 / (2 * 3 + 1 + 2),
    "matthews_correlation": (3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2)),
}
SCORES, GOLD = [1.0, 2.0, 4.0], [1.0, 3.0, 2.0]
# deviations from the means 7/3 and 2: (-4, -1, 5)/3 and (-1, 1, 0)
CORRELATIONS = {
    "pearson": ((4 - 1) / 3) / math.sqrt((16 + 1 + 25) / 9 * 2),
    "spearmanr": 1 - 6 * (0 + 1 + 1) / (3 * (9 - 1)),  # ranks (1, 2, 3) and (1, 3, 2)
}


def compute(name, predictions, references):
    metric = evaluate.load(glue_metric.__file__, name, keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references)[name]


@pytest.mark.parametrize("name", BY_HAND)
def test_hand_computed_classes(name):
    assert compute(name, PREDICTIONS, REFERENCES) == pytest.approx(BY_HAND[name], rel=1e-12)


@pytest.mark.parametrize("name", CORRELATIONS)
def test_hand_computed_scores(name):
    assert compute(name, SCORES, GOLD) == pytest.approx(CORRELATIONS[name], rel=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "predictions", "references", "value"),
    [
        ("accuracy", [0, 0], [0, 0], 1.0),
        ("accuracy", [0, 0], [1, 1], 0.0),
        ("f1", [0, 0, 0], [0, 0, 0], 0.0),
        ("f1", [0, 0, 0], [1, 0, 1], 0.0),
        ("f1", [1, 1], [1, 1], 1.0),
        ("matthews_correlation", [1, 1, 1], [1, 0, 1], 0.0),
        ("matthews_correlation", [1, 0, 1], [1, 1, 1], 0.0),
        ("matthews_correlation", [0, 1], [1, 0], -1.0),
        ("pearson", [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 0.0),
        ("pearson", [1.0, 2.0, 3.0], [2.0, 2.0, 2.0], 0.0),
        ("spearmanr", [2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 0.0),
        ("spearmanr", [1.0, 2.0, 30.0], [1.0, 2.0, 3.0], 1.0),
    ],
)
def test_degenerate_predictions(name, predictions, references, value):
    assert compute(name, predictions, references) == pytest.approx(value)


def test_unknown_metric():
    with pytest.raises(KeyError, match="bleu"):
        evaluate.load(glue_metric.__file__, "bleu")


def test_logits_become_predictions():
    assert predictions_of(np.array([[0.1, 0.9], [2.0, -1.0]]), False).tolist() == [1, 0]
    assert predictions_of(np.array([[0.5], [2.0]]), True).tolist() == [0.5, 2.0]
    assert predictions_of((np.array([[0.1, 0.9]]), np.zeros(3)), False).tolist() == [1]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_its_official_metrics(name):
    task = TASKS[name]
    rows = 4
    if task.is_regression:
        output = EvalPrediction(np.arange(rows, dtype=float)[:, None], np.arange(rows, dtype=float))
    else:
        labels = np.arange(rows) % len(task.labels)
        output = EvalPrediction(np.eye(len(task.labels))[labels], labels)
    official = {
        "cola": {"matthews_correlation"},
        "mrpc": {"f1", "accuracy"},
        "qqp": {"f1", "accuracy"},
        "stsb": {"pearson", "spearmanr"},
    }.get(name, {"accuracy"})
    scores = make_compute_metrics(task.metrics, task.is_regression)(output)
    assert set(scores) == official | ({"combined_score"} if len(official) > 1 else set())
    assert all(value == pytest.approx(1.0) for value in scores.values())


def test_combined_score_is_the_mean():
    logits = np.eye(2)[PREDICTIONS]
    scores = make_compute_metrics(("f1", "accuracy"), False)(EvalPrediction(logits, np.array(REFERENCES)))
    assert scores["combined_score"] == pytest.approx((BY_HAND["f1"] + BY_HAND["accuracy"]) / 2)


def test_unknown_task():
    with pytest.raises(ValueError, match=r"(?s)task_name='mrcp'.*cola.*wnli"):
        get_task("mrcp")
