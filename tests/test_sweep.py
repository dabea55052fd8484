"""Sweep files, and the runner that does them."""

import fcntl
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers import ROOT, snapshot
from transformers import BertForSequenceClassification

from adasam_hf.cli import run_command
from adasam_hf.glue.arguments import parse
from adasam_hf.glue.configs import find_config
from adasam_hf.glue.run import main as run_glue
from adasam_hf.glue.sweep import cards, engines, execution, procedure
from adasam_hf.glue.sweep import command as command_line
from adasam_hf.glue.sweep import cost as cost_module
from adasam_hf.glue.sweep.choice import blind_grids, chosen
from adasam_hf.glue.sweep.command import base_of
from adasam_hf.glue.sweep.cost import Budget, OutOfTime, checkpoint_size, cost, estimate, fitting, work
from adasam_hf.glue.sweep.preparation import prepare
from adasam_hf.glue.sweep.records import check
from adasam_hf.glue.sweep.run import comparable, parse_run
from adasam_hf.glue.sweep.specification import Sweep
from adasam_hf.glue.tasks import get_task

SWEEPS = sorted(path.relative_to(ROOT) for path in ROOT.glob("configs/sweeps/**/*.yaml"))
TASKS = sorted(path.stem for path in ROOT.glob("configs/glue/*.yaml"))
METHODS = sorted(path.stem for path in ROOT.glob("configs/optim/*.yaml"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    yield
    for folder in (ROOT / "runs" / "sweeps").glob(f"{tmp_path.name}-*"):  # logs of real runs
        shutil.rmtree(folder)


@pytest.fixture
def glue(tmp_path):
    """A small snapshot of tasks."""

    def glue(*names):
        for name in names:
            task = get_task(name)
            count = max(len(task.labels), 2)
            folder = snapshot(tmp_path / "glue" / names[0], task, labels=[i % count for i in range(24)])
        configs = [
            {"config_name": name, "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split in splits]}
            for name in names
            for splits in [sorted(p.name.partition("-")[0] for p in Path(folder, name).iterdir())]
        ]
        Path(folder, "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
        return folder

    return glue


# ---- the files ----


def one_step(words, tiny, folder, tmp_path):
    """The first step of a run, on a small model and few rows, and nothing else of it changed."""
    trainer = run_glue(
        [
            *words,
            f"--model_name_or_path={tiny}",
            f"--dataset_name_or_path={folder}",
            f"--cache_dir={tmp_path / 'cache'}",
            f"--output_dir={tmp_path / 'out'}",
            "--ignore_mismatched_sizes",
            "--use_cpu",
            "--max_steps=1",
            "--warmup_steps=0",
            "--per_device_train_batch_size=4",
            "--max_eval_samples=4",
            "--save_strategy=no",
            "--eval_strategy=no",
            "--disable_tqdm=true",
        ]
    )
    assert trainer.state.global_step == 1
    return trainer


@pytest.mark.parametrize("name", TASKS)
def test_the_first_step_of_each_task(name, tiny, glue, tmp_path):
    words = [f"--config=configs/glue/{name}.yaml", "--config=configs/optim/adasam.yaml"]
    _, data, args = parse([*words, "--output_dir=out", "--use_cpu"])
    # the recipe, as far as it is the same for all
    assert data.task_name == name and args.adam_epsilon == 1e-6 and args.weight_decay == 0.01
    assert args.max_grad_norm == 0
    assert args.warmup_steps / args.max_steps == pytest.approx(0.06, abs=1e-3)
    trainer = one_step(words, tiny, glue(name), tmp_path)
    (group, *_) = trainer.optimizer.param_groups
    assert (group["rho"], group["betas"], group["eps"]) == (0.01, (0.9, 0.98), 1e-6)


def test_the_recipe_of_the_sister_work():
    """Batch, peak rate, updates and warm-up of WHU-ZQH/FSAM4PLM."""
    table = {
        "cola": (32, 1e-5, 2668, 160),
        "sst2": (64, 1e-5, 10467, 628),
        "mrpc": (32, 1e-5, 1148, 68),
        "stsb": (32, 2e-5, 1799, 107),
        "rte": (32, 2e-5, 1018, 61),
    }
    for name, expected in table.items():
        _, _, args = parse([f"--config=configs/glue/{name}.yaml", "--output_dir=out", "--use_cpu"])
        found = args.per_device_train_batch_size, args.learning_rate, args.max_steps, args.warmup_steps
        assert found == expected, name
        assert args.lr_scheduler_type == "polynomial" and args.lr_scheduler_kwargs == {"lr_end": 0.0, "power": 1.0}


@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_of_each_optimizer(method, tiny, glue, tmp_path):
    words = ["--config=configs/small.yaml", f"--config=configs/optim/{method}.yaml", "--task_name=rte"]
    words += ["--selection_samples=4"] if method == "amsgrad_stop" else []  # of 24
    trainer = one_step(words, tiny, glue("rte"), tmp_path)
    names = {"adamw": "adamw_torch_fused", "sam": "sam", "sgdm": "sgdm"}
    assert trainer.args.optim == ("amsgrad" if method.startswith("amsgrad") else names.get(method, "adasam"))
    radii = {"sam": 0.01, "adasam": 0.01, "fast": 0.1, "free": 0.4}
    radius = radii.get(method, 0.05 if trainer.args.optim == "adasam" else 0.0)
    assert trainer.args.resolved_rho == radius
    climbed = [entry for entry in trainer.state.log_history if "sam_loss" in entry]
    assert bool(climbed) == (radius > 0 and method not in ("free", "noise"))


@pytest.mark.parametrize("path", SWEEPS, ids=str)
def test_each_sweep(path, tiny, glue, tmp_path, monkeypatch):
    sweep = Sweep(path, tmp_path / "results")
    trials = sweep.trials()
    finals = sweep.finals(lambda task, method: {})
    assert len({run.record for run in [*trials, *finals]}) == len(trials) + len(finals)
    assert len(finals) == math.prod(len(values) for values in sweep.axes.values())
    check([*trials, *finals])  # parses each
    for run in trials:
        assert any(word.startswith("--held_out_samples=") for word in run.words)
    for run in finals:  # never chosen or trained on what is reported, never reported on what was chosen on
        assert not any(word.startswith("--held_out_samples=") for word in run.words)
    words = [word for word in (trials or finals)[0].words if "held_out" not in word and "init_from" not in word]
    one_step(words, tiny, glue((trials or finals)[0].axes["task_name"]), tmp_path)
    if "sam_rho" in sweep.axes:  # an axis wins over what was chosen
        found = {run.axes["sam_rho"]: run.arguments["sam_rho"] for run in sweep.finals(lambda *key: {"sam_rho": 7})}
        assert found == {radius: radius for radius in sweep.axes["sam_rho"]}
    if sweep.choose == "table1":  # its trials are there to be taken
        other = Sweep(path.with_name("table1.yaml"))
        assert set(sweep.axes["task_name"]) <= set(other.axes["task_name"])
        assert set(sweep.axes["method"]) <= set(other.axes["method"])


def test_large_and_small_sweeps_belong_together():
    large = {path.name for path in SWEEPS if path.parent.name == "sweeps"}
    small = {path.name for path in SWEEPS if path.parent.name == "small"}
    assert large == {f"{name}.yaml" for name in ("table1", "table2", "batch_size", "radius", "mnli")} and large < small
    for name in large:
        sweep = Sweep(Path("configs/sweeps") / name)
        for run in sweep.finals(lambda task, method: {}):
            starts = any(word == "--init_from=runs/sweeps/roberta-large/mnli/mnli-adamw-1" for word in run.words)
            assert starts == (run.axes["task_name"] in ("rte", "mrpc", "stsb"))
    (source,) = Sweep(Path("configs/sweeps/mnli.yaml")).finals(lambda task, method: {})
    assert str(source.folder) == "runs/sweeps/roberta-large/mnli/mnli-adamw-1" and source.keep_model


# ---- from a file to runs ----


def write_sweep(tmp_path, **changes):
    content = {
        "output_dir": str(tmp_path / tmp_path.name),
        "configs": ["configs/optim/{method}.yaml"],
        "arguments": {"do_train": True, "do_eval": True, "model_name_or_path": "nowhere", "learning_rate": 1e-4},
        "axes": {"task_name": ["rte", "mrpc"], "method": ["amsgrad", "adasam"], "seed": [1, 2]},
        "choose": {"arguments": {"held_out_samples": 8, "seed": 0}, "grid": GRID},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (content | changes).items() if v is not None}, sort_keys=False))
    return path


HELD_OUT = {"held_out_samples": 8}
GRID = {
    "amsgrad": {"learning_rate": ["1e-3", "1e-4"]},
    "adasam": {"learning_rate": ["1e-3"], "sam_rho": [0.01, 0.05]},
}


def choice(arguments=HELD_OUT, seeds=None, **grid):
    """The key `choose` of a sweep file."""
    return {"choose": {"arguments": arguments, "grid": GRID | grid} | ({"seeds": seeds} if seeds else {})}


def test_broken_yaml_is_named(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("axes: {task_name: [rte\n")
    with pytest.raises(ValueError, match=r"sweep\.yaml cannot be read as YAML: [^\n]+$"):
        Sweep(path)
    with pytest.raises(ValueError, match=r"metod\}.yaml' has a name that is not an axis; known are .*\{method\}"):
        Sweep(write_sweep(tmp_path, configs=["configs/{metod}.yaml", "{method}"])).trials()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": {}}, r"unknown keys \['axis'\]"),
        ({"axes": {"task_name": ["rte"], "seed": [1]}}, r"axes has no \['method'\]"),
        (
            {"axes": {"task_name": ["rte"], "method": ["adasam"], "seed": [1], "learning_rat": [1]}, "choose": None},
            r"axes \['learning_rat'\] are no arguments",
        ),
        ({"when": [{"task": ["rte"], "arguments": {}}]}, r"a case of when has \['task'\]"),
        ({"choose": {"grid": {}}}, "it takes arguments and grid"),
        ({"configs": None}, "must be a mapping with output_dir, configs and axes"),
        ({"choose": {"arguments": HELD_OUT, "grid": {"adasam": {"sam_rho": [0.1]}}}}, r"no \['amsgrad'\]"),
        (
            {
                "choose": {
                    "arguments": HELD_OUT,
                    "grid": {"adasam": {"sam_rho": [1]}, "amsgrad": {"weight_decay": [0, 1]}},
                }
            },
            r"unfair.*'amsgrad': 2, 'adasam': 1",
        ),
        ({"choose": {"arguments": HELD_OUT, "grid": {"adasam": {"sam_rho": 0.1}}}}, r"\['sam_rho'\] without a list"),
        (
            {"choose": {"arguments": HELD_OUT, "grid": {"adasam": {"seed": [1, 2]}}}},
            r"\['seed'\] are axes and in choose",
        ),
        ({"choose": {"arguments": {"seed": 0}, "grid": {}}}, "no held_out_samples"),
        ({"axes": {"task_name": ["rte"], "method": ["adasam"], "seed": 1}, "choose": None}, "axis seed is 1"),
        ({"axes": {"task_name": [], "method": ["adasam"], "seed": [1]}, "choose": None}, r"axis task_name is \[\]"),
        ({"axes": {"task_name": ["rte"], "method": ["adasam"], "seed": [1, 1]}, "choose": None}, "different values"),
        ({"axes": {"task_name": ["rte"], "method": ["adasam"], "seed": None}, "choose": None}, "axis seed is None"),
        ({"axes": ["rte"]}, "axes is .*takes a mapping"),
        ({"configs": "configs/small.yaml"}, "configs is .*takes a list"),
        ({"axes": {"task_name": ["mine"], "method": ["adasam"], "seed": [1]}, "choose": None}, "under tasks"),
        ({"tasks": {"rte": {}}}, r"tasks has \['rte'\], which are GLUE's"),
        ({"arguments": {"learning_rate": [1e-4, 2e-4]}}, r"learning_rate is \[0.0001, 0.0002\]; it takes one value"),
        (choice(amsgrad={"learning_rate": [0.01, 0.01]}), r"amsgrad.learning_rate is .*different values"),
        (choice(adasam={"learning_rate": ["1e-3"], "sam_rho": [0.01, "1e-2"]}), "adasam.sam_rho is .*different values"),
        (choice(seeds=[7, 7]), "choose.seeds is .*different values"),
        (choice(seeds=[1, 7, 8]), r"seeds \[1\] are of trials and of runs"),
        (choice(seeds=[7], arguments={"held_out_samples": 8, "seed": 0}), "seeds and arguments.seed"),
    ],
)
def test_bad_files(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Sweep(write_sweep(tmp_path, **changes))


def test_bad_arguments_are_found_before_anything_runs(tmp_path):
    sweep = Sweep(write_sweep(tmp_path, arguments={"do_train": True, "model_name_or_path": "x", "sam_row": 1}))
    with pytest.raises(ValueError, match="sam_row"):
        check(sweep.trials())
    sweep = Sweep(write_sweep(tmp_path, configs=["configs/optim/{method}/nothing.yaml"]))
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml"):
        check(sweep.trials())


def test_more_arguments_for_some_and_the_scaled_rate(tmp_path):
    axes = {"task_name": ["rte", "mrpc"], "method": ["adasam"], "per_device_train_batch_size": [8, 32], "seed": [1]}
    when = [{"task_name": ["mrpc"], "per_device_train_batch_size": [8], "arguments": {"weight_decay": 0.5}}]
    path = write_sweep(tmp_path, axes=axes, when=when, choose=None, scale_learning_rate_from=32)
    found = {}
    for run in Sweep(path).finals(lambda task, method: {"learning_rate": "1e-3"}):
        _, _, args = parse_run(run.words)
        found[run.name] = (args.learning_rate, args.weight_decay)
    arguments = {"do_train": True, "model_name_or_path": "x", "gradient_accumulation_steps": 4}
    path = write_sweep(tmp_path, axes=axes, choose=None, scale_learning_rate_from=32, arguments=arguments)
    runs = Sweep(path).finals(lambda task, method: {"learning_rate": "1e-3"})
    rates = [parse_run(run.words)[2].learning_rate for run in runs]
    assert rates == [pytest.approx(v) for v in (1e-3, 2e-3) * 2]  # √(4 · 8 / 32) and √(4 · 32 / 32)
    assert found == {
        "rte-adasam-8-1": (pytest.approx(5e-4), 0.0),
        "rte-adasam-32-1": (pytest.approx(1e-3), 0.0),
        "mrpc-adasam-8-1": (pytest.approx(5e-4), 0.5),
        "mrpc-adasam-32-1": (pytest.approx(1e-3), 0.0),
    }


def put(run, score, loss=0.5, **more):
    """A finished record, as far as it is looked at."""
    run.record.parent.mkdir(parents=True, exist_ok=True)
    names = {"rte": ["eval_accuracy"], "mrpc": ["eval_combined_score"]}[run.axes["task_name"]]
    content = {
        "arguments": run.arguments,
        "axes": run.axes,
        "metrics": {**dict.fromkeys(names, score), "eval_loss": loss},
    }
    run.record.write_text(json.dumps(content | {"seconds_per_row": 0.5} | more))


def test_the_best_trial_is_chosen(tmp_path):
    sweep = Sweep(write_sweep(tmp_path))
    trials = sweep.trials()
    scores = {"rte-amsgrad": [0.5, 0.6], "rte-adasam": [float("nan"), 0.1], "mrpc-amsgrad": [0.8, 0.7]}
    for key, (first, second) in scores.items():
        mine = [run for run in trials if run.name.startswith(key)]
        assert len(mine) == 2
        put(mine[0], first)
        put(mine[1], second)
    assert chosen(sweep, "rte", "amsgrad") == {"learning_rate": "1e-4"}
    assert {run.axes["seed"] for run in trials} == {0}
    assert chosen(sweep, "rte", "adasam") == {"learning_rate": "1e-3", "sam_rho": 0.05}
    assert chosen(sweep, "mrpc", "amsgrad") == {"learning_rate": "1e-3"}
    with pytest.raises(ValueError, match="0 of 2 trials of adasam on mrpc"):
        chosen(sweep, "mrpc", "adasam")
    for run in trials:
        if run.name.startswith("mrpc-adasam"):
            put(run, float("nan"))
    with pytest.raises(ValueError, match="all trials of adasam on mrpc have diverged"):
        chosen(sweep, "mrpc", "adasam")
    (one, other) = [run for run in trials if run.name.startswith("rte-amsgrad")]
    put(one, 0.6, loss=0.7)
    put(other, 0.6, loss=0.6)
    assert chosen(sweep, "rte", "amsgrad") == {"learning_rate": "1e-4"}  # of equal scores the lower loss
    put(one, 0.6, loss=0.5)
    assert chosen(sweep, "rte", "amsgrad") == {"learning_rate": "1e-3"}
    put(one, 0.9, loss=math.nan)  # a model of NaN has a score, too: that of the first class
    assert chosen(sweep, "rte", "amsgrad") == {"learning_rate": "1e-4"}
    put(one, 0.5)
    other = Sweep(write_sweep(tmp_path, choose="sweep", axes=sweep.axes).rename(tmp_path / "other.yaml"))
    write_sweep(tmp_path)
    assert chosen(other, "mrpc", "amsgrad") == {"learning_rate": "1e-3"}  # another sweep's trials
    run = next(r for r in sweep.finals(lambda *key: {"learning_rate": "1e-3", "sam_rho": 0.05}) if "adasam" in r.name)
    _, data, args = parse_run(run.words)
    assert (args.sam_rho, args.learning_rate, args.seed, data.held_out_samples) == (0.05, 1e-3, 1, None)


def test_the_mean_over_trial_seeds_chooses(tmp_path):
    grid = {"amsgrad": {"learning_rate": [1e-4, 2e-4, 4e-4]}, "adasam": {"sam_rho": [0.0, 0.02, 0.05]}}
    sweep = Sweep(write_sweep(tmp_path, **choice(seeds=[7, 8, 9], **grid)))
    trials = sweep.trials()
    assert len(trials) == len({run.record for run in trials}) == 3 * 2 * 2 * 3
    assert [run.axes["seed"] for run in trials] == [7] * 12 + [8] * 12 + [9] * 12  # whole grids, one by one
    mine = [run for run in trials if (run.axes["task_name"], run.axes["method"]) == ("rte", "amsgrad")]
    assert [run.arguments["seed"] for run in mine] == [7, 7, 7, 8, 8, 8, 9, 9, 9]
    for run, value in zip(mine, [0.9, 0.7, 0.5, 0.5, 0.7, 0.8, 0.5, 0.75, 0.5], strict=True):
        put(run, value)
    assert chosen(sweep, "rte", "amsgrad") == {"learning_rate": 2e-4}  # which is the best of no seed but the last
    put(mine[1], 0.0)
    assert chosen(sweep, "rte", "amsgrad") == {"learning_rate": 1e-4}
    put(mine[3], 0.9, loss=math.nan)  # diverged with one seed
    assert chosen(sweep, "rte", "amsgrad") == {"learning_rate": 4e-4}
    mine[8].record.unlink()
    with pytest.raises(ValueError, match="8 of 9 trials of amsgrad on rte"):
        chosen(sweep, "rte", "amsgrad")
    (first, *_) = [run for run in trials if run.axes["method"] == "adasam"]
    _, _, args = parse_run(first.words)
    assert args.optim == "adasam" and args.resolved_rho == 0  # the baseline is in AdaSAM's own grid


def test_a_choice_at_an_edge_stops_before_the_seeds(tmp_path, monkeypatch, capsys):
    grid = {"amsgrad": {"learning_rate": [1e-4, 2e-4, 4e-4]}, "adasam": {"sam_rho": [0.0, 0.02, 0.05]}}
    axes = {"task_name": ["rte"], "method": ["amsgrad", "adasam"], "seed": [1]}
    path = write_sweep(tmp_path, axes=axes, **choice(seeds=[7], **grid))
    trials = Sweep(path).trials()
    started = []
    monkeypatch.setattr(procedure, "prepare", lambda *_: None)
    monkeypatch.setattr(engines, "execute", lambda run, *_: started.append(run.name))

    def outcome(scores, *words):
        started.clear()
        for run, value in zip(trials, scores, strict=True):
            put(run, value)
        return run_command("sweep", [str(path), *words]), sorted(started), capsys.readouterr().err

    inside, edge, zero = [0.6, 0.7, 0.5, 0.6, 0.7, 0.5], [0.6, 0.7, 0.8, 0.6, 0.7, 0.5], [0.6, 0.7, 0.5, 0.8, 0.7, 0.5]
    finals = ["rte-adasam-1", "rte-amsgrad-1"]
    assert outcome(inside)[:2] == (0, finals)
    code, runs, said = outcome(edge)
    assert (code, runs) == (1, []) and "chose learning_rate=0.0004, the highest of its grid" in said
    assert "widen choose.grid.amsgrad.learning_rate, or pass --accept_edge" in said
    assert outcome(edge, "--accept_edge")[:2] == (0, finals)
    assert outcome(zero)[:2] == (0, finals)  # nothing is below a radius of 0


def test_a_grid_without_an_inside_is_found_before_the_trials(tmp_path, monkeypatch, capsys):
    path = write_sweep(tmp_path)
    monkeypatch.setattr(procedure, "prepare", lambda *_: pytest.fail("too late"))
    assert run_command("sweep", [str(path)]) == 2
    assert "so that any choice is at an edge" in capsys.readouterr().err
    grid = {"amsgrad": {"learning_rate": [1, 2, 3]}, "adasam": {"learning_rate": [1e-4], "sam_rho": [0.0, 0.1, 0.2]}}
    assert not blind_grids(Sweep(write_sweep(tmp_path, **choice(**grid))))


def test_a_part_of_the_tasks_and_methods(tmp_path):
    path = write_sweep(tmp_path)
    whole, part = Sweep(path), Sweep(path, tasks=["mrpc"], methods=["adasam"])
    names = {run.name for run in [*whole.trials(), *whole.finals(lambda *key: {})]}
    found = [run.name for run in [*part.trials(), *part.finals(lambda *key: {})]]
    assert len(found) == 2 + 2 and set(found) <= names and all(n.startswith("mrpc-adasam") for n in found)
    with pytest.raises(ValueError, match=r"has no method \['sam'\]; it has \['amsgrad', 'adasam'\]"):
        Sweep(path, methods=["sam"])


def test_a_task_of_own_files(tmp_path, files):
    train, validation, _ = (word.partition("=")[2] for word in files)
    own = {"mine": {"train_file": train, "validation_file": validation, "max_train_samples": 10}}
    axes = {"task_name": ["mine", "rte"], "method": ["amsgrad", "adasam"], "seed": [1]}
    sweep = Sweep(write_sweep(tmp_path, tasks=own, axes=axes))
    run, *_ = sweep.trials()
    assert run.arguments["task_name"] is None and run.arguments["train_file"] == train
    assert work(run) == 30  # rows
    prepare([run], [], [tmp_path])
    for trial, value in zip(sweep.trials()[:2], (0.6, 0.7), strict=True):
        trial.record.parent.mkdir(parents=True, exist_ok=True)
        metrics = {"eval_accuracy": value, "eval_loss": 0.5}
        content = {"arguments": trial.arguments, "axes": trial.axes, "metrics": metrics, "seconds_per_row": 0.5}
        trial.record.write_text(json.dumps(content))
    assert chosen(sweep, "mine", "amsgrad") == {"learning_rate": "1e-4"}
    Path(train).unlink()
    with pytest.raises(FileNotFoundError, match=r"train_file=.*does not exist"):
        prepare([run], [], [tmp_path])


def test_arguments_that_say_how_a_run_is_done_refuse_no_record(tmp_path):
    how = {"report_to": "none", "save_steps": 7, "per_device_eval_batch_size": 3, "save_strategy": "no"}
    path = write_sweep(tmp_path)
    for run in Sweep(path).trials():
        put(run, 0.5)
    arguments = yaml.safe_load(path.read_text())["arguments"]
    check(Sweep(write_sweep(tmp_path, arguments=arguments | how)).trials())
    with pytest.raises(ValueError, match="other arguments"):
        check(Sweep(write_sweep(tmp_path, arguments=arguments | {"warmup_steps": 9})).trials())
    found = [comparable({"load_best_model_at_end": best, "save_steps": 7}) for best in (False, True)]
    assert ["save_steps" in arguments for arguments in found] == [False, True]  # the best one is one of those saved
    (run, *_) = Sweep(write_sweep(tmp_path)).trials()
    older = {k: v for k, v in run.arguments.items() if k not in ("label_noise", "sam_interval")}  # had no such thing
    put(run, 0.5, arguments=older | {"adam_defaults": {"adam_beta2": 0.98}})  # who set a number, not the number
    assert check([run]) == []
    put(run, 0.5, arguments=run.arguments | {"sam_interval": 2})
    with pytest.raises(ValueError, match="other arguments"):
        check([run])


def test_lists_and_nothing_as_arguments(tmp_path):
    words = {"label_names": ["labels", "weights"], "subset_seed": "{seed}", "max_eval_samples": None}
    arguments = {"do_eval": True, "model_name_or_path": "m"} | words
    for run in Sweep(write_sweep(tmp_path, choose=None, arguments=arguments)).finals(lambda *key: {}):
        _, data, args = parse_run(run.words)
        assert args.label_names == ["labels", "weights"] and data.max_eval_samples is None
        assert data.subset_seed == run.axes["seed"]


def test_a_record_of_other_arguments_is_not_taken(tmp_path):
    config = tmp_path / "all.yaml"
    config.write_text("num_train_epochs: 3\n")
    path = write_sweep(tmp_path, configs=[str(config), "configs/optim/{method}.yaml"])
    for run in Sweep(path).trials():
        put(run, 0.5)
    check(Sweep(path).trials())
    chosen(Sweep(path), "rte", "adasam")
    config.write_text("num_train_epochs: 5\n")  # the words are the same
    with pytest.raises(ValueError, match=r"other arguments.*'num_train_epochs': 3.*move it away"):
        check(Sweep(path).trials())
    with pytest.raises(ValueError, match="other arguments"):
        chosen(Sweep(path), "rte", "adasam")


def test_a_record_of_another_device_is_taken(tmp_path):
    """Also when it was made with a GPU and is read without one, or the other way round."""
    sweep = Sweep(write_sweep(tmp_path))
    for run in sweep.trials():
        arguments = run.arguments
        assert "dataloader_pin_memory" not in arguments and "use_cpu" not in arguments
        put(run, 0.5, arguments=arguments | {"use_cpu": False, "dataloader_pin_memory": True})
    assert check(sweep.trials()) == []


def test_a_file_that_is_no_record_is_named(tmp_path):
    run, *others = Sweep(write_sweep(tmp_path)).trials()
    put(others[0], 0.5)
    whole = json.loads(others[0].record.read_text())
    without_loss = json.dumps(whole | {"metrics": {"eval_accuracy": 0.5}})
    for text in ("", "[]", '{"arguments": {}}', without_loss, json.dumps(whole | {"axes": {}})):
        run.record.write_text(text)
        for use in (lambda: check([run]), lambda: estimate(others)):
            with pytest.raises(ValueError, match=f"{re.escape(run.record.name)} is not a record of a run"):
                use()


def test_a_dry_run_calls_no_broken_record_finished(tmp_path, monkeypatch, capsys):
    path = write_sweep(tmp_path)
    final, *_ = Sweep(path).finals(lambda *key: {"learning_rate": "1e-3"})
    final.record.parent.mkdir(parents=True)
    for text in ("", '{"arguments": {}'):
        final.record.write_text(text)
        assert run_command("sweep", [str(path), "--dry_run"]) == 2
        assert f"{final.record.name} is not a record of a run" in capsys.readouterr().err


def test_what_would_make_every_run_fail_is_found_before_the_first(tmp_path, tiny, glue, monkeypatch, capsys):
    arguments = {"do_train": True, "model_name_or_path": tiny, "cache_dir": str(tmp_path / "c")}
    path = write_sweep(tmp_path, arguments=arguments)
    monkeypatch.setattr(engines, "execute", lambda *_: pytest.fail("a run was started"))

    def error(path, folder):
        assert run_command("sweep", [str(path), f"--dataset_name_or_path={folder}", "--accept_edge"]) == 2
        return capsys.readouterr().err

    with monkeypatch.context() as patch:  # a folder that is not there needs no look at the runs
        patch.setattr(procedure, "run_sweep", lambda *_: pytest.fail("too late"))
        assert "dataset_name_or_path='./nowhere' is not a folder" in error(path, "./nowhere")
    assert "has no task 'mrpc', only ['rte']" in error(path, glue("rte"))
    place = tmp_path / tmp_path.name / "records"
    shutil.rmtree(place)
    place.write_text("in the way")
    assert str(place) in error(path, glue("rte"))
    place.unlink()
    missing = write_sweep(tmp_path, arguments=arguments | {"model_name_or_path": "./nowhere"})
    assert "model_name_or_path='./nowhere' is not a folder" in error(missing, glue("rte"))


def test_a_model_to_start_from_that_is_gone_is_made_again(tmp_path):
    path = write_sweep(tmp_path, choose=None, keep_models=True)
    run, *_ = Sweep(path).finals(lambda *key: {})
    put(run, 0.5)
    assert run.keep_model and not run.finished
    run.folder.mkdir(parents=True)
    (run.folder / "record.json").write_text("{}")
    assert run.finished


def fake_run(tmp_path, monkeypatch, exits, logs=None, seconds=0.0):
    """`execute` with processes that end as told; 0 leaves a record."""
    path = write_sweep(tmp_path, choose=None)
    run, *_ = Sweep(path).finals(lambda *key: {})
    left, commands, logs = list(exits), [], list(logs or ["" for _ in exits])

    def process(words, stdout, **kwargs):
        commands.append(words)
        stdout.write(logs.pop(0) + "\n")
        stdout.flush()
        time.sleep(seconds)
        code = left.pop(0)
        if code == 0:
            content = {
                "metrics": {"train_runtime": 5.0, "eval_loss": 0.5},
                "arguments": run.arguments,
                "axes": run.axes,
            }
            (run.folder / "record.json").write_text(json.dumps(content))
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(execution.subprocess, "run", process)
    monkeypatch.setattr(execution, "work", lambda run: 10)
    return run, commands


def test_a_run_that_fails_once(tmp_path, monkeypatch, capsys):
    run, commands = fake_run(tmp_path, monkeypatch, [1, 0])
    found = execution.execute(run, [])
    assert found["attempts"] == 2 and found["resumed"] is False and found["seconds_per_row"] == 0.5
    assert len(commands) == 2 and f"{run.name} failed, see" in capsys.readouterr().err


def test_whether_a_run_failed_twice_for_one_reason(tmp_path, monkeypatch):
    run, _ = fake_run(tmp_path, monkeypatch, [1, 1], logs=["Traceback\nValueError: no rows", "ValueError: no rows"])
    with pytest.raises(execution.RunFailed, match="failed twice") as caught:
        execution.execute(run, [])
    assert caught.value.same and pickle.loads(pickle.dumps(caught.value)).same  # Ray sends it
    run, _ = fake_run(tmp_path, monkeypatch, [1, 1], logs=["MemoryError", "ValueError: no rows"])
    with pytest.raises(execution.RunFailed) as caught:
        execution.execute(run, [])
    assert not caught.value.same


@pytest.mark.parametrize("same", [True, False])
def test_a_trial_that_fails_for_good_stops_the_others(tmp_path, monkeypatch, same):
    runs = Sweep(write_sweep(tmp_path)).trials()
    order = []

    def fail(run, *_):
        order.append(run.name)
        time.sleep(0.05)
        raise execution.RunFailed("failed twice", same)

    monkeypatch.setattr(engines, "execute", fail)
    for needed in (True, False):  # seeds do not need each other
        order.clear()
        engine = engines.Processes(1)
        failures = engines.do(runs, engine, [], needed=needed)
        engine.close()
        engine.pool.shutdown(wait=True)
        stopped = needed and same
        assert len(failures) == (1 if stopped else len(runs))
        assert len(order) <= 2 if stopped else len(order) == len(runs)


def test_two_sweeps_in_one_folder_do_a_run_once(tmp_path, monkeypatch):
    run, commands = fake_run(tmp_path, monkeypatch, [0], seconds=0.3)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: execution.execute(run, []), range(2))
    assert one == other == json.loads(run.record.read_text()) and len(commands) == 1
    assert not (run.folder / "record.json").exists()
    run.record.write_text(json.dumps(one | {"arguments": run.arguments | {"weight_decay": 7.0}}))
    with pytest.raises(ValueError, match="other arguments"):
        execution.execute(run, [])


def test_being_interrupted_or_killed_is_no_failure(tmp_path, monkeypatch):
    run, commands = fake_run(tmp_path, monkeypatch, [-signal.SIGINT, 0])
    with pytest.raises(RuntimeError, match="interrupted"):
        execution.execute(run, [])
    monkeypatch.setattr(execution, "last_complete", lambda folder: "checkpoint-3")  # it had got that far
    found = execution.execute(run, [])
    assert json.loads(run.record.read_text()) == found and not (run.folder / "record.json").exists()
    assert found["attempts"] == 1 and found["resumed"] is True and found["seconds_per_row"] is None
    assert "--resume_from_checkpoint=last" in commands[1] and "--resume_from_checkpoint=last" not in commands[0]


def test_where_runs_lie(tmp_path):
    """By output_dir, so that another one has runs, and models to start from, of its own."""
    path = Path("configs/sweeps/table1.yaml")
    ours = Sweep(path).runs()
    assert str(ours) == "runs/sweeps/roberta-large"
    others = {Sweep(path, tmp_path / name / "roberta-large").runs() for name in ("a", "b")}
    assert len(others | {ours}) == 3
    sweep = Sweep(path, tmp_path / "a")
    assert f"--init_from={sweep.runs()}/mnli/mnli-adamw-1" in sweep.trials()[-1 - 3 * 4 * 3].words


def test_where_the_paths_of_a_file_begin(tmp_path, monkeypatch):
    """At the folder that has its configs/, or else at the working directory; never inside an installed package."""
    monkeypatch.chdir(tmp_path)
    assert base_of(ROOT / "configs" / "sweeps" / "small" / "table1.yaml") == ROOT
    assert base_of(tmp_path / "elsewhere" / "mine.yaml") == tmp_path
    assert base_of(tmp_path / "project" / "configs" / "mine.yaml") == tmp_path / "project"
    package = tmp_path / "site-packages" / "adasam_hf"
    monkeypatch.setattr(command_line, "PACKAGE", package)
    assert base_of(package / "configs" / "sweeps" / "table1.yaml") == tmp_path


def test_configs_that_come_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "configs/optim/adasam.yaml"
    assert find_config(name) == ROOT / name
    (tmp_path / "configs" / "optim").mkdir(parents=True)
    (tmp_path / name).write_text("optim: adasam\n")
    assert find_config(name) == Path(name)  # one's own first
    with pytest.raises(FileNotFoundError, match=r"config='configs/optim/adasan.yaml' does not exist"):
        find_config("configs/optim/adasan.yaml")


def test_a_scratch_folder(tmp_path):
    path = Path("configs/sweeps/table1.yaml")
    sweep = Sweep(path, scratch=tmp_path / "scratch")
    run = sweep.trials()[0]
    assert run.folder.is_relative_to(tmp_path / "scratch") and run.record.is_relative_to("results/roberta-large")
    assert any(
        w == f"--init_from={tmp_path}/scratch/roberta-large/mnli/mnli-adamw-1" for r in sweep.trials() for w in r.words
    )
    here, there = (
        [r.arguments for r in Sweep(path, scratch=Path(folder)).trials()] for folder in ("a", tmp_path / "b")
    )
    assert here == there  # records do not depend on it


def test_what_it_costs(tmp_path, tiny):
    arguments = {"do_train": True, "model_name_or_path": tiny, "max_train_samples": 100, "save_strategy": "epoch"}
    path = write_sweep(tmp_path, arguments=arguments, choose=None)
    run, *_ = Sweep(path).finals(lambda *key: {})
    weights = sum(p.numel() for p in BertForSequenceClassification.from_pretrained(tiny).parameters())
    assert checkpoint_size(run) == 4 * weights * 4  # in float32: w, m, v and v̂
    assert cost([run]) == f"0.00 M rows, ? h, {16 * weights / 1e9:.1f} GB a checkpoint"
    write_sweep(tmp_path, arguments=arguments | {"save_strategy": "no"}, choose=None)
    assert checkpoint_size(Sweep(path).finals(lambda *key: {})[0]) == 0
    write_sweep(tmp_path, arguments=arguments | {"model_name_or_path": "nowhere"}, choose=None)
    assert checkpoint_size(Sweep(path).finals(lambda *key: {})[0]) is None


def test_the_time_that_is_left(tmp_path):
    arguments = {"do_train": True, "model_name_or_path": "x", "max_train_samples": 100, "num_train_epochs": 2}
    sweep = Sweep(write_sweep(tmp_path, arguments=arguments))
    trials = sweep.trials()
    assert set(estimate(trials).values()) == {None}
    rows = {run.name.split("-")[1]: work(run) for run in trials}
    assert rows == {"amsgrad": 200, "adasam": 400}  # twice where the weights are perturbed
    put(trials[0], 0.5, seconds_per_row=0.5)
    put(trials[1], 0.5, seconds_per_row=0.7)
    seconds = estimate(trials)
    assert [seconds[run] for run in trials if "adasam" in run.name] == [pytest.approx(20 + 400 * 0.6)] * 4
    assert [seconds[run] for run in trials if "mrpc-amsgrad" in run.name] == [pytest.approx(20 + 200 * 0.6)] * 2


def test_dry_run_says_what_would_run(tmp_path, capsys, monkeypatch):
    path = write_sweep(tmp_path)
    put(Sweep(path).trials()[0], 0.5)
    assert run_command("sweep", [str(path), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "trials: 8 runs, 1 finished; time left: about" in said and "runs: 8 runs, 0 finished" in said
    assert "rte   amsgrad  1/2" in said and "hours with 1 at once" in said
    assert said.count("(a trial's; to be chosen)") == 4
    assert "2/2" not in said and "M rows" in said and "? GB a checkpoint" in said  # of a model that is nowhere
    for run, score in zip(Sweep(path).trials()[:2], (0.5, 0.6), strict=True):
        put(run, score)
    assert run_command("sweep", [str(path), "--dry_run", "--engine=ray"]) == 0
    said = capsys.readouterr().out
    assert said.count("(a trial's; to be chosen)") == 3 and "over the runs that the cluster does at once" in said
    (final,) = [line for line in said[said.index("runs: 8 runs") :].splitlines() if line.startswith("  rte   amsgrad")]
    assert final.endswith("--learning_rate=1e-4 --task_name=rte --seed=1")  # what the trials chose
    assert not (tmp_path / tmp_path.name / "records" / "sweep" / "rte-amsgrad-1.json").exists()
    assert run_command("sweep", [str(tmp_path / "nothing.yaml")]) == 2
    assert "does not exist" in capsys.readouterr().err


# ---- real runs ----

SECONDS = 800  # a machine that others share may stand still for minutes


def real_sweep(tmp_path, tiny, **changes):
    arguments = {
        "model_name_or_path": tiny,
        "cache_dir": str(tmp_path / "cache"),
        "do_train": True,
        "do_eval": True,
        "max_steps": 3,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
    }
    return write_sweep(
        tmp_path,
        arguments=arguments | changes.pop("arguments", {}),
        axes={"task_name": ["rte"], "method": ["amsgrad", "adasam"], "seed": [1, 2]} | changes.pop("axes", {}),
        **changes,
    )


def command(path, folder, *words):
    return [
        sys.executable,
        str(ROOT / "scripts" / "sweep_glue.py"),
        str(path),
        f"--dataset_name_or_path={folder}",
        *words,
    ]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def records_of(tmp_path):
    return {path.stem: json.loads(path.read_text()) for path in (tmp_path / tmp_path.name).glob("records/**/*.json")}


@pytest.mark.slow
def test_a_sweep_chooses_runs_records_and_skips(tmp_path, tiny, glue, capfd):
    path = real_sweep(tmp_path, tiny)
    folder = glue("rte")
    done = subprocess.run(command(path, folder, "--jobs=2", "--accept_edge"), env=environment(), timeout=SECONDS)
    assert done.returncode == 0, capfd.readouterr().err
    sweep = Sweep(path)
    records = records_of(tmp_path)
    assert len(records) == 4 + 4
    for method, arguments in (("amsgrad", ["learning_rate"]), ("adasam", ["learning_rate", "sam_rho"])):
        trials = [r for r in records.values() if r["trial"] and r["axes"]["method"] == method]
        assert [r["metrics"]["eval_samples"] for r in trials] == [8, 8]  # held out, of 24 training rows
        assert [r["metrics"]["train_samples"] for r in trials] == [16, 16]
        scores = [r["metrics"]["eval_accuracy"] for r in trials]
        best = [r["trial"] for r in trials if r["metrics"]["eval_accuracy"] == max(scores)]
        for seed in (1, 2):
            final = records[f"rte-{method}-{seed}"]
            taken = {name: final["arguments"][name] for name in arguments}
            assert taken in [{name: float(trial[name]) for name in arguments} for trial in best]
            assert final["seed"] == seed and final["metrics"]["train_samples"] == 24 and final["attempts"] == 1
            assert final["arguments"]["held_out_samples"] is None and len(final["log_history"]) > 3
    for run in [*sweep.trials(), *sweep.finals(partial(chosen, sweep))]:
        assert (ROOT / run.folder / "log.txt").exists() and not list((ROOT / run.folder).glob("**/*.safetensors"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / tmp_path.name).glob("**/*.json")}
    start = time.monotonic()
    subprocess.run(command(path, folder), env=environment(), timeout=SECONDS, check=True)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / tmp_path.name).glob("**/*.json")} == before
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path, tiny, glue):
    """The runner is killed again and again. Its records are whole, and no run is done twice."""
    path = real_sweep(tmp_path, tiny, choose=None, axes={"method": ["amsgrad", "adasam"], "seed": [1, 2]})
    folder = glue("rte")
    runs = Sweep(path).finals(lambda *key: {})

    def a_run_is_at_work():
        return any((ROOT / run.folder / "log.txt").exists() for run in runs)

    def a_record_is_there():
        return any(run.finished for run in runs)

    for moment in (a_run_is_at_work, a_record_is_there):
        runner = subprocess.Popen(command(path, folder, "--jobs=2"), env=environment())
        end = time.monotonic() + SECONDS
        while not moment():
            assert runner.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        runner.send_signal(signal.SIGKILL)
        runner.wait()
        records_of(tmp_path)  # whole, or there would be an error
        if moment is a_run_is_at_work:  # an orphan goes on, and holds its lock
            (folder_at_work, *_) = [ROOT / run.folder for run in runs if (ROOT / run.folder / "log.txt").exists()]
            with open(folder_at_work / "lock") as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    subprocess.run(command(path, folder, "--jobs=2"), env=environment(), timeout=SECONDS, check=True)
    records = records_of(tmp_path)
    assert set(records) == {f"rte-{method}-{seed}" for method in ("amsgrad", "adasam") for seed in (1, 2)}
    for run in runs:
        log = (ROOT / run.folder / "log.txt").read_text()
        assert log.count("***** train metrics *****") == 1, run.name


