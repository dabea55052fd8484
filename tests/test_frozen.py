"""Reuse of what frozen modules compute: the same bits as without it, and none where anything differs."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import SeedSteps, Sharp, flat, make_model, make_rows
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, TrainerCallback

from adasam_hf import AdaSAMSeq2SeqTrainer, rng
from adasam_hf.buffers import ModelState
from adasam_hf.frozen import FrozenOutputs, Trust, frozen_modules

# ---- one module ----


class Below(nn.Module):
    """Frozen; `kind` says on what its output depends beside its input."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear, self.dropout, self.norm = kind, nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)
        self.register_buffer("centre", torch.zeros(4))
        self.number, self.generator, self.latest = 1, random.Random(0), torch.zeros(4)
        self.counter = SimpleNamespace(runs=0)
        self.requires_grad_(False).double()

    def forward(self, x, context=None):
        self.counter.runs += 1
        if self.kind == "number":
            self.number += 1
            x = x * self.number
        if self.kind == "generator":
            x = x * self.generator.random()
        if self.kind == "codebook":  # through .data, which counts no version
            self.centre.data.mul_(0.9).add_(x.mean(0), alpha=0.1)
            x = x - self.centre
        if self.kind == "attribute":
            self.latest = x.mean(0)
        if self.kind == "context":
            x = x * len(context.append(1) or context.items)
        x = self.linear(x)
        if self.kind == "mask":
            x = self.dropout(x)
        return self.norm(x) if self.kind == "statistics" else x


class Context:
    """As a cache of keys and values that layers write to."""

    def __init__(self):
        self.items = []

    def append(self, item):
        self.items.append(item)


X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def trusted(*modules):
    """What `Trust` is after a step in which they have been run twice."""
    trust = Trust()
    for module in modules:
        trust.note(module, same=True)
    trust.end_step()
    return trust


def two_calls(kind, between=lambda below, x: x, same_numbers=True, reuse=True):
    """Both outputs of a module, what it and the generators are left with, and how often it ran."""
    torch.manual_seed(0)
    random.seed(0)
    below, x = Below(kind), X * (kind != "zeros")
    context = Context() if kind == "context" else None
    generators = rng.generators_of(below.modules())
    outputs = FrozenOutputs([below] if reuse else [], trusted(below), generators=generators)
    start, state = rng.capture(generators), ModelState(below.modules())
    with outputs.record():
        first = below(x, context)
    if same_numbers:
        rng.rewind(start)
    state.restore()
    x = between(below, x)
    with outputs.replay():
        second = below(x, context)
    drawn = torch.tensor([torch.rand(()).item(), random.random(), below.generator.random()])
    state = [b.double().flatten() for b in below.buffers()] + [below.latest.double().flatten()]
    return torch.cat([first.flatten(), second.flatten(), drawn.double(), *state]), below.counter.runs


@pytest.mark.parametrize("kind", ["plain", "mask", "generator", "number", "codebook", "attribute", "statistics"])
def test_what_is_the_same_is_computed_once(kind):
    with_reuse, runs = two_calls(kind)
    without, always = two_calls(kind, reuse=False)
    assert torch.equal(with_reuse, without) and (runs, always) == (1, 2)


