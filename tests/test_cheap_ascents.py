"""Each cheap ascent against a loop written by hand in float64."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LR, InOrder, Plain, Sharp, flat, make_model, make_rows
from helpers import Fingerprint, causal_model, causal_rows
from transformers import TrainerCallback

from adasam_hf import AdaSAM, AdaSAMTrainingArguments
from adasam_hf.description import describe
from adasam_hf.directions import DIRECTIONS, Direction, Momentum, innermost
from adasam_hf.parameters import choose_parameters
from adasam_hf.schedule import Schedule

RHO = 0.05
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SCOPES = pytest.mark.parametrize("scope", ["batch", "microbatch"])


def bert(**config):
    return make_model("bert", **NO_DROPOUT, **config)


class ByHand:
    """SAM over windows of micro-batches of 4 rows; `climb` says where from the clean weights the descent is taken."""

    def __init__(self, model, optimizer, rho=RHO):
        self.model, self.optimizer, self.rho = model.train(), optimizer, rho
        self.params = dict(model.named_parameters())

    def gradient(self, batches, rows=slice(None), total=None):
        """Mean over micro-batches, or sum over `total` labels."""
        for p in self.params.values():
            p.grad = None
        for batch in batches:
            inputs = {key: torch.stack([r[key] for r in batch[rows]]) for key in batch[0]}
            scale = {"num_items_in_batch": total} if total else {}
            loss = self.model(**inputs, **scale).loss
            (loss if total else loss / len(batches)).backward()
        return {name: p.grad.clone() for name, p in self.params.items()}

    def sphere(self, vectors, rho=None):
        """ρ · v/‖v‖ over the given names."""
        norm = math.sqrt(sum(v.square().sum().item() for v in vectors.values()))
        return {name: (rho or self.rho) * v / norm for name, v in vectors.items()}

    def run(self, rows, climb, k=1, batch=4, scope="batch"):
        micro = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        for step, start in enumerate(range(0, len(micro), k)):
            window = micro[start : start + k]
            parts = [window] if scope == "batch" else [[b] for b in window]
            total = {name: torch.zeros_like(p) for name, p in self.params.items()}
            for part in parts:
                clean = {name: p.detach().clone() for name, p in self.params.items()}
                delta = climb(self, step, part)
                with torch.no_grad():
                    for name, d in delta.items():
                        self.params[name].add_(d)
                descent = self.gradient(part)
                with torch.no_grad():
                    for name, value in clean.items():
                        self.params[name].copy_(value)
                        total[name] += descent[name] / len(parts)
            for name, p in self.params.items():
                p.grad = total[name]
            self.optimizer.step()
        return flat(self.model)


def hand_written(climb, scope="batch", k=2, optimizer=None, rho=RHO, rows=None):
    model = bert()
    optimizer = optimizer(model) if optimizer else torch.optim.SGD(model.parameters(), lr=LR)
    return ByHand(model, optimizer, rho).run(make_rows() if rows is None else rows, climb, k, scope=scope)


def trained(build, optim="sgd", k=2, rows=None, **flags):
    trainer = build(Sharp, bert(), rows, optim=optim, gradient_accumulation_steps=k, sam_rho=RHO, **flags)
    trainer.train()
    return trainer


def first_line(trainer):
    """Of the training that it has just had."""
    return describe(trainer.args, trainer.accelerator, trainer.model, trainer.optimizer, [RHO, RHO])


def full(loop, _, part):
    return loop.sphere(loop.gradient(part))


def agree(got, want):
    assert (flat(got) - want).abs().max() < 1e-14


@SCOPES
def test_the_loop_is_right_and_can_fail(build, scope):
    agree(trained(build, sam_scope=scope).model, hand_written(full, scope))
    other = hand_written(full, "microbatch" if scope == "batch" else "batch")
    with pytest.raises(AssertionError):
        agree(trained(build, sam_scope=scope).model, other)


# ---- a share of the rows ----


@SCOPES
@pytest.mark.compat("Cheap ascents", "`sam_ascent_fraction`")
def test_the_ascent_sees_its_share_of_the_rows(build, scope):
    def half(loop, _, part):
        return loop.sphere(loop.gradient(part, rows=slice(0, None, 2)))

    trainer = trained(build, sam_scope=scope, sam_ascent_fraction=0.5, rows=make_rows(24))
    agree(trainer.model, hand_written(half, scope, rows=make_rows(24)))
    with pytest.raises(AssertionError):
        agree(trainer.model, hand_written(full, scope, rows=make_rows(24)))


def test_labels_are_counted_among_the_rows_that_are_seen(build):
    """`num_items_in_batch` of the ascent is that of its own rows, so that its logged loss is a mean."""
    seen = []

    def loss_of(outputs, labels, num_items_in_batch):
        counted = int((labels[..., 1:] != -100).sum())
        seen.append((len(labels), counted, int(num_items_in_batch)))
        return outputs.logits.double().square().sum() / num_items_in_batch

    build(
        Sharp,
        causal_model(),
        causal_rows()[:8],
        mend=False,
        compute_loss_func=loss_of,
        optim="sgd",
        sam_rho=RHO,
        sam_ascent_fraction=0.5,
        gradient_accumulation_steps=2,
    ).train()
    first, second = seen[:2], seen[2:]
    assert [rows for rows, _, _ in first] == [2, 2] and [rows for rows, _, _ in second] == [4, 4]
    for passes in (first, second):
        assert {items for _, _, items in passes} == {sum(counted for _, counted, _ in passes)}


@SCOPES
def test_a_share_uses_the_randomness_of_a_plain_run(build, scope):
    """Radius 1e-30 moves nothing, so with dropout on weights and random stream must be those of stock."""
    results = []
    for kind, more in ((Plain, {}), (Sharp, {"sam_rho": 1e-30, "sam_scope": scope, "sam_ascent_fraction": 0.5})):
        marks = Fingerprint()
        model = make_model("bert", torch.float32)
        build(kind, model, callbacks=[marks], mend=False, gradient_accumulation_steps=2, **more).train()
        results.append((flat(model), marks.states))
    (want, want_states), (got, states) = results
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(states, want_states, strict=True))


# ---- some of the parameters ----


@SCOPES
@pytest.mark.parametrize("which", ["norm", r"layer\.1\.attention"])
@pytest.mark.compat("Cheap ascents", "`sam_parameters`")
def test_the_chosen_parameters_climb_alone(build, scope, which):
    word = {"norm": "LayerNorm"}.get(which, "layer.1.attention")

    def some(loop, _, part):
        return loop.sphere({name: g for name, g in loop.gradient(part).items() if word in name})

    trainer = trained(build, sam_scope=scope, sam_parameters=which)
    agree(trainer.model, hand_written(some, scope))
    with pytest.raises(AssertionError):
        agree(trainer.model, hand_written(full, scope))


def test_the_ascent_computes_no_other_weight_gradient(build):
    model = bert()
    model.register_forward_pre_hook(
        lambda *_: seen.append({name for name, p in model.named_parameters() if p.requires_grad})
    )
    seen = []
    trainer = build(Sharp, model, make_rows(4), optim="adasam", sam_parameters="norm")
    trainer.train()
    every = {name for name, _ in model.named_parameters()}
    assert seen == [{name for name in every if "LayerNorm" in name}, every]
    assert all(p.requires_grad for p in model.parameters())


def test_a_failure_leaves_all_parameters_trainable(build):
    model = bert()

    def fail(*_):
        raise RuntimeError("in the first pass")

    model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the first pass"):
        build(Sharp, model, optim="adasam", sam_parameters="norm").train()
    assert all(p.requires_grad for p in model.parameters())


def test_a_choice_of_nothing_is_an_error(build):
    with pytest.raises(ValueError, match=r"sam_parameters='lora' names no trainable parameter.*bert\.embeddings"):
        build(Sharp, bert(), optim="adasam", sam_parameters="lora").train()
    model = bert()
    model.bert.requires_grad_(False)
    with pytest.raises(ValueError, match="'norm'"):
        choose_parameters(model, "norm")
    assert choose_parameters(model, "all") is None
    assert choose_parameters(model, "classifier") == list(model.classifier.parameters())


@pytest.mark.compat("Cheap ascents", "`sam_parameters` and reentrant checkpointing", refused=True)
def test_reentrant_checkpointing_is_refused(build):
    flags = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(NotImplementedError, match=r"sam_parameters='norm'.*use_reentrant"):
        build(Sharp, bert(), optim="adasam", sam_parameters="norm", **flags).train()


# ---- when, and how far ----


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (Schedule(), range(10)),
        (Schedule(start=0.7), [7, 8, 9]),
        (Schedule(start=0.65), [7, 8, 9]),
        (Schedule(end=0.3), [0, 1, 2]),
        (Schedule(start=0.2, end=0.9, interval=3), [2, 5, 8]),
        (Schedule(interval=4), [0, 4, 8]),
    ],
)
def test_steps_that_climb(schedule, steps):
    assert [t for t in range(10) if schedule.ascends(t, 10)] == list(steps)


def test_shares_that_floating_point_cannot_hold():
    for share, total, first in ((0.55, 100, 55), (0.07, 100, 7), (0.14, 50, 7), (0.7, 10, 7), (1 / 3, 100, 34)):
        assert next(t for t in range(total) if Schedule(start=share).ascends(t, total)) == first


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_radii_at_the_ends(start):
    first, stop = int(100 * start), 100
    middle = (first + stop) // 2
    for shape, ends in {"constant": (1, 1, 1), "linear": (1, 0.5, 0), "cosine": (1, 0.5, 0)}.items():
        schedule = Schedule(start=start, shape=shape)
        got = [schedule.factor(t, 100) for t in (first, middle, stop)]
        assert got == pytest.approx(ends, abs=1e-12)
        assert 0 < schedule.factor(stop - 1, 100) <= 1
    assert Schedule(start=start, shape="cosine").factor(first + (stop - first) // 4, 100) == pytest.approx(
        (1 + math.sqrt(0.5)) / 2, abs=0.02
    )
    assert Schedule(shape="lr").factor(3, 100, lr_share=0.25) == 0.25


class Passes(TrainerCallback):
    """Forward passes in training mode, by step."""

    def __init__(self, model):
        self.count, self.by_step = 0, []
        model.register_forward_pre_hook(self.add)

    def add(self, *_):
        self.count += 1

    def on_step_end(self, *args, **kwargs):
        self.by_step.append(self.count)
        self.count = 0


@SCOPES
@pytest.mark.compat("Cheap ascents", "`sam_start`, `sam_end`, `sam_interval`, `sam_rho_schedule`")
def test_the_trainer_climbs_when_the_schedule_says(build, scope):
    flags = {"sam_start": 0.25, "sam_interval": 2, "sam_rho_schedule": "linear", "num_train_epochs": 4}

    def climb(loop, step, part):
        return loop.sphere(loop.gradient(part), RHO * (1 - (step - 3) / 9)) if step in (3, 5, 7, 9, 11) else {}

    model = bert()
    passes = Passes(model)
    trainer = build(
        Sharp,
        model,
        callbacks=[passes],
        optim="sgd",
        sam_rho=RHO,
        gradient_accumulation_steps=2,
        sam_scope=scope,
        **flags,
    )
    trainer.train()
    # 22 rows: 6 micro-batches in 3 steps for each of 4 epochs
    assert passes.by_step == [2, 2, 2] + [4, 2] * 4 + [4]
    loop = ByHand(bert(), None)
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=LR)
    counter = iter(range(12))
    for _ in range(4):
        steps = [next(counter) for _ in range(3)]
        loop.run(make_rows(), lambda loop, step, part, steps=steps: climb(loop, steps[step], part), 2, scope=scope)
    agree(model, flat(loop.model))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["sam_rho"] for entry in logs] == pytest.approx(
        [RHO * (1 - (t - 3) / 9) if t in (3, 5, 7, 9, 11) else 0.0 for t in range(12)]
    )
    assert ["sam_gap" in entry for entry in logs] == [t in (3, 5, 7, 9, 11) for t in range(12)]


def test_the_radius_follows_the_learning_rate(build):
    trainer = trained(build, k=1, sam_rho_schedule="lr", lr_scheduler_type="linear", warmup_steps=2, num_train_epochs=1)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    # step t has the rate that was set after step t - 1; logged is the one set after step t
    assert [entry["sam_rho"] for entry in logs] == pytest.approx([RHO * s for s in (0, 0.5, 1, 0.75, 0.5, 0.25)])


@SCOPES
@pytest.mark.compat("Cheap ascents", "`sam_interval` with `sam_reuse`")
def test_the_last_direction_again(build, scope):
    kept = {}

    def climb(loop, step, part):
        if step % 3 == 0:
            kept["g"] = loop.gradient(part)
        return loop.sphere(kept["g"])

    trainer = trained(build, k=1, sam_scope=scope, sam_interval=3, sam_reuse=True)
    agree(trainer.model, hand_written(climb, scope, k=1))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["sam_gap" in entry for entry in logs] == [True, False, False] * 2
    assert {entry["sam_rho"] for entry in logs} == {RHO}


# ---- a direction of one's own ----


class Sign(Direction):
    """That of docs/extending.md."""

    first_pass = True

    def __call__(self, p):
        return None if p.grad is None else p.grad.sign()


@SCOPES
@pytest.mark.parametrize("reuse", [False, True])
def test_a_new_direction_needs_a_class_and_a_name(build, scope, reuse, monkeypatch):
    monkeypatch.setitem(DIRECTIONS, "sign", Sign)
    kept = {}

    def climb(loop, step, part):
        if step % 2 == 0 or not reuse:
            kept["s"] = {name: g.sign() for name, g in loop.gradient(part).items()}
        return loop.sphere(kept["s"])

    flags = {"sam_interval": 2, "sam_reuse": True} if reuse else {}
    trainer = trained(build, k=1, sam_scope=scope, sam_direction="sign", **flags)
    agree(trainer.model, hand_written(climb, scope, k=1))
    with pytest.raises(AssertionError):
        agree(trainer.model, hand_written(full, scope, k=1))
    assert "2 forward/backward passes" in first_line(trainer)
    args = AdaSAMTrainingArguments("out", optim="adasam", sam_preset="fast", sam_direction="sign", use_cpu=True)
    assert (args.resolved_ascent_fraction, args.resolved_rho) == (0.125, 0.05)


def test_a_new_direction_without_a_first_pass_is_treated_as_one(build, monkeypatch):
    monkeypatch.setitem(DIRECTIONS, "up", type("Up", (Momentum,), {"sign": 1.0}))
    trainer = trained(build, optim="adamw_torch", sam_direction="up", sam_preset="fast")
    assert trainer.args.resolved_ascent_fraction == 1
    assert "along the up: 1 forward/backward pass" in first_line(trainer)
    with pytest.raises(ValueError, match="sam_reuse=True contradicts sam_direction='up'"):
        trained(build, optim="adamw_torch", sam_direction="up", sam_interval=2, sam_reuse=True)
    with pytest.raises(RuntimeError, match=r"sam_direction='up'.*has no first moment"):
        trained(build, optim="adafactor", sam_direction="up")


# ---- along the momentum ----

MOMENTA = {
    "adasam": lambda model: AdaSAM(model.parameters(), lr=LR),
    "adamw_torch": lambda model: torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0),
    "sam": lambda model: torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9),
}


@SCOPES
@pytest.mark.parametrize("optim", MOMENTA)
@pytest.mark.compat("Cheap ascents", "`sam_direction=momentum`")
def test_along_the_momentum(build, scope, optim):
    """One pass at w − ρ·m/‖m‖, the first at w."""

    def climb(loop, step, _):
        if step == 0:
            return {}
        state = loop.optimizer.state
        key = "momentum_buffer" if optim == "sam" else "exp_avg"
        return loop.sphere({name: -state[p][key] for name, p in loop.params.items()})

    model = bert()
    passes = Passes(model)
    flags = {"optim": optim, "sam_rho": RHO, "gradient_accumulation_steps": 2, "sam_scope": scope}
    trainer = build(Sharp, model, callbacks=[passes], sam_direction="momentum", **flags)
    trainer.train()
    assert passes.by_step == [2, 2, 2]
    want = hand_written(climb, optimizer=MOMENTA[optim])
    assert (flat(model) - want).abs().max() < 1e-12
    uphill = hand_written(lambda *a: {n: -d for n, d in climb(*a).items()}, optimizer=MOMENTA[optim])
    assert (flat(model) - uphill).abs().max() > 1e-8  # the control: +m
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert not any("sam_gap" in entry for entry in logs) and [entry["sam_rho"] for entry in logs] == [0, RHO, RHO]


def test_an_optimizer_without_momentum_is_an_error(build):
    with pytest.raises(RuntimeError, match=r"sam_direction='momentum'.*has no first moment"):
        build(Sharp, bert(), optim="adafactor", sam_rho=RHO, sam_direction="momentum").train()
    with pytest.raises(RuntimeError, match="has no first moment"):
        build(Sharp, bert(), optim="sgd", sam_rho=RHO, sam_direction="momentum").train()


# ---- along other directions ----

SECOND_MOMENTS = {
    "adasam": lambda model: AdaSAM(model.parameters(), lr=LR),
    "adamw_torch": lambda model: torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0),
}


@SCOPES
@pytest.mark.parametrize("optim", SECOND_MOMENTS)
@pytest.mark.compat("Cheap ascents", "`sam_direction=preconditioned`")
def test_along_the_preconditioned_gradient(build, scope, optim):
    """s / (√v̂ + ε), and s before the first update."""

    def climb(loop, step, part):
        gradients = loop.gradient(part)
        if step == 0:
            return loop.sphere(gradients)
        vectors = {}
        for name, p in loop.params.items():
            state = loop.optimizer.state[p]
            v = state["max_exp_avg_sq"] if optim == "adasam" else state["exp_avg_sq"] / (1 - 0.999**step)
            vectors[name] = gradients[name] / (v.sqrt() + (1e-6 if optim == "adasam" else 1e-8))
        return loop.sphere(vectors)

    got = trained(build, optim, sam_scope=scope, sam_direction="preconditioned").model
    assert (flat(got) - hand_written(climb, scope, optimizer=SECOND_MOMENTS[optim])).abs().max() < 1e-9
    plain = hand_written(full, scope, optimizer=SECOND_MOMENTS[optim])
    assert (flat(got) - plain).abs().max() > 1e-6  # the control: along s


def test_an_optimizer_without_a_second_moment_is_an_error(build):
    for optim in ("adafactor", "sgd", "sam"):
        with pytest.raises(ValueError, match=rf"sam_direction='preconditioned'.*optim='{optim}' keeps none"):
            trained(build, optim, sam_direction="preconditioned")
    model = bert()
    mine = torch.optim.SGD(model.parameters(), lr=LR)
    flags = {"optim": "adamw_torch", "sam_rho": RHO, "sam_direction": "preconditioned"}
    with pytest.raises(RuntimeError, match=r"sam_direction='preconditioned'.*keeps no second moment"):
        build(Sharp, model, optimizers=(mine, None), **flags).train()


def test_whether_a_checkpoint_is_saved_does_not_change_the_noise(build):
    """Of a training that begins to perturb its weights late: what counts updates counts them from the start."""

    def run(folder, **how):
        model = bert()
        flags = {"optim": "adamw_torch", "sam_rho": RHO, "sam_direction": "noise", "sam_start": 0.5}
        build(Sharp, model, folder=folder, **flags, **how).train()
        return flat(model)

    assert torch.equal(run("plain"), run("saves", save_strategy="steps", save_steps=1))
    assert not torch.equal(run("plain"), run("other", seed=7))


@SCOPES
@pytest.mark.compat("Cheap ascents", "`sam_direction=noise` over a resume")
def test_noise_goes_on_after_a_resume(build, scope):
    def run(folder, **how):
        model = bert()
        flags = {"optim": "adamw_torch", "sam_rho": RHO, "sam_scope": scope, "sam_direction": "noise"}
        trainer = build(Sharp, model, folder=folder, save_strategy="steps", save_steps=2, **flags)
        trainer.train(**how)
        return flat(model), trainer.args.output_dir

    whole, folder = run("whole")
    resumed, _ = run("other", resume_from_checkpoint=f"{folder}/checkpoint-2")
    assert torch.equal(whole, resumed)
    (Path(folder) / "checkpoint-2" / "sharpness_aware_state.json").unlink()  # the control
    assert not torch.equal(whole, run("control", resume_from_checkpoint=f"{folder}/checkpoint-2")[0])


@SCOPES
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.compat("Cheap ascents", "`sam_direction=friendly`")
def test_along_the_batchs_own_part_of_the_gradient(build, scope, reuse):
    """s - m, with the running mean m of the gradients so far, this one included."""

    def climber(share):
        means, last = {}, {}

        def climb(loop, step, part):
            if reuse and step % 2:
                return loop.sphere(last)
            for name, s in loop.gradient(part).items():
                means[name] = 0.9 * means.get(name, 0.0) + 0.1 * s
                last[name] = s - share * means[name]
            return loop.sphere(last)

        return climb

    flags = {"sam_interval": 2, "sam_reuse": True} if reuse else {}
    rows = (make_rows() * 2)[:40]  # five windows of two micro-batches of four rows
    got = trained(build, rows=rows, sam_scope=scope, sam_direction="friendly", **flags).model
    assert (flat(got) - hand_written(climber(1.0), scope, rows=rows)).abs().max() < 1e-12
    assert (flat(got) - hand_written(climber(0.0), scope, rows=rows)).abs().max() > 1e-8  # the control: along s


@SCOPES
@pytest.mark.compat("Cheap ascents", "`sam_direction=noise`")
def test_along_noise(build, scope):
    """One pass at w + ρu, the same u for all micro-batches of a step and another for each step."""
    model = bert()
    passes = Passes(model)
    flags = {"optim": "sgd", "sam_rho": RHO, "gradient_accumulation_steps": 2, "sam_scope": scope}
    trainer = build(Sharp, model, callbacks=[passes], sam_direction="noise", **flags)
    trainer.train()
    assert passes.by_step == [2, 2, 2]
    names = {p: name for name, p in model.named_parameters()}
    order = [names[p] for group in trainer.optimizer.param_groups for p in group["params"]]

    def climber(updates):
        def climb(loop, step, _):
            vectors = {}
            for place, name in enumerate(order):
                words = np.random.SeedSequence((trainer.args.seed, updates(step), place)).generate_state(1)
                generator = torch.Generator().manual_seed(int(words[0]))
                p = loop.params[name]
                vectors[name] = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            return loop.sphere(vectors)

        return climb

    agree(model, hand_written(climber(lambda step: step)))
    # The control: the noise of the first step in all of them.
    assert (flat(model) - hand_written(climber(lambda step: 0))).abs().max() > 1e-8


@pytest.mark.parametrize("direction", ["preconditioned", "friendly", "noise"])
def test_other_directions_relative_to_the_weights(build, direction):
    """T²d/‖Td‖ with T = |w| + 0.01, for the d that the direction has without it."""
    moved = {}

    class Moves(Sharp):
        def training_step(self, model, inputs, *args, **kwargs):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            ascend = self._sam_running().step.perturbation.ascend

            def look(*args, **kwargs):
                norm = ascend(*args, **kwargs)
                if self.state.global_step == 1:
                    delta = {name: p.detach() - before[name] for name, p in model.named_parameters()}
                    moved[self.args.sam_adaptive] = before, delta
                return norm

            self._sam_running().step.perturbation.ascend = look
            try:
                return super().training_step(model, inputs, *args, **kwargs)
            finally:
                self._sam_running().step.perturbation.ascend = ascend

    for adaptive in (False, True):
        flags = {"optim": "adasam", "sam_rho": 1e-9, "sam_direction": direction, "sam_adaptive": adaptive}
        build(Moves, bert(), learning_rate=1e-9, **flags).train()
    (before, plain), (_, got) = moved[False], moved[True]
    sizes = {name: w.abs() + 0.01 for name, w in before.items()}
    norm = math.sqrt(sum((sizes[name] * d).square().sum().item() for name, d in plain.items()))
    for name, d in plain.items():
        torch.testing.assert_close(got[name], 1e-9 * sizes[name] ** 2 * d / norm, rtol=0, atol=1e-12)
    assert max((got[name] - d).abs().max() for name, d in plain.items()) > 1e-11  # the control


# ---- relative to the weights ----


@SCOPES
@pytest.mark.compat("Cheap ascents", "`sam_adaptive`")
def test_relative_to_the_weights(build, scope):
    def adaptive(loop, _, part):
        gradient = loop.gradient(part)
        t = {name: loop.params[name].detach().abs() + 0.01 for name in gradient}
        norm = math.sqrt(sum((t[name] * g).square().sum().item() for name, g in gradient.items()))
        return {name: RHO * t[name] ** 2 * g / norm for name, g in gradient.items()}

    trainer = trained(build, sam_scope=scope, sam_adaptive=True)
    agree(trainer.model, hand_written(adaptive, scope))
    with pytest.raises(AssertionError):
        agree(trainer.model, hand_written(full, scope))


# ---- together ----


@SCOPES
@pytest.mark.compat("Cheap ascents", "fraction × parameters × adaptive × interval × schedule")
def test_all_at_once(build, scope):
    def climb(loop, step, part):
        if step % 2:
            return {}
        gradient = loop.gradient(part, rows=slice(0, None, 2))
        chosen = {name: g for name, g in gradient.items() if "LayerNorm" in name}
        t = {name: loop.params[name].detach().abs() + 0.01 for name in chosen}
        norm = math.sqrt(sum((t[name] * g).square().sum().item() for name, g in chosen.items()))
        rho = RHO * (1 + math.cos(math.pi * step / 3)) / 2
        return {name: rho * t[name] ** 2 * g / norm for name, g in chosen.items()}

    flags = {"sam_ascent_fraction": 0.5, "sam_parameters": "norm", "sam_adaptive": True, "sam_interval": 2}
    trainer = trained(build, sam_scope=scope, sam_rho_schedule="cosine", rows=make_rows(24), **flags)
    agree(trainer.model, hand_written(climb, scope, rows=make_rows(24)))
    with pytest.raises(AssertionError):
        agree(trainer.model, hand_written(full, scope, rows=make_rows(24)))


@pytest.mark.parametrize(
    ("flags", "first_pass"),
    [
        ({}, 1.0),
        ({"sam_ascent_fraction": 0.5}, 0.5),
        ({"sam_ascent_fraction": 0.25}, 0.5),  # one row of four would be fewer than sam_ascent_min_rows
        ({"sam_ascent_fraction": 0.25, "sam_ascent_min_rows": 1}, 0.25),
        ({"sam_parameters": "norm"}, 2 / 3),
        ({"sam_direction": "momentum"}, 0.0),
        ({"sam_start": 0.5}, 0.5),
    ],
)
def test_flops(build, flags, first_pass):
    totals = [
        (t := build(kind, bert(), make_rows(16), optim=optim, **more), t.train(), t.state.total_flos)[-1]
        for kind, optim, more in ((Plain, "adamw_torch", {}), (Sharp, "adasam", flags))
    ]
    assert totals[1] == pytest.approx(totals[0] * (1 + first_pass), rel=1e-6)


class SkipsFirst(InOrder):
    def training_step(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 0:
            return torch.zeros((), dtype=torch.float64)
        return super().training_step(model, inputs, *args, **kwargs)


class ClearsState(TrainerCallback):
    """As restarts (ReLoRA) do."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == 2:
            innermost(optimizer).state.clear()


@pytest.mark.parametrize("direction", ["momentum", "preconditioned"])
@pytest.mark.parametrize("optim", ["adasam", "adamw_torch"])
def test_steps_before_there_is_a_moment_go_along_none(build, direction, optim):
    """The first update had no gradient, or somebody has cleared the state: no reason to end the run."""
    flags = {"optim": optim, "sam_direction": direction, "sam_rho": RHO}
    kind = type("Mine", (SkipsFirst, Sharp), {})
    skipped = build(kind, bert(), make_rows(16), **flags)
    skipped.train()
    cleared = build(Sharp, bert(), make_rows(16), callbacks=[ClearsState()], **flags)
    cleared.train()
    radii = [[log.get("sam_rho") for log in t.state.log_history if "loss" in log] for t in (skipped, cleared)]
    first_pass = direction == "preconditioned"  # which goes along the gradient until then
    assert radii[0][2:] == [RHO, RHO] and radii[1] == [RHO if first_pass else 0, RHO, RHO if first_pass else 0, RHO]
