"""What is logged, when, and beside what others log."""

import pytest
from conftest import InOrder, Plain, Sharp, make_model, make_rows
from transformers import Trainer, TrainerCallback

from adasam_hf import AdaSAMTrainer

SCOPES = pytest.mark.parametrize("scope", ["batch", "microbatch"])
OURS = {"sam_loss", "sam_gap", "sam_grad_norm", "sam_rho"}


class LogsALoss(InOrder):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.log({"loss": float(loss), "train_loss": 1.0, "mine": 1.0})
        return (loss, outputs) if return_outputs else loss


@SCOPES
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.compat("Logs", "`self.log({'loss': …})` in `compute_loss` or a callback")
def test_what_others_log_is_left_alone(build, scope, k):
    def entries(base, **more):
        kind = type("Own", (LogsALoss, base), {})
        trainer = build(kind, make_model("bert"), gradient_accumulation_steps=k, **more)
        trainer.train()
        return trainer.state.log_history

    theirs = [entry for entry in entries(AdaSAMTrainer, sam_rho=0.05, sam_scope=scope) if "mine" in entry]
    stock = entries(Trainer)
    assert len(theirs) == 2 * sum("mine" in entry for entry in stock)  # both passes
    assert not any(OURS & set(entry) for entry in theirs)

    without = build(Sharp, make_model("bert"), gradient_accumulation_steps=k, sam_rho=0.05, sam_scope=scope)
    without.train()
    kept = [e for e in entries(AdaSAMTrainer, sam_rho=0.05, sam_scope=scope) if "grad_norm" in e]
    want = [e for e in without.state.log_history if "grad_norm" in e]
    assert [{key: e[key] for key in OURS} for e in kept] == [{key: e[key] for key in OURS} for e in want] != []


class Chatters(TrainerCallback):
    """Logs a training loss of its own whenever it can."""

    def on_substep_end(self, args, state, control, **kwargs):
        self.trainer.log({"loss": 0.0, "mine": 1.0})

    on_step_begin = on_pre_optimizer_step = on_optimizer_step = on_substep_end


@SCOPES
def test_a_callback_that_logs_takes_nothing_away(build, scope):
    histories = []
    for callbacks in ([], [Chatters()]):
        flags = {"gradient_accumulation_steps": 2, "logging_steps": 2, "sam_scope": scope}
        trainer = build(Sharp, make_model("bert"), callbacks=callbacks, sam_rho=0.05, **flags)
        for callback in callbacks:
            callback.trainer = trainer
        trainer.train()
        histories.append([e for e in trainer.state.log_history if "mine" not in e and "train_runtime" not in e])
    assert histories[0] == histories[1] and set(histories[0][0]) >= OURS


def test_the_last_steps_count_though_they_are_not_logged(build, caplog):
    """With 3 steps and an entry every 2, what the third did is still looked at."""
    trainer = build(Sharp, make_model("bert"), make_rows(12), sam_rho=50.0, logging_steps=2, num_train_epochs=9)
    trainer.train()
    assert "looks far too large" in caplog.text
    assert sum("sam_gap" in entry for entry in trainer.state.log_history) == 13  # 27 steps


def test_radius_zero_logs_what_stock_logs(build):
    keys = []
    for kind in (Plain, Sharp):
        trainer = build(kind, make_model("bert"))
        trainer.train()
        keys.append([set(entry) for entry in trainer.state.log_history])
    assert keys[0] == keys[1]