CHANGES = {
    "another number of its own": ("number", {"between": lambda below, x: (setattr(below, "number", 7), x)[1]}),
    "another buffer": ("codebook", {"between": lambda below, x: (below.centre.data.add_(1.0), x)[1]}),
    "a weight that has been written to": ("plain", {"between": lambda below, x: (below.linear.weight.mul_(2.0), x)[1]}),
    "a thawed weight": ("plain", {"between": lambda below, x: (below.requires_grad_(True), x)[1]}),
    "something that cannot be compared": ("context", {}),
    "another input": ("plain", {"between": lambda below, x: x + 1e-16 * torch.arange(4) * x}),
    "an input of another sign of zero": (
        "plain",
        {"between": lambda below, x: x * torch.tensor([1.0, 1.0, 1.0, -1.0])},
    ),
    "an input that needs a gradient": ("plain", {"between": lambda below, x: x.clone().requires_grad_()}),
    "an input that has been written to": ("plain", {"between": lambda below, x: x.add_(1.0)}),
    "other masks": ("mask", {"same_numbers": False}),
    "another mode": ("mask", {"between": lambda below, x: (below.eval(), x)[1]}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_differs_is_computed_again(what):
    kind, how = CHANGES[what]
    with_reuse, runs = two_calls(kind, **how)
    without, always = two_calls(kind, reuse=False, **how)
    assert torch.equal(with_reuse, without) and (runs, always) == (2, 2)


def test_equal_inputs_of_another_call_and_no_numbers_to_draw():
    assert two_calls("plain", between=lambda below, x: x.clone())[1] == 1
    assert two_calls("plain", same_numbers=False)[1] == 1


def test_an_output_that_has_been_written_to_is_not_handed_out():
    below = Below("plain")
    outputs = FrozenOutputs([below], trusted(below))
    with outputs.record():
        below(X).add_(1.0)
    with outputs.replay():
        assert torch.equal(below(X), below.linear(X)) and below.counter.runs == 2


def test_a_forward_that_a_library_has_put_there_is_called_and_stays():
    below = Below("plain")
    below.forward = lambda x: 2 * type(below).forward(below, x)
    theirs = below.forward
    outputs = FrozenOutputs([below], trusted(below))
    with outputs.record():
        first = below(X)
    with outputs.replay():
        assert torch.equal(below(X), first)
    assert below.forward is theirs and torch.equal(first, 2 * below.linear(X))


def test_which_modules_are_frozen():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU())
    assert frozen_modules([model]) == []
    model[:2].requires_grad_(False)
    assert frozen_modules([model]) == [model[0], model[1]]
    model[0][1].register_forward_hook(lambda *_: None)  # somebody looks inside
    assert frozen_modules([model]) == [model[0][0], model[1]]
    model[1].register_forward_hook(lambda *_: None)  # which is called beside a forward that is left out, too
    assert frozen_modules([model]) == [model[0][0], model[1]]
    model[2].gradient_checkpointing = True
    assert frozen_modules([model]) == []
    assert frozen_modules([model, torch.compile(model)]) == []
    whole = nn.Linear(2, 2).requires_grad_(False)
    assert frozen_modules([whole]) == [whole]
    assert frozen_modules([nn.Sequential(nn.SyncBatchNorm(2).requires_grad_(False), nn.Linear(2, 2))]) == []


# ---- trainings ----


def lower_frozen(model, layers):
    for part in (model.bert.embeddings, *model.bert.encoder.layer[:layers]):
        part.requires_grad_(False)
    return model


def bert(**config):
    return lower_frozen(make_model("bert", num_hidden_layers=3, **config), 2)


def head_only():
    return lower_frozen(make_model("bert", num_hidden_layers=2), 2)


def lora():
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="SEQ_CLS", layers_to_transform=[1], target_modules=["query", "value"], lora_dropout=0.1
    )
    return get_peft_model(make_model("bert", num_hidden_layers=2), config)


def encoder_frozen():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32, dropout=0.1,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).double()
    model.model.encoder.requires_grad_(False)
    return model


MODELS = {"lower layers": bert, "all but the head": head_only, "LoRA on the upper layer": lora}


