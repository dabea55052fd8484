"""What the Trainer does around its steps: with radius 0 all of it is stock, with a radius all but the numbers."""

from functools import partial
from itertools import cycle

import numpy as np
import pytest
import torch
from conftest import flat, make_model, make_rows
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from adasam_hf import AdaSAMTrainer, AdaSAMTrainingArguments

TIMES = ("runtime", "per_second")
EXACT = ("step", "epoch", "learning_rate", "num_input_tokens_seen")
WISHES = ("should_log", "should_evaluate", "should_save", "should_epoch_stop", "should_training_stop")

STEPS = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_score"}
CASES = {
    "logging, evaluation and saving by steps": {**STEPS, "gradient_accumulation_steps": 2, "logging_first_step": True},
    "logging, evaluation and saving by epochs": {f"{job}_strategy": "epoch" for job in ("logging", "eval", "save")},
    "`eval_on_start`": {**STEPS, "eval_on_start": True},
    "`load_best_model_at_end`": {**STEPS, **BEST},
    "`save_strategy=best`": {**STEPS, **BEST, "save_strategy": "best"},
    "`save_total_limit`": {**STEPS, **BEST, "save_total_limit": 1},
    "early stopping": {**STEPS, **BEST, "patience": 1},
}
each_case = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.compat("Trainer behaviour", case)) for case in CASES]
)


class Recorder(TrainerCallback):
    """Every event, with what the Trainer is about to do."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        return partial(self.record, name) if name.startswith("on_") else super().__getattribute__(name)

    def record(self, event, args, state, control, **kwargs):
        self.events.append((event, state.global_step, *(getattr(control, wish) for wish in WISHES)))


def run(kind, folder, patience=None, **kwargs):
    arguments = AdaSAMTrainingArguments if issubclass(kind, AdaSAMTrainer) else TrainingArguments
    common = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 1e-2, "weight_decay": 0.1}
    common |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "include_num_input_tokens_seen": True}
    # The best score comes third, whatever the weights are.
    rows, scores = make_rows(22), cycle((0.4, 0.3, 0.6, 0.5, 0.2, 0.1))
    recorder = Recorder()
    trainer = kind(
        model=make_model("bert", torch.float32),
        args=arguments(output_dir=str(folder), **{**common, **kwargs}),
        train_dataset=rows,
        eval_dataset=rows[:7],
        compute_metrics=lambda prediction: {"score": next(scores)},
        callbacks=[recorder] + ([EarlyStoppingCallback(patience)] if patience else []),
    )
    result = trainer.train()
    trainer.save_state()
    return trainer, recorder.events, result


def without_times(entry):
    return {name: value for name, value in entry.items() if not name.endswith(TIMES)}


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def equal(a, b):
    """Equality to the bit of what checkpoints hold."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else torch.equal(a, b) if torch.is_tensor(a) else a == b


def contents(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=False)  # the random states hold NumPy's


@each_case
def test_radius_zero_does_what_stock_does(tmp_path, case):
    stock_folder, folder = tmp_path / "stock", tmp_path / "ours"
    stock, stock_events, stock_result = run(Trainer, stock_folder, **CASES[case])
    ours, events, result = run(AdaSAMTrainer, folder, sam_rho=0.0, **CASES[case])
    assert events == stock_events
    assert list(map(without_times, ours.state.log_history)) == list(map(without_times, stock.state.log_history))
    assert without_times(result.metrics) == without_times(stock_result.metrics)
    for name in ("best_metric", "best_global_step", "total_flos"):
        assert getattr(ours.state, name) == getattr(stock.state, name), name
    assert torch.equal(flat(ours.model), flat(stock.model))
    assert listing(folder) == listing(stock_folder)
    for path in folder.rglob("*"):
        if path.suffix in (".safetensors", ".pt", ".pth"):
            assert equal(contents(path), contents(stock_folder / path.relative_to(folder))), path
    predictions = [trainer.predict(make_rows(5)).predictions for trainer in (ours, stock)]
    assert np.array_equal(*predictions)


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
@each_case
def test_a_radius_changes_numbers_only(tmp_path, case, scope):
    stock, stock_events, _ = run(Trainer, tmp_path / "stock", **CASES[case])
    ours, events, _ = run(AdaSAMTrainer, tmp_path / "ours", sam_rho=0.05, sam_scope=scope, **CASES[case])
    assert events == stock_events
    assert listing(tmp_path / "ours") == listing(tmp_path / "stock")
    assert ours.state.best_global_step == stock.state.best_global_step
    assert not torch.equal(flat(ours.model), flat(stock.model))
    for entry, stock_entry in zip(ours.state.log_history, stock.state.log_history, strict=True):
        added = {"sam_loss", "sam_gap", "sam_grad_norm", "sam_rho"} if "loss" in stock_entry else set()
        assert entry.keys() == stock_entry.keys() | added
        assert all(entry[name] == stock_entry[name] for name in EXACT if name in entry)


def test_the_cases_differ(tmp_path):
    """The control of the tests above: what they compare tells one case from another."""
    seen, best = set(), {}
    for case, settings in CASES.items():
        folder = tmp_path / str(len(seen))
        trainer, events, _ = run(Trainer, folder, **settings)
        seen.add((*events, *listing(folder)))
        best[case] = trainer.state.best_global_step, trainer.state.global_step
    assert len(seen) == len(CASES)
    assert best["`load_best_model_at_end`"] == (9, 18) and best["early stopping"] == (3, 6)
