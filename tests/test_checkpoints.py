import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import flat, make_model, make_rows
from transformers.trainer_utils import get_last_checkpoint

from adasam_hf import AdaSAMTrainer, AdaSAMTrainingArguments, checkpoints
from adasam_hf.checkpoints import last_complete


@pytest.fixture
def said(monkeypatch):
    """The warnings of `last_complete`."""
    said = []
    monkeypatch.setattr(checkpoints.logger, "warning", said.append)
    return said


def build(folder, kind=AdaSAMTrainer, **flags):
    args = AdaSAMTrainingArguments(
        str(folder), optim="adasam", save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, **flags
    )
    return kind(make_model("bert", torch.float32), args, train_dataset=make_rows(8))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    build(folder, max_steps=10).train()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """checkpoint-2 to checkpoint-10, as saved by a run."""
    return shutil.copytree(saved, tmp_path / "out")


def cut(path, size=100):
    path.write_bytes(path.read_bytes()[:size])


FAULTS = {
    "nothing": (lambda c: shutil.rmtree(c) or c.mkdir(), "trainer_state.json"),
    "no state": (lambda c: (c / "trainer_state.json").unlink(), "trainer_state.json"),
    "half a state": (lambda c: cut(c / "trainer_state.json"), "trainer_state.json"),
    "binary in the state": (lambda c: (c / "trainer_state.json").write_bytes(b"\xff\x00"), "trainer_state.json"),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "no weights"),
    "empty weights": (lambda c: cut(c / "model.safetensors", 0), "nothing in model.safetensors"),
    "no optimizer": (lambda c: (c / "optimizer.pt").unlink(), "no optimizer"),
    "empty optimizer": (lambda c: cut(c / "optimizer.pt", 0), "nothing in optimizer.pt"),
    "no scheduler": (lambda c: (c / "scheduler.pt").unlink(), "no scheduler"),
    "no random state": (lambda c: (c / "rng_state.pth").unlink(), "no random state"),
    "one process too few": (lambda c: (c / "rng_state.pth").rename(c / "rng_state_1.pth"), "of process 0"),
    "marked": (lambda c: (c / "checkpoint-is-incomplete.txt").touch(), "checkpoint-is-incomplete.txt"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_partial_checkpoints_are_passed_over_by_name(folder, said, fault):
    spoil, message = FAULTS[fault]
    for step in (10, 8):
        spoil(folder / f"checkpoint-{step}")
    before = sorted(path for path in folder.rglob("*"))
    assert last_complete(folder) == str(folder / "checkpoint-6")
    assert [
        f"checkpoint-{step} is skipped, as it was not completely saved" in text
        for step, text in zip((10, 8), said, strict=True)
    ] == [True] * 2
    assert all(message in text for text in said)
    assert sorted(folder.rglob("*")) == before  # nothing is deleted
    assert get_last_checkpoint(folder).endswith("checkpoint-10")  # the control: Transformers would take it


def test_complete_checkpoints(folder, said):
    assert last_complete(folder) == last_complete(str(folder)) == str(folder / "checkpoint-10")  # by number, not name
    newest = folder / "checkpoint-10"
    for name in ("best", "12.tmp", "x-12"):
        (folder / f"checkpoint-{name}").mkdir()
    (folder / "checkpoint-12").touch()
    assert last_complete(folder) == str(newest)
    # saved by others: FSDP, several processes, PEFT, DeepSpeed, `save_only_model`
    (newest / "rng_state.pth").rename(newest / "rng_state_0.pth")
    shutil.copy(newest / "rng_state_0.pth", newest / "rng_state_1.pth")
    weights, optimizer = newest / "model.safetensors", newest / "optimizer.pt"
    for name in ("pytorch_model.bin", "pytorch_model_fsdp_0", "adapter_model.safetensors", "global_step10"):
        weights = weights.rename(newest / name)
        assert last_complete(folder) == str(newest)
    for name in ("optimizer.bin", "optimizer_0", "rank0-of-2-optimizer.pt"):
        optimizer = optimizer.rename(newest / name)
        assert last_complete(folder) == str(newest)
    optimizer.unlink()
    (newest / "scheduler.pt").unlink()
    assert last_complete(folder) == str(newest)  # DeepSpeed keeps them in global_step10
    weights.rename(newest / "model-00001-of-00002.safetensors")
    for path in newest.glob("rng_state_*"):
        path.unlink()
    assert last_complete(folder) == str(newest)
    assert said == []


def test_nothing_to_go_on_from(tmp_path, said):
    assert last_complete(tmp_path / "nowhere") is last_complete(tmp_path) is None
    (tmp_path / "checkpoint-2").mkdir()
    assert last_complete(tmp_path) is None and "checkpoint-2" in said[0]
    with pytest.raises(ValueError, match="has no completely saved checkpoint"):
        build(tmp_path).train(resume_from_checkpoint=True)


def test_true_is_the_last_complete_checkpoint(folder, said):
    (folder / "checkpoint-10" / "trainer_state.json").unlink()
    trainer = build(folder, max_steps=10)
    trainer.train(resume_from_checkpoint=True)
    assert len(said) == 1
    steps = json.loads((folder / "checkpoint-10" / "trainer_state.json").read_text())["global_step"]
    assert steps == trainer.state.global_step == 10
    assert build(folder, max_steps=12).train(True, trial=None, ignore_keys_for_eval=None).global_step == 12
    assert build(folder, max_steps=2).train(False).global_step == 2


def test_a_failed_save_says_where(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("unexpected pos 29760 vs 29652")  # what torch says of a full disk

    trainer = build(tmp_path, max_steps=2)
    monkeypatch.setattr(trainer, "_save_scaler", full)
    with pytest.raises(RuntimeError) as error:
        trainer.train()
    assert f"{tmp_path / 'checkpoint-2'} is not complete" in error.value.__notes__[0]


class SavesItself(AdaSAMTrainer):
    """Keeps its weights in a file that nobody else knows."""

    def _save(self, output_dir=None, state_dict=None):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), Path(output_dir, "head.pt"))

    def _load_from_checkpoint(self, checkpoint, model=None):
        self.model.load_state_dict(torch.load(Path(checkpoint, "head.pt")))


@pytest.mark.compat("Interruption", "resume of a trainer with a weight file of its own")
def test_a_trainer_with_a_weight_file_of_its_own_resumes(tmp_path):
    def trained(folder, steps, resume=None):
        flags = {"max_steps": steps, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
        trainer = build(tmp_path / folder, kind=SavesItself, **flags)
        trainer.train(resume_from_checkpoint=resume)
        return flat(trainer.model)

    straight = trained("straight", 4)
    stopped = trained("out", 2)
    assert torch.equal(trained("out", 4, resume=True), straight)
    assert not torch.equal(stopped, straight)
    (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").unlink()  # what is known is still looked at
    assert last_complete(tmp_path / "out", usual_weights=False).endswith("checkpoint-2")
