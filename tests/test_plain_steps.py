"""Steps that cannot be perturbed are stock steps, counted and told."""

import pytest
import torch
from conftest import InOrder, Plain, Sharp, flat, make_model, make_rows
from helpers import RunsOutOfMemory
from torch import nn
from transformers import Trainer, TrainerCallback

from adasam_hf import SharpnessAwareTrainerMixin

RHO = 0.05
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SCOPES = pytest.mark.parametrize("scope", ["batch", "microbatch"])
WINDOWS = pytest.mark.parametrize("k", [1, 2, 3])


class SkipsBatches(InOrder):
    """Gives a batch up without a backward pass: the second of every three calls."""

    calls = 0
    which = 1

    def training_step(self, model, inputs, *args, **kwargs):
        self.calls += 1
        if self.calls % 3 == self.which:
            return torch.zeros((), dtype=torch.float64)
        return super().training_step(model, inputs, *args, **kwargs)


def trained(build, mixin, base, **more):
    kind = type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})
    trainer = build(kind, make_model("bert", **NO_DROPOUT), learning_rate=1e-2, optim="sgd", **more)
    trainer.train()
    return trainer


@WINDOWS
@SCOPES
@pytest.mark.parametrize("mixin", [SkipsBatches, RunsOutOfMemory])
@pytest.mark.compat("Steps that cannot be perturbed", "a batch that a trainer skips, an out-of-memory that it catches")
def test_a_batch_that_is_given_up_is_given_up_as_in_stock(build, mixin, scope, k):
    """At a tiny radius every such run is the stock one; at a real one it is another."""
    stock = trained(build, mixin, Plain, gradient_accumulation_steps=k)
    tiny = trained(build, mixin, Sharp, gradient_accumulation_steps=k, sam_scope=scope, sam_rho=1e-10)
    assert (flat(tiny.model) - flat(stock.model)).abs().max() < 1e-8
    real = trained(build, mixin, Sharp, gradient_accumulation_steps=k, sam_scope=scope, sam_rho=0.5)
    if any(entry.get("sam_perturbed_steps", 1) for entry in real.state.log_history if "loss" in entry):
        assert (flat(real.model) - flat(stock.model)).abs().max() > 1e-6


@WINDOWS
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("flags", [{"sam_ascent_fraction": 0.5}, {"sam_parameters": "norm"}])
def test_a_broken_window_is_plain_where_the_ascent_saw_a_part_of_it(build, flags, which, k, monkeypatch):
    monkeypatch.setattr(SkipsBatches, "which", which)
    stock = trained(build, SkipsBatches, Plain, gradient_accumulation_steps=k)
    tiny = trained(build, SkipsBatches, Sharp, gradient_accumulation_steps=k, sam_rho=1e-10, **flags)
    assert (flat(tiny.model) - flat(stock.model)).abs().max() < 1e-8


def test_a_run_without_an_ascent_says_so_once_at_its_end(build, caplog):
    class SkipsTheLast(SkipsBatches):
        def training_step(self, model, inputs, *args, **kwargs):
            self.calls += 1
            if self.calls % 2 == 0:
                return torch.zeros((), dtype=torch.float64)
            return super(SkipsBatches, self).training_step(model, inputs, *args, **kwargs)

    stock = trained(build, SkipsTheLast, Plain, gradient_accumulation_steps=2)
    run = trained(build, SkipsTheLast, Sharp, gradient_accumulation_steps=2, sam_rho=RHO)
    assert torch.equal(flat(run.model), flat(stock.model))  # the ascent's gradients are the stock step's
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["sam_perturbed_steps"] for entry in entries] == [0, 0, 0]
    assert caplog.text.count("1 of 1 sharpness-aware steps were plain steps: the trainer did not finish all") == 1
    assert caplog.text.count("this was plain training: none of the 3 steps planned to be perturbed could be") == 1
    caplog.clear()
    run = build(Sharp, make_model("bert"), optim="sgd", gradient_accumulation_steps=2, sam_rho=RHO)
    run.train()
    assert not caplog.text.count("plain")
    assert not any("sam_perturbed_steps" in entry for entry in run.state.log_history)


