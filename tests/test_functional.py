"""Functional-SAM against Jacobians by hand in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import SeedSteps, Sharp, flat, make_model, make_rows
from helpers import OneProcess
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from adasam_hf import AdaSAMSeq2SeqTrainer, SharpnessAwareLoop
from adasam_hf.directions import Gradient
from adasam_hf.functional import LogitGradients
from adasam_hf.step import StepSettings, TwoPassStep
from adasam_hf.step_metrics import StepMetrics
from adasam_hf.window import StepPlan, Window

RHO = 0.5
SCOPES = pytest.mark.parametrize("scope", ["batch", "microbatch"])
COUNTS = pytest.mark.parametrize("k", [1, 3])


def causal_head():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).double()


def causal_rows():
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"].clone()} for row in make_rows(12)]


def seq2seq_head():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=40, max_position_embeddings=32, **sizes, **heads)
    ).double()


class SharpSeq2Seq(AdaSAMSeq2SeqTrainer):
    pass


HEADS = {
    "bert": (lambda: make_model("bert"), lambda: make_rows(12), Sharp),
    "causal": (causal_head, causal_rows, Sharp),
    "seq2seq": (seq2seq_head, causal_rows, SharpSeq2Seq),
}


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


def by_hand(window, loss, scope, scale=1.0, fault=None, start=None, seed=1):
    """J(w + δ)ᵀ ∇_F L(w), summed over the window."""
    model = bert()
    if start is not None:
        torch.nn.utils.vector_to_parameters(start, model.parameters())
    torch.manual_seed(seed)
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
    settings = StepSettings(scope, same_masks=True, adaptive=False, functional=True)
    step = TwoPassStep(model, optimizer, settings, metrics=StepMetrics(), loss_scale=lambda: scale)
    torch.manual_seed(1)
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
    want, found = by_hand(batches(k), loss, scope, scale), ours(batches(k), loss, scope, scale)
    assert (found - want).norm() < 1e-13 * want.norm()
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
    settings = StepSettings("batch", same_masks=True, adaptive=False, functional=True)
    step = TwoPassStep(model, optimizer, settings, metrics=StepMetrics())

    def stock_step(x):
        found = model(x)
        loss = found["loss"] if isinstance(found, dict) else found
        loss.backward()
        return loss.detach()

    window = Window([torch.randn(2, 3)], StepPlan([RHO], Gradient(optimizer)))
    with pytest.raises(
        NotImplementedError, match=r"takes the loss's derivative at the logits.*Plain.*sam_descent='loss'"
    ):
        step(window, window[0], stock_step, OneProcess())
    assert torch.equal(model.body.weight, before)


# ---- in the Trainer ----


@SCOPES
@COUNTS
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.compat("Descent", "`sam_descent=functional`, label smoothing, dropout")
def test_a_training_by_hand(build, scope, k, smoothing):
    model, rows = bert(), make_rows(4 * 2 * k)
    flags = {"sam_descent": "functional", "sam_scope": scope, "label_smoothing_factor": smoothing}
    options = {"optim": "sgd", "learning_rate": 0.1, "sam_rho": RHO, "gradient_accumulation_steps": k}
    build(Sharp, model, rows, callbacks=[SeedSteps()], **options, **flags).train()

    def trained_by_hand(fault=None):
        weights = flat(bert())
        for step in range(2):
            parts = [rows[i : i + 4] for i in range(4 * k * step, 4 * k * (step + 1), 4)]
            window = [{key: torch.stack([row[key] for row in part]) for key in part[0]} for part in parts]
            loss = lambda logits, labels: cross_entropy(logits, labels, label_smoothing=smoothing)  # noqa: E731
            weights = weights - 0.1 * by_hand(window, loss, scope, fault=fault, start=weights, seed=100 + step)
        return weights

    tolerance = 1e-10 if smoothing else 1e-12  # the Trainer sums the smoothed part in float32
    assert (flat(model) - trained_by_hand()).abs().max() < tolerance
    assert (flat(model) - trained_by_hand("loss")).abs().max() > 1e-5


@pytest.mark.compat("Descent", "`sam_descent=functional` in bf16 autocast, causal and sequence-to-sequence heads")
@pytest.mark.parametrize("kind", ["bert", "causal", "seq2seq"])
@pytest.mark.parametrize("bf16", [False, True])
def test_heads_of_other_kinds(build, kind, bf16):
    """At a vanishing radius it is the plain run; at a real one it is neither that nor ordinary SAM."""
    make, rows, trainer = HEADS[kind]

    def run(**flags):
        model = make()
        build(
            trainer, model, rows(), callbacks=[SeedSteps()], optim="sgd", learning_rate=0.1, bf16=bf16, **flags
        ).train()
        return flat(model)

    plain = run()
    tiny = run(sam_rho=1e-10, sam_descent="functional")
    assert (tiny - plain).abs().max() < (1e-3 if bf16 else 1e-8)
    real, ordinary = run(sam_rho=RHO, sam_descent="functional"), run(sam_rho=RHO)
    assert min((real - plain).abs().max(), (real - ordinary).abs().max()) > 1e-5


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"sam_direction": "momentum"}, "sam_direction='momentum'.*set sam_direction='gradient'"),
        ({"sam_ascent_fraction": 0.5}, "sam_ascent_fraction=0.5.*set sam_ascent_fraction=1.0"),
        ({"sam_interval": 2, "sam_reuse": True}, "sam_reuse=True.*set sam_reuse=False"),
        ({"torch_compile": True}, "torch_compile=True.*set torch_compile=False"),
    ],
)
@pytest.mark.compat("Descent", "`functional` without a first pass, on a share of the rows, compiled", refused=True)
def test_what_contradicts_it(build, flags, problem):
    with pytest.raises(ValueError, match=f"{problem}, or sam_descent='loss'"):
        build(Sharp, bert(), optim="adamw_torch", sam_rho=RHO, sam_descent="functional", **flags)


@SCOPES
def test_a_loop_of_ones_own(scope):
    """`SharpnessAwareLoop` against the Jacobian by hand."""
    model = bert()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    sam = SharpnessAwareLoop(accelerator, model, optimizer, rho=RHO, scope=scope, descent="functional")
    torch.manual_seed(1)
    for batch in batches(2):
        with accelerator.accumulate(model):
            sam.backward(lambda ids, labels: classify(model(input_ids=ids).logits, labels), *batch.values())
    found = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])
    want = by_hand(batches(2), classify, scope)
    assert (found - want).norm() < 1e-13 * want.norm()
    assert (found - by_hand(batches(2), classify, scope, fault="loss")).norm() > 1e-3 * want.norm()
    with pytest.raises(ValueError, match="direction='momentum' contradicts descent='functional'"):
        SharpnessAwareLoop(accelerator, model, optimizer, rho=RHO, direction="momentum", descent="functional")
