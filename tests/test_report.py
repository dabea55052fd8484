"""The report's numbers against ones computed another way, and its verdicts against records made to decide them."""

import json
import math
import re
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from conftest import load_script
from scipy import stats

from adasam_hf.glue.tasks import get_task

report_glue = load_script("report_glue")
FULL = {"cola": "eval_matthews_correlation", "sst2": "eval_accuracy", "mrpc": "eval_combined_score"}
FULL |= {"stsb": "eval_combined_score"}


def record(task="sst2", method="adasam", seed=1, value=0.8, sweep="table1", trial=None, losses=(1.0, 0.5), **axes):
    return {
        "sweep": sweep,
        "run": f"{task}-{method}-{seed}",
        "axes": {"task_name": task, "method": method, "seed": seed, **axes},
        "trial": trial,
        "resumed": False,
        "attempts": 1,
        "commit": "0123456789abcdef",
        "dirty": False,
        "versions": {"torch": "2.13.0"},
        "hardware": {"cpus": 2, "accelerators": []},
        "arguments": {
            "per_device_train_batch_size": 32,
            "model_name_or_path": "MiniLM",
            "learning_rate": 1e-4,
            "sam_rho": 0.05 if method in ("sam", "adasam") else None,
        },
        "metrics": {
            **dict.fromkeys([f"eval_{name}" for name in get_task(task).metrics], value),
            FULL[task]: value,
            "train_runtime": 60.0,
            "final_sam_gap": 0.1 if method == "adasam" else 0.2,
        },
        "log_history": [{"loss": str(loss), "step": i} for i, loss in enumerate(losses, 1)] + [{"eval_loss": 1.0}],
    }


def grid(differences, sweep="table1", base=0.7, one="adasam", other="amsgrad"):
    """Records with the given differences of scores: task → one for each seed."""
    out = []
    for task, values in differences.items():
        for seed, difference in enumerate(values, 1):
            noise = 0.01 * math.sin(7 * seed)  # common to the pair
            out.append(record(task, other, seed, base + noise, sweep))
            out.append(record(task, one, seed, base + noise + difference, sweep))
    return out


def find(claims, text):
    (claim,) = [c for c in claims if c.text.startswith(text)]
    return claim


def verdict(records, text, sizes=(), without=()):
    grids = report_glue.Grid.of(records, "table1"), report_glue.Grid.of(without, "table2")
    return find(report_glue.claims(*grids, list(sizes)), text)


# ---- statistics ----


def test_a_paired_difference():
    one, other = {1: 80.0, 2: 82.0, 3: 81.5, 9: 0.0}, {1: 79.0, 2: 80.5, 3: 81.0, 4: 100.0}
    found = report_glue.Difference.between(one, other)  # of the seeds that both have
    assert found.values == [1.0, 1.5, 0.5] and found.mean == 1.0
    assert found.p == pytest.approx(stats.ttest_rel([80.0, 82.0, 81.5], [79.0, 80.5, 81.0]).pvalue)
    assert found.p != pytest.approx(stats.ttest_ind([80.0, 82.0, 81.5], [79.0, 80.5, 81.0]).pvalue)
    low, high = report_glue.bootstrap(found.values)
    every = [statistics.mean(picks) for picks in np.stack(np.meshgrid(*[found.values] * 3), -1).reshape(-1, 3)]
    assert low == np.percentile(every, 2.5, method="inverted_cdf")  # of all 27 samples, not 10,000 of them
    assert high == np.percentile(every, 97.5, method="inverted_cdf")


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 1.2, 0.9, 1.1, 1.0], "confirmed here"),
        ([-1.0, -1.2, -0.9, -1.1, -1.0], "not confirmed here"),
        ([1.0, -1.2, 0.9, -1.1, 0.2], "cannot tell from these runs"),
        ([5.0], "cannot tell from these runs"),  # one pair tells nothing
        ([], "cannot tell from these runs"),
        ([0.0, 0.0, 0.0], "cannot tell from these runs"),
        ([1.0, 1.0, 1.0], "confirmed here"),
    ],
)
def test_verdicts_on_a_difference(values, verdict):
    found = report_glue.Difference(values)
    assert found.verdict() == verdict
    opposite = {"confirmed here": "not confirmed here", "not confirmed here": "confirmed here"}
    assert found.verdict(sign=-1) == opposite.get(verdict, verdict)


