import dataclasses
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from adasam_hf import AdaSAM, AdaSAMSeq2SeqTrainingArguments, AdaSAMTrainer, AdaSAMTrainingArguments

CLASSES = [AdaSAMTrainingArguments, AdaSAMSeq2SeqTrainingArguments]
OURS = ["adasam", "amsgrad", "sam", "sgdm"]


@pytest.fixture
def make(tmp_path):
    def make(cls=AdaSAMTrainingArguments, **kwargs):
        return cls(output_dir=str(tmp_path), use_cpu=True, report_to="none", **kwargs)

    return make


def said(args) -> dict:
    return {name: getattr(args, name) for name in VALUES}


VALUES = {
    "optim": "adasam",
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-5,
    "sgd_momentum": 0.5,
    "sam_rho": 0.02,
    "sam_scope": "microbatch",
    "sam_sync": False,
    "sam_dropout": "fresh",
    "sam_preset": "fast",
    "sam_direction": "gradient",
    "sam_adaptive": True,
    "sam_ascent_fraction": 0.5,
    "sam_parameters": "norm",
    "sam_start": 0.25,
    "sam_end": 0.75,
    "sam_interval": 2,
    "sam_reuse": True,
    "sam_rho_schedule": "cosine",
}


@pytest.mark.parametrize("cls", CLASSES)
def test_round_trips(make, tmp_path, cls):
    args = make(cls, **VALUES)
    assert said(args) == VALUES
    rebuilt = {
        "dict": cls(**args.to_dict()),
        "json": cls(**json.loads(args.to_json_string())),
        "pickle": pickle.loads(pickle.dumps(args)),
        "replace": dataclasses.replace(args),
    }
    torch.save(args, tmp_path / "training_args.bin")
    rebuilt["training_args.bin"] = torch.load(tmp_path / "training_args.bin", weights_only=False)
    for how, other in rebuilt.items():
        assert said(other) == VALUES, how