class CountsLayers(TrainerCallback):
    """How often the first layer has run."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.runs = 0
        layer = next(m for m in model.modules() if type(m).__name__ in ("BertLayer", "BartEncoderLayer"))
        forward = type(layer).forward

        def counted(this, *args, **kwargs):
            self.runs += this is layer
            return forward(this, *args, **kwargs)

        self.undo = lambda: setattr(type(layer), "forward", forward)
        type(layer).forward = counted

    def on_train_end(self, *args, **kwargs):
        self.undo()


def trained(build, model, kind=Sharp, rows=None, **flags):
    count = CountsLayers()
    options = {"optim": "adasam", "sam_rho": 0.3, "gradient_accumulation_steps": 2, "callbacks": [SeedSteps(), count]}
    trainer = build(kind, model, rows, **(options | flags))
    trainer.train()
    losses = [entry["sam_loss"] for entry in trainer.state.log_history if "sam_loss" in entry]
    return torch.cat([flat(model), torch.tensor(losses, dtype=torch.float64)]), count.runs


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.compat("Cost", "reuse of what frozen layers compute, with dropout")
def test_trainings_are_the_same_bits(build, name, scope, bf16, caplog):
    flags = {"sam_scope": scope, "bf16": bf16}
    with_reuse, runs = trained(build, MODELS[name](), **flags)
    without, always = trained(build, MODELS[name](), sam_cache_frozen=False, **flags)
    assert torch.equal(with_reuse, without)
    # Of six micro-batches, those of the first step (in scope microbatch: the first) are run twice to see.
    assert (runs, always) == (8 if scope == "batch" else 7, 12)
    plain, _ = trained(build, MODELS[name](), sam_rho=0.0)
    assert (with_reuse[: len(plain)] - plain).abs().max() > 1e-6


@pytest.mark.compat("Cost", "reuse of what a frozen encoder computes, with dropout")
def test_a_frozen_encoder(build):
    class Sharp(AdaSAMSeq2SeqTrainer):
        pass

    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(4, 40, (6,), generator=generator)} for _ in range(24)]
    rows = [row | {"labels": row["input_ids"].flip(0)} for row in rows]
    with_reuse, runs = trained(build, encoder_frozen(), Sharp, rows)
    without, always = trained(build, encoder_frozen(), Sharp, rows, sam_cache_frozen=False)
    assert torch.equal(with_reuse, without) and runs < always == 12


class Distils(Sharp):
    """From a teacher that is an attribute of the trainer, with a loss that asks it in each pass."""

    teacher = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        with torch.no_grad():
            target = self.teacher(input_ids=inputs["input_ids"]).logits.softmax(-1)
        return nn.functional.cross_entropy(model(input_ids=inputs["input_ids"]).logits, target)


@pytest.mark.compat("Cost", "reuse of what a frozen teacher computes")
def test_a_teacher(build):
    def run(**flags):
        torch.manual_seed(1)
        teacher, asked = make_model("bert").requires_grad_(False).eval(), []
        forward = type(teacher.bert).forward
        teacher.bert.forward = lambda *args, **kwargs: (asked.append(1), forward(teacher.bert, *args, **kwargs))[1]
        model = make_model("bert")
        trainer = build(Distils, model, optim="sgd", sam_rho=0.3, callbacks=[SeedSteps()], **flags)
        trainer.teacher = teacher
        trainer.train()
        return flat(model), len(asked)

    (with_reuse, runs), (without, always) = run(), run(sam_cache_frozen=False)
    assert torch.equal(with_reuse, without) and runs < always == 12


@pytest.mark.parametrize(
    "flags",
    [
        {"sam_dropout": "fresh"},
        {"sam_ascent_fraction": 0.5},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=lambda flags: next(iter(flags)),
)
def test_where_it_is_not_exact_nothing_is_reused(build, flags):
    with_reuse, runs = trained(build, bert(), **flags)
    without, always = trained(build, bert(), sam_cache_frozen=False, **flags)
    assert torch.equal(with_reuse, without) and runs == always


def test_layers_that_are_thawed_and_frozen_in_mid_training(build):
    class Thaws(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.bert.encoder.layer[1].requires_grad_(state.global_step != 1)
            model.bert.encoder.layer[0].requires_grad_(state.global_step == 2)

    def run(**flags):
        count = CountsLayers()
        model = bert()
        build(Sharp, model, optim="sgd", sam_rho=0.3, callbacks=[SeedSteps(), Thaws(), count], **flags).train()
        return flat(model), count.runs

    (with_reuse, runs), (without, always) = run(), run(sam_cache_frozen=False)
    assert torch.equal(with_reuse, without) and (runs, always) == (
        8,
        12,
    )  # twice in the first step, and in the one in which it is trainable


def test_what_it_says(build, caplog):
    trained(build, bert())
    assert caplog.text.count("sam_cache_frozen: the second pass takes from the first what frozen modules with") == 1
    caplog.clear()
    trained(build, make_model("bert"))
    trained(build, bert(), sam_cache_frozen=False)
    trained(build, bert(), sam_rho=0.0)
    assert "sam_cache_frozen" not in caplog.text


def test_outputs_are_freed_after_the_step(build):
    kept = []

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            kept.append(len(trainer._sam_run._window.passes))

    trainer = build(Sharp, bert(), callbacks=[Look()], sam_rho=0.3, optim="sgd", gradient_accumulation_steps=2)
    trainer.train()
    assert kept == [0] * len(kept) and kept


# ---- what cannot be seen from outside, and what is looked at nevertheless ----


class Odd(nn.Module):
    """A frozen layer, a trained one, and something that ties them together in an unusual way."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.trained, self.frozen = nn.Linear(4, 4), OddLayer(kind)
        self.frozen.requires_grad_(False)
        if kind == "shared memory":
            self.frozen.linear.weight = nn.Parameter(self.trained.weight.data, requires_grad=False)
        if kind == "a reference to trained weights":
            self.frozen.others = [self.trained]
        self.double()

    def forward(self, input_ids, labels):
        x = torch.nn.functional.one_hot(input_ids % 4, 4).double().mean(1)
        if self.kind == "a scale from outside":
            self.frozen.scale = self.trained.weight.detach().sum()
        if self.kind == "an average of trained weights":
            with torch.no_grad():
                self.frozen.linear.weight.mul_(0.5).add_(self.trained.weight, alpha=0.5)
        if self.kind == "a second call on trained outputs":
            x = x + 0 * self.frozen(self.trained(x))
        with torch.set_grad_enabled(self.kind not in ("a reference to trained weights", "functional call")):
            if self.kind == "a dictionary that it writes to":
                features = {"x": x}
                self.frozen(features)
                x = features["h"]
            elif self.kind == "functional call":
                weights = {"linear.weight": self.frozen.linear.weight * self.trained.weight.detach().sum()}
                x = torch.func.functional_call(self.frozen, weights, (x,))
            else:
                x = self.frozen(x)
        if self.kind == "a list that others write to":
            x[0] = x[0] * 2
        if isinstance(x, list):
            x = x[0]
        if self.kind == "a copy of it":
            x = x + copy.deepcopy(self.frozen)(2 * x)
        if self.kind == "what it remembers":
            x = x + sum(self.frozen.seen)
            self.frozen.seen.clear()
        return {"loss": nn.functional.cross_entropy(self.trained(x), labels)}