class TwoHeads(nn.Module):
    """Each batch is of one task and uses that task's head alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head_a, self.head_b = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.double()

    def forward(self, x, task, labels):
        head = self.head_b if int(task[0]) else self.head_a
        return {"loss": nn.functional.cross_entropy(head(torch.relu(self.trunk(x))), labels)}


def task_rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 5, generator=generator, dtype=torch.float64)
    return [{"x": x[i], "task": torch.tensor((i // 4) % 2), "labels": torch.tensor(i % 3)} for i in range(32)]


@SCOPES
@pytest.mark.compat("Steps that cannot be perturbed", "batches without a gradient for a chosen parameter")
def test_batches_that_do_not_use_a_chosen_parameter(build, scope, caplog):
    """Every other batch is a plain step; the others are perturbed in head_a alone."""

    def by_hand():
        model, rows = TwoHeads(), task_rows()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        chosen = list(model.head_a.parameters())
        for i in range(0, 32, 4):
            batch = {key: torch.stack([row[key] for row in rows[i : i + 4]]) for key in rows[0]}
            model.zero_grad()
            model(**batch)["loss"].backward()
            gradients = [p.grad for p in chosen if p.grad is not None]
            if gradients:
                clean = [p.detach().clone() for p in chosen]
                norm = torch.cat([g.flatten() for g in gradients]).norm()
                with torch.no_grad():
                    for p, g in zip(chosen, gradients, strict=True):
                        p.add_(0.5 * g / norm)
                model.zero_grad()
                model(**batch)["loss"].backward()
                with torch.no_grad():
                    for p, value in zip(chosen, clean, strict=True):
                        p.copy_(value)
            optimizer.step()
        return flat(model)

    flags = {"learning_rate": 1e-2, "optim": "sgd", "sam_rho": 0.5, "sam_scope": scope}
    trainer = build(Sharp, TwoHeads(), task_rows(), sam_parameters="head_a", logging_steps=2, **flags)
    trainer.train()
    assert (flat(trainer.model) - by_hand()).abs().max() < 1e-12
    assert [e["sam_perturbed_steps"] for e in trainer.state.log_history if "loss" in e] == [1] * 4
    assert caplog.text.count("the batch has no gradient for any parameter that may be perturbed") == 1
    everywhere = build(Sharp, TwoHeads(), task_rows(), **flags)
    everywhere.train()
    assert (flat(everywhere.model) - by_hand()).abs().max() > 1e-4


@SCOPES
@pytest.mark.compat("Steps that cannot be perturbed", "rows without labels")
def test_batches_without_labels_are_no_alarm_about_the_radius(build, scope, caplog):
    """Labels of -100 alone give a loss that is not a number, or none; the step is what stock makes of it."""
    rows = make_rows(24)
    for row in rows[4:8]:
        row["labels"] = torch.tensor(-100)

    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / 4  # 0 for such a batch

    flags = {"compute_loss_func": loss, "optim": "sgd", "learning_rate": 1e-2, "logging_steps": 6}
    models = {}
    for name, kind, more in (("stock", Plain, {}), ("tiny", Sharp, {"sam_rho": 1e-10, "sam_scope": scope})):
        trainer = build(kind, make_model("bert", **NO_DROPOUT), rows, **flags, **more)
        trainer.train()
        models[name] = flat(trainer.model)
    assert (models["tiny"] - models["stock"]).abs().max() < 1e-8
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["sam_perturbed_steps"] == 5
    assert "1 of 6 sharpness-aware steps were plain steps: the gradient was 0 or not finite" in caplog.text
    assert "too large" not in caplog.text


def test_a_means_only_over_perturbed_steps(build):
    """What is logged of a stretch with plain steps in it is what its perturbed steps alone would log."""

    class Collects(TrainerCallback):
        def __init__(self):
            self.entries = []

        def on_log(self, args, state, control, logs, **kwargs):
            self.entries.append(logs)

    flags = {"optim": "sgd", "learning_rate": 0.0, "sam_rho": 0.5, "sam_parameters": "head_a"}
    each, together = Collects(), Collects()
    build(Sharp, TwoHeads(), task_rows(), callbacks=[each], **flags).train()
    build(Sharp, TwoHeads(), task_rows(), callbacks=[together], logging_steps=8, **flags).train()
    single = [entry["sam_gap"] for entry in each.entries if "sam_gap" in entry]
    assert len(single) == 4 and min(single) > 0
    assert together.entries[0]["sam_gap"] == pytest.approx(sum(single) / 4, rel=1e-9)
    assert "sam_gap" not in each.entries[1] and each.entries[1]["sam_rho"] == 0.5


class StopsTheEpoch(TrainerCallback):
    """After the first micro-batch of the second step."""

    def on_substep_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == 1


@pytest.mark.parametrize("flags", [{}, {"sam_ascent_fraction": 0.5}, {"sam_parameters": "classifier"}])
def test_a_window_that_ends_with_its_epoch_leaves_its_gradient_to_the_next(build, flags):
    """As in stock, where nothing clears it."""

    def trained(kind, **more):
        options = {"optim": "sgd", "learning_rate": 1e-2, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
        model = make_model("bert", **NO_DROPOUT)
        trainer = build(kind, model, make_rows(24), callbacks=[StopsTheEpoch()], **options, **more)
        trainer.train()
        return flat(model)

    stock = trained(Plain)
    assert (trained(Sharp, sam_rho=1e-10, **flags) - stock).abs().max() < 1e-8
    assert (trained(Sharp, sam_rho=0.5, **flags) - stock).abs().max() > 1e-5


class OwnEpoch(Trainer):
    """A loop that brings its micro-batches itself, in a class behind the mixin."""

    def _run_epoch(self, model, epoch, train_dataloader, **kwargs):
        self.current_gradient_accumulation_steps = 1
        for batch in train_dataloader:
            self.training_step(model, batch)
            self.optimizer.step()
            model.zero_grad()
            self.state.global_step += 1


def test_a_loop_behind_the_mixin_follows_the_schedule(build):
    """Each of its calls is a step of its own; only those from the middle on are perturbed."""

    def trained(start):
        kind = type("Own", (InOrder, SharpnessAwareTrainerMixin, OwnEpoch), {})
        model = make_model("bert", **NO_DROPOUT)
        passes = []
        model.register_forward_pre_hook(lambda *_: passes.append(trainer.state.global_step))
        trainer = build(kind, model, make_rows(24), optim="sgd", sam_rho=0.5, sam_start=start)
        trainer.train()
        return [passes.count(step) for step in range(6)]

    assert trained(0.5) == [1, 1, 1, 2, 2, 2]
    assert trained(0.0) == [2] * 6
