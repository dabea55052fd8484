"""What a run says of itself when it starts."""

import pytest
import torch
from conftest import Sharp, make_model


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("adasam_hf.run.logger.warning", lines.append)
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
        "AdaSAM with sam_rho=0.03, sam_scope=batch (the whole optimizer step, 2 micro-batches): perturbs "
        f"{len(moving)} tensors with {sum(p.numel() for p in moving):,} of {sum(numbers):,} parameters; 1 process; "
        "float32 weights, bf16 autocast; +0.0 MiB for a copy of them; 2 forward/backward "
        "passes per micro-batch instead of 1",
        said[1],
    ]
    assert said[1].startswith("sam_cache_frozen: the second pass takes from the first what frozen modules with")


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


def test_the_line_names_a_cheap_ascent(build, said):
    flags = {"sam_parameters": "norm", "sam_interval": 3, "sam_reuse": True, "sam_rho_schedule": "linear"}
    build(Sharp, make_model("bert"), optim="adasam", sam_preset="fast", sam_start=0.5, **flags).train()
    for words in (
        "sam_rho=0.1 times its linear schedule",
        "from 50% to 100% of training",
        "in one step of 3, again in the others",
        "(sam_parameters=norm) with 160 of",
        "for a copy of them and the last gradient",
        "the first on 12.5% of a step's rows without gradients of the other weights",
    ):
        assert words in said[0], words


def test_the_line_has_the_real_share_of_the_rows(build, said):
    """Batches of 4: an eighth of a row is 2 rows, half of them."""
    trainer = build(Sharp, make_model("bert"), optim="adasam", sam_preset="fast")
    trainer.train()
    assert "the first on 50% of a step's rows (12.5% would be fewer than sam_ascent_min_rows=2 allows)" in said[0]
    shares = [entry["sam_ascent_share"] for entry in trainer.state.log_history if "loss" in entry]
    assert shares == [0.5] * 5 + [1.0]  # 22 rows: the last batch has 2


def test_a_schedule_without_a_step_is_told(build, said):
    build(Sharp, make_model("bert"), optim="adasam", sam_start=0.7, max_steps=1).train()
    assert (
        sum(
            "sam_start=0.7 and sam_end=1.0 leave no step in which to perturb the weights, of 1" in line for line in said
        )
        == 1
    )


def test_a_plain_run_says_nothing(build, said):
    build(Sharp, make_model("bert"), optim="amsgrad").train()
    build(Sharp, make_model("bert"), optim="adamw_torch").train()
    assert said == []


def test_arguments_of_an_ascent_that_there_is_not(build, caplog):
    build(Sharp, make_model("bert"), optim="adamw_torch", sam_preset="fast", sam_scope="microbatch").train()
    assert "sam_scope='microbatch', sam_preset='fast': without effect at radius 0" in caplog.text
    caplog.clear()
    build(Sharp, make_model("bert"), optim="adamw_torch").train()
    build(Sharp, make_model("bert"), optim="adamw_torch", sam_preset="fast", sam_rho=0.05).train()
    assert "without effect" not in caplog.text
