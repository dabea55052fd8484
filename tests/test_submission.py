"""The zip for the leaderboard: names, headers, row counts."""

import os
import zipfile
from pathlib import Path

import pytest
from test_glue_data import snapshot

from adasam_hf.cli import run_command
from adasam_hf.glue.run import main as run_glue
from adasam_hf.glue.submission import ROWS, check, collect, write_submission
from adasam_hf.glue.tasks import TASKS, get_task

GLUE = Path(os.environ.get("ADASAM_GLUE", Path(__file__).parents[2] / "shared" / "glue"))


@pytest.fixture
def folders(tmp_path):
    """Files of the nine tasks, as run_glue.py writes them."""
    for task in TASKS.values():
        folder = tmp_path / "runs" / task.name
        folder.mkdir(parents=True)
        for _, name in task.submissions:
            count = ROWS[name]
            values = [7.0 * i / count for i in range(count)] if task.is_regression else [i % 2 for i in range(count)]
            write_submission(folder / name, task, values)
    return sorted((tmp_path / "runs").iterdir())


def submit(folders, output):
    return run_command("submit", [*map(str, folders), f"--output={output}"])


def test_the_zip(folders, tmp_path, capsys):
    assert submit(folders, tmp_path / "all.zip") == 0
    assert "AX.tsv, which counts nothing, is made up" in capsys.readouterr().out
    # as the hub's copy and the leaderboard count them
    rows = {"CoLA": 1063, "SST-2": 1821, "MRPC": 1725, "STS-B": 1379, "QQP": 390965, "MNLI-m": 9796, "MNLI-mm": 9847}
    rows |= {"QNLI": 5463, "RTE": 3000, "WNLI": 146, "AX": 1104}
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert sorted(archive.namelist()) == sorted(f"{name}.tsv" for name in rows)
        for name in archive.namelist():
            header, *lines = archive.read(name).decode().splitlines()
            assert header == "index\tprediction" and len(lines) == rows[name.removesuffix(".tsv")]
            assert [line.split("\t")[0] for line in lines] == [str(i) for i in range(len(lines))]
        assert archive.read("AX.tsv").decode().splitlines()[-1] == "1103\tentailment"
        assert archive.read("RTE.tsv").decode().splitlines()[1:3] == ["0\tentailment", "1\tnot_entailment"]
        assert archive.read("WNLI.tsv").decode().splitlines()[1:3] == ["0\t0", "1\t1"]
        assert archive.read("STS-B.tsv").decode().splitlines()[-1] == "1378\t5.000"  # cut to the scale
    assert [p.name for p in tmp_path.glob("*.zip*")] == ["all.zip"] and not list(tmp_path.glob(".*"))


def test_diagnostics_of_ones_own(folders, tmp_path, capsys):
    own = tmp_path / "runs" / "mnli" / "AX.tsv"
    write_submission(own, get_task("mnli"), [2] * 1104)
    assert submit(folders, tmp_path / "all.zip") == 0
    assert "made up" not in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert archive.read("AX.tsv") == own.read_bytes() and len(archive.namelist()) == 11
    write_submission(own, get_task("mnli"), [2] * 1103)
    with pytest.raises(ValueError, match=r"AX.tsv: 1103 predictions, the test set has 1104 rows"):
        collect(folders)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rte/RTE.tsv", lambda t: t.replace("index", "id", 1), "first line"),
        ("rte/RTE.tsv", lambda t: "", "first line"),
        ("rte/RTE.tsv", lambda t: t.rsplit("\n", 2)[0] + "\n", "2999 predictions, the test set has 3000"),
        ("rte/RTE.tsv", lambda t: t.replace("1\tnot_entailment", "1\tneutral", 1), "line 3 predicts 'neutral'"),
        ("cola/CoLA.tsv", lambda t: t.replace("0\t0", "0\tunacceptable", 1), r"one of \['0', '1'\]"),
        ("stsb/STS-B.tsv", lambda t: t.replace("\t0.000", "\tnan", 1), "a number from 0 to 5"),
        ("stsb/STS-B.tsv", lambda t: t.replace("\t0.000", "\t", 1), "a number from 0 to 5"),
        ("sst2/SST-2.tsv", lambda t: t.replace("\n5\t", "\n4\t", 1), "line 7 has index '4', not 5"),
    ],
)
def test_files_that_would_be_refused(folders, tmp_path, capsys, name, change, message):
    path = tmp_path / "runs" / name
    path.write_text(change(path.read_text()))
    assert submit(folders, tmp_path / "all.zip") == 2
    with pytest.raises(ValueError, match=message):
        collect(folders)
    assert path.name in capsys.readouterr().err and not (tmp_path / "all.zip").exists()


def test_a_task_that_is_missing_or_comes_twice(folders):
    with pytest.raises(ValueError, match=r"MNLI-m.tsv is missing.*task mnli with --do_predict"):
        collect([folder for folder in folders if folder.name != "mnli"])
    with pytest.raises(ValueError, match="is in 2 folders"):
        collect([*folders, folders[0]])


@pytest.mark.parametrize("name", ["cola", "mrpc", "qnli", "rte", "sst2", "stsb", "wnli"])
@pytest.mark.skipif(not GLUE.is_dir(), reason="no copy of GLUE")
def test_row_counts_of_the_real_test_sets(name):
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(GLUE / name / "test-*.parquet"), split="train")
    ((_, file),) = get_task(name).submissions
    assert len(rows) == ROWS[file]


def test_a_real_run_predicts_a_file_that_passes(flags, tmp_path):
    task = get_task("wnli")
    folder = snapshot(tmp_path / "glue", task, labels=[0, 1], test_labels=[-1] * ROWS["WNLI.tsv"])
    job = [*flags, "--task_name=wnli", f"--dataset_name_or_path={folder}", f"--cache_dir={tmp_path / 'cache'}"]
    run_glue([*job, "--do_train", "--max_steps=1", "--do_predict"])
    path = tmp_path / "out" / "WNLI.tsv"
    check(path, task)
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match="145 predictions"):  # the check can fail
        check(path, task)
