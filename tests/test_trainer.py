import math
from functools import partialmethod, wraps

import numpy as np
import pytest
import torch
from conftest import (
    BETAS,
    DEVICE,
    EPS,
    LR,
    InOrder,
    Plain,
    SeedSteps,
    Sharp,
    flat,
    make_model,
    make_rows,
    random_state,
    set_random_state,
)
from helpers import Fingerprint, causal_model, causal_rows
from oracle import Oracle
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from adasam_hf import (
    AdaSAM,
    AdaSAMSeq2SeqTrainer,
    AdaSAMTrainer,
    SharpnessAwareTrainerMixin,
)
from adasam_hf import AdaSAMTrainer as Stock

# ---- against a loop written by hand ----


class HandWritten:
    """Both passes, the window, clipping and the update in NumPy; only the model's own gradients come from torch."""

    def __init__(self, head, update, scope, k, smoothing=0.0, clip=0.0, decay=0.0, rho=0.05, fault=None):
        self.model = make_model(head).to(DEVICE).train()
        self.update, self.scope, self.k, self.smoothing, self.clip, self.fault = (
            update,
            scope,
            k,
            smoothing,
            clip,
            fault,
        )
        names = [n for n, _ in self.model.named_parameters()]
        decayed = [i for i, n in enumerate(names) if "bias" not in n and "LayerNorm" not in n]
        plain = [i for i in range(len(names)) if i not in decayed]
        common = {"lr": LR, "betas": BETAS, "eps": EPS, "rho": rho}
        groups = [
            {**common, "weight_decay": decay, "index": decayed},
            {**common, "weight_decay": 0.0, "index": plain},
        ]
        self.oracle = Oracle([p.detach().cpu().numpy() for p in self.model.parameters()], groups)
        self.buffer = [0.0 for _ in names]

    def gradient(self, at, rows):
        for p, value in zip(self.model.parameters(), at, strict=True):
            p.data.copy_(torch.from_numpy(np.asarray(value)))
            p.grad = None
        logits = self.model(input_ids=torch.stack([r["input_ids"] for r in rows]).to(DEVICE)).logits
        labels = torch.stack([r["labels"] for r in rows]).to(DEVICE)
        loss = cross_entropy(logits, labels)
        if self.smoothing:  # as Transformers has it, with one sum in float32
            uniform = -logits.log_softmax(-1).sum(-1, dtype=torch.float32).mean() / logits.shape[-1]
            loss = (1 - self.smoothing) * loss + self.smoothing * uniform
        loss.backward()
        return loss.item(), [p.grad.cpu().numpy().copy() for p in self.model.parameters()]

    def mean(self, at, micro_batches, states):
        """Mean loss and gradient over micro-batches, each from its own random state."""
        total, gradients = 0.0, None
        for rows, state in zip(micro_batches, states, strict=True):
            if state is not None:
                set_random_state(state)
            loss, g = self.gradient(at, rows)
            total += loss / len(micro_batches)
            g = [x / len(micro_batches) for x in g]
            gradients = g if gradients is None else [a + b for a, b in zip(gradients, g, strict=True)]
        return total, gradients

    def step(self, micro_batches):
        x = self.oracle.x
        states, ascents, clean = [], [], 0.0
        for rows in micro_batches:
            states.append(random_state())
            loss, g = self.gradient(x, rows)
            clean += loss / len(micro_batches)
            ascents.append(g)
        if self.fault == "fresh_masks":
            states = [None] * len(states)
        if self.scope == "batch":
            ascent = [sum(gs) / len(ascents) for gs in zip(*ascents, strict=True)]
            sam, g = self.mean(self.oracle.perturbed(ascent), micro_batches, states)
        else:
            ascent = ascents[-1]
            sam, g = 0.0, [np.zeros_like(p) for p in x]
            for rows, state, own in zip(micro_batches, states, ascents, strict=True):
                loss, more = self.mean(self.oracle.perturbed(own), [rows], [state])
                sam += loss / len(micro_batches)
                g = [a + b / len(micro_batches) for a, b in zip(g, more, strict=True)]
        if self.clip:
            norm = math.sqrt(sum((a**2).sum() for a in g))
            g = [a * min(1.0, self.clip / (norm + 1e-6)) for a in g]
        if self.update == "adasam":
            self.oracle.update(g)
        else:  # SGD with momentum and coupled decay
            for group in self.oracle.groups:
                for i in group["index"]:
                    self.buffer[i] = 0.9 * self.buffer[i] + g[i] + group["weight_decay"] * x[i]
                    x[i] = x[i] - LR * self.buffer[i]
        # In microbatch scope the last window's `ascent` is one micro-batch's share of the mean.
        norm = math.sqrt(sum((a**2).sum() for a in ascent)) / (1 if self.scope == "batch" else len(micro_batches))
        return {"loss": clean, "sam_loss": sam, "sam_gap": sam - clean, "sam_grad_norm": norm}

    def run(self, rows, batch=4):
        batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        logs = []
        for t in range(0, len(batches), self.k):
            torch.manual_seed(100 + t // self.k)
            logs.append(self.step(batches[t : t + self.k]))
        return np.concatenate([p.reshape(-1) for p in self.oracle.x]), logs


CASES = {
    "plain": {},
    "halves": {"k": 2},
    "accumulation": {"k": 4},  # 6 micro-batches: the last window is shorter, and so is its last micro-batch
    "label smoothing": {"smoothing": 0.1, "k": 4},
    "clipping": {"clip": 0.05, "k": 2},
    "everything": {"k": 4, "smoothing": 0.2, "clip": 0.1, "decay": 0.5},
}


def trained(build, head, optim, scope, k=1, smoothing=0.0, clip=0.0, decay=0.0, **more):
    trainer = build(
        Sharp,
        make_model(head),
        callbacks=[SeedSteps()],
        optim=optim,
        sam_rho=0.05,
        sam_scope=scope,
        gradient_accumulation_steps=k,
        label_smoothing_factor=smoothing,
        max_grad_norm=clip,
        weight_decay=decay,
        **({"adam_epsilon": EPS} if optim == "adasam" else {}),
        **more,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
@pytest.mark.parametrize("optim", ["adasam", "sam"])
@pytest.mark.parametrize("head", ["bert", "roberta"])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.compat("Accumulation", f"classification heads: {what}"))
        for case, what in {
            "plain": "k = 1",
            "halves": "k = 2",
            "accumulation": "k = 4, shorter last window",
            "label smoothing": "label smoothing",
            "clipping": "clipping",
            "everything": "label smoothing × clipping × weight decay",
        }.items()
    ],
)
def test_equals_a_hand_written_loop(build, device, head, case, optim, scope):
    trainer = trained(build, head, optim, scope, **CASES[case])
    want, want_logs = HandWritten(head, optim, scope, **{"k": 1, **CASES[case]}).run(make_rows())
    got = flat(trainer.model).numpy()
    travelled = np.abs(want - flat(make_model(head)).numpy()).max()
    assert np.abs(got - want).max() < 1e-11 * max(travelled, 1e-2)

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == len(want_logs) == math.ceil(6 / CASES[case].get("k", 1))
    for entry, wanted in zip(logs, want_logs, strict=True):
        # the logged loss is accumulated in float32
        assert {name: entry[name] for name in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        assert entry["sam_rho"] == 0.05


@pytest.mark.parametrize("fault", ["fresh masks", "other scope", "other radius", "plain optimizer"])
def test_the_hand_written_loop_tells_faults_apart(fault):
    """The control of the test above."""
    options = {"head": "bert", "update": "adasam", "scope": "batch", "k": 4, "rho": 0.05}
    right, _ = HandWritten(**options).run(make_rows())
    change = {
        "fresh masks": {"fault": "fresh_masks"},
        "other scope": {"scope": "microbatch"},
        "other radius": {"rho": 0.051},
        "plain optimizer": {"rho": 0.0},
    }[fault]
    wrong, _ = HandWritten(**{**options, **change}).run(make_rows())
    assert np.abs(wrong - right).max() > 1e-6


# ---- against the stock Trainer ----


def compare_with_stock(build, stock, ours, exact=True):
    results = []
    for kind, kwargs in ((Plain, stock), (Sharp, {**stock, **ours})):
        marks = Fingerprint()
        # the window's callbacks run before the loop's, so a step starts where the last one ended
        trainer = build(
            kind, make_model("bert", torch.float32), callbacks=[marks], mend=False, folder=kind.__name__, **kwargs
        )
        trainer.train()
        results.append((flat(trainer.model), marks.states, trainer))
    (want, want_states, _), (got, states, trainer) = results
    assert len(states) == len(want_states) > 0
    assert torch.equal(got, want) is exact
    assert all(torch.equal(a, b) for a, b in zip(states, want_states, strict=True))
    assert not torch.equal(want, flat(make_model("bert", torch.float32)))
    return trainer


SETTINGS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4},
    "neftune": {"neftune_noise_alpha": 5.0},
    "label smoothing": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    "clipping, warm-up, decay": {
        "max_grad_norm": 0.1,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
    },
}


