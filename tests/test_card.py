"""The model card: the stock one and those of libraries, what is pushed, the project's address."""

import email.message
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Sharp, make_model, make_rows

import adasam_hf
from adasam_hf import AdaSAMTrainer
from adasam_hf.card import CITATION, SAM_CITATION


def test_model_card_shows_the_values(build, tmp_path):
    shown = {}
    for name, more in {
        "adasam": {"sam_rho": 0.03, "adam_beta2": 0.9},
        "sam": {},
        "adamw_torch": {"sam_rho": 0.01, "sam_scope": "microbatch"},
        "amsgrad": {},
        "plain": {"optim": "adamw_torch"},
        "free": {"optim": "adasam", "sam_preset": "free"},
        "fast": {"optim": "adasam", "sam_preset": "fast", "sam_parameters": "norm", "sam_start": 0.5},
    }.items():
        more = {"optim": name, **more}
        trainer = build(Sharp, make_model("bert"), make_rows(4), hub_token="hf_planted", **more)
        trainer.train()
        trainer.create_model_card()
        shown[name] = (tmp_path / "out" / "README.md").read_text()
        assert "hf_planted" not in shown[name]
        assert shown[name].count("- optimizer:") == 1
        assert "- lr_scheduler_type: constant" in shown[name]
        os.remove(tmp_path / "out" / "README.md")
    assert "- optimizer: adasam (AdaSAM, arXiv:2303.00565, with betas=(0.9, 0.9), epsilon=1e-06)" in shown["adasam"]
    assert "- sam_rho: 0.03\n- sam_scope: batch\n- sam_dropout: same\n" in shown["adasam"]
    assert "- optimizer: sam (SGD with momentum=0.9)" in shown["sam"]
    assert "betas=(0.9, 0.999), epsilon=1e-08" in shown["adamw_torch"]
    assert "- sam_scope: microbatch" in shown["adamw_torch"]
    assert "- sam_direction: momentum\n" in shown["free"] and "sam_ascent_fraction" not in shown["free"]
    assert "- sam_ascent_fraction: 0.125\n- sam_parameters: norm\n" in shown["fast"]
    assert "- sam_schedule: Schedule(start=0.5" in shown["fast"]
    assert "- sam_rho: 0.0\n- lr_scheduler_type" in shown["amsgrad"]
    paper = "[AdaSAM](https://arxiv.org/abs/2303.00565)"
    assert f"Fine-tuned with {paper}, sharpness-aware minimization, at radius 0.03, by `adasam_hf`" in shown["adasam"]
    assert f"AMSGrad, which is {paper} at radius 0" in shown["amsgrad"]
    assert f"around `sam` at radius 0.05, by the steps of {paper}" in shown["sam"]
    assert all(shown[name].count(SAM_CITATION) == shown[name].count(CITATION) == 1 for name in ("sam", "adamw_torch"))
    assert all(SAM_CITATION not in shown[name] for name in ("adasam", "amsgrad", "free", "fast"))
    assert all(shown[name].count(CITATION) == 1 for name in ("adasam", "amsgrad", "free", "fast"))
    assert "## Optimizer" not in shown["plain"] and "bibtex" not in shown["plain"]


class Later(AdaSAMTrainer):
    """Goes on with the card, as a library's trainer may."""

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        with open(os.path.join(self.args.output_dir, "README.md"), "a") as file:
            file.write("\n## Mine\n\nMore of it.\n")


class Other(AdaSAMTrainer):
    """Writes a card of its own, without Transformers'; one of an earlier run says radius 0.9."""

    def create_model_card(self, *args, **kwargs):
        before = "Fine-tuned with [AdaSAM](https://arxiv.org/abs/2303.00565) at radius 0.9"
        text = f"# Theirs\n\n## Optimizer\n\n{before}\n```bibtex\n{CITATION}```\n\n### Versions\n\n- one\n"
        Path(self.args.output_dir, "README.md").write_text(text)


class Without(AdaSAMTrainer):
    def create_model_card(self, *args, **kwargs):
        return


@pytest.mark.parametrize("kind", [Later, Other])
def test_cards_of_subclasses_say_it_once(build, tmp_path, kind):
    trainer = build(kind, make_model("bert"), make_rows(4), optim="adasam", sam_rho=0.03)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("More of it." if kind is Later else "# Theirs\n\n### Versions\n\n- one\n") in card
    assert card.count("## Optimizer") == card.count(CITATION) == card.count("- sam_rho: 0.03\n") == 1
    assert "at radius 0.03" in card and "0.9\n" not in card


def test_an_optimizer_that_was_given_is_named(build, tmp_path):
    model = make_model("bert")
    given = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = build(AdaSAMTrainer, model, make_rows(4), optim="adasam", optimizers=(given, None))
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- optimizer: adasam (not in use; SGD was given to the trainer)" in card
    assert "around `SGD` at radius 0.05" in card and "betas" not in card


def test_before_training_a_card_claims_nothing(build, tmp_path):
    trainer = build(AdaSAMTrainer, make_model("bert"), make_rows(4), optim="adasam")
    os.makedirs(tmp_path / "out", exist_ok=True)
    trainer.create_model_card()
    assert "Fine-tuned with" not in (tmp_path / "out" / "README.md").read_text()


def test_a_trainer_that_writes_no_card(build, tmp_path):
    trainer = build(Without, make_model("bert"), make_rows(4), optim="adasam")
    os.makedirs(tmp_path / "out", exist_ok=True)
    trainer.create_model_card()
    assert not (tmp_path / "out" / "README.md").exists()


def test_what_is_pushed_to_the_hub_has_the_card(build, tmp_path, monkeypatch):
    """The hub is a stand-in: it keeps the card that comes with the folder."""
    pushed = []

    class Hub:
        def create_repo(self, name, **kwargs):
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, repo_id, folder_path, **kwargs):
            pushed.append((repo_id, sorted(os.listdir(folder_path)), Path(folder_path, "README.md").read_text()))

    monkeypatch.setattr("transformers.trainer.hf_api", Hub, raising=False)
    for name in ("create_repo", "upload_folder"):  # older Transformers
        monkeypatch.setattr(f"transformers.trainer.{name}", getattr(Hub(), name), raising=False)
    trainer = build(AdaSAMTrainer, make_model("bert"), make_rows(4), optim="adasam", sam_rho=0.03)
    trainer.train()
    trainer.push_to_hub()
    ((repository, files, card),) = pushed
    assert repository == "me/out" and "model.safetensors" in files
    assert "- sam_rho: 0.03\n" in card and card.count(CITATION) == 1


@pytest.mark.parametrize("home", [None, "https://example.org/adasam_hf"])
def test_the_card_links_the_project_once_it_has_an_address(build, tmp_path, monkeypatch, home):
    found = email.message.Message()
    found["Project-URL"] = "Documentation, https://example.org/docs"
    if home:
        found["Project-URL"] = f"Homepage, {home}"
    monkeypatch.setattr("adasam_hf.card.metadata", lambda name: {"adasam_hf": found}[name])
    trainer = build(AdaSAMTrainer, make_model("bert"), make_rows(4), optim="adasam")
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"by {f'[adasam_hf]({home})' if home else '`adasam_hf`'} {adasam_hf.__version__}." in card


def test_the_citation_is_that_of_the_readme():
    assert f"```bibtex\n{CITATION}```" in (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
