"""The command `adasam`: what each of its commands says to input that it cannot use, and how it starts."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers import ROOT

from adasam_hf import __version__, cli
from adasam_hf.cli import COMMANDS, run_command
from adasam_hf.console import sentence
from adasam_hf.environment import environment

ROWS = "text,label\n" + "a warm film,good\nfar too long,bad\n" * 8
SWEEP = {
    "output_dir": "{tmp}/found",
    "configs": ["configs/optim/{method}.yaml"],
    "arguments": {"model_name_or_path": "{tiny}", "do_train": True, "do_eval": True, "max_steps": 1},
    "tasks": {"mine": {"train_file": "{tmp}/train.csv", "validation_file": "{tmp}/train.csv", "max_train_samples": 8}},
    "axes": {"task_name": ["mine"], "method": ["adasam"], "seed": [1]},
}
FILES = {
    "train.csv": ROWS,
    "empty.csv": "",
    "header.csv": "text,label\n",
    "nan.csv": ROWS + "so so,\n",
    "nan_word.csv": ROWS.replace("bad", "nan"),
    "one_class.csv": ROWS.replace("bad", "good"),
    "other_labels.csv": ROWS.replace("bad", "ugly"),
    "ragged.csv": 'text,label\n"a,b\n',
    "rows.json": "{",
    "rows.txt": ROWS,
    "good.yaml": "learning_rate: 1e-3\n",
    "empty.yaml": "",
    "list.yaml": "[1, 2]",
    "broken.yaml": "learning_rate: [1\n",
    "unknown.yaml": "learning_rat: 1\n",
    "wrong.yaml": "learning_rate: much\n",
    "in_the_way": "a file where a folder is to be",
    "records/records/broken/one.json": "{}",
}


@pytest.fixture
def place(tmp_path, tiny):
    """A folder of good and bad files. Returns what the names in words stand for."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.yaml").write_bytes("run_name: Zürich\n".encode("latin-1"))
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "nothing").mkdir()
    return {"tmp": str(tmp_path), "tiny": tiny}