@pytest.mark.compat("Trainer behaviour", "radius 0 is the stock run bit for bit (AdamW, SGD, Adafactor)")
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_radius_zero_is_the_stock_run(build, device, setting, optim):
    trainer = compare_with_stock(build, {"optim": optim, **SETTINGS[setting]}, {"sam_rho": 0.0})
    assert not any("sam_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_two_passes_with_no_effect_are_the_stock_run(build, device, setting, scope):
    """Radius 1e-30 runs all the machinery but moves no float32 weight: weights and randomness are those of stock."""
    trainer = compare_with_stock(build, SETTINGS[setting], {"sam_rho": 1e-30, "sam_scope": scope})
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs and all(entry["sam_gap"] == 0 and entry["sam_rho"] == 1e-30 for entry in logs)


def test_a_real_radius_uses_the_same_randomness(build):
    compare_with_stock(build, {}, {"sam_rho": 0.05}, exact=False)


def test_fresh_masks_differ(build):
    """The control of the two tests above."""
    with pytest.raises(AssertionError):
        compare_with_stock(build, {}, {"sam_rho": 1e-30, "sam_dropout": "fresh"})


# ---- the window ----


@pytest.mark.parametrize(
    "scope",
    [
        pytest.param(
            "batch",
            marks=pytest.mark.compat(
                "Accumulation", "8×1 = 4×2 = 2×4, classification and causal LM, shorter last window"
            ),
        ),
        "microbatch",
    ],
)
@pytest.mark.parametrize("kind", ["classification", "causal"])
def test_micro_batches_equal_one_batch(build, kind, scope):
    """8×1 = 4×2 = 2×4 per step, also in the last window of 2; in microbatch scope, by design, not."""
    results = []
    for size, k in ((8, 1), (4, 2), (2, 4)):
        if kind == "causal":
            model, rows = causal_model(), causal_rows()
        else:
            model, rows = make_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), make_rows(18)
        trainer = build(
            Sharp,
            model,
            rows,
            mend=kind == "classification",
            optim="adasam",
            adam_epsilon=EPS,
            sam_scope=scope,
            sam_rho=0.1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=k,
        )
        trainer.train()
        assert trainer.state.global_step == 3
        results.append(flat(model))
    difference = max((r - results[0]).abs().max().item() for r in results[1:])
    assert difference < 1e-13 if scope == "batch" else difference > 1e-7


