# One import a line and no relative ones: `evaluate` copies this file and scans it for dependencies.
import collections.abc
import typing

import datasets
import evaluate
import numpy
import scipy.stats
import sklearn.metrics

_DESCRIPTION = """GLUE's official metrics, by name: accuracy, f1 (of class 1), matthews_correlation, pearson, spearmanr.

Where a definition is 0/0 the result is 0.0: F1 without a true or predicted class 1, Matthews and the two correlations
with constant predictions or constant references.
"""
_CITATION = """@inproceedings{wang2019glue,
  title={{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author={Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and Bowman, Samuel R.},
  booktitle={ICLR}, year={2019}
}"""


def _correlation(
    function: collections.abc.Callable[..., typing.Any], predictions: numpy.ndarray, references: numpy.ndarray
) -> float:
    if numpy.ptp(predictions) == 0 or numpy.ptp(references) == 0:
        return 0.0
    return float(function(predictions, references)[0])


METRICS = {
    "accuracy": lambda p, r: float(sklearn.metrics.accuracy_score(r, p)),
    "f1": lambda p, r: float(sklearn.metrics.f1_score(r, p, zero_division=0.0)),
    "matthews_correlation": lambda p, r: float(sklearn.metrics.matthews_corrcoef(r, p)),
    "pearson": lambda p, r: _correlation(scipy.stats.pearsonr, p, r),
    "spearmanr": lambda p, r: _correlation(scipy.stats.spearmanr, p, r),
}


class GlueMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """One of `METRICS`, chosen by the configuration name."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in METRICS:
            raise KeyError(f"config_name={self.config_name!r} must be one of {sorted(METRICS)}")
        real = self.config_name in ("pearson", "spearmanr")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description="predictions, references: class indices (int), or scores (float) for the correlations",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64" if real else "int64"),
                    "references": datasets.Value("float64" if real else "int64"),
                }
            ),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        value = METRICS[self.config_name](numpy.asarray(predictions), numpy.asarray(references))
        return {self.config_name: value}
