"""What must not get out, and what must not be run: tokens, YAML tags, code of models, pickles."""

import json
import logging
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import Plain, Sharp, make_model, make_rows

from adasam_hf.glue.run import main, parse

TOKEN = "hf_planted0123456789"


def leaks(folder):
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and TOKEN.encode() in path.read_bytes()
    }


# ---- tokens ----


@pytest.fixture
def all_logs(caplog):
    """Every library says all that it can."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_debug()
    transformers.logging.enable_propagation()
    caplog.set_level(logging.DEBUG)
    yield caplog
    transformers.logging.disable_propagation()
    transformers.logging.set_verbosity(level)


@pytest.fixture
def start(flags, files, tmp_path, monkeypatch, capfd, all_logs):
    """Runs the command line `words` and returns all that it said and wrote, but for training_args.bin (see below)."""

    def start(*words):
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "out" / "board"))
        more = ["--do_train", "--do_eval", "--max_steps=2", "--save_steps=1", "--report_to=tensorboard"]
        monkeypatch.setattr(sys, "argv", ["run_glue.py", *flags, *files, *more, *words])
        trainer = main()
        said = capfd.readouterr()
        texts = {"stdout": said.out, "stderr": said.err, "logs": all_logs.text}
        for name in ("__repr__", "__str__", "to_json_string", "to_dict", "to_sanitized_dict"):
            texts[name] = str(getattr(trainer.args, name)())
        written = {name for name in leaks(tmp_path / "out") if not name.endswith("training_args.bin")}
        return trainer, texts, {name for name, text in texts.items() if TOKEN in text} | written

    return start


@pytest.mark.parametrize(
    "spelling", [[f"--hub_token={TOKEN}"], ["--hub_token", TOKEN], [f"--hub-token={TOKEN}"], "file"]
)
def test_a_token_stays_inside(start, tmp_path, spelling):
    (tmp_path / "token.yaml").write_text(f"hub_token: {TOKEN}\n")
    trainer, texts, found = start(*(spelling if spelling != "file" else [f"--config={tmp_path / 'token.yaml'}"]))
    assert trainer.args.hub_token == TOKEN
    assert all(texts.values())
    assert not found


def test_what_is_no_token_is_found(start):
    """The control: the same word as the name of the run."""
    *_, found = start(f"--run_name={TOKEN}")
    assert {"record.json", "__str__", "to_json_string"} < found
    assert any("tfevents" in name for name in found)


@pytest.mark.parametrize("bad", ["--sam_rho=-1", "--learning_rate=fast", "--sam_row=1", "--train_file=nowhere.csv"])
def test_errors_do_not_quote_a_token(flags, files, capfd, bad):
    with pytest.raises((Exception, SystemExit)) as error:
        main([*flags, *files, "--do_train", f"--hub_token={TOKEN}", bad])
    said = capfd.readouterr()
    assert TOKEN not in f"{error.value!r} {said.out} {said.err}"


def test_checkpoints_hold_no_more_of_a_token_than_stock_ones(build, tmp_path):
    """Transformers pickles all arguments into training_args.bin, the token among them."""
    for kind, name in ((Plain, "stock"), (Sharp, "ours")):
        model = make_model("bert", torch.float32)
        trainer = build(kind, model, make_rows(8), folder=name, hub_token=TOKEN, save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.save_model()
    assert leaks(tmp_path / "ours") <= leaks(tmp_path / "stock")


# ---- code ----


def test_yaml_runs_nothing(flags, files, tmp_path):
    mark = tmp_path / "ran"
    text = f"run_name: !!python/object/apply:builtins.open ['{mark}', w]\n"
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match="cannot be read as YAML: could not determine a constructor"):
        parse([*flags, *files, "--do_train", f"--config={tmp_path / 'bad.yaml'}"])
    assert not mark.exists()
    yaml.unsafe_load(text)
    assert mark.exists()


CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification
Path({mark!r}).touch()
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("model_type", ["bert", "own"])
def test_code_of_a_model_runs_only_when_trusted(flags, files, tiny, tmp_path, monkeypatch, model_type):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny, folder)
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    job = [*flags, *files, "--do_eval", f"--model_name_or_path={folder}", f"--tokenizer_name={tiny}"]
    job += ["--max_eval_samples=2"]
    if model_type == "bert":  # Transformers has a class of its own for it
        main(job)
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            main(job)
    assert not mark.exists()
    main([*job, "--trust_remote_code"])
    assert mark.exists()


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(
    "file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "training_args.bin"]
)
def test_checkpoints_run_nothing(build, tmp_path, file):
    common = {"optim": "adasam", "save_strategy": "steps", "save_steps": 1}
    build(Sharp, make_model("bert", torch.float32), make_rows(8), **common).train()
    checkpoint, mark = tmp_path / "out" / "checkpoint-1", tmp_path / "ran"
    torch.save(Payload(mark), checkpoint / file)
    if file == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    trainer = build(Sharp, make_model("bert", torch.float32), make_rows(8), **common)
    if file == "training_args.bin":  # which is not read
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not mark.exists()
    torch.load(checkpoint / file, weights_only=False)
    assert mark.exists()
