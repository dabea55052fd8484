import json

import pytest
from datasets import DatasetDict
from helpers import snapshot

from adasam_hf.glue.data import load_files, load_task, resolve_path
from adasam_hf.glue.tasks import TASKS, get_task

SIZES = {  # of the hub's nyu-mll/glue, where the local snapshot has the task
    "cola": (8551, 1043, 1063),
    "sst2": (67349, 872, 1821),
    "mrpc": (3668, 408, 1725),
    "stsb": (5749, 1500, 1379),
    "rte": (2490, 277, 3000),
    "wnli": (635, 71, 146),
}


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("name", TASKS)
def test_every_task_loads_from_a_snapshot(tmp_path, name):
    task = get_task(name)
    splits = ["train", *(s for s, _ in task.evaluations), *(s for s, _ in task.submissions)]
    data = load_task(task, snapshot(tmp_path / "glue", task), splits, cache_dir=str(tmp_path / "cache"))
    assert isinstance(data, DatasetDict) and set(data) == set(splits)
    assert len(data["train"]) == 3


@pytest.mark.parametrize("name", SIZES)
def test_the_real_snapshot(glue_snapshot, name):
    data = load_task(get_task(name), glue_snapshot, ["train", "validation", "test"])
    assert tuple(len(data[s]) for s in ("train", "validation", "test")) == SIZES[name]


def test_what_the_real_snapshot_lacks_is_named(glue_snapshot):
    with pytest.raises(ValueError, match=r"(?s)no task 'mnli'.*nyu-mll/glue"):
        load_task(get_task("mnli"), glue_snapshot, ["train"])
    with pytest.raises(ValueError, match="no split 'train'"):
        load_task(get_task("qnli"), glue_snapshot, ["train"])
    assert len(load_task(get_task("qnli"), glue_snapshot, ["validation"])["validation"]) == 5463


def test_missing_folder():
    with pytest.raises(FileNotFoundError, match="nyu-mll/glue"):
        load_task(get_task("cola"), "./nowhere", ["train"])
    with pytest.raises(FileNotFoundError, match="dataset_name_or_path='nowhere' is not a folder, and"):
        load_task(get_task("cola"), "nowhere", ["train"])


def test_bad_snapshots(tmp_path):
    task, cache = get_task("rte"), str(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"row 1 of split 'train' has label -1.*entailment"):
        load_task(task, snapshot(tmp_path / "a", task, labels=(0, -1, 1)), ["train"], cache)
    with pytest.raises(ValueError, match=r"no column \['sentence2'\]"):
        load_task(task, snapshot(tmp_path / "b", task, texts=("sentence1", "other")), ["train"], cache)
    with pytest.raises(ValueError, match="not those of the task"):
        load_task(task, snapshot(tmp_path / "c", task, names=("not_entailment", "entailment")), ["train"], cache)
    stsb = get_task("stsb")
    with pytest.raises(ValueError, match=r"row 2 .* nan.*finite"):
        load_task(stsb, snapshot(tmp_path / "d", stsb, labels=(0, 1, float("nan"))), ["train"], cache)


CSV = "text,label\ngood film,1\nbad film,0\nfine film,1\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", CSV),
        ("a.tsv", CSV.replace(",", "\t")),
        (
            "a.json",
            "\n".join(json.dumps({"text": t, "label": y}) for t, y in [("good film", 1), ("bad film", 0), ("x", 1)]),
        ),
        (
            "a.jsonl",
            "\n".join(json.dumps({"text": t, "label": y}) for t, y in [("good film", 1), ("bad film", 0), ("x", 1)]),
        ),
    ],
)
def test_file_formats(write, name, text):
    task, data = load_files(None, {"train": write(name, text)}, None, "label", ["train"])
    assert (task.texts, task.labels, task.metrics) == (("text",), ("0", "1"), ("accuracy",))
    assert list(data["train"]["label"]) == [1, 0, 1]


def test_label_names_and_pairs(write):
    train = write("train.csv", "premise,hypothesis,gold\na,b,yes\nc,d,no\ne,f,maybe\n")
    dev = write("dev.csv", "premise,hypothesis,gold\na,b,no\n")
    files = {"train": train, "validation": dev}
    with pytest.raises(ValueError, match=r"text_column_names is not set.*name one or two"):
        load_files(None, files, None, "gold", ["train", "validation"])  # one of two may be an id
    task, data = load_files(None, files, ["premise", "hypothesis"], "gold", ["train", "validation"])
    assert (task.texts, task.labels) == (("premise", "hypothesis"), ("maybe", "no", "yes"))
    assert list(data["train"]["label"]) == [2, 1, 0]
    assert list(data["validation"]["label"]) == [1]


