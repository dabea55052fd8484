"""`PeakRates` beside PyTorch's own schedulers, whose rates and peaks are worked out by hand here."""

import json
import math

import pytest
import torch
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from adasam_hf.schedule import PeakRates, Schedule

STEPS = 12
WARMUP = [(t + 1) / 4 if t < 4 else 1 - (t - 3) / 9 for t in range(STEPS)]


def sgd(*rates):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=1.0)


def shares_of(optimizer, peaks):
    return [peaks.share(i, float(g["lr"]), g.get("initial_lr")) for i, g in enumerate(optimizer.param_groups)]


def run(optimizer, step, steps=STEPS, peaks=None):
    """Shares and rates of every group at every step, as a trainer asks for them: before the update."""
    peaks, shares, rates = peaks or PeakRates(), [], []
    for _ in range(steps):
        shares.append(shares_of(optimizer, peaks))
        rates.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        step()
    return shares, rates


def plateau(optimizer):
    """Step t sees a loss that stays, so that a patience of 2 cuts the rate by 10 after every third."""
    scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=2)
    return lambda: scheduler.step(1.0)


def rising(rates):
    """What is right where the peak is the highest rate so far."""
    return [[rate / max(column[: t + 1]) for t, rate in enumerate(column)] for column in zip(*rates, strict=True)]


SCHEDULERS = {
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=1e-3, total_steps=STEPS + 1).step,
    "CyclicLR": lambda o: CyclicLR(o, base_lr=1e-4, max_lr=1e-3, step_size_up=4, cycle_momentum=False).step,
    "ReduceLROnPlateau": plateau,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_that_rise_above_the_first_one(name):
    optimizer = sgd(1e-3, 2e-3)
    shares, rates = run(optimizer, SCHEDULERS[name](optimizer))
    for column, want in zip(zip(*shares, strict=True), rising(rates), strict=True):
        assert list(column) == pytest.approx(want, rel=1e-12)
    assert all(0 < share <= 1 for row in shares for share in row)
    assert {row[0] for row in shares} > {1.0}  # it is at the peak, and it is not always


def test_the_share_of_initial_lr_would_not_do():
    """The control: what the ascent had before."""
    optimizer = sgd(1e-3)
    step = SCHEDULERS["OneCycleLR"](optimizer)
    first = optimizer.param_groups[0]["initial_lr"]
    assert max(rate / first for (rate,) in run(optimizer, step)[1]) == pytest.approx(25, rel=0.05)


def test_the_cycles_by_hand():
    optimizer = sgd(1e-3)
    shares, _ = run(optimizer, SCHEDULERS["CyclicLR"](optimizer))
    down = [1 - 0.225 * t for t in (1, 2, 3)]
    assert [share for (share,) in shares] == pytest.approx([1.0] * 5 + [*down, 0.1, *down[::-1]])


def test_a_plateau_by_hand():
    optimizer = sgd(1e-3)
    shares, _ = run(optimizer, plateau(optimizer))
    assert [share for (share,) in shares] == pytest.approx([1.0] * 4 + [0.1] * 3 + [0.01] * 3 + [1e-3] * 2)


def test_a_warm_up_and_a_decay_are_those_of_the_rate():
    """Each group follows its own, from the first step of the warm-up on, as `initial_lr` is the peak."""
    optimizer = sgd(1e-3, 5e-5)
    scheduler = LambdaLR(optimizer, [WARMUP.__getitem__, lambda t: 0.5**t], last_epoch=-1)
    shares, _ = run(optimizer, scheduler.step, STEPS - 1)
    assert [row[0] for row in shares] == pytest.approx(WARMUP[:-1])
    assert [row[1] for row in shares] == pytest.approx([0.5**t for t in range(STEPS - 1)])


def test_a_group_at_rate_zero_stays_and_the_others_go_on():
    optimizer = sgd(0.0, 1e-3)
    scheduler = LambdaLR(optimizer, lambda t: 1 - t / STEPS)
    shares, _ = run(optimizer, scheduler.step)
    assert [row[0] for row in shares] == [0.0] * STEPS
    assert [row[1] for row in shares] == pytest.approx([1 - t / STEPS for t in range(STEPS)])


def test_a_group_that_thaws():
    peaks = PeakRates()
    assert [peaks.share(0, rate, 0.0) for rate in (0.0, 0.1, 0.2, 0.1, 0.0)] == [0.0, 1.0, 1.0, 0.5, 0.0]


def test_groups_that_appear():
    peaks = PeakRates()
    assert peaks.share(0, 1.0) == 1.0
    assert peaks.share(2, 0.5, 1.0) == 0.5  # the one between has not been asked for
    assert peaks.share(1, 3.0) == 1.0
    assert [peaks.share(i, 0.25) for i in range(3)] == [0.25, 0.25 / 3, 0.25]


@pytest.mark.parametrize("name", ["CyclicLR", "ReduceLROnPlateau"])
def test_a_resumed_run_goes_on(name):
    """Through JSON, as a checkpoint has it; without the peaks it would begin a new maximum."""
    optimizer = sgd(1e-3, 0.0)
    step = SCHEDULERS[name](optimizer)
    peaks = PeakRates()
    run(optimizer, step, 7, peaks)
    state = json.loads(json.dumps(peaks.state()))
    resumed, fresh = PeakRates(), PeakRates()
    resumed.load(state)
    want, got, forgotten = (shares_of(optimizer, p) for p in (peaks, resumed, fresh))
    assert got == want and want[0] < 1
    assert forgotten[0] > want[0]
    state.append(1.0)  # both are lists of their own
    peaks.state().clear()
    assert len(resumed.state()) == len(peaks.state()) == 2


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "lr"])
def test_the_share_matters_to_one_shape_alone(shape):
    by_hand = {"constant": 1.0, "linear": 0.75, "cosine": (1 + math.cos(math.pi / 4)) / 2}
    schedule = Schedule(start=0.2, shape=shape)
    for share in (0.0, 0.3, 1.0):
        assert schedule.factor(4, 10, share) == pytest.approx(by_hand.get(shape, share))
    assert (
        [schedule.ascends(t, 10) for t in range(10)]
        == [schedule.climbs(t, 10) for t in range(10)]
        == ([False] * 2 + [True] * 8)
    )
