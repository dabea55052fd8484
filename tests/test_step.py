"""The two passes as a plain object, on models that no Trainer knows, against NumPy."""

import numpy as np
import pytest
import torch
from helpers import OneProcess
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adasam_hf.directions import Gradient
from adasam_hf.step import StepSettings, TwoPassStep
from adasam_hf.step_metrics import StepMetrics
from adasam_hf.window import StepPlan, Window

LR, RHO = 0.1, 0.3


# ---- layouts: each makes a parameter of six elements, and says where in memory they lie ----


def contiguous(generator):
    return torch.randn(2, 3, generator=generator, dtype=torch.float64)


def sliced(generator):
    return torch.randn(2, 8, generator=generator, dtype=torch.float64)[:, 1:4]


def strided(generator):
    return torch.randn(4, 6, generator=generator, dtype=torch.float64)[::2, ::2]


def transposed(generator):
    return torch.randn(3, 2, generator=generator, dtype=torch.float64).t()


def channels_last(generator):
    return torch.randn(1, 3, 2, 1, generator=generator, dtype=torch.float64).to(memory_format=torch.channels_last)


def scalars(generator):
    return torch.randn(6, generator=generator, dtype=torch.float64)


LAYOUTS = [contiguous, sliced, strided, transposed, channels_last, scalars]


class Quadratic(nn.Module):
    """½ Σ (a·w − b)², over the parameters that a micro-batch uses; those beyond `inside` belong to the loss."""

    def __init__(self, layouts, inside, generator):
        super().__init__()
        self.bases = [layout(generator) for layout in layouts]
        everything = [nn.Parameter(base) for base in self.bases]
        self.inner = nn.ParameterList(everything[:inside])
        self.outer = everything[inside:]  # a list is not registered: the optimizer alone knows these

    @property
    def all(self):
        return [*self.inner, *self.outer]

    def forward(self, micro_batch):
        terms = [((a * p - b) ** 2).sum() / 2 for p, (a, b) in zip(self.all, micro_batch, strict=True) if a is not None]
        return sum(terms)


def gradient_by_hand(weights, micro_batch, trainable):
    return [
        a.numpy() * (a.numpy() * w - b.numpy()) if a is not None and on else np.zeros_like(w)
        for w, (a, b), on in zip(weights, micro_batch, trainable, strict=True)
    ]


def step_by_hand(weights, window, taken, trainable, scope, fault=None):
    """The weights after one step of SGD; `taken` says which micro-batches the trainer does not skip."""
    batches = [batch for batch, on in zip(window, taken, strict=True) if on]
    k = len(window)

    def total(at, some):
        parts = [gradient_by_hand(at, batch, trainable) for batch in some]
        return [sum(gs) / k for gs in zip(*parts, strict=True)] if parts else [np.zeros_like(w) for w in weights]

    def perturbed(ascent):
        norm = np.sqrt(sum((g**2).sum() for g in ascent))
        return weights if norm == 0 else [w + RHO * g / norm for w, g in zip(weights, ascent, strict=True)]

    if scope == "batch":
        ascent = total(weights, batches)
        g = total(perturbed(ascent), batches) if taken[-1] and fault != "plain" else ascent
    else:
        parts = [total(perturbed(total(weights, [batch])), [batch]) for batch in batches]
        g = [sum(gs) for gs in zip(*parts, strict=True)] if parts else [np.zeros_like(w) for w in weights]
    return [w - LR * d for w, d in zip(weights, g, strict=True)]


@st.composite
def trainings(draw):
    layouts = draw(st.lists(st.sampled_from(LAYOUTS), min_size=2, max_size=5))
    steps = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))  # micro-batches of each
    return {
        "layouts": layouts,
        "inside": draw(st.integers(1, len(layouts))),
        "scope": draw(st.sampled_from(["batch", "microbatch"])),
        "steps": [
            {
                "uses": draw(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=k, max_size=k)),
                "taken": draw(st.lists(st.sampled_from([True, True, True, False]), min_size=k, max_size=k)),
                "trainable": draw(st.lists(st.sampled_from([True, True, False]), min_size=5, max_size=5)),
            }
            for k in steps
        ],
    }


