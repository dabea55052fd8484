"""Functional-SAM against Jacobians by hand in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_rows
from test_step import OneProcess
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from adasam_hf.directions import Gradient
from adasam_hf.functional import LogitGradients
from adasam_hf.metrics import StepMetrics
from adasam_hf.step import TwoPassStep
from adasam_hf.window import StepPlan, Window

RHO = 0.5
SCOPES = pytest.mark.parametrize("scope", ["batch", "microbatch"])
COUNTS = pytest.mark.parametrize("k", [1, 3])


def batches(k, rows=2):
    found = make_rows(rows * k)
    parts = [found[i : i + rows] for i in range(0, rows * k, rows)]
    return [{key: torch.stack([row[key] for row in part]) for key in part[0]} for part in parts]


def classify(logits, labels):
    return cross_entropy(logits, labels)


def smooth(logits, labels):
    return cross_entropy(logits, labels, label_smoothing=0.2)


def regress(logits, labels):
    return mse_loss(logits[:, 0], labels.double())


def bert(seed=0):
    return make_model("bert").train()  # with dropout


def by_hand(window, loss, scope, scale=1.0, fault=None):
    """Gradients at w of J(w + δ)ᵀ ∇_F L(w), summed over the window, and ‖s‖ of the last ascent."""
    model = bert()
    params, k = list(model.parameters()), len(window)
    total = [torch.zeros_like(p) for p in params]
    clean = [p.detach().clone() for p in params]
    states, at_logits, slopes = [], [], []
    for batch in window:
        states.append(torch.get_rng_state())
        logits = model(input_ids=batch["input_ids"]).logits
        value = scale * loss(logits, batch["labels"]) / k
        (slope,) = torch.autograd.grad(value, logits, retain_graph=True)
        at_logits.append(slope)
        slopes.append(torch.autograd.grad(value, params, materialize_grads=True))
    after = torch.get_rng_state()
    groups = [range(k)] if scope == "batch" else [[i] for i in range(k)]
    for group in groups:
        s = [sum(slopes[i][j] for i in group) for j in range(len(params))]
        norm = math.sqrt(sum(g.square().sum().item() for g in s))
        with torch.no_grad():
            for p, g in zip(params, s, strict=True):
                p.add_(RHO * g / norm)
        for i in group:
            torch.set_rng_state(states[i])
            logits = model(input_ids=window[i]["input_ids"]).logits
            outer = at_logits[i]
            if fault == "loss":  # ordinary SAM
                (outer,) = torch.autograd.grad(scale * loss(logits, window[i]["labels"]) / k, logits, retain_graph=True)
            found = torch.autograd.grad(logits, params, outer, materialize_grads=True)
            total = [a + b for a, b in zip(total, found, strict=True)]
        with torch.no_grad():
            for p, value in zip(params, clean, strict=True):
                p.copy_(value)
    torch.set_rng_state(after)
    return torch.cat([g.flatten() for g in total])


def ours(window, loss, scope, scale=1.0, wrap=lambda model: model):
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    how = {"scope": scope, "same_masks": True, "functional": True, "adaptive": False, "metrics": StepMetrics()}
    step = TwoPassStep(model, optimizer, loss_scale=lambda: scale, **how)
    called = wrap(model)

    def stock_step(batch):
        value = loss(called(input_ids=batch["input_ids"]).logits, batch["labels"]) / len(window)
        (scale * value).backward()
        return value.detach()

    for batch in (steps := Window(window, StepPlan([RHO], Gradient(optimizer)))):
        step(steps, batch, stock_step, OneProcess())
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


@SCOPES
@COUNTS
@pytest.mark.parametrize("loss", [classify, smooth, regress])
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_it_is_the_jacobian_at_the_perturbed_weights(scope, k, loss, scale):
    torch.manual_seed(1)
    want = by_hand(batches(k), loss, scope, scale)
    torch.manual_seed(1)
    found = ours(batches(k), loss, scope, scale)
    assert (found - want).norm() < 1e-13 * want.norm()
    torch.manual_seed(1)
    assert (found - by_hand(batches(k), loss, scope, scale, fault="loss")).norm() > 1e-3 * want.norm()


def test_logits_that_accelerate_has_copied_into_float32():
    """The loss in a model comes from the original; so does that which is made of the copy."""

    class Rounds(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Linear(3, 2)

        def forward(self, x):
            logits = self.body(x).bfloat16()
            inside = logits.float().square().mean()
            return {"loss": inside, "logits": logits.float()}

    model, x = Rounds(), torch.randn(4, 3)
    gradients = LogitGradients(model)
    with gradients.record():
        outputs = model(x)
        (outputs["loss"] + outputs["logits"].mean()).backward()
    model.zero_grad()
    with torch.no_grad():
        model.body.weight.mul_(2.0)
    with gradients.replay():
        outputs = model(x)
        (outputs["loss"] + outputs["logits"].mean()).backward()
    logits = model.body(x).detach()
    at_w = Rounds().body(x).bfloat16().float()
    slope = (2 * at_w / at_w.numel() + 1 / at_w.numel()).bfloat16().float()
    torch.testing.assert_close(model.body.weight.grad, slope.T @ x, rtol=1e-2, atol=1e-3)
    ordinary = (2 * logits / logits.numel() + 1 / logits.numel()).T @ x
    assert (model.body.weight.grad - ordinary).abs().max() > 0.05


def test_several_outputs_and_several_calls():
    """As in question answering, and in preference losses that call the model twice."""

    class TwoEnds(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Linear(3, 2).double()

        def forward(self, x):
            start, end = torch.tanh(self.body(x)).split(1, dim=-1)
            return SimpleNamespace(logits=None, start_logits=start, end_logits=end, router_logits=start * 2)

    def loss(outputs):
        return sum((o.start_logits.exp() * o.end_logits).sum() * i for i, o in enumerate(outputs, 1))

    xs = [torch.randn(4, 3, dtype=torch.float64) for _ in range(2)]
    model = TwoEnds()
    gradients = LogitGradients(model)
    with gradients.record():
        loss([model(x) for x in xs]).backward()
    model.zero_grad()
    weights = list(model.parameters())
    outer = []
    for i, x in enumerate(xs, 1):
        o = TwoEnds()(x)
        ends = [o.start_logits.detach().requires_grad_(), o.end_logits.detach().requires_grad_()]
        outer.append(torch.autograd.grad((ends[0].exp() * ends[1]).sum() * i, ends))
    with torch.no_grad():
        model.body.weight.add_(0.3)
    with gradients.replay():
        loss([model(x) for x in xs]).backward()
    outputs = [model(x) for x in xs]
    flat = [t for o in outputs for t in (o.start_logits, o.end_logits)]
    want = torch.autograd.grad(flat, weights, [t for pair in outer for t in pair])
    for p, g in zip(weights, want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "outputs", [lambda h: h.sum(), lambda h: {"loss": h.sum()}, lambda h: {"logits": h.detach(), "loss": h.sum()}]
)
def test_models_without_logits_are_refused_before_anything_moves(outputs):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(3, 2)

        def forward(self, x):
            return outputs(self.body(x))

    model = Plain()
    before = model.body.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    how = {"scope": "batch", "same_masks": True, "functional": True, "adaptive": False, "metrics": StepMetrics()}

    def stock_step(x):
        found = model(x)
        loss = found["loss"] if isinstance(found, dict) else found
        loss.backward()
        return loss.detach()

    window = Window([torch.randn(2, 3)], StepPlan([RHO], Gradient(optimizer)))
    with pytest.raises(
        NotImplementedError, match=r"takes the loss's derivative at the logits.*Plain.*sam_descent='loss'"
    ):
        TwoPassStep(model, optimizer, **how)(window, window[0], stock_step, OneProcess())
    assert torch.equal(model.body.weight, before)