GLUE = ["--model_name_or_path={tiny}", "--output_dir={tmp}/out", "--use_cpu", "--report_to=none", "--do_train"]
GLUE += ["--train_file={tmp}/train.csv", "--max_steps=1"]
BAD = [  # command, words, what is said
    ("glue", [], "required: --model_name_or_path"),
    ("glue", [*GLUE, "--learning_rate=much"], "invalid float value: 'much'"),
    ("glue", [*GLUE, "--sam_rhoo=1"], "--sam_rhoo"),
    ("glue", [*GLUE, "--sam_rho=-1"], "sam_rho=-1.0 must be"),
    ("glue", [*GLUE, "--optim=adasm"], "optim='adasm'"),
    ("glue", [*GLUE, "--task_name=mrcp"], "task_name='mrcp' is not a GLUE task"),
    ("glue", [*GLUE, "--max_seq_length=0"], "max_seq_length=0 must be at least 1"),
    ("glue", [*GLUE, "--train_file={tmp}/absent.csv"], "absent.csv' does not exist"),
    ("glue", [*GLUE, "--train_file={tmp}/folder.csv"], "folder.csv' does not exist"),
    ("glue", [*GLUE, "--train_file={tmp}/rows.txt"], "rows.txt' must end in one of .csv, .tsv, .json, .jsonl"),
    ("glue", [*GLUE, "--train_file={tmp}/empty.csv"], "empty.csv' is empty"),
    ("glue", [*GLUE, "--train_file={tmp}/header.csv"], "header.csv' has no rows"),
    ("glue", [*GLUE, "--train_file={tmp}/nan.csv"], "1 training labels are missing"),
    ("glue", [*GLUE, "--train_file={tmp}/nan_word.csv"], "training labels have 'nan'"),
    ("glue", [*GLUE, "--train_file={tmp}/one_class.csv"], "all training labels are 'good'"),
    ("glue", [*GLUE, "--train_file={tmp}/ragged.csv"], "ragged.csv' cannot be read as CSV"),
    ("glue", [*GLUE, "--train_file={tmp}/rows.json"], "rows.json' cannot be read as JSON"),
    ("glue", [*GLUE, "--do_eval", "--validation_file={tmp}/other_labels.csv"], "has label 'ugly'"),
    ("glue", [*GLUE, "--text_column_names=review"], "has no column ['review']"),
    ("glue", [*GLUE, "--output_dir={tmp}/in_the_way"], "in_the_way' cannot be written to"),
    ("glue", [*GLUE, "--model_name_or_path={tmp}/absent"], "absent' is not a folder"),
    ("glue", [*GLUE, "--model_name_or_path={tmp}/nothing"], "config.json"),
    ("glue", [*GLUE, "--config={tmp}/absent.yaml"], "absent.yaml' does not exist"),
    ("glue", [*GLUE, "--config={tmp}/empty.yaml"], "empty.yaml' must be a mapping"),
    ("glue", [*GLUE, "--config={tmp}/list.yaml"], "list.yaml' must be a mapping"),
    ("glue", [*GLUE, "--config={tmp}/broken.yaml"], "broken.yaml' cannot be read as YAML"),
    ("glue", [*GLUE, "--config={tmp}/unknown.yaml"], "unknown keys ['learning_rat']"),
    ("glue", [*GLUE, "--config={tmp}/wrong.yaml"], "invalid float value: 'much'"),
    ("glue", [*GLUE, "--config={tmp}/latin.yaml"], "latin.yaml' is not text in UTF-8"),
    ("sweep", [], "required: sweep"),
    ("sweep", ["{tmp}/absent.yaml"], "absent.yaml' does not exist"),
    ("sweep", ["configs/sweeps/absent.yaml"], "configs/sweeps/absent.yaml' does not exist"),
    ("sweep", ["{tmp}/nothing"], "nothing' does not exist"),
    ("sweep", ["{tmp}/empty.yaml"], "must be a mapping with output_dir, configs and axes"),
    ("sweep", ["{tmp}/broken.yaml"], "broken.yaml cannot be read as YAML"),
    ("sweep", ["{tmp}/latin.yaml"], "latin.yaml is not text in UTF-8"),
    ("sweep", ["{tmp}/good.yaml", "--jobs=0"], "--jobs=0 must be at least 1"),
    ("sweep", ["{tmp}/good.yaml", "--jobs=two"], "invalid int value: 'two'"),
    ("sweep", ["{tmp}/good.yaml", "--seeds", "x"], "invalid int value: 'x'"),
    ("sweep", ["{tmp}/good.yaml", "--engine=slurm"], "invalid choice: 'slurm'"),
    ("sweep", ["{tmp}/good.yaml", "--dataset_name_or_path=./absent"], "'./absent' is not a folder"),
    ("report", [], "required: folder"),
    ("report", ["{tmp}/absent"], "absent/records has no records"),
    ("report", ["{tmp}/in_the_way"], "in_the_way/records has no records"),
    ("report", ["{tmp}/records"], "one.json is not a record"),
    ("power", [], "give a folder of records, or --spread"),
    ("power", ["--spread=nan"], "--spread must be finite and above 0"),
    ("power", ["--spread=1", "--gain", "0"], "must be finite numbers other than 0"),
    ("power", ["--spread=1", "--gain", "small"], "invalid float value: 'small'"),
    ("power", ["{tmp}/absent"], "absent/records has no records"),
    ("submit", [], "required: folders"),
    ("submit", ["{tmp}/absent"], "CoLA.tsv is missing"),
    ("landscape", [], "required: checkpoints"),
    ("landscape", ["{tiny}"], "give one of --train_file and --task_name"),
    ("landscape", ["{tmp}/absent", "--train_file={tmp}/train.csv"], "absent is not the folder of a model"),
    ("landscape", ["{tiny}", "--train_file={tmp}/empty.csv", "--output={tmp}/x.png"], "empty.csv' is empty"),
    ("landscape", ["{tiny}", "--train_file={tmp}/train.csv", "--output={tmp}/x.txt"], "must end as a picture does"),
    ("landscape", ["{tiny}", "--train_file={tmp}/train.csv", "--output={tmp}/absent/x.png"], "does not exist; make it"),
    ("landscape", ["{tiny}", "--train_file={tmp}/train.csv", "--extent=nan"], "--extent above 0"),
    ("quickstart", ["--sam_rho=0"], "--sam_rho: set by this comparison itself"),
    ("quickstart", ["--seeds", "one"], "invalid int value: 'one'"),
    ("quickstart", ["--optim=sam"], "--optim: set by this comparison itself"),
    ("quickstart", ["--output_dir={tmp}/in_the_way"], "in_the_way"),
    ("quickstart", ["--output_dir={tmp}/q", "--max_step=1"], "--max_step"),
    ("benchmark", [], "required: what"),
    ("benchmark", ["speed"], "invalid choice: 'speed'"),
    ("benchmark", ["step", "--rounds=0"], "--rounds=0"),
    ("benchmark", ["step", "--model=mini"], "invalid choice: 'mini'"),
    ("benchmark", ["flatness", "--report_only", "--output_dir={tmp}/absent"], "absent/records has no records"),
    ("env", ["--all"], "unrecognized arguments: --all"),
]