def test_words_that_look_like_markup_are_text(write):
    train = write("a.tsv", 'text\tlabel\n"Yes he said\t1\nNA\t0\nnull\t1\n')
    _, data = load_files(None, {"train": train}, None, "label", ["train"])
    assert list(data["train"]["text"]) == ['"Yes he said', "NA", "null"]
    both = write("b.csv", "text,label,stars\na,x,1\nb,y,0\n")
    _, data = load_files(None, {"train": both}, ["text"], "stars", ["train"])
    assert list(data["train"]["label"]) == [1, 0]


def test_fractions_mean_regression(write):
    task, data = load_files(None, {"train": write("a.csv", "text,label\na,0.5\nb,2\n")}, None, "label", ["train"])
    assert task.is_regression and task.metrics == ("pearson", "spearmanr")
    assert list(data["train"]["label"]) == [0.5, 2.0]


def test_files_for_a_glue_task(write):
    files = {"train": write("a.csv", "sentence,label\na,0\nb,1\n")}
    task, _ = load_files(get_task("cola"), files, None, "label", ["train"])
    assert task == get_task("cola")
    files = {"train": write("b.csv", "sentence,label\na,0\nb,2\n")}
    with pytest.raises(ValueError, match=r"row 1 .* label 2.*0 to 1"):
        load_files(get_task("cola"), files, None, "label", ["train"])


@pytest.mark.parametrize(
    ("train", "dev", "texts", "label", "message"),
    [
        (CSV, "text,label\na,5\n", None, "label", r"validation_file=.*row 0 has label 5, which is not.*'0', '1'"),
        ("text,label\na,x\nb,y\n", "text,label\na,z\n", None, "label", r"row 0 has label 'z', which is not.*'x', 'y'"),
        ("text,label\na,0\nb,-1\nc,1\n", CSV, None, "label", "'-1', which mostly stands for a label that is unknown"),
        ("text,label\na,0\nb,NaN\nc,1\n", CSV, None, "label", "'NaN', which mostly stands for"),
        ("text,label\na,0.5\nb,nan\nc,1\n", CSV, None, "label", "'nan', which mostly stands for"),
        ("", CSV, None, "label", r"train_file=.*train\.csv' is empty"),
        (CSV, "text,label\n", None, "label", r"validation_file=.*dev\.csv' has no rows"),
        (CSV, "text,label\na,1\nb,0,2,3\n", None, "label", r"validation_file=.*cannot be read as CSV: .*line 3"),
        (CSV, CSV, ["sentence"], "label", r"no column \['sentence'\], only \['text', 'label'\]"),
        (CSV, CSV, None, "gold", r"no column \['gold'\]"),
        (CSV, "text\na\n", None, "label", r"validation_file=.*no column \['label'\]"),
        ("text,label\na,\nb,\n", CSV, None, "label", "missing"),
        ("text,label\na,1\nb,1\n", CSV, None, "label", "one class"),
        (CSV, "text,label\n,1\n", None, "label", "row 0 of split 'validation' has no text in 'text'"),
        ("text,label\na,1.5\nb,2\n", "text,label\na,good\n", None, "label", "'good', which is not a finite number"),
        ("a,b,c,label\nx,y,z,1\n", CSV, None, "label", "text_column_names is not set"),
    ],
)
def test_bad_files(write, train, dev, texts, label, message):
    files = {"train": write("train.csv", train), "validation": write("dev.csv", dev)}
    with pytest.raises(ValueError, match=message):
        load_files(None, files, texts, label, ["train", "validation"])


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ("[]", "has no rows"), ("{oops", "cannot be read as JSON: JSON parse")]
)
def test_bad_json(write, text, message):
    with pytest.raises(ValueError, match=message):
        load_files(None, {"train": write("a.json", text)}, None, "label", ["train"])


def test_labels_of_test_rows_are_never_read(write):
    files = {"train": write("a.csv", CSV), "test": write("b.csv", "text,label\na,unknown\nb,-1\n")}
    _, data = load_files(None, files, None, "label", ["train", "test"])
    assert data["test"]["label"][:] == [-1, -1]


def test_missing_files(write):
    with pytest.raises(FileNotFoundError, match=r"train_file='nowhere.csv'"):
        load_files(None, {"train": "nowhere.csv"}, None, "label", ["train"])
    with pytest.raises(ValueError, match=r"must end in one of .csv"):
        load_files(None, {"train": write("a.txt", CSV)}, None, "label", ["train"])
    with pytest.raises(ValueError, match="no split 'validation'"):
        load_files(None, {"train": write("a.csv", CSV)}, None, "label", ["train", "validation"])
    with pytest.raises(ValueError, match="train_file is not set"):
        load_files(None, {"test": write("a.csv", CSV)}, None, "label", ["test"])


def test_paths_inside_packages():
    assert resolve_path("somewhere/else") == "somewhere/else"
    assert resolve_path("pip:pytest/__init__.py") == pytest.__file__
    with pytest.raises(FileNotFoundError, match="'no_such_package' is not installed"):
        resolve_path("pip:no_such_package/x")
    with pytest.raises(FileNotFoundError, match="has no 'nowhere'"):
        resolve_path("pip:pytest/nowhere")
