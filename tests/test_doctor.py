import pytest
import torch
from conftest import Sharp, make_model

from adasam_hf import doctor


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("adasam_hf.doctor.logger.warning", lines.append)
    return lines


def test_one_line_says_what_will_happen(build, said):
    model = make_model("bert", torch.float32)
    for p in model.bert.embeddings.parameters():
        p.requires_grad_(False)
    moving = [p for p in model.parameters() if p.requires_grad]
    trainer = build(Sharp, model, optim="adasam", gradient_accumulation_steps=2, sam_rho=0.03, bf16=True)
    trainer.train()
    numbers = [p.numel() for p in model.parameters()]
    assert said == [
        f"AdaSAM with sam_rho=0.03, sam_scope=batch (the whole optimizer step, 2 micro-batches): climbs {len(moving)} "
        f"tensors with {sum(p.numel() for p in moving):,} of {sum(numbers):,} parameters; 1 process; float32 weights, "
        "bf16 autocast; +0.0 MiB for a copy of them; 2 forward/backward passes per micro-batch instead of 1"
    ]


def test_the_memory_that_it_names_is_the_memory_held(build, said):
    model = make_model("bert", torch.float32, vocab_size=40_000)
    trainer = build(Sharp, model, optim="sam", sam_scope="microbatch")
    held = []
    model.classifier.register_forward_pre_hook(
        lambda *_: held.append(sum(b.numel() * b.element_size() for b in trainer._perturbation._buffers.values()))
    )
    trainer.train()
    assert f"+{held[-1] / 2**20:.1f} MiB" in said[0] and held[-1] > 2**20
    assert said[0].startswith("SGD with sam_rho=0.05, sam_scope=microbatch (each micro-batch by itself")


def test_radius_zero_says_so(build, said):
    build(Sharp, make_model("bert"), optim="amsgrad").train()
    assert said == [
        "AdaSAM with sam_rho=0: plain steps, one forward/backward per micro-batch and no ascent",
    ]


def logs(loss, sam_loss, rho=0.2, **more):
    return {"loss": loss, "sam_loss": sam_loss, "sam_rho": rho, **more}


@pytest.mark.parametrize("bad", [1.6, float("nan")])
def test_a_radius_far_too_large_is_told_once(said, bad):
    watch = doctor.Watch(0.2)
    for _ in range(3):
        watch(logs(0.7, 0.9), steps=10)
    watch(logs(0.7, bad), steps=10)
    assert said == []  # 10 steps are not many
    for _ in range(5):
        watch(logs(0.6, bad), steps=10)
    assert len(said) == 1
    assert "sam_rho=0.2 looks far too large" in said[0] and "try sam_rho=0.05" in said[0]


def test_a_sharp_minimum_is_no_alarm(said):
    """Late in training the loss is small, and a perturbed loss of many times it is what SAM is for."""
    watch = doctor.Watch(0.2)
    watch(logs(0.7, 0.9), steps=10)
    for _ in range(20):
        watch(logs(0.01, 0.5), steps=10)
    assert said == []


def test_steps_in_a_row(said):
    watch = doctor.Watch(0.2)
    for _ in range(10):
        watch(logs(0.7, 9.0), steps=10)
        watch(logs(0.7, 0.9), steps=10)
    assert said == []


def test_a_run_with_a_huge_radius_is_told(build, said):
    """The real thing: the neighbourhood of radius 50 knows nothing."""
    build(Sharp, make_model("bert"), optim="adasam", sam_rho=50.0, num_train_epochs=5).train()
    assert len([line for line in said if "sam_rho=50 looks far too large" in line]) == 1
    said.clear()
    build(Sharp, make_model("bert"), optim="adasam", sam_rho=0.05, num_train_epochs=5).train()
    assert not any("too large" in line for line in said)