def name_of(case):
    return f"{case[0]}: {case[2]}"


def snapshot(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.parametrize("case", BAD, ids=name_of)
def test_bad_input_is_one_sentence_and_nothing_is_lost(case, place, monkeypatch, capsys):
    command, words, message = case
    monkeypatch.chdir(place["tmp"])
    before = snapshot(place["tmp"])
    assert run_command(command, [word.format(**place) for word in words]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("adasam")]
    assert len(said) == 1 and said[0].startswith(f"adasam {command}: ") and message in said[0]
    assert before.items() <= snapshot(place["tmp"]).items()
    with pytest.raises(Exception, match=r".") as caught:  # with --debug it is raised, with its traceback
        run_command(command, [word.format(**place) for word in words], debug=True)
    assert not isinstance(caught.value, SystemExit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axis": {}}, "unknown keys ['axis']"),
        ({5: 1}, "unknown keys ['5']"),
        ({"axes": ["mine"]}, "axes is ['mine']; it takes a mapping"),
        ({"axes": None}, "axes is empty"),
        ({"axes": {"task_name": [3], "method": ["adasam"], "seed": [1]}}, "axis task_name has [3]"),
        ({"axes": {"task_name": ["mine"], "method": "adasam", "seed": [1]}}, "axis method is 'adasam'"),
        ({"output_dir": None}, "output_dir is empty"),
        ({"output_dir": 5}, "output_dir is 5; it takes a folder"),
        ({"output_dir": "{tmp}/in_the_way"}, "in_the_way"),
        ({"configs": [1]}, "configs has [1]"),
        ({"configs": ["configs/optim/{method}.yaml", "{tmp}/absent.yaml"]}, "absent.yaml' does not exist"),
        ({"configs": ["configs/optim/{method}.yaml", "{tmp}/wrong.yaml"]}, "invalid float value: 'much'"),
        ({"arguments": "fast"}, "arguments is 'fast'"),
        ({"tasks": {"mine": ["train.csv"]}}, "tasks.mine is ['train.csv']"),
        ({"tasks": {"mine": {"train_file": "{tmp}/absent.csv"}}}, "absent.csv"),
        ({"when": {"seed": [1]}}, "when is {'seed': [1]}; it takes a list"),
        ({"when": ["seed"]}, "when has 'seed'; it takes mappings"),
        ({"when": [{"seed": 1, "arguments": {}}]}, "when.seed is 1"),
        ({"choose": 5}, "choose is 5; it takes a mapping, or the name of a sweep"),
        ({"choose": "absent"}, "absent.yaml' does not exist"),
        ({"choose": {"arguments": {"held_out_samples": 4}, "grid": None}}, "choose.grid is None"),
        ({"choose": {"arguments": {"held_out_samples": 4}, "grid": {"adasam": [0.1]}}}, "choose.grid.adasam is [0.1]"),
        ({"scale_learning_rate_from": 0}, "scale_learning_rate_from is 0"),
        ({"scale_learning_rate_from": "32"}, "scale_learning_rate_from is '32'"),
        ({"keep_models": "yes please"}, "keep_models is 'yes please'; it takes true or false"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(map(str, value))),
)
def test_bad_sweep_files_are_one_sentence(change, message, place, monkeypatch, capsys):
    monkeypatch.chdir(place["tmp"])
    text = yaml.safe_dump(SWEEP | change, sort_keys=False)
    for name, value in place.items():
        text = text.replace(f"{{{name}}}", value)
    Path("bad.yaml").write_text(text)
    before = snapshot(place["tmp"])
    assert run_command("sweep", ["bad.yaml"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("adasam")]
    assert len(said) == 1 and message in said[0]
    assert before.items() <= snapshot(place["tmp"]).items()


def test_the_sweep_that_the_bad_ones_are_made_of_is_good(place, monkeypatch, capsys):
    monkeypatch.chdir(place["tmp"])
    text = yaml.safe_dump(SWEEP).replace("{tmp}", place["tmp"]).replace("{tiny}", place["tiny"])
    Path("good sweep.yaml").write_text(text)  # with a space in its name
    assert run_command("sweep", ["good sweep.yaml", "--dry_run"]) == 0
    assert "runs: 1 runs, 0 finished" in capsys.readouterr().out


def test_paths_with_spaces_from_another_folder(place, monkeypatch):
    """The run that the bad ones are made of is good, too."""
    folder = Path(place["tmp"], "two words")
    folder.mkdir()
    (folder / "my rows.csv").write_text(ROWS)
    (folder / "my config.yaml").write_text("learning_rate: 1e-3\n")
    monkeypatch.chdir(folder)
    words = [word.format(**place) for word in GLUE]
    words += ["--train_file=my rows.csv", "--config=my config.yaml", "--output_dir=an output"]
    assert run_command("glue", words) == 0
    record = json.loads((folder / "an output" / "record.json").read_text())
    assert record["arguments"]["learning_rate"] == 1e-3 and record["metrics"]["train_samples"] == 16


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(name, ["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: adasam {name}") and f"\n    adasam {name}" in shown


def test_what_a_bug_report_needs(capsys):
    assert run_command("env", []) == 0
    shown = capsys.readouterr().out
    for name in ("adasam_hf", "torch", "transformers", "accelerate", "datasets", "Python", "platform", "devices"):
        assert f"- {name}: " in shown
    assert not any("/" in value or "\\" in value for value in environment().values())  # no paths


def test_errors_in_words():
    assert sentence(ModuleNotFoundError("no", name="matplotlib.pyplot")).endswith(
        "pip install '.[report]' in a checkout"
    )
    assert sentence(PermissionError(13, "Permission denied", "/x")) == "'/x': Permission denied; give another path"
    assert sentence(ValueError("two\n  lines")) == "two lines" and sentence(ValueError()) == "ValueError"


def test_a_defect_has_its_traceback(monkeypatch):
    def raises(error):
        def command(words):
            raise error

        monkeypatch.setattr(cli, "import_module", lambda *_: SimpleNamespace(main=command))

    for error in (ZeroDivisionError(), ModuleNotFoundError("no", name="adasam_hf.nowhere"), KeyError("x")):
        raises(error)
        with pytest.raises(type(error)):
            run_command("env", [])
    raises(ModuleNotFoundError("no", name="matplotlib"))
    assert run_command("env", []) == 2


def adasam(*words, code="from adasam_hf.cli import main; main()", **options):
    command = [sys.executable, "-X", "importtime", "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    return done, imported, said


@pytest.fixture
def path_to_the_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_help_and_wrong_names_need_neither_torch_nor_transformers(path_to_the_package, tmp_path):
    shown, imported, _ = adasam("--help", cwd=tmp_path)
    assert shown.returncode == 0 and all(f"    {name} " in shown.stdout for name in COMMANDS)
    assert "adasam_hf.cli" in imported and not imported & {"torch", "transformers", "numpy", "yaml"}
    wrong, imported, said = adasam("swep", cwd=tmp_path)
    assert wrong.returncode == 2 and "torch" not in imported
    (line,) = said
    assert line.startswith("adasam: 'swep' is neither a command") and line.endswith("did you mean sweep?")
    for name in COMMANDS.keys() - {"glue"}:  # whose arguments are Transformers'
        shown, imported, _ = adasam(name, "--help", cwd=tmp_path)
        assert shown.returncode == 0 and not imported & {"torch", "transformers"}, name


def test_a_script_named_like_a_command(path_to_the_package, tmp_path):
    """With its suffix or a folder it is the script; the bare name is the command."""
    for name in ("env", "env.py"):
        (tmp_path / name).write_text("import sys; print('the script', sys.argv[1:])\n")
    for word in ("./env", "env.py"):
        done, _, _ = adasam(word, "--sam_rho", "0", cwd=tmp_path)
        assert done.stdout == "the script ['--sam_rho', '0']\n"
    done, _, _ = adasam("env", cwd=tmp_path)
    assert "- torch: " in done.stdout and "the script" not in done.stdout
    done, _, said = adasam("--debug", "env.py", cwd=tmp_path)
    assert done.returncode == 2 and said == ["adasam: --debug is for a command, and comes right before its name"]
    done, _, said = adasam("--debug", "power", "--spread=0", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback (most recent call last):" in said


def test_the_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["adasam", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"adasam {__version__}\n"