def test_unmended_heads_depend_on_the_split(build):
    """The upstream trap that `mend` stands for: without it, classification heads sum over micro-batches."""
    norms = []
    for size, k in ((8, 1), (2, 4)):
        model = make_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        trainer = build(
            Plain,
            model,
            make_rows(8),
            mend=False,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=k,
            max_grad_norm=1e9,
        )
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(4 * norms[0], rel=1e-6)


class Stream(IterableDataset):
    """Rows without a length: the last window is short and, in stock too, ends without an update."""

    def __iter__(self):
        yield from make_rows(22)


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
def test_unsized_data_carries_left_over_gradients_as_stock_does(build, scope):
    results = []
    for kind, more in ((Trainer, {}), (AdaSAMTrainer, {"sam_rho": 1e-30, "sam_scope": scope})):
        model = make_model("bert", torch.float32)
        build(kind, model, Stream(), max_steps=4, gradient_accumulation_steps=4, mend=False, **more).train()
        results.append(flat(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
@pytest.mark.compat("Accumulation", "custom `compute_loss_func`")
def test_a_custom_loss_equals_a_hand_written_loop(build, device, scope):
    def mean(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs.logits, labels) / trainer.current_gradient_accumulation_steps

    flags = {"optim": "adasam", "adam_epsilon": EPS, "sam_scope": scope, "gradient_accumulation_steps": 4}
    trainer = build(Sharp, make_model("bert"), callbacks=[SeedSteps()], compute_loss_func=mean, **flags)
    trainer.train()
    want, _ = HandWritten("bert", "adasam", scope, k=4).run(make_rows())
    assert np.abs(flat(trainer.model).numpy() - want).max() < 1e-13


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
def test_unsized_data_that_runs_out_does_not_dilute_what_is_logged(build, scope):
    """Once it is empty the Trainer goes on asking for windows."""

    class Short(IterableDataset):
        def __iter__(self):
            yield from make_rows(16)

    flags = {"optim": "adasam", "sam_scope": scope, "gradient_accumulation_steps": 4, "logging_steps": 5}
    trainer = build(AdaSAMTrainer, make_model("bert"), Short(), max_steps=20, **flags)
    trainer.train()
    for entry in (e for e in trainer.state.log_history if "sam_gap" in e):
        assert entry["sam_loss"] - entry["sam_gap"] == pytest.approx(entry["loss"], rel=1e-5)


def test_a_custom_loss_is_the_same_in_both_passes(build):
    """The Trainer takes the labels out of the inputs for it; both passes must still find them."""
    seen = []

    def loss_of(outputs, labels, num_items_in_batch=None):
        seen.append(labels.tolist())
        return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    trainer = build(Sharp, make_model("bert"), make_rows(8), compute_loss_func=loss_of, optim="adasam")
    trainer.train()
    assert seen[0] == seen[1] != seen[2] == seen[3]


# ---- clean weights ----


class Watch(TrainerCallback):
    """Every callback sees the weights of the last update."""

    def __init__(self):
        self.events = set()

    def see(self, event, model):
        now = flat(model)
        if event == "step_begin":
            self.clean = now
        elif event != "optimizer_step":
            assert torch.equal(now, self.clean), event
        self.events.add(event)

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.see("step_begin", model)

    def on_substep_end(self, args, state, control, model, **kwargs):
        self.see("substep_end", model)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.see("pre_optimizer_step", model)


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
@pytest.mark.compat("Interruption", "callbacks see clean weights")
def test_callbacks_see_clean_weights(build, scope):
    watch = Watch()
    build(
        Sharp, make_model("bert"), callbacks=[watch], optim="adasam", sam_scope=scope, gradient_accumulation_steps=2
    ).train()
    assert watch.events == {"step_begin", "substep_end", "pre_optimizer_step"}


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("scope", ["batch", "microbatch"])
def test_failure_in_the_second_pass_leaves_clean_weights(build, error, scope):
    model = make_model("bert", torch.float32)
    watch = Watch()
    trainer = build(Sharp, model, callbacks=[watch], optim="adasam", sam_scope=scope, gradient_accumulation_steps=2)
    moved = []

    def fail(*_):
        if hasattr(watch, "clean") and not torch.equal(flat(model), watch.clean) and trainer.state.global_step == 1:
            moved.append(True)
            raise error

    model.classifier.register_forward_hook(fail)
    with pytest.raises(type(error)):
        trainer.train()
    assert moved == [True]
    assert torch.equal(flat(model), watch.clean)


@pytest.mark.parametrize("optim", ["adasam", "sam", "adamw_torch"])
def test_interrupted_and_resumed_equals_uninterrupted(build, tmp_path, optim):
    common = {
        "optim": optim,
        "sam_rho": 0.05,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
    }

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    whole = make_model("bert", torch.float32)
    build(AdaSAMTrainer, whole, folder="whole", **common).train()
    build(AdaSAMTrainer, make_model("bert", torch.float32), folder="cut", callbacks=[Stop()], **common).train()
    resumed = make_model("bert", torch.float32)
    trainer = build(AdaSAMTrainer, resumed, folder="cut", **common)
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert trainer.state.global_step == 6
    assert torch.equal(flat(resumed), flat(whole))
    saved = torch.load(tmp_path / "cut" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    kinds = {name for state in saved["state"].values() for name in state}
    assert kinds <= {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}


# ---- the radius has one owner ----


def test_the_radius_of_an_instance_counts(build):
    model = make_model("bert")
    trainer = build(Sharp, model, optimizers=(AdaSAM(model.parameters(), lr=LR, rho=0.07), None))
    trainer.train()
    assert trainer.state.log_history[0]["sam_rho"] == 0.07


def test_the_radius_of_a_class_counts(build):
    trainer = build(Sharp, make_model("bert"), optimizer_cls_and_kwargs=(AdaSAM, {"lr": LR, "rho": 0.07}))
    trainer.train()
    assert trainer.state.log_history[0]["sam_rho"] == 0.07


def test_an_argument_replaces_the_radius_of_an_instance_and_says_so(build, monkeypatch):
    said = []
    monkeypatch.setattr("adasam_hf.plan.logger.warning", said.append)
    model = make_model("bert")
    optimizer = AdaSAM(model.parameters(), lr=LR, rho=0.07)
    trainer = build(Sharp, model, optimizers=(optimizer, None), sam_rho=0.02)
    trainer.train()
    assert optimizer.param_groups[0]["rho"] == trainer.state.log_history[0]["sam_rho"] == 0.02
    assert len(said) == 1 and "0.02 replaces the radius 0.07" in said[0]


def test_groups_may_differ(build):
    model = make_model("bert", torch.float32)
    *body, head = model.parameters()
    optimizer = AdaSAM([{"params": body, "rho": 0.0}, {"params": [head], "rho": 0.1}], lr=LR)
    moved = []

    def look(*_):
        if torch.is_grad_enabled():
            moved.append((flat(model)[: -head.numel()].clone(), head.detach().clone()))

    model.classifier.register_forward_hook(look)
    build(Sharp, model, make_rows(4), optimizers=(optimizer, None)).train()
    (body_at_w, head_at_w), (body_up, head_up) = moved
    assert torch.equal(body_at_w, body_up)
    assert not torch.equal(head_at_w, head_up)


def test_adadelta_keeps_its_own_rho(build):
    model = make_model("bert")
    optimizer = torch.optim.Adadelta(model.parameters(), rho=0.8)
    trainer = build(Sharp, model, optimizers=(optimizer, None), sam_rho=0.05)
    trainer.train()
    assert optimizer.param_groups[0]["rho"] == 0.8
    assert trainer.state.log_history[0]["sam_rho"] == 0.05


def test_amsgrad_resumed_from_adasam_stays_at_radius_zero(build, tmp_path):
    common = {"save_strategy": "steps", "save_steps": 3}
    build(Sharp, make_model("bert"), optim="adasam", **common).train()
    trainer = build(Sharp, make_model("bert"), optim="amsgrad", **common)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert trainer.state.global_step == 6
    assert "sam_loss" not in trainer.state.log_history[-2]


def test_beta2_without_warm_up_is_pointed_out(build, monkeypatch):
    said = []
    monkeypatch.setattr("adasam_hf.run.logger.warning", said.append)
    build(Sharp, make_model("bert"), optim="adasam", adam_beta2=0.999).train()
    assert sum("without warm-up" in line and "warmup_steps" in line for line in said) == 1
    build(Sharp, make_model("bert"), optim="adasam", adam_beta2=0.999, warmup_steps=2).train()
    build(Sharp, make_model("bert"), optim="adasam").train()
    assert sum("without warm-up" in line for line in said) == 1


# ---- the rest of the contract ----


def test_direct_calls_are_a_window_of_one(build):
    model = make_model("bert")
    trainer = build(Sharp, model, optim="adasam", gradient_accumulation_steps=4)
    before = flat(model)
    batch = {k: torch.stack([r[k] for r in make_rows(4)]) for k in ("input_ids", "labels")}
    trainer.current_gradient_accumulation_steps = 1
    torch.manual_seed(0)
    loss = trainer.training_step(model, batch)
    assert torch.equal(flat(model), before)
    torch.manual_seed(0)
    assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-12)


def test_a_failed_direct_call_leaves_nothing_behind(build):
    model = make_model("bert")
    trainer = build(Sharp, model, optim="adasam")
    trainer.current_gradient_accumulation_steps = 1
    batch = {k: torch.stack([r[k] for r in make_rows(4)]) for k in ("input_ids", "labels")}
    with pytest.raises(IndexError):
        trainer.training_step(model, {**batch, "labels": torch.full((4,), 7)})
    assert trainer.training_step(model, batch).item() > 0


def test_an_optimizer_of_the_combined_trainer_counts(build):
    class Own(Trainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            return torch.optim.RMSprop, {"lr": args.learning_rate}

    class Combined(SharpnessAwareTrainerMixin, Own):
        pass

    trainer = build(Combined, make_model("bert"), sam_rho=0.05)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.RMSprop
    assert trainer.state.log_history[0]["sam_rho"] == 0.05


def test_flops_count_both_passes(build):
    totals = [
        (t := build(kind, make_model("bert"), **more), t.train(), t.state.total_flos)[-1]
        for kind, more in ((Plain, {}), (Sharp, {}), (Sharp, {"optim": "adasam"}))
    ]
    assert totals[0] > 0
    assert totals[1:] == [totals[0], 2 * totals[0]]


def test_flops_before_training_are_those_of_a_plain_step(build):
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    plain, sharp = (build(kind, make_model("bert")).floating_point_ops(inputs) for kind in (Plain, Sharp))
    assert sharp == plain > 0


def test_seq2seq(build):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(vocab_size=40, max_position_embeddings=20, **sizes, **heads))
    rows = [{"input_ids": r["input_ids"], "labels": r["input_ids"][:5]} for r in make_rows(8)]
    trainer = build(
        AdaSAMSeq2SeqTrainer,
        model,
        rows,
        mend=False,
        optim="adasam",
        predict_with_generate=True,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    assert trainer.state.log_history[0]["sam_gap"] > 0
    assert len(trainer.predict(rows).predictions) == 8


def test_plain_arguments_are_refused(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(TypeError, match="AdaSAMTrainingArguments"):
        AdaSAMTrainer(make_model("bert"), args)


def test_without_arguments_there_are_those_of_transformers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for kind in (AdaSAMTrainer, AdaSAMSeq2SeqTrainer):
        args = kind(make_model("bert")).args
        assert args.output_dir == "tmp_trainer" and args.resolved_rho == 0.0
    assert hasattr(args, "predict_with_generate")


def test_overrides_that_would_undo_the_ascent_are_refused(build, caplog):
    class MakesData(Sharp):
        def _prepare_inputs(self, inputs):
            return super()._prepare_inputs(inputs)

    class Pretends(Sharp):
        def training_step(self, model, inputs, *args, **kwargs):
            if model is None:
                return super().training_step(model, inputs, *args, **kwargs)
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    with pytest.raises(NotImplementedError, match=r"MakesData overrides _prepare_inputs"):
        build(MakesData, make_model("bert"), optim="adasam").train()
    for more in ({}, {"logging_strategy": "no"}):  # plain steps, and whoever asked for others is told
        caplog.clear()
        build(Pretends, make_model("bert"), optim="adasam", **more).train()
        assert "this was plain training: none of the 6 steps planned to be perturbed could be" in caplog.text

    class Talks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trainer.log({"begun": state.global_step})

    trainer = build(Sharp, make_model("bert"), optim="adasam", callbacks=[Talks()])
    trainer.train()  # logging before a step's first pass is no fault
    assert sum("begun" in entry for entry in trainer.state.log_history) == trainer.state.global_step
    for kind in (MakesData, Pretends):
        build(kind, make_model("bert"), optim="amsgrad").train()


# ---- trainers with steps of their own ----


class Adds(Sharp):
    """Adds to the gradients after the step, as adversarial training does."""

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        for p in model.parameters():
            p.grad.add_(0.1)
        return loss


class Replaces(Sharp):
    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        for p in model.parameters():
            p.grad = p.grad + 0.1
        return loss


WINDOW = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 2}


@pytest.mark.parametrize("kind", [Adds, Replaces])
def test_gradients_of_others_are_not_thrown_away(build, kind):
    """In scope batch they would go into the ascent's gradient only."""
    with pytest.raises(
        RuntimeError, match=rf"gradients have changed between.*{kind.__name__}.training_step.*microbatch"
    ):
        build(kind, make_model("bert"), sam_rho=0.05, **WINDOW).train()
    found = []
    for rho in (0.0, 1e-9):  # where they are kept, a tiny radius is none
        for more in ({"gradient_accumulation_steps": 1}, {"sam_scope": "microbatch"}):
            trainer = build(kind, make_model("bert"), **(WINDOW | more), sam_rho=rho, optim="adasam")
            trainer.train()
            found.append(flat(trainer.model))
    assert torch.allclose(found[0], found[2], atol=1e-7) and torch.allclose(found[1], found[3], atol=1e-7)
    plain = build(
        Sharp, make_model("bert"), **(WINDOW | {"gradient_accumulation_steps": 1}), sam_rho=1e-9, optim="adasam"
    )
    plain.train()
    assert not torch.allclose(found[2], flat(plain.model), atol=1e-7)


def test_inputs_that_change_in_place_are_told_of(build, caplog):
    class Changes(Sharp):
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs["input_ids"].clamp_(max=20)
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Replaces(Sharp):
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs["input_ids"] = inputs["input_ids"].clone().clamp_(max=20)
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
            return super().compute_loss(model, inputs, *args, **kwargs)

    def made_in_place(rows):
        return {k: v.clone().clamp_(max=v.max()) for k, v in default_data_collator(rows).items()}

    def told(kind, collator=default_data_collator, rho=0.05, **more):
        caplog.clear()
        trainer = build(kind, make_model("bert"), sam_rho=rho, **(WINDOW | more))
        trainer.data_collator = collator
        trainer.train()
        return caplog.text.count("changes inputs['input_ids'] in place")

    assert told(Changes) == told(Changes, sam_scope="microbatch") == 1  # once
    assert told(Changes, rho=0.0) == told(Replaces) == told(Sharp, made_in_place) == 0
    # the ascent's rows are a copy
    assert told(Changes, made_in_place, sam_ascent_fraction=0.5, per_device_train_batch_size=4) == 0


def test_an_override_is_warned_of_where_its_state_could_mislead(build, caplog):
    class Keeps(Sharp):
        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs)

    def warned(**more):
        caplog.clear()
        build(Keeps, make_model("bert"), sam_rho=0.05, **(WINDOW | more)).train()
        return "Keeps overrides training_step: with gradient_accumulation_steps=2" in caplog.text

    assert warned()
    assert not warned(sam_scope="microbatch") and not warned(gradient_accumulation_steps=1)


STEP = Sharp.training_step


def test_overrides_that_come_to_the_step_in_other_ways(build, monkeypatch):
    """A parent by another name, and functions put in the place of the method, as profilers and scripts do."""

    class ByName(InOrder, AdaSAMTrainer):
        def training_step(self, *args, **kwargs):
            return Stock.training_step(self, *args, **kwargs)

    def perturbed(kind):
        trainer = build(kind, make_model("bert"), make_rows(8), optim="sam", logging_steps=2)
        trainer.train()
        return "sam_gap" in trainer.state.log_history[0]

    assert perturbed(ByName)

    def timed(self, *args, **kwargs):
        return STEP(self, *args, **kwargs)

    monkeypatch.setattr(Sharp, "training_step", timed, raising=False)
    assert perturbed(Sharp)
    monkeypatch.setattr(Sharp, "training_step", wraps(STEP)(timed), raising=False)
    assert perturbed(Sharp)

    monkeypatch.setattr(Sharp, "training_step", partialmethod(STEP), raising=False)
    assert perturbed(Sharp)

    def instead(self, model, inputs, *args, **kwargs):
        return Trainer.training_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Sharp, "training_step", instead, raising=False)
    # Its base by name: to look at it, as good as the ones above. That it goes past the step is told at the end.
    assert not perturbed(Sharp)
    monkeypatch.setattr(Sharp, "training_step", lambda self, *args, **kwargs: torch.zeros(()), raising=False)
    with pytest.raises(NotImplementedError, match="overrides training_step without super"):
        perturbed(Sharp)


def test_overrides_through_a_helper_and_of_the_window(build):
    class Helped(Sharp):
        def training_step(self, *args, **kwargs):
            return self._go(*args, **kwargs)

        def _go(self, *args, **kwargs):
            return super().training_step(*args, **kwargs)

    trainer = build(Helped, make_model("bert"), sam_rho=0.05)
    trainer.train()
    assert trainer.state.log_history[0]["sam_rho"] == 0.05

    class Windows(Sharp):
        def get_batch_samples(self, iterator, count, device):
            return [next(iterator) for _ in range(count)], None

    with pytest.raises(NotImplementedError, match=r"Windows overrides get_batch_samples without super"):
        build(Windows, make_model("bert"), sam_rho=0.05, **WINDOW).train()


def test_a_create_optimizer_of_ones_own_bypasses_no_refusal(build, monkeypatch, caplog):
    class Own(Sharp):
        def create_optimizer(self, *args, **kwargs):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
            return self.optimizer

    build(Own, make_model("bert"), optim="adasam", max_steps=1).train()
    assert "optim=adasam is not in use: the trainer was given a SGD" in caplog.text

    def refuse(trainer):
        raise NotImplementedError("refused")

    monkeypatch.setattr("adasam_hf.trainer.refuse_unsupported", refuse)
    with pytest.raises(NotImplementedError, match="refused"):
        build(Own, make_model("bert"), optim="adasam", max_steps=1).train()
    build(Own, make_model("bert"), max_steps=1).train()  # at radius 0 nothing is refused