class OddLayer(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 4)
        self.scale, self.calls, self.seen = torch.ones(()), [], []
        self.register_buffer("centre", torch.zeros(4))

    def forward(self, x):
        if self.kind == "a dictionary that it writes to":
            x["h"] = self.linear(x["x"])
            return x
        h = self.linear(x) * self.scale
        if self.kind == "a reference to trained weights":
            h = h * self.others[0].weight.sum()
        if self.kind == "a second call on trained outputs":
            self.centre = self.centre + h.detach().mean(0)
            h = h + self.centre
        if self.kind == "calls that it counts in a list":
            self.calls.append(1)
            h = h * len(self.calls)
        if self.kind == "what it remembers":
            self.seen.append(h)
        return [h] if self.kind == "a list that others write to" else h


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
@pytest.mark.parametrize(
    "kind",
    [
        "nothing",
        "a list that others write to",
        "a dictionary that it writes to",
        "a second call on trained outputs",
        "a scale from outside",
        "shared memory",
        "functional call",
        "a reference to trained weights",
        "calls that it counts in a list",
        "a copy of it",
        "what it remembers",
    ],
)
@pytest.mark.compat("Cost", "reuse of what frozen layers compute, where that depends on more than inputs and weights")
def test_odd_models_train_to_the_same_bits(build, kind, scope):
    def run(**flags):
        model = Odd(kind)
        options = {"optim": "sgd", "learning_rate": 0.1, "sam_rho": 0.3, "gradient_accumulation_steps": 2}
        trainer = build(Sharp, model, make_rows(32), **options, sam_scope=scope, **flags)
        trainer.train()
        return flat(model)

    assert torch.equal(run(), run(sam_cache_frozen=False))


def test_averages_that_a_forward_pass_writes_are_refused(build):
    """The second pass would take them once more, from the perturbed weights."""
    model = Odd("an average of trained weights")
    with pytest.raises(
        NotImplementedError, match=r"written to parameters that are not in the optimizer.*or set sam_rho=0"
    ):
        build(Sharp, model, optim="sgd", sam_rho=0.3).train()
    build(Sharp, Odd("an average of trained weights"), optim="sgd").train()


def test_a_module_is_looked_at_again_now_and_then():
    below, trust = Below("plain"), trusted()
    trust.note(below, same=True)
    trust.end_step()
    found = []
    for _ in range(100):
        found.append(trust.has(below))
        trust.end_step()
    assert [step + 2 for step, has in enumerate(found) if not has] == [16, 32, 64]


def test_buffers_that_autograd_has_saved_are_not_written_to(build):
    """A frozen network that is asked about the prediction, and about the target, as in perceptual losses."""

    class Perceptual(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.trained = nn.Linear(4, 4)
            self.judge = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).requires_grad_(False).eval()
            self.double()

        def train(self, mode=True):
            super().train(mode)
            self.judge.eval()
            return self

        def forward(self, input_ids, labels):
            x = nn.functional.one_hot(input_ids % 4, 4).double().mean(1)
            return {"loss": (self.judge(self.trained(x)) - self.judge(x)).square().mean()}

    def run(**flags):
        model = Perceptual()
        build(Sharp, model, optim="sgd", learning_rate=0.1, sam_rho=0.3, **flags).train()
        return flat(model)

    assert torch.equal(run(), run(sam_cache_frozen=False))


def test_outputs_of_a_module_that_has_others_the_second_time_are_not_trusted():
    below, trust = Below("plain"), Trust()
    trust.note(below, same=True)
    assert not trust.has(below)  # not before the step has ended
    trust.end_step()
    assert trust.has(below)
    trust.note(below, same=False)
    assert not trust.has(below)
    trust.end_step()
    assert not trust.has(below)