def test_most_tasks():
    assert report_glue.share_of_most([[1, 1, 1], [1, 1, 1], [-1, -1, -1]]) == 1.0
    assert report_glue.share_of_most([[1, 1, 1], [-1, -1, -1]]) == 0.0  # half is not most
    # Seeds are drawn together for all tasks: each sample's mean has the same sign in both rows.
    share = report_glue.share_of_most([[1.0, -1.0], [1.0, -1.0]])
    assert share == pytest.approx(0.25, abs=0.02)  # only two draws of the first seed have a positive mean


def test_the_interval_of_a_mean():
    mean, half = report_glue.interval([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, loc=mean, scale=stats.sem([1.0, 2.0, 4.0]))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    assert report_glue.interval([1.0]) == (1.0, math.inf)


# ---- loss curves ----


def test_curves_are_averaged_over_rows_not_iterations():
    raw = [4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    steps, wide = report_glue.losses(record(losses=raw, per_device_train_batch_size=64))  # over 4 iterations
    assert wide == pytest.approx([2.5, 1.75, 1.25, 1.0, 1.0, 1.0, 1.0])
    assert steps == pytest.approx([2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5])  # the middle of each four
    steps, narrow = report_glue.losses(record(losses=raw, per_device_train_batch_size=256))
    assert narrow.tolist() == raw and steps.tolist() == list(range(1, 11))
    # logged every 10 iterations, as means of 10
    rare = record(losses=raw, per_device_train_batch_size=16)  # 1.6 entries, so 2
    for entry in rare["log_history"]:
        entry["step"] = entry.get("step", 0) * 10
    steps, values = report_glue.losses(rare)
    assert steps[:2] == pytest.approx([10.5, 20.5]) and values[:2] == pytest.approx([3.5, 2.5])


def curve(size, power, seed=1, rows=4096):
    """A loss that falls to a given value after iterations ∝ b^power."""
    steps = np.arange(1, rows // size + 1)
    return np.exp(-steps / (400 * (size / 4) ** power * (1 + 0.02 * seed)))


def sizes(power, seeds=5, tilt=0.0):
    return [
        record(
            "cola",
            seed=seed,
            sweep="batch_size",
            losses=curve(b, power + tilt * (seed - 3), seed),
            per_device_train_batch_size=b,
        )
        for seed in range(1, seeds + 1)
        for b in (4, 8, 16, 32)
    ]


def test_the_exponent():
    for power in (-1.0, -0.7, -0.5, 0.0):
        level, found, slopes = report_glue.exponents(sizes(power))
        assert len(slopes) == 5 and statistics.mean(slopes) == pytest.approx(power, abs=0.07)
        for counts in found.values():
            assert list(counts) == [4, 8, 16, 32]
        # where the noise-free loss itself is at the level
        exact = 400 * 1.02 * (4 / 4) ** power * -math.log(level)
        assert found[1][4] == pytest.approx(exact, rel=0.1)
    text = "iterations to a loss level"
    assert verdict([], text, sizes(-1.0)).verdict == "confirmed here"
    assert verdict([], text, sizes(-0.6)).verdict == "not confirmed here"
    assert verdict([], text, sizes(-1.0, tilt=0.25)).verdict == "cannot tell from these runs"  # seeds disagree
    assert verdict([], text, sizes(-1.0, seeds=1)).verdict == "cannot tell from these runs"


# ---- claims ----


def test_claims_about_adasam_and_amsgrad():
    better = {"cola": [0.02, 0.03, 0.025], "sst2": [0.01, 0.012, 0.011], "mrpc": [-0.01, -0.011, -0.012]}
    average, most = "AdaSAM's average is above", "AdaSAM is better than AMSGrad on most"
    assert verdict(grid(better), most).verdict == verdict(grid(better), average).verdict == "confirmed here"
    worse = {task: [-v for v in values] for task, values in better.items()}
    assert verdict(grid(worse), most).verdict == verdict(grid(worse), average).verdict == "not confirmed here"
    mixed = {"cola": [0.02, -0.02, 0.01], "sst2": [-0.01, 0.02, -0.02], "mrpc": [0.01, -0.02, 0.02]}
    assert verdict(grid(mixed), most).verdict == verdict(grid(mixed), average).verdict == "cannot tell from these runs"
    assert verdict([], most).verdict == verdict([], average).verdict == "cannot tell from these runs"
    claim = verdict(grid(better), average)
    seeds = [statistics.mean(100 * values[i] for values in better.values()) for i in range(3)]
    assert claim.number.startswith(f"{statistics.mean(seeds):+.2f} [")
    assert f"p = {stats.ttest_1samp(seeds, 0).pvalue:.3f}" in claim.number


def test_claims_about_momentum_compare_the_same_tasks():
    gain = [0.02, 0.03, 0.025]
    first = grid({"cola": gain, "stsb": [0.5, 0.5, 0.5]})  # stsb has no run without momentum
    second = grid({"cola": [0.0, 0.0, 0.0]}, "table2")
    claim = verdict(first, "momentum helps AdaSAM", without=second)
    assert claim.verdict == "confirmed here" and claim.number.startswith(f"{100 * statistics.mean(gain):+.2f}")
    assert verdict(first, "momentum helps AMSGrad", without=second).verdict == "cannot tell from these runs"
    assert verdict(second, "momentum helps AdaSAM").verdict == "cannot tell from these runs"


def test_the_average_is_of_seeds_that_have_every_task():
    runs = [*grid({"cola": [0.1, 0.1]}), record("sst2", "adasam", 1, 0.9)]
    found = report_glue.Grid.of(runs, "table1")
    cola = 100 * (0.7 + 0.01 * math.sin(7) + 0.1)
    assert found.average("adasam") == {1: pytest.approx((cola + 90) / 2)}
    assert found.average("amsgrad") == {}


# ---- the page ----


def test_the_page(tmp_path):
    trials = [
        record("sst2", method, 0, value, trial={"learning_rate": "1e-4"} | radius)
        for method, value, radius in (
            ("amsgrad", 0.7, {}),
            ("adasam", 0.72, {"sam_rho": 0.01}),
            ("adasam", 0.75, {"sam_rho": 0.05}),
        )
    ]
    better = {"sst2": [0.02, 0.03, 0.025], "mrpc": [0.01, 0.012, 0.011]}
    runs = [*grid(better), *grid({"mrpc": [0.0, 0.01, -0.01]}, "table2"), *sizes(-1.0, seeds=2), *trials]
    for i, content in enumerate(runs):
        path = tmp_path / "records" / content["sweep"] / ("trials" if content["trial"] else "") / f"{i}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    page = report_glue.report(tmp_path)
    scores = [100 * (0.7 + 0.01 * math.sin(7 * s) + d) for s, d in zip((1, 2, 3), better["sst2"], strict=True)]
    assert f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}" in page
    assert "| AdaSAM's average is above AMSGrad's | by 0.28: remembered, not re-read | **confirmed here** |" in page
    assert "| table1 | SST2 | AdaSAM | 0.0001 | 0.05 | 2 |" in page and "0123456789ab" in page
    for name in ("loss.png", "batch_size.png", "radius.png"):
        assert (tmp_path / name).stat().st_size > 5000 and name in page
    assert report_glue.report(tmp_path) == page  # nothing in it is drawn anew
    with pytest.raises(ValueError, match="no records"):
        report_glue.report(tmp_path / "nothing")


def test_the_committed_report_is_that_of_its_records(tmp_path, monkeypatch):
    committed = Path(__file__).parent.parent / "results" / "small"
    shutil.copytree(committed / "records", tmp_path / "results" / "small" / "records")
    monkeypatch.chdir(tmp_path)
    made = report_glue.report(Path("results/small"))
    assert made == (committed / "REPORT.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\((\w+\.png)\)", made):
        assert (committed / name).is_file()
    path = tmp_path / "results/small/records/table1/sst2-adasam-1.json"
    changed = json.loads(path.read_text())
    changed["metrics"]["eval_accuracy"] = 0.5
    path.write_text(json.dumps(changed))
    assert report_glue.report(Path("results/small")) != made