@pytest.mark.slow
def test_ctrl_c(tmp_path, tiny, glue):
    """Stops the runner and its runs at once, and no run begins anew."""
    path = real_sweep(tmp_path, tiny, choose=None)
    runs = Sweep(path).finals(lambda *key: {})
    runner = subprocess.Popen(
        command(path, glue("rte"), "--jobs=2"),
        env=environment(),
        start_new_session=True,
        # what runs in a shell's background inherits that Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + SECONDS
    while not any((ROOT / run.folder / "log.txt").exists() for run in runs):
        assert runner.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(runner.pid, signal.SIGINT)  # as a terminal does
    assert runner.wait(timeout=20) == 130
    time.sleep(3)
    for plan in (ROOT / runs[0].folder).parent.glob("*/plan.json"):
        assert json.loads(plan.read_text())["failures"] == 0
        with open(plan.with_name("lock")) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it
    subprocess.run(command(path, glue("rte"), "--jobs=2"), env=environment(), timeout=SECONDS, check=True)
    assert {record["attempts"] for record in records_of(tmp_path).values()} == {1}
    assert len(records_of(tmp_path)) == 4


@pytest.mark.slow
def test_a_run_that_fails_is_tried_again_and_reported(tmp_path, tiny, glue):
    path = real_sweep(
        tmp_path,
        tiny,
        choose=None,
        axes={"task_name": ["mrpc", "rte"], "method": ["adasam"], "seed": [1]},
        when=[{"task_name": ["mrpc"], "arguments": {"held_out_samples": 500}}],  # of 24
    )
    done = subprocess.run(
        command(path, glue("mrpc", "rte")), env=environment(), timeout=SECONDS, capture_output=True, text=True
    )
    assert done.returncode == 1 and "FAILED mrpc-adasam-1" in done.stderr and "held_out_samples=500" in done.stderr
    assert "1 failed" in done.stderr
    assert set(records_of(tmp_path)) == {"rte-adasam-1"}  # the others went on
    (run, _) = Sweep(path).finals(lambda *key: {})
    assert (ROOT / run.folder / "log.txt").read_text().count("Traceback") == 2


@pytest.mark.slow
def test_two_nodes_of_a_ray_cluster(tmp_path, tiny, glue):
    from ray.cluster_utils import Cluster

    path = real_sweep(tmp_path, tiny, choose=None)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        words = ["--engine=ray", f"--ray_address={cluster.address}"]
        for bad in (["--gpus_per_run=1"], ["--cpus_per_run=7"], ["--gpus_per_run=2"]):
            done = subprocess.run(
                command(path, glue("rte"), *words, *bad),
                env=environment(),
                timeout=SECONDS,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 2 and ("a run is to have" in done.stderr or "gpus_per_run=2" in done.stderr)
        subprocess.run(command(path, glue("rte"), *words), env=environment(), timeout=SECONDS, check=True)
    finally:
        cluster.shutdown()
    records = records_of(tmp_path)
    assert set(records) == {f"rte-{method}-{seed}" for method in ("amsgrad", "adasam") for seed in (1, 2)}
    assert len({record["node"] for record in records.values()}) == 2  # both had their share


# ---- launching ----


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_what_the_launch_files_say(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(f"configs/launch/{name}.yaml")
    assert config.num_processes == 8 and config.mixed_precision == "no" and not config.use_cpu
    if name == "fsdp2":
        assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_offload_params"] is False
    else:
        assert config.distributed_type == "MULTI_GPU"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_the_first_step_as_launched(name, tiny, glue, tmp_path):
    """Two processes on CPUs (where Accelerate makes DDP of FSDP) in place of eight on GPUs."""
    words = ["--config_file", f"configs/launch/{name}.yaml", "--num_processes=2"]
    job = ["--config=configs/glue/rte.yaml", "--config=configs/optim/adasam.yaml", "--use_cpu", "--ddp_backend=gloo"]
    job += [
        f"--model_name_or_path={tiny}",
        f"--dataset_name_or_path={glue('rte')}",
        f"--cache_dir={tmp_path / 'cache'}",
    ]
    job += ["--max_steps=2", "--warmup_steps=0", "--per_device_train_batch_size=2", "--eval_strategy=no"]
    job += ["--save_strategy=no", "--logging_steps=1", f"--output_dir={tmp_path / 'out'}"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *words, "scripts/run_glue.py", *job]
    done = subprocess.run(launch, env=environment(), timeout=SECONDS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert len([entry for entry in record["log_history"] if "sam_gap" in entry]) == 2
    assert "2 processes" in done.stderr  # the line that the run begins with


# ---- a budget, and what a GPU needs ----


def test_what_fits_into_a_budget(tmp_path):
    arguments = {"do_train": True, "model_name_or_path": "x", "max_train_samples": 100, "num_train_epochs": 2}
    sweep = Sweep(write_sweep(tmp_path, arguments=arguments))
    trials = sweep.trials()
    assert fitting(trials, 1, 10) is None
    put(trials[0], 0.5, seconds_per_row=1.0)
    rest = trials[1:]
    seconds = [estimate(rest)[run] for run in rest]
    assert sorted(set(seconds)) == [220, 420]  # 20 and a second for each row and pass
    assert [fitting(rest, 1, limit / 60) for limit in (219, 220, 439, 440)] == [0, 1, 1, 2]
    assert fitting(rest, 8, max(seconds) / 60) == len(rest)  # side by side
    assert Budget(1, time.monotonic() - 50).rest == pytest.approx(10, abs=1)
    assert Budget(1, time.monotonic() - 70).rest == 0


def test_times_are_those_of_the_same_hardware(tmp_path, monkeypatch):
    arguments = {"do_train": True, "model_name_or_path": "x", "max_train_samples": 100, "num_train_epochs": 2}
    trials = Sweep(write_sweep(tmp_path, arguments=arguments)).trials()
    put(trials[0], 0.5, seconds_per_row=1.0, hardware={"accelerators": []})
    put(trials[1], 0.5, seconds_per_row=0.1, hardware={"accelerators": ["A Card"]})
    monkeypatch.setattr(cost_module, "accelerators", list)
    assert estimate(trials)[trials[2]] == pytest.approx(20 + work(trials[2]))
    monkeypatch.setattr(cost_module, "accelerators", lambda: ["A Card"])
    assert estimate(trials)[trials[2]] == pytest.approx(20 + 0.1 * work(trials[2]))
    monkeypatch.setattr(cost_module, "accelerators", lambda: ["Another"])
    assert estimate(trials)[trials[2]] is None


@pytest.mark.parametrize(("minutes", "all_of_them"), [(1 / 60, False), (60, True)])
def test_no_run_begins_that_would_end_too_late(tmp_path, monkeypatch, minutes, all_of_them):
    """Its time is not known, so that the longest so far, 0.4 s, stands for it."""
    runs, done = Sweep(write_sweep(tmp_path)).trials(), []

    def take_a_while(run, machine, threads, node, budget):
        time.sleep(0.4)
        done.append(run)
        return {}

    monkeypatch.setattr(engines, "execute", take_a_while)
    engine = engines.Processes(1, Budget(minutes))
    start = time.monotonic()
    assert engines.do(runs, engine, []) == [] and done
    assert (len(done) == len(runs)) is all_of_them
    assert all_of_them or time.monotonic() - start < 1.5
    engine.close()


def test_a_run_that_is_still_at_work_is_stopped(tmp_path, monkeypatch):
    run, *_ = Sweep(write_sweep(tmp_path)).finals(lambda *key: {})
    monkeypatch.setattr(execution.subprocess, "run", lambda *a, timeout, **k: stop(timeout))

    def stop(timeout):
        assert 0 < timeout <= 60
        raise subprocess.TimeoutExpired("x", timeout)

    with pytest.raises(OutOfTime):
        execution.execute(run, [], budget=Budget(1))
    assert not run.record.exists()
    state = json.loads((run.folder / "plan.json").read_text())
    assert state["failures"] == 0  # it has not failed, and is tried anew another time


@pytest.mark.parametrize(
    ("words", "message"), [(["--minutes=0"], "--minutes=0.0 must"), (["--minutes=1", "--engine=ray"], "--engine local")]
)
def test_a_budget_that_makes_no_sense(words, message, tmp_path, capsys):
    assert run_command("sweep", [str(write_sweep(tmp_path)), *words]) == 2
    assert message in capsys.readouterr().err


def test_how_a_batch_is_split_for_a_card():
    """By hand: RoBERTa-large with AdaSAM has w, g, m, v, v̂, the copy (4 bytes each) and bf16 casts (2)."""
    run = Sweep(Path("configs/sweeps/table1.yaml"), tasks=["sst2"], methods=["adasam"]).finals(
        lambda *key: {"sam_rho": 0.01}
    )[0]
    size = cards.size_of("roberta-large")
    fixed = 26 * 355_361_794
    row = 34 * 24 * 512 * 1024
    for card in cards.CARDS:
        rows = cards.micro_batch(run, size, card)
        assert fixed + rows * row <= 0.9 * card * 1e9
        assert rows == 64 or fixed + 2 * rows * row > 0.9 * card * 1e9
        assert 64 % rows == 0
    assert cards.micro_batch(run, size, 10) == 0
    assert cards.micro_batch(run, size, 80) == 64 > cards.micro_batch(run, size, 16)


def test_gpu_hours_follow_from_the_record_or_an_assumption(tmp_path):
    run = Sweep(Path("configs/sweeps/table1.yaml"), tasks=["rte"], methods=["amsgrad"]).finals(lambda *key: {})[0]
    size = cards.size_of("roberta-large")
    tokens = work(run) * 88
    assert cards.seconds_of(run, size, None) == pytest.approx(20 + 6 * size.parameters * tokens / 1e14)
    record = {"device": "cuda", "seconds": {"AdaSAM": [0.2, 0.2, 0.9]}, "tokens": 1000, "parameters": size.parameters}
    (tmp_path / cards.MEASURED).write_text(json.dumps(record))
    assert cards.measurement(tmp_path) == record
    assert cards.seconds_of(run, size, record) == pytest.approx(20 + tokens * 0.1 / 1000)
    (tmp_path / cards.MEASURED).write_text(json.dumps(record | {"device": "cpu"}))  # a rehearsal's
    assert cards.measurement(tmp_path) is None


def test_the_dry_run_of_the_papers_table(capsys):
    assert run_command("sweep", ["configs/sweeps/table1.yaml", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "hours of one card" in said and "disk: 2 checkpoints" in said and "goes on from its last checkpoint" in said
    assert [card for card in (16, 24, 80) if f"  {card} GB: micro-batch × accumulation" in said] == [16, 24, 80]


@pytest.mark.slow
def test_a_sweep_within_a_budget(tmp_path, tiny, glue):
    """Ten minutes are enough, and five seconds for nothing; both end well, and records say what made them."""
    path, folder = real_sweep(tmp_path, tiny, choose=None), glue("rte")
    short = subprocess.run(
        command(path, folder, "--minutes=0.08", "--jobs=2"),
        env=environment(),
        text=True,
        capture_output=True,
        timeout=SECONDS,
    )
    assert short.returncode == 0 and "the time is over: 4 of 4 runs are left" in short.stdout, short.stderr[-2000:]
    assert not records_of(tmp_path)
    subprocess.run(command(path, folder, "--minutes=10", "--jobs=2"), env=environment(), timeout=SECONDS, check=True)
    made_by = [record["hardware"]["accelerators"] for record in records_of(tmp_path).values()]
    assert made_by == [cost_module.accelerators()] * 4
