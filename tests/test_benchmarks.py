"""The benchmarks: that contenders do the same work, and that tables are those of their records."""

import copy
import json
import statistics
import time

import pytest
import torch
from conftest import make_model, make_rows
from helpers import ROOT

from adasam_hf.benchmarks import contenders, flatness, step, timing
from adasam_hf.benchmarks.contenders import PEER_STEPS, Contender, for_loop_sam, through_trainer
from adasam_hf.benchmarks.settings import BASE, FREEZES, PEERS, RHO
from adasam_hf.cli import run_command

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def batch_of(count=4):
    rows = make_rows(count)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def gradients(model):
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def test_contenders_do_the_same_work():
    """The gradient at w + δ, in float64, against one by hand; the plain one is another."""
    batch, found = batch_of(), {}
    for name, build in {
        "for-loop SAM": for_loop_sam,
        "AdaSAM": lambda model, dtype: through_trainer(model, dtype, {"optim": "adasam", "sam_rho": RHO}),
        "AMSGrad": lambda model, dtype: through_trainer(model, dtype, {"optim": "amsgrad"}),
    }.items():
        model = make_model("bert", **NO_DROPOUT)
        before = copy.deepcopy(model.state_dict())
        build(model, "float32").passes(batch)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        found[name] = gradients(model)
    model = make_model("bert", **NO_DROPOUT)
    model(**batch).loss.backward()
    plain = gradients(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(p.grad, alpha=RHO / plain.norm().item())
    model.zero_grad()
    model(**batch).loss.backward()
    sharp = gradients(model)
    torch.testing.assert_close(found["for-loop SAM"], sharp)
    torch.testing.assert_close(found["AdaSAM"], sharp)
    torch.testing.assert_close(found["AMSGrad"], plain)
    assert not torch.allclose(sharp, plain, rtol=1e-3)


def test_time_with_one_thread_is_that_of_the_processor(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert torch.get_num_threads() == 1 and timing.clock() == "CPU seconds"
    assert timing.seconds(time.sleep, 0.2) < 0.1  # others may have the processor meanwhile
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert timing.clock() == "wall seconds" and timing.seconds(time.sleep, 0.2) >= 0.2


def test_every_peer_has_its_step():
    assert set(PEER_STEPS) == set(PEERS)


def test_an_update_follows_the_passes():
    calls = []
    contender = Contender(lambda batch: calls.append(batch), lambda: calls.append("update"))
    contender({"a": 1})
    assert calls == [{"a": 1}, "update"]


def test_contenders_take_turns():
    order = []
    steps = {name: lambda batch, name=name: order.append((name, batch)) for name in "abc"}
    times = timing.take_turns(steps, [0, 1, 2, 3], warm_up=1)
    assert order[:6] == [("a", 0), ("b", 0), ("c", 0), ("b", 1), ("c", 1), ("a", 1)]
    assert {name: len(spent) for name, spent in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_paired_by_batch():
    times = {BASE: [1.0, 2.0, 4.0], "AdaSAM": [2.0, 5.0, 8.4]}
    found = timing.ratios(times)
    assert found["AdaSAM"]["ratio"] == statistics.median([2.0, 2.5, 2.1]) != 5.0 / 2.0
    assert found[BASE] == {"ratio": 1.0, "low": 1.0, "high": 1.0}


def test_the_parts_of_a_step():
    model = make_model("bert", dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    found = timing.phases(model, "float32", [batch_of()] * 3)
    parts = ("step", "update", "ascent", timing.MOVE, "descent", "restore", "AdamW update")
    assert all(found[part] > 0 for part in parts)
    assert found["step"] > found["update"] and found["outside the passes"] > found["update"]
    moved = max((model.state_dict()[name] - value).abs().max() for name, value in before.items())
    assert moved < 1e-4  # by updates at a rate of 1e-6, and by nothing else
    record = {
        "phases": found,
        "ratios": {BASE: {"ratio": 1.0, "low": 1.0, "high": 1.0}},
        "peak_memory_mib": {BASE: 3.0},
    }
    assert "| AdamW (fused) | 1.00 | 1.00–1.00 | 1.00 |" in step.table(record)


def test_a_commit_that_is_not_there():
    with pytest.raises(ValueError, match=r"--against='nowhere'.*name a commit of a checkout"):
        step.package_at("nowhere")


def test_real_sentences_in_batches():
    batches = contenders.build_batches(2, 4, vocabulary=50)
    assert [sorted(batch) for batch in batches] == [sorted(batches[0])] * 2
    assert all(batch["input_ids"].max() < 50 and batch["input_ids"].shape[1] % 8 == 0 for batch in batches)
    assert set(batches[0]["labels"].tolist()) == {0, 1}


def test_the_committed_table_of_flatness_is_that_of_its_records():
    folder = ROOT / "results" / "benchmark_flatness"
    records = [json.loads(path.read_text()) for path in sorted((folder / "records").glob("*.json"))]
    committed = (folder / "table.md").read_text(encoding="utf-8")
    assert flatness.table(flatness.summarize(records)).lstrip() + "\n" == committed
    records[0]["score"] += 1.0
    assert flatness.table(flatness.summarize(records)).lstrip() + "\n" != committed


def test_a_timed_trainer_counts_its_cpu_seconds(build):
    trainer = build(flatness.TimedTrainer, make_model("bert"), max_steps=2)
    assert trainer.cpu_seconds != trainer.cpu_seconds  # not a number before
    trainer.train()
    assert 0 < trainer.cpu_seconds < 60


@pytest.mark.slow
def test_one_table_by_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = ["step", "--model=1m", "--rounds=2", "--batch_size=4", "--contenders", "AdaSAM", f"--output_dir={tmp_path}"]
    assert run_command("benchmark", words) == 0
    record = json.loads((tmp_path / "1m-float32.json").read_text())
    assert set(record["ratios"]) == {BASE, "AdaSAM"} and record["peak_memory_mib"]["AdaSAM"] > 100
    assert "| AdaSAM | " in capsys.readouterr().out
    assert record["parameters"] > 1_000_000


@pytest.mark.parametrize("what", FREEZES)
def test_what_is_frozen(what):
    """of a BERT of four layers; beside what is named, the rest stays trainable."""
    model = contenders.freeze(make_model("bert", dtype=torch.float32, num_hidden_layers=4), what)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = {int(name.split(".layer.")[1].split(".")[0]) for name in trainable if ".layer." in name}
    assert layers == {"half": {2, 3}, "all but the top layer": {3}, "all but the head": set(), "lora": {3}}[what]
    assert any("classifier" in name for name in trainable) and not any("embeddings" in name for name in trainable)
    if what == "lora":
        assert all("lora_" in name for name in trainable if ".layer." in name)
