"""The report's numbers against ones computed another way, and its verdicts against records made to decide them."""

import json
import math
import re
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from matplotlib import pyplot
from scipy import stats

from adasam_hf.cli import run_command
from adasam_hf.glue.report.choices import choices
from adasam_hf.glue.report.claims import claims
from adasam_hf.glue.report.curves import LEVELS, SpeedUp, losses
from adasam_hf.glue.report.page import report
from adasam_hf.glue.report.records import Grid
from adasam_hf.glue.report.statistics import Difference, bootstrap, holm, interval, pairs_for, power, visible_gain
from adasam_hf.glue.report.tables import choices_table, table
from adasam_hf.glue.report.wording import name as title
from adasam_hf.glue.tasks import get_task

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
            "measure_gap": 0.05,
            "sam_rho": 0.05 if method in ("sam", "adasam") else None,
        },
        "metrics": {
            **dict.fromkeys([f"eval_{name}" for name in get_task(task).metrics], value),
            FULL[task]: value,
            "eval_loss": 0.5,
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
    grids = Grid.of(records, "table1"), Grid.of(without, "table2")
    return find(claims(*grids, list(sizes)), text)


# ---- statistics ----


def test_a_paired_difference():
    one, other = {1: 80.0, 2: 82.0, 3: 81.5, 9: 0.0}, {1: 79.0, 2: 80.5, 3: 81.0, 4: 100.0}
    found = Difference.between(one, other)  # of the seeds that both have
    assert found.values == [1.0, 1.5, 0.5] and found.mean == 1.0
    assert found.p == pytest.approx(stats.ttest_rel([80.0, 82.0, 81.5], [79.0, 80.5, 81.0]).pvalue)
    assert found.p != pytest.approx(stats.ttest_ind([80.0, 82.0, 81.5], [79.0, 80.5, 81.0]).pvalue)
    low, high = bootstrap(found.values)
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
        ([1.0, 1.0, 1.0], "cannot tell from these runs"),  # no test can judge it
        ([0.36101083032490067] + 4 * [0.3610108303249149], "cannot tell from these runs"),  # the same but for rounding
        ([0.01, 0.01, 5.0], "cannot tell from these runs"),
    ],
)
def test_verdicts_on_a_difference(values, verdict):
    found = Difference(values)
    assert found.verdict() == verdict
    opposite = {"confirmed here": "not confirmed here", "not confirmed here": "confirmed here"}
    assert found.verdict(sign=-1) == opposite.get(verdict, verdict)


def test_what_the_report_says_of_the_bootstrap():
    """That of five seeds its 95 % interval covers the mean in 83 % of cases; Student's does in 95 %."""
    values = np.random.default_rng(0).normal(size=(4000, 5))
    picks = np.random.default_rng(1).integers(5, size=(1000, 5))
    low, high = np.percentile(values[:, picks].mean(axis=2), [2.5, 97.5], axis=1)
    assert np.mean((low < 0) & (high > 0)) == pytest.approx(0.83, abs=0.02)
    half = stats.t.ppf(0.975, 4) * stats.sem(values, axis=1)
    assert np.mean(abs(values.mean(axis=1)) < half) == pytest.approx(0.95, abs=0.02)
    low, high = bootstrap(values[0])
    again = np.percentile(values[0][picks].mean(axis=1), [2.5, 97.5])
    assert (low, high) == pytest.approx(again, abs=0.1)  # the same kind of interval


def test_most_tasks():
    most = "AdaSAM is better than AMSGrad on most"
    better, worse, unclear = [0.02, 0.03, 0.025], [-0.02, -0.03, -0.025], [0.02, -0.02, 0.01]

    def found(*tasks):
        return verdict(grid(dict(zip(("cola", "sst2", "mrpc", "stsb"), tasks, strict=False))), most).verdict

    assert found(better, better, worse) == "confirmed here"
    assert found(better, better, worse, unclear) == "cannot tell from these runs"  # half is not most
    assert found(worse, worse, better) == found(worse, worse, better, unclear) == "not confirmed here"
    assert found(better, better) == found(worse, worse) == "cannot tell from these runs"  # of three tasks or more
    assert found(better, unclear, unclear) == "cannot tell from these runs"