def run(training, fault=None):
    """Through the step, and by hand. Returns the largest difference, and how far the weights have come."""
    generator = torch.Generator().manual_seed(0)
    model = Quadratic(training["layouts"], training["inside"], generator)
    count = len(model.all)
    storages = [base.untyped_storage() for base in model.bases]
    before = [torch.frombuffer(s, dtype=torch.float64).clone() for s in map(_bytes, storages)]
    optimizer = torch.optim.SGD(model.all, lr=LR, foreach=False)
    settings = StepSettings(training["scope"], same_masks=True, adaptive=False)
    step = TwoPassStep(model, optimizer, settings, metrics=StepMetrics())
    weights = [p.detach().numpy().copy() for p in model.all]
    start = [w.copy() for w in weights]
    direction = Gradient(optimizer)
    for one in training["steps"]:
        trainable = one["trainable"][:count]
        for p, on in zip(model.all, trainable, strict=True):
            p.requires_grad_(on)
        micro_batches = []
        for uses in one["uses"]:
            # The first trainable parameter always takes part, or there would be no loss to go back from.
            first = trainable.index(True) if True in trainable else None
            micro_batches.append(
                [
                    (torch.randn(p.shape, generator=generator, dtype=torch.float64), torch.ones_like(p.detach()))
                    if on or i == first
                    else (None, torch.ones_like(p.detach()))
                    for i, (p, on) in enumerate(zip(model.all, uses[:count], strict=True))
                ]
            )
        if True not in trainable:
            continue
        k = len(micro_batches)

        def stock_step(micro_batch, k=k):
            loss = model(micro_batch) / k
            loss.backward()
            return loss.detach()

        window = Window(micro_batches, StepPlan([RHO], direction))
        for micro_batch, taken in zip(window, one["taken"], strict=True):
            if taken:
                step(window, micro_batch, stock_step, OneProcess())
        step.finish(window, stock_step, OneProcess())
        assert not step.perturbation.active
        for p, w in zip(model.all, weights, strict=True):
            assert np.array_equal(p.detach().numpy(), w)  # the weights are w, bit for bit, until the update
        optimizer.step()
        optimizer.zero_grad()
        by_hand = step_by_hand(weights, micro_batches, one["taken"], trainable, training["scope"], fault)
        error = max(np.abs(p.detach().numpy() - w).max() for p, w in zip(model.all, by_hand, strict=True))
        if error > 1e-12:
            return error, 0.0
        weights = [p.detach().numpy().copy() for p in model.all]
    # What lies beside a view in its memory has never been touched.
    for base, storage, old in zip(model.bases, storages, before, strict=True):
        now = torch.frombuffer(_bytes(storage), dtype=torch.float64).clone()
        mine = torch.zeros(len(old), dtype=torch.bool)
        torch.as_strided(mine, base.shape, base.stride(), base.storage_offset()).fill_(True)
        assert torch.equal(now[~mine], old[~mine])
    return 0.0, max(np.abs(w - s).max() for w, s in zip(weights, start, strict=True))


def _bytes(storage):
    return bytearray(bytes(storage.tolist()))


@settings(max_examples=60, deadline=None)
@given(trainings())
@pytest.mark.compat(
    "Parameters", "slices, transposed and channels-last weights; frozen and unfrozen; outside the model"
)
def test_any_layout_window_and_skip_follows_numpy(training):
    error, _ = run(training)
    assert error == 0.0


def test_the_comparison_can_fail():
    every = {"uses": [[True] * 5] * 2, "taken": [True, True], "trainable": [True] * 5}
    training = {"layouts": LAYOUTS[:4], "inside": 3, "scope": "batch", "steps": [every]}
    error, moved = run(training)
    assert error == 0.0 and moved > 1e-2
    error, _ = run(training, fault="plain")
    assert error > 1e-3
    training["scope"] = "microbatch"
    assert run(training)[0] == 0.0


# ---- what the step refuses ----


def steps_of(model, scope="batch", **more):
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    settings = StepSettings(scope, same_masks=True, adaptive=False)
    step = TwoPassStep(model, optimizer, settings, metrics=StepMetrics(), **more)

    def stock_step(x):
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    return step, stock_step, lambda rows: Window(rows, StepPlan([RHO], Gradient(optimizer)))


def test_one_micro_batch_of_several_taken_twice_is_refused_in_scope_batch():
    step, stock_step, window_of = steps_of(nn.Linear(3, 1), owner="Mine.training_step")
    window = window_of([torch.randn(2, 3), torch.randn(2, 3)])
    for x in window:
        step(window, x, stock_step, OneProcess())
        with pytest.raises(
            RuntimeError, match=r"Mine.training_step takes one micro-batch of an accumulated step twice.*microbatch"
        ):
            step(window, x, stock_step, OneProcess())
        break
    step, stock_step, window_of = steps_of(nn.Linear(3, 1), scope="microbatch")
    window = window_of([torch.randn(2, 3), torch.randn(2, 3)])
    for x in window:
        step(window, x, stock_step, OneProcess())
        step(window, x, stock_step, OneProcess())
    assert step.metrics.read is not None and window.complete


def test_a_micro_batch_that_comes_again_after_the_descent_is_refused():
    """As where a trainer tries it again after an out-of-memory: it would ascend along that one alone."""
    model = nn.Linear(3, 1)
    step, stock_step, window_of = steps_of(model)
    calls = []

    def fails_in_the_last_second_pass(x):
        calls.append(x)
        if len(calls) == 4:
            raise MemoryError
        return stock_step(x)

    window = window_of([torch.randn(2, 3), torch.randn(2, 3)])
    for i, x in enumerate(window):
        if not i:
            step(window, x, fails_in_the_last_second_pass, OneProcess())
            continue
        with pytest.raises(MemoryError):
            step(window, x, fails_in_the_last_second_pass, OneProcess())
        with pytest.raises(RuntimeError, match="takes one micro-batch of an accumulated step twice"):
            step(window, x, fails_in_the_last_second_pass, OneProcess())
    window = window_of([torch.randn(2, 3)])  # one that is a whole step may come again
    for x in window:
        for _ in range(2):
            step(window, x, stock_step, OneProcess())
    assert window.complete


def test_a_window_that_is_not_iterated_over_is_counted():
    """A trainer may take the micro-batches out of the window before it trains on them."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    step, stock_step, window_of = steps_of(model)
    rows = [torch.randn(2, 3), torch.randn(2, 3)]
    window = window_of(rows)
    for x in list(window):
        step(window, x, stock_step, OneProcess())
    assert window.complete
    counted = model.weight.grad.clone()
    model.zero_grad()
    window = window_of(rows)
    for x in window:
        step(window, x, stock_step, OneProcess())
    assert torch.equal(model.weight.grad, counted)