@pytest.mark.parametrize("cls", CLASSES)
def test_command_line_json_and_yaml(tmp_path, cls):
    values = {**VALUES, "learning_rate": 3e-5, "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    tokens = [f"--{name}={value}" for name, value in values.items()]
    (tmp_path / "a.json").write_text(json.dumps(values))
    # 1e-5, as people write it, is text to a YAML reader
    (tmp_path / "a.yaml").write_text("".join(f"{n}: {v}\n" for n, v in values.items()))
    parser = HfArgumentParser(cls)
    for (args,) in (
        parser.parse_args_into_dataclasses(tokens),
        parser.parse_json_file(str(tmp_path / "a.json")),
        parser.parse_yaml_file(str(tmp_path / "a.yaml")),
    ):
        assert said(args) == VALUES
        assert args.learning_rate == 3e-5


def test_help_explains_each_argument():
    text = HfArgumentParser(AdaSAMTrainingArguments).format_help()
    for name in (*VALUES, "optim"):
        assert f"--{name}" in text
    for word in ("adasam", "amsgrad", "sgdm", "{batch,microbatch}", "{same,fresh}", "{full,fast,free}"):
        assert word in text


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", OURS)
def test_own_names(make, cls, name):
    args = make(cls, optim=name)
    kind, kwargs = AdaSAMTrainer.get_optimizer_cls_and_kwargs(args)
    optimizer = kind([torch.nn.Parameter(torch.ones(2))], **kwargs)
    if name in ("adasam", "amsgrad"):
        assert type(optimizer) is AdaSAM
        assert optimizer.defaults["betas"] == (0.9, 0.98)
        assert optimizer.defaults["eps"] == 1e-6
        assert optimizer.defaults["rho"] == (0.05 if name == "adasam" else 0.0)
    else:
        assert type(optimizer) is torch.optim.SGD
        assert optimizer.defaults["momentum"] == 0.9
    assert optimizer.defaults["lr"] == args.learning_rate
    assert args.resolved_rho == (0.05 if name in ("adasam", "sam") else 0.0)


def test_given_values_reach_the_optimizer(make):
    args = make(optim="adasam", adam_beta1=0.0, adam_beta2=0.9, adam_epsilon=1e-4, sam_rho=0.2, learning_rate=0.5)
    kind, kwargs = AdaSAMTrainer.get_optimizer_cls_and_kwargs(args)
    assert kind is AdaSAM
    assert kwargs == {"lr": 0.5, "betas": (0.0, 0.9), "eps": 1e-4, "rho": 0.2}
    args = make(optim="sam", sgd_momentum=0.0, optim_args="nesterov=False, fused=true")
    kind, kwargs = AdaSAMTrainer.get_optimizer_cls_and_kwargs(args)
    assert (kind, kwargs["momentum"], kwargs["fused"]) == (torch.optim.SGD, 0.0, True)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_names_of_transformers_keep_their_meaning(make, tmp_path, name):
    stock = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", optim=name)
    args = make(optim=name)
    assert args.optim is OptimizerNames(name)
    want = Trainer.get_optimizer_cls_and_kwargs(stock)
    assert AdaSAMTrainer.get_optimizer_cls_and_kwargs(args) == want
    assert AdaSAMTrainer.get_optimizer_cls_and_kwargs(make(optim=name, sam_rho=0.05)) == want


def test_the_default_is_that_of_transformers(make, tmp_path):
    assert make().optim == TrainingArguments(output_dir=str(tmp_path), use_cpu=True).optim
    assert make().resolved_rho == 0


def test_resolved_values_do_not_leak_into_copies(make):
    adasam = make(optim="adasam")
    assert (adasam.resolved_betas, adasam.resolved_epsilon) == ((0.9, 0.98), 1e-6)
    AdaSAMTrainer.get_optimizer_cls_and_kwargs(adasam)
    stock = dataclasses.replace(adasam, optim="adamw_torch")
    assert (stock.resolved_betas, stock.resolved_epsilon, stock.resolved_rho) == ((0.9, 0.999), 1e-8, 0.0)


def test_set_optimizer(make):
    args = make().set_optimizer("adasam", learning_rate=1e-3, rho=0.1)
    assert said(args)["optim"] == "adasam"
    assert (args.resolved_betas, args.sam_rho, args.learning_rate) == ((0.9, 0.98), 0.1, 1e-3)
    args = args.set_optimizer("adamw_torch")
    assert args.optim is OptimizerNames.ADAMW_TORCH
    assert (args.resolved_betas, args.sam_rho) == ((0.9, 0.999), None)
    with pytest.raises(ValueError, match="adasm"):
        args.set_optimizer("adasm")


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("sam_rho", -0.1, ">= 0"),
        ("sam_rho", float("nan"), "finite"),
        ("sam_rho", float("inf"), "finite"),
        ("sam_rho", "much", "number"),
        ("sam_scope", "epoch", "batch, microbatch"),
        ("sam_dropout", "none", "same, fresh"),
        ("sam_preset", "cheap", "full, fast, free"),
        ("sam_direction", "up", "gradient, momentum"),
        ("sam_rho_schedule", "step", "constant, linear, cosine, lr"),
        ("sam_ascent_fraction", 0.0, r"\(0, 1\]"),
        ("sam_ascent_fraction", 1.5, r"\(0, 1\]"),
        ("sam_start", 1.0, "sam_start=0.7"),
        ("sam_start", -0.1, "0 <= sam_start < sam_end"),
        ("sam_end", 0.0, "0 <= sam_start < sam_end"),
        ("sam_interval", 0, ">= 1"),
        ("sam_interval", 1.5, "whole number"),
        ("sam_reuse", True, "sam_interval"),
        ("sam_parameters", "layer.(", "regular expression"),
        ("sam_parameters", None, "regular expression"),
        ("sgd_momentum", 1.0, r"\[0, 1\)"),
        ("sgd_momentum", None, r"\[0, 1\)"),
        ("adam_beta1", 1.5, r"\[0, 1\)"),
        ("adam_beta2", 1.0, r"\[0, 1\)"),
        ("adam_epsilon", -1e-8, ">= 0"),
        ("optim", "adasm", "adasam"),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_bad_values_are_named(make, cls, name, value, remedy):
    with pytest.raises(ValueError, match=f"(?s){name}={re.escape(repr(value))}.*{remedy}"):
        make(cls, **{name: value})


def test_contradictions_are_refused(make):
    for optim, positive in (("amsgrad", "adasam"), ("sgdm", "sam")):
        with pytest.raises(ValueError, match=f"optim='{positive}'"):
            make(optim=optim, sam_rho=0.05)
    with pytest.raises(ValueError, match="adam_epsilon"):
        make(optim="adasam", adam_epsilon=0.0)
    make(optim="adamw_torch", adam_epsilon=0.0)


@pytest.mark.parametrize("text", ["rho=0.1", "rho", "rho=0.1,", "foreach=1", "nesterov=true", "beta1=0.9"])
def test_optim_args_are_checked(make, text):
    with pytest.raises(ValueError, match="optim_args"):
        make(optim="adasam", optim_args=text)


def test_a_plain_trainer_fails_loudly(make):
    model = torch.nn.Linear(2, 2)
    for kind in (Trainer, Seq2SeqTrainer):
        with pytest.raises(ValueError, match="adasam"):
            kind.get_optimizer_cls_and_kwargs(make(optim="adasam"), model)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_hub_token_stays_hidden(make, cls):
    args = make(cls, hub_token="hf_planted")
    for text in (repr(args), str(args), args.to_json_string(), str(args.to_sanitized_dict())):
        assert "hf_planted" not in text


def test_import_does_no_work():
    code = "import sys, adasam_hf; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = "import adasam_hf; [getattr(adasam_hf, n) for n in adasam_hf.__all__]; adasam_hf.nonsense"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "no attribute 'nonsense'" in failed.stderr


def test_presets_stand_for_what_is_unset(make):
    def resolved(**flags):
        args = make(optim="adasam", **flags)
        return args.resolved_direction, args.resolved_ascent_fraction

    assert resolved() == resolved(sam_preset="full") == ("gradient", 1.0)
    assert resolved(sam_preset="fast") == ("gradient", 0.125)
    assert resolved(sam_preset="free") == ("momentum", 1.0)
    assert resolved(sam_preset="fast", sam_ascent_fraction=0.5) == ("gradient", 0.5)
    assert resolved(sam_preset="free", sam_direction="gradient") == ("gradient", 1.0)
    assert resolved(sam_preset="fast", sam_direction="momentum") == ("momentum", 1.0)
    assert make(optim="adasam", sam_preset="fast").resolved_rho == 0.1
    assert make(optim="adasam", sam_preset="free").resolved_rho == 0.4
    # radii belong to a direction
    assert make(optim="adasam", sam_preset="free", sam_direction="gradient").resolved_rho == 0.05
    assert make(optim="adasam", sam_preset="fast", sam_direction="momentum").resolved_rho == 0.4
    assert make(optim="adasam", sam_preset="free", sam_rho=0.1).resolved_rho == 0.1
    assert make(optim="adamw_torch", sam_preset="free").resolved_rho == 0.0
    args = make(optim="adasam", sam_preset="fast")
    assert args.sam_ascent_fraction is None  # so that it is not carried along
    assert dataclasses.replace(args, sam_preset="free").resolved_direction == "momentum"


@pytest.mark.parametrize("flags", [{"sam_ascent_fraction": 0.5}, {"sam_reuse": True, "sam_interval": 2}])
def test_what_a_momentum_has_no_use_for(make, flags):
    with pytest.raises(ValueError, match=rf"{next(iter(flags))}=.* contradicts sam_direction='momentum'"):
        make(optim="adasam", sam_direction="momentum", **flags)
    with pytest.raises(ValueError, match="sgd_momentum above 0"):
        make(optim="sam", sam_direction="momentum", sgd_momentum=0.0)


@pytest.mark.parametrize("name", ["adasm", "AdaSAM", "ada_sam"])
def test_a_misspelt_optimizer(tmp_path, name):
    with pytest.raises(ValueError, match=f"optim='{name}' is unknown; did you mean 'adasam'"):
        AdaSAMTrainingArguments(str(tmp_path), optim=name, use_cpu=True)