def test_the_interval_of_a_mean():
    mean, half = interval([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, loc=mean, scale=stats.sem([1.0, 2.0, 4.0]))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    assert interval([1.0]) == (1.0, math.inf)


# ---- power ----


def test_power_is_how_often_the_test_sees_the_gain():
    values = 0.8 + np.random.default_rng(0).normal(scale=1.2, size=(20_000, 8))
    for comparisons in (1, 4):
        seen = np.mean(stats.ttest_1samp(values, 0.0, axis=1).pvalue < 0.05 / comparisons)
        assert power(8, 0.8, 1.2, comparisons) == pytest.approx(seen, abs=0.01)
    assert power(8, 0.0001, 1.2) == pytest.approx(0.05, abs=1e-3) and power(1, 5.0, 1.2) == 0
    assert power(8, -0.8, 1.2) == pytest.approx(power(8, 0.8, 1.2))
    for gain, seeds in ((0.28, 147), (1.0, 14)):
        assert pairs_for(gain, 1.2) == seeds
        assert power(seeds - 1, gain, 1.2) < 0.8 <= power(seeds, gain, 1.2)
    assert pairs_for(0.5, 1.2, comparisons=4) > pairs_for(0.5, 1.2)
    assert power(8, visible_gain(8, 1.2, 4), 1.2, 4) == pytest.approx(0.8, abs=1e-6)
    with pytest.raises(ValueError, match="too small beside a spread of 1"):
        pairs_for(1e-5, 1.0)


def test_power_from_records(tmp_path, capsys):
    gains = [0.02, 0.03, 0.025, 0.01]
    put(tmp_path, [*grid({"sst2": gains}), *trials("sst2", "adasam", [0.7, 0.8])])
    spread = statistics.stdev(100 * gain for gain in gains)
    assert run_command("power", [str(tmp_path), "--gain", "1", "--seeds", "5"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    needed = pairs_for(1.0, spread)
    assert row == f"| table1 sst2 | 4 | {spread:.3g} | {needed} | {power(5, 1.0, spread):.2f} |"
    for words in ([], [str(tmp_path), "--spread", "1"], [str(tmp_path / "nothing")], ["--spread", "1", "--gain", "0"]):
        assert run_command("power", words) == 2


# ---- loss curves ----


def test_curves_are_averaged_over_rows_not_iterations():
    raw = [4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    steps, wide = losses(record(losses=raw, per_device_train_batch_size=64))  # over 4 iterations
    assert wide == pytest.approx([2.5, 1.75, 1.25, 1.0, 1.0, 1.0, 1.0])
    assert steps == pytest.approx([2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5])  # the middle of each four
    steps, narrow = losses(record(losses=raw, per_device_train_batch_size=256))
    assert narrow.tolist() == raw and steps.tolist() == list(range(1, 11))
    # logged every 10 iterations, as means of 10
    rare = record(losses=raw, per_device_train_batch_size=16)  # 1.6 entries, so 2
    for entry in rare["log_history"]:
        entry["step"] = entry.get("step", 0) * 10
    steps, values = losses(rare)
    assert steps[:2] == pytest.approx([10.5, 20.5]) and values[:2] == pytest.approx([3.5, 2.5])


def curve(size, power, seed=1, rows=4096):
    """A loss that falls to a given value after iterations ∝ b^power."""
    steps = np.arange(1, rows // size + 1)
    return np.exp(-steps / (400 * (size / 4) ** power * (1 + 0.02 * seed)))


def sizes(power, seeds=5, tilt=0.0):
    out = [
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
    for run in out:
        run["metrics"]["train_constant_loss"] = 1.0
    return out


SPEED_UP = "iterations to a loss level"


def test_the_exponent():
    for exponent in (-1.0, -0.7, -0.5, 0.0):
        found = SpeedUp.of(sizes(exponent))
        assert len(found.slopes) == 5 and statistics.mean(found.slopes) == pytest.approx(exponent, abs=0.07)
        for counts in found.found.values():
            assert list(counts) == [4, 8, 16, 32]
        # where the noise-free loss itself is at the level
        exact = 400 * 1.02 * (4 / 4) ** exponent * -math.log(found.level)
        assert found.found[1][4] == pytest.approx(exact, rel=0.1)
    levels = [SpeedUp.of(sizes(-1.0), share).level for share in (0.25, 0.5, 0.75)]
    assert levels == sorted(levels, reverse=True)
    assert levels[1] == pytest.approx((levels[0] + levels[2]) / 2)
    assert verdict([], SPEED_UP, sizes(-1.0)).verdict == "confirmed here"
    assert verdict([], SPEED_UP, sizes(-0.6)).verdict == "not confirmed here"
    assert verdict([], SPEED_UP, sizes(-1.0, tilt=0.25)).verdict == "cannot tell from these runs"  # seeds disagree
    assert verdict([], SPEED_UP, sizes(-1.0, seeds=1)).verdict == "cannot tell from these runs"


def bent(run):
    """A loss that falls to a half in iterations ∝ 1/b, and from there to 0 in 100 whatever the batch size."""
    size = run["axes"]["per_device_train_batch_size"]
    steps, half = np.arange(1, 4096 // size + 1), 800 / size
    return np.where(steps < half, 1 - 0.5 * steps / half, np.maximum(0.5 - (steps - half) / 200, 0.0))


def changed(runs, how):
    """With other losses: `how` makes them of a run."""
    for run in runs:
        losses = how(run)
        run["log_history"] = [{"loss": str(loss), "step": i} for i, loss in enumerate(losses, 1)]
    return runs


def rising(run):
    return [0.5 + 0.01 * i for i in range(4096 // run["axes"]["per_device_train_batch_size"])]


def flat(run):
    return [0.5] * (4096 // run["axes"]["per_device_train_batch_size"])


def nan_at_32(run):
    size = run["axes"]["per_device_train_batch_size"]
    return [math.nan] * 128 if size == 32 else curve(size, -1.0)


@pytest.mark.parametrize("how", [rising, flat, nan_at_32, lambda run: [1.0], lambda run: []])
def test_curves_that_never_fall_to_a_level_have_no_exponent(how):
    """Where a curve begins, the middle of the first window is ∝ 1/b whatever was learned."""
    runs = changed(sizes(-1.0), how)
    for share in LEVELS:
        assert SpeedUp.of(runs, share).slopes == []
    claim = verdict([], SPEED_UP, runs)
    assert claim.verdict == "cannot tell from these runs" and "no complete seed" in claim.number


def test_two_batch_sizes_have_no_exponent():
    runs = [r for r in sizes(-1.0) if r["axes"]["per_device_train_batch_size"] in (4, 8)]
    assert SpeedUp.of(runs).slopes == []


def test_levels_are_below_what_a_constant_answer_has():
    runs = sizes(-1.0)
    for run in runs:
        run["metrics"]["train_constant_loss"] = 0.4
    for share in LEVELS:
        lowest = max(losses(run)[1].min() for run in runs)
        assert SpeedUp.of(runs, share).level == pytest.approx(0.4 + share * (lowest - 0.4))
    assert verdict([], SPEED_UP, runs).verdict == "confirmed here"
    del runs[3]["metrics"]["train_constant_loss"]  # then nobody knows
    claim = verdict([], SPEED_UP, runs)
    assert claim.verdict == "cannot tell from these runs" and "which a constant answer may have" in claim.number
    for run in runs:
        run["metrics"]["train_constant_loss"] = 1e-9  # which none of them reaches
    assert SpeedUp.of(runs).slopes == []


def test_levels_that_disagree_do_not_confirm():
    runs = changed(sizes(-1.0), bent)
    found = {SpeedUp.of(runs, share).verdict for share in LEVELS}
    assert len(found) > 1 and "confirmed here" in found
    assert verdict([], SPEED_UP, runs).verdict == "cannot tell from these runs"


# ---- claims ----

NOTHING = Grid.of([], "table2")


def test_claims_about_adasam_and_amsgrad():
    better = {"cola": [0.02, 0.03, 0.025], "sst2": [0.01, 0.012, 0.011], "mrpc": [-0.01, -0.011, -0.012]}
    average = "AdaSAM's average is above"
    assert verdict(grid(better), average).verdict == "confirmed here"
    worse = {task: [-v for v in values] for task, values in better.items()}
    assert verdict(grid(worse), average).verdict == "not confirmed here"
    mixed = {"cola": [0.02, -0.02, 0.01], "sst2": [-0.01, 0.02, -0.02], "mrpc": [0.01, -0.02, 0.02]}
    assert verdict(grid(mixed), average).verdict == "cannot tell from these runs"
    assert verdict([], average).verdict == "cannot tell from these runs"
    claim = verdict(grid(better), average)
    seeds = [statistics.mean(100 * values[i] for values in better.values()) for i in range(3)]
    assert claim.number.startswith(f"{statistics.mean(seeds):+.2f} [")
    assert f"p = {stats.ttest_1samp(seeds, 0).pvalue:.3f}" in claim.number
    half = stats.t.ppf(0.975, 2) * stats.sem(seeds)
    assert f"t: ± {half:.2f}" in claim.number and "; COLA, MRPC, SST2, 3 pairs" in claim.number


def trials(task, method, scores, sweep="table1"):
    """One trial for each learning rate, 1e-4 first."""
    return [
        record(task, method, 0, value, sweep, trial={"learning_rate": f"{i}e-4"}) for i, value in enumerate(scores, 1)
    ]


def test_a_task_on_which_trials_tie_is_left_out():
    runs = grid({"cola": [0.2, 0.3, 0.25], "sst2": [-0.02, -0.03, -0.025]})
    tied = [*trials("cola", "amsgrad", [0.0, 0.0, 0.0]), *trials("cola", "adasam", [0.0, 0.1, 0.0])]
    grids = Grid.of(runs, "table1"), Grid.of([], "table2")

    def found(made):
        return find(claims(*grids, [], choices(runs, made)), "AdaSAM's average is above")

    claim = found(tied)
    assert claim.verdict == "not confirmed here" and "; SST2, 3 pairs" in claim.number
    assert "left out, as all trials of one tie: COLA" in claim.number
    assert found(tied[3:]).verdict == found([]).verdict == "confirmed here"  # AdaSAM's own trials do not tie


def test_a_tie_shields_only_the_method_that_ties_and_only_from_losing():
    runs = grid({"cola": [-0.08, -0.079, -0.081]})
    tied = [*trials("cola", "amsgrad", [0.0, 0.0]), *trials("cola", "adasam", [0.0, 0.1])]

    def found(runs, made):
        return find(claims(Grid.of(runs, "table1"), NOTHING, [], choices(runs, made)), "AdaSAM's average is above")

    claim = found(runs, tied)  # it wins without a choice, too
    assert claim.verdict == "not confirmed here" and claim.number.startswith("-8.00")
    ties = [*trials("cola", "amsgrad", [0.0, 0.1]), *trials("cola", "adasam", [0.0, 0.0])]
    assert found(runs, ties).number == "no pairs of runs; left out, as all trials of one tie: COLA"  # now it loses
    better = grid({"cola": [0.08, 0.079, 0.081]})
    assert found(better, ties).verdict == "confirmed here"
    assert found(better, tied).verdict == "cannot tell from these runs"


def test_holm():
    ps = [0.04, math.nan, 0.001, 0.03]
    assert holm(ps) == [
        pytest.approx(0.06),
        pytest.approx(math.nan, nan_ok=True),
        0.003,
        pytest.approx(0.06),
    ]
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_verdicts_are_corrected_for_their_number():
    """One difference with p = 0.035 is confirmed alone, and not beside a second test."""
    runs = grid({"cola": [0.02, 0.03, 0.01, 0.025, 0.001]})
    average, momentum = "AdaSAM's average is above", "momentum helps AMSGrad"
    alone = verdict(runs, average)
    assert 0.025 < alone.difference.p < 0.05 and alone.verdict == "confirmed here"
    second = grid({"cola": [0.02, -0.03, 0.01, -0.025, 0.001]}, "table2", one="amsgrad", other="sgdm")
    assert verdict(runs, momentum, without=second).difference.p > 0.05
    both = verdict(runs, average, without=second)
    spread = statistics.stdev(both.difference.values)
    assert both.verdict == "cannot tell from these runs" and "Holm's p = 0.0" in both.number
    count = sum(not math.isnan(c.difference.p) for c in claims(
        Grid.of(runs, "table1"), Grid.of(second, "table2"), []) if c.difference)  # fmt: skip
    assert f"with a power of 80 %, 5 pairs see {visible_gain(5, spread, count):.2g}" in both.number


def test_choices_at_an_edge_are_named():
    runs = grid({"sst2": [0.2, 0.3, 0.25]})  # at rate 1e-4
    made = [*trials("sst2", "amsgrad", [0.8, 0.7]), *trials("sst2", "adasam", [0.8])]
    amsgrad, adasam = choices(runs, made)
    assert amsgrad.edge == "AMSGrad on SST2: its grid's lowest rate" and not amsgrad.tie
    assert adasam.edge == "" and not adasam.tie  # one value is no grid
    claim = find(claims(Grid.of(runs, "table1"), Grid.of([], "table2"), [], [amsgrad]), "AdaSAM's average is above")
    assert claim.verdict == "confirmed here" and "3 pairs; AMSGrad on SST2: its grid's lowest rate;" in claim.number
    inside = [*trials("sst2", "amsgrad", [0.7, 0.8, 0.7])]
    for run in runs:
        run["arguments"]["learning_rate"] = 2e-4
    assert [choice.edge for choice in choices(runs, inside)] == [""]
    zero = [record("sst2", "adasam", 0, 0.8, trial={"learning_rate": "2e-4", "sam_rho": r}) for r in (0.0, 0.02)]
    for run in runs:
        run["arguments"]["sam_rho"] = 0.0
    (adasam,) = choices(runs, zero)
    assert adasam.taken["sam_rho"] == 0 and adasam.edge == ""  # nothing is below 0


def test_choices_are_by_the_mean_over_seeds():
    made = [
        record("sst2", "amsgrad", seed, value, trial={"learning_rate": rate})
        for rate, values in (("1e-4", [0.9, 0.5, 0.5]), ("2e-4", [0.7, 0.7, 0.8]))
        for seed, value in enumerate(values, 7)
    ]
    runs = [record("sst2", "amsgrad")]
    runs[0]["arguments"]["learning_rate"] = 2e-4
    (found,) = choices(runs, made)
    assert [value for _, value in found.trials] == [pytest.approx(190 / 3), pytest.approx(220 / 3)]
    assert found.otherwise == "1 of 3 seeds alone would have chosen otherwise"
    assert found.otherwise in choices_table([found])


def test_a_run_that_diverged_has_no_score_and_no_pair():
    runs = grid({"sst2": [0.02, 0.03, 0.025, 0.5]})
    lost = runs[-1]
    assert lost["axes"]["method"] == "adasam"
    lost["metrics"]["eval_loss"] = math.nan  # its accuracy is 1.2
    found = Grid.of(runs, "table1")
    assert math.isnan(found.values("sst2", "adasam")[4])
    assert Difference.between(found.values("sst2", "adasam"), found.values("sst2", "amsgrad")).values == [
        pytest.approx(v) for v in (2.0, 3.0, 2.5)
    ]
    row = next(line for line in table(found).splitlines() if line.startswith("| AdaSAM"))
    assert row.count("1 of 4 diverged") == 2
    for run in runs:
        run["metrics"]["eval_loss"] = math.nan
    row = next(line for line in table(found).splitlines() if line.startswith("| AdaSAM"))
    assert row == "| AdaSAM | 4 of 4 diverged | 4 of 4 diverged |"


def test_cells_of_fewer_seeds_say_so():
    runs = [record(method=method, seed=seed) for method, seeds in (("sam", 3), ("adasam", 2)) for seed in range(seeds)]
    sam, adasam = table(Grid.of(runs, "table1")).splitlines()[2:]
    assert "seeds" not in sam and adasam.count(", 2 seeds") == 2


def test_runs_that_share_a_place_or_differ_in_a_cell_are_refused():
    with pytest.raises(ValueError, match=r"two runs of \('sst2', 'adasam'\) with seed 1.*'sam_scope'"):
        Grid.of([record(sam_scope="batch"), record(sam_scope="microbatch")], "table1")
    other = record(seed=2)
    other["arguments"]["learning_rate"] = 9.0
    with pytest.raises(ValueError, match=r"\('sst2', 'adasam'\) that differ in learning_rate: 9.0 and"):
        Grid.of([record(seed=1), other], "table1")
    for key, value in (("adam_beta1", 0.0), ("weight_decay", 0.1), ("model_name_or_path", "x"), ("max_seq_length", 8)):
        other = record(seed=2)
        other["arguments"][key] = value
        with pytest.raises(ValueError, match=f"differ in {key}"):
            Grid.of([record(seed=1), other], "table1")


def test_unfair_trials_and_runs_of_no_trial_decide_nothing(tmp_path):
    runs = grid({"sst2": [0.02, 0.03]})
    unfair = [*trials("sst2", "amsgrad", [0.7, 0.8]), *trials("sst2", "adasam", [0.7])]
    put(tmp_path / "a", [*runs, *unfair])
    page = report(tmp_path / "a")
    assert "no pairs of runs; left out, as one had more trials: SST2" in page and "confirmed here**" not in page
    fair = [*unfair, *trials("sst2", "adasam", [0.7, 0.8])[1:]]
    put(tmp_path / "b", [*runs, *fair])
    assert "SST2, 2 pairs" in report(tmp_path / "b")
    for run in runs:
        run["arguments"]["learning_rate"] = 7e-4
    put(tmp_path / "c", [*runs, *fair])
    page = report(tmp_path / "c")
    assert "left out, as one was run with what no trial had: SST2" in page and "| no trial had it |" in page


def calibration_gains(runs):
    found = [100 * run["metrics"]["eval_calibration_error"] for run in runs]
    return [adasam - amsgrad for amsgrad, adasam in zip(found[::2], found[1::2], strict=True)]


def test_a_sweep_with_a_name_of_its_own_has_its_page(tmp_path):
    runs = grid({"sst2": [0.02, 0.03, 0.01]}, "few")
    for i, run in enumerate(runs):
        run["metrics"] |= {"eval_cross_entropy": 0.5 + 0.01 * i, "eval_calibration_error": 0.1 + 0.001 * i * i}
        run["metrics"]["eval_reliability"] = [{"count": 5, "confidence": 0.9, "accuracy": 0.8}]
    made = [
        record("sst2", "adasam", seed, 0.5 + seed / 10, "few", {"learning_rate": "1e-4", "sam_rho": 0.05})
        for seed in (1, 2)
    ]
    radii = [record(sweep="radii", seed=seed, value=0.7 + seed * r, sam_rho=r) for seed in (1, 2) for r in (0.0, 0.1)]
    put(tmp_path, [*runs, *made, *without_gap(radii)])
    page = report(tmp_path)
    assert "## few" in page and "## radii" in page and "## Verdicts" not in page and "## Verdicts" not in page
    for name in ("few", "few_differences", "few_reliability", "few_loss", "radii_differences"):
        assert f"]({name}.png)" in page and (tmp_path / f"{name}.png").stat().st_size > 5000
    assert "radii_reliability" not in page  # none was recorded
    _, gaps = page.split("`sam_gap` × 1000 at radius 0.05:\n")  # once: of the other sweep none was measured
    assert gaps.startswith("\n|  | SST2 | average |\n| --- | --- | --- |\n| AMSGrad | 200.0 ± 0.0 [200.0, 200.0] |")
    gains = [2.0, 3.0, 1.0]
    half = stats.t.ppf(0.975, 2) * stats.sem(gains)
    p = stats.ttest_1samp(gains, 0).pvalue
    (row,) = [line for line in page.splitlines() if line.startswith("| AdaSAM – AMSGrad | SST2 | score × 100")]
    family = [p, stats.ttest_1samp(calibration_gains(runs), 0).pvalue]  # cross-entropy has no test
    corrected = min(1, max(2 * p, family[1])) if family[1] < p else min(1, 2 * p)
    assert f"| +2.000 ± {half:.3f} | 3 | {p:.4f} | {corrected:.4f} | 3 pairs see" in row
    assert f"- SST2, score × 100, AdaSAM – AMSGrad: +2.00 ± {half:.2f}, cannot tell" in page
    (row,) = [line for line in page.splitlines() if line.startswith("| AdaSAM – AMSGrad | SST2 | cross-entropy")]
    assert "| +0.010 ± 0.000 | 3 | – | – | – |" in row  # the same three times: no test
    assert f"calibration error × 100 | {statistics.mean(calibration_gains(runs)):+.3f}" in page
    assert "| SST2 | AdaSAM | 0.0001 / 0.05 | 2 | 65.00 ± 7.07" in page  # trials
    assert "| AdaSAM, sam_rho = 0.1 – AdaSAM, sam_rho = 0.0 | SST2 | score × 100 | +15.000" in page


def test_claims_about_momentum_compare_the_same_tasks():
    gain = [0.02, 0.03, 0.025]
    first = grid({"cola": gain, "stsb": [0.5, 0.5, 0.5]})  # stsb has no run without momentum
    second = grid({"cola": [0.0, 0.0, 0.0]}, "table2")
    claim = verdict(first, "momentum helps AdaSAM", without=second)
    assert claim.verdict == "confirmed here" and claim.number.startswith(f"{100 * statistics.mean(gain):+.2f}")
    assert verdict(first, "momentum helps AMSGrad", without=second).verdict == "cannot tell from these runs"
    assert verdict(second, "momentum helps AdaSAM").verdict == "cannot tell from these runs"


def test_claims_about_the_adaptive_rate():
    gain = {"cola": [0.02, 0.03, 0.025]}
    for one, other in (("amsgrad", "sgdm"), ("adasam", "sam")):
        runs = grid(gain, one=one, other=other)
        text = f"{title(one)} is above {title(other)}"
        assert verdict(runs, f"the adaptive rate helps: {text}").verdict == "confirmed here"
        assert verdict(runs, f"and without momentum: {text}").verdict == "cannot tell from these runs"
        runs = grid(gain, "table2", one=one, other=other)
        assert verdict([], f"and without momentum: {text}", without=runs).verdict == "confirmed here"


def test_the_average_is_of_seeds_that_have_every_task():
    runs = [*grid({"cola": [0.1, 0.1]}), record("sst2", "adasam", 1, 0.9)]
    found = Grid.of(runs, "table1")
    cola = 100 * (0.7 + 0.01 * math.sin(7) + 0.1)
    assert found.average("adasam") == {1: pytest.approx((cola + 90) / 2)}
    assert found.average("amsgrad") == {}


# ---- the page ----


def put(folder, runs):
    for i, content in enumerate(runs):
        path = folder / "records" / content["sweep"] / ("trials" if content["trial"] else "") / f"{i}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def without_gap(runs):
    for run in runs:
        del run["metrics"]["final_sam_gap"], run["arguments"]["measure_gap"]
    return runs


def gap_of_nan(runs):
    runs[-1]["metrics"]["final_sam_gap"] = math.nan
    return runs


GAIN = {"sst2": [0.0, 0.1]}
BOTH = [*trials("sst2", "adasam", [0.7, 0.8]), *trials("cola", "adasam", [0.7, 0.8])]
PARTS = {  # records, what the page has
    "trials only": (BOTH, ["# GLUE with MiniLM", "radius.png"]),
    "table2 alone": (
        [*grid(GAIN, "table2"), *trials("sst2", "adasam", [0.7, 0.8], "table2")],
        ["## Without momentum", "`sam_gap`"],
    ),
    "another optimizer": (
        [*grid(GAIN), record(method="lion"), *trials("sst2", "lion", [0.5])],
        ["| lion | 80.00 (one seed) |", "| table1 | SST2 | lion |"],
    ),
    "no gap": (without_gap(grid(GAIN)), ["## With momentum"]),
    "a gap that is not a number": (gap_of_nan(grid(GAIN)), ["| AdaSAM | 100.0 (one seed, 1 of 2 diverged) |"]),
    "no losses": (changed(grid(GAIN), lambda run: []), ["loss.png", "`sam_gap`"]),
    "one run": ([record()], ["80.00 (one seed)", "`sam_gap`"]),
    "radii of one task of two": ([*BOTH, record(sweep="radius", sam_rho=0.1)], ["radius.png"]),
    "batch sizes without curves": (changed(sizes(-1.0), lambda run: []), ["no complete seed", "batch_size.png"]),
}


@pytest.mark.parametrize("part", PARTS)
def test_whatever_is_there_has_its_page(tmp_path, part):
    runs, expected = PARTS[part]
    put(tmp_path, runs)
    page = report(tmp_path)
    for text in expected:
        assert text in page
    assert all((tmp_path / name).is_file() for name in re.findall(r"\]\((\w+\.png)\)", page))
    assert part != "no gap" or "`sam_gap`" not in page


WITHOUT = [
    {k: v for k, v in record().items() if k != key} for key in ("log_history", "versions", "metrics", "attempts")
]


@pytest.mark.parametrize("text", ["", "[]", '{"trial": null}', *map(json.dumps, WITHOUT)])
def test_a_file_that_is_no_record_is_named(tmp_path, text):
    put(tmp_path, [record()])
    (tmp_path / "records" / "table1" / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json is not a record"):
        report(tmp_path)


def test_the_page(tmp_path):
    trials = [
        record("sst2", method, 0, value, trial={"learning_rate": "1e-4"} | radius)
        for method, value, radius in (
            ("amsgrad", 0.7, {"sam_rho": 0.0}),
            ("amsgrad", 0.6, {"sam_rho": 0.1}),
            ("adasam", 0.72, {"sam_rho": 0.01}),
            ("adasam", 0.75, {"sam_rho": 0.05}),
        )
    ]
    better = {"sst2": [0.02, 0.03, 0.025], "mrpc": [0.01, 0.012, 0.011]}
    runs = [*grid(better), *grid({"mrpc": [0.0, 0.01, -0.01]}, "table2"), *sizes(-1.0, seeds=2), *trials]
    put(tmp_path, runs)
    page = report(tmp_path)
    scores = [100 * (0.7 + 0.01 * math.sin(7 * s) + d) for s, d in zip((1, 2, 3), better["sst2"], strict=True)]
    assert f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}" in page
    assert "| AdaSAM's average is above AMSGrad's | by 0.28: remembered, not re-read | **confirmed here** |" in page
    tried = "0.0001 / 0.01: 72.0, 0.0001 / 0.05: 75.0 | AdaSAM on SST2: its grid's highest radius"
    assert f"| table1 | SST2 | AdaSAM | 0.0001 / 0.05 | {tried} |" in page and "0123456789ab" in page
    for name in ("loss.png", "batch_size.png", "radius.png"):
        assert (tmp_path / name).stat().st_size > 5000 and name in page
    assert report(tmp_path) == page  # nothing in it is drawn anew
    with pytest.raises(ValueError, match="no records"):
        report(tmp_path / "nothing")


@pytest.mark.parametrize("folder", ["results/small", "results/evidence"])
def test_the_committed_report_is_that_of_its_records(tmp_path, monkeypatch, folder):
    committed = Path(__file__).parent.parent / folder
    shutil.copytree(committed / "records", tmp_path / folder / "records")
    monkeypatch.chdir(tmp_path)
    made = report(Path(folder))
    assert made == (committed / "REPORT.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\((\w+\.png)\)", made):
        one, other = (pyplot.imread(folder / name) for folder in (committed, Path(folder)))
        assert one.shape == other.shape and abs(one - other).mean() < 1e-3  # of [0, 1]
    path = next((tmp_path / folder / "records").glob("**/sst2-adasam-*.json"))
    changed = json.loads(path.read_text())
    changed["metrics"]["eval_accuracy"] = 0.5
    path.write_text(json.dumps(changed))
    assert report(Path(folder)) != made


def few_labels(method: str, metric: str) -> np.ndarray:
    """The metric of the committed runs on SST-2, by seed."""
    folder = ROOT / "results/evidence/records/few_labels"
    runs = [json.loads((folder / f"sst2-{method}-{seed}.json").read_text()) for seed in range(1, 36)]
    return np.array([run["metrics"][metric] for run in runs])


@pytest.mark.parametrize(
    ("metric", "scale", "digits"),
    [
        ("eval_accuracy", 100, 2),
        ("eval_cross_entropy", 1, 3),
        ("eval_calibration_error", 100, 2),
        ("final_sam_gap", 1000, 1),
    ],
)
def test_the_findings_are_those_of_the_records(metric, scale, digits):
    differences = scale * (few_labels("adasam", metric) - few_labels("amsgrad", metric))
    found = stats.ttest_1samp(differences, 0)
    low, high = found.confidence_interval(0.95)
    said = f"{differences.mean():+.{digits}f} ± {(high - low) / 2:.{digits}f}".replace("-", "−")
    page = (ROOT / "docs/findings.md").read_text(encoding="utf-8")
    (p,) = re.findall(rf"^\| [^|]+ \| {re.escape(said)} \| ([0-9.]+) \|$", page, re.MULTILINE)
    assert float(f"{found.pvalue:.1g}") == float(p) if found.pvalue < 0.01 else f"{found.pvalue:.2f}" == p
    assert metric != "final_sam_gap" or (max(differences) < 0 and "lower in all 35 pairs" in page)


def test_the_readme_has_the_means_of_the_records():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for metric, scale, digits in (("eval_accuracy", 100, 1), ("final_sam_gap", 1, 3)):
        values = [scale * few_labels(method, metric) for method in ("amsgrad", "adasam")]
        cells = " | ".join(f"{v.mean():.{digits}f} ± {v.std(ddof=1):.{digits}f}" for v in values)
        assert f"| {cells} |" in readme
    rows = json.loads((ROOT / "results/quickstart/results.json").read_text(encoding="utf-8"))["rows"]
    accuracies = [np.array([100 * r["accuracy"] for r in rows if r["optim"] == o]) for o in ("amsgrad", "adasam")]
    cells = " | ".join(f"{a.mean():.1f} ± {a.std(ddof=1):.1f}" for a in accuracies)
    assert len(accuracies[0]) == 11 and f"11 seeds: accuracy | {cells} |" in readme
    losses = [np.array([r["loss"] for r in rows if r["optim"] == o]) for o in ("amsgrad", "adasam")]
    cells = " | ".join(f"{loss.mean():.3f} ± {loss.std(ddof=1):.3f}" for loss in losses)
    assert f"the same: held-out loss | {cells} |" in readme
    more, less = losses
    interval = stats.ttest_1samp(less - more, 0).confidence_interval(0.95)
    assert f"**higher** by {(less - more).mean():.2f} ± {(interval.high - interval.low) / 2:.2f}" in readme
    report = (ROOT / "results/evidence/REPORT.md").read_text(encoding="utf-8")
    (row,) = [line for line in report.splitlines() if line.startswith("| SST2 | AMSGrad | 0.0001 |")]
    assert row.split("|")[-2].split()[0] == "5.9" and "AMSGrad at AdaSAM's has 0.006" in readme
    for sweep, task, metric, scale, digits in (
        ("same_rate", "sst2", "eval_cross_entropy", 1, 3),
        ("same_rate", "sst2", "eval_accuracy", 100, 1),
        ("table2", "cola", "eval_matthews_correlation", 100, 1),
    ):
        cells = []
        for method in ("amsgrad", "adasam"):
            paths = (ROOT / "results/small/records" / sweep).glob(f"{task}-{method}-*.json")
            found = [scale * json.loads(path.read_text())["metrics"][metric] for path in paths]
            assert len(found) == 5
            cells.append(f"{np.mean(found):.{digits}f} ± {np.std(found, ddof=1):.{digits}f}")
        assert f"| {' | '.join(cells)} |" in readme
