import copy
import dataclasses
import json
import pickle
import re
import subprocess
import sys
from fractions import Fraction
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from transformers.training_args import OptimizerNames

import adasam_hf
from adasam_hf import (
    AdaSAM,
    AdaSAMSeq2SeqTrainingArguments,
    AdaSAMTrainer,
    AdaSAMTrainingArguments,
    SharpnessAwareArgumentsMixin,
)
from adasam_hf.training_args import set_launcher_defaults

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
    "sam_descent": "loss",  # the other one contradicts those below
    "sam_cache_frozen": False,
    "sam_preset": "fast",
    "sam_direction": "gradient",
    "sam_adaptive": True,
    "sam_ascent_fraction": 0.5,
    "sam_ascent_min_rows": 3,
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
    assert args.optim == OptimizerNames(name) == stock.optim and args.optim in [stock.optim] and args.optim in {name}
    assert (args.optim.value, args.optim.name, hash(args.optim)) == (name, stock.optim.name, hash(stock.optim))
    assert args.optim != OptimizerNames.LOMO and OptimizerNames(args.optim) is stock.optim
    want = Trainer.get_optimizer_cls_and_kwargs(stock)
    assert AdaSAMTrainer.get_optimizer_cls_and_kwargs(args) == want
    assert AdaSAMTrainer.get_optimizer_cls_and_kwargs(make(optim=name, sam_rho=0.05)) == want


def test_the_default_is_that_of_transformers(make, tmp_path):
    assert make().optim == TrainingArguments(output_dir=str(tmp_path), use_cpu=True).optim
    assert make().resolved_rho == 0


# ---- β2 and ε: numbers that follow the optimizer until they are set ----

STOCK = {"adam_beta2": 0.999, "adam_epsilon": 1e-8}  # Transformers' own
ADASAM = {"adam_beta2": 0.98, "adam_epsilon": 1e-6}
IN_FORCE = {"adasam": ADASAM, "amsgrad": ADASAM, "sam": STOCK, "sgdm": STOCK, "adamw_torch": STOCK, "adafactor": STOCK}


def numbers(args) -> dict:
    return {name: getattr(args, name) for name in STOCK}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", IN_FORCE)
def test_the_numbers_in_force_are_read(make, cls, name):
    args = make(cls, optim=name)
    want = IN_FORCE[name]
    for found in (
        numbers(args),
        args.to_dict(),
        vars(args),
        dataclasses.asdict(args),
        json.loads(args.to_json_string()),
    ):
        assert {n: found[n] for n in want} == want
        assert {type(found[n]) for n in want} == {float}
    assert args.to_sanitized_dict()["adam_beta2"] == want["adam_beta2"]  # which makes text of all but plain types
    assert yaml.safe_load(yaml.safe_dump(numbers(args))) == want
    assert f"adam_beta2={want['adam_beta2']}," in str(args)


def rebuilt(cls, args, **changes):
    return cls(**{**json.loads(args.to_json_string()), **changes})


def parsed(method, suffix, dump):
    def parse(cls, args, path, **changes):
        (path / f"args.{suffix}").write_text(dump({**args.to_dict(), **changes}))
        (found,) = getattr(HfArgumentParser(cls), method)(str(path / f"args.{suffix}"))
        return found

    return parse


def changed(args, **changes):
    for name, value in changes.items():  # as hyperparameter search does it
        setattr(args, name, type(getattr(args, name))(value))
    return args


def through_a_file(args, path):
    torch.save(args, path / "training_args.bin")
    return torch.load(path / "training_args.bin", weights_only=False)


# (class, arguments, a folder, **changes) → arguments with the changes
WAYS = {
    "replace": lambda cls, args, path, **new: dataclasses.replace(args, **new),
    "replace twice": lambda cls, args, path, **new: dataclasses.replace(dataclasses.replace(args), **new),
    "asdict": lambda cls, args, path, **new: cls(**{**dataclasses.asdict(args), **new}),
    "to_dict": lambda cls, args, path, **new: cls(**{**args.to_dict(), **new}),
    "parse_dict": lambda cls, args, path, **new: HfArgumentParser(cls).parse_dict({**args.to_dict(), **new})[0],
    "json": lambda cls, args, path, **new: rebuilt(cls, args, **new),
    "json twice": lambda cls, args, path, **new: rebuilt(cls, rebuilt(cls, args), **new),
    "parse_json_file": parsed("parse_json_file", "json", json.dumps),
    "parse_yaml_file": parsed("parse_yaml_file", "yaml", yaml.safe_dump),
    "json in yaml": parsed("parse_yaml_file", "yaml", json.dumps),  # where 1e-06 is text
    "search": lambda cls, args, path, **new: changed(args, **new),
    "copy": lambda cls, args, path, **new: changed(copy.copy(args), **new),
    "deepcopy": lambda cls, args, path, **new: dataclasses.replace(copy.deepcopy(args), **new),
    "pickle": lambda cls, args, path, **new: dataclasses.replace(pickle.loads(pickle.dumps(args)), **new),
    "training_args.bin": lambda cls, args, path, **new: changed(through_a_file(args, path), **new),
}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("way", WAYS)
def test_defaults_follow_the_optimizer_and_values_stay(make, tmp_path, cls, way):
    def there(args, **changes):
        return WAYS[way](cls, args, tmp_path, **changes)

    assert numbers(there(make(cls, optim="adasam"))) == ADASAM
    assert numbers(there(make(cls, optim="adasam"), optim="adamw_torch")) == STOCK
    assert numbers(there(there(make(cls, optim="adasam"), optim="sam"), optim="amsgrad")) == ADASAM
    # a value that equals the default is a value, and one of the two may be set alone
    for values in (ADASAM, STOCK, {"adam_beta2": 0.95, "adam_epsilon": 0.1}):
        args = make(cls, optim="adasam", **values)
        assert numbers(there(args, optim="adamw_torch")) == numbers(there(args)) == values
        args = make(cls, optim="adasam", adam_beta2=values["adam_beta2"])
        assert numbers(there(args, optim="adamw_torch")) == {**STOCK, "adam_beta2": values["adam_beta2"]}
    assert numbers(there(make(cls, optim="adasam"), adam_beta2=0.95)) == {**ADASAM, "adam_beta2": 0.95}


@pytest.mark.parametrize("way", ["replace", "asdict", "search", "copy", "pickle"])
def test_a_value_given_with_another_optimizer_wins(make, tmp_path, way):
    """Also where it equals the default that it replaces."""
    args = WAYS[way](AdaSAMTrainingArguments, make(optim="adasam"), tmp_path, optim="adamw_torch", **ADASAM)
    assert numbers(args) == ADASAM


def test_none_is_unset(make):
    assert numbers(make(optim="adasam", adam_beta2=None, adam_epsilon=None)) == ADASAM
    args = make(optim="adasam", adam_beta2=0.5)
    args.adam_beta2 = None
    assert numbers(args) == ADASAM


def test_what_json_cannot_tell(make, caplog):
    """Numbers whose record says that they are defaults follow, and the run says so; without the record they stay."""
    written = json.loads(make(optim="adasam", adam_epsilon=1e-6).to_json_string())
    assert written["adam_defaults"] == {"adam_beta2": 0.98}  # ε is a value
    args = AdaSAMTrainingArguments(**{**written, "optim": "adamw_torch"})
    assert numbers(args) == {"adam_beta2": 0.999, "adam_epsilon": 1e-6}
    assert "adam_beta2=0.999, the default of optim=adamw_torch, replaces 0.98" in caplog.text
    caplog.clear()
    assert numbers(AdaSAMTrainingArguments(**written)) == ADASAM
    edited = AdaSAMTrainingArguments(**{**written, "optim": "adamw_torch", "adam_beta2": 0.97})
    assert edited.adam_beta2 == 0.97
    del written["adam_defaults"]
    assert numbers(AdaSAMTrainingArguments(**{**written, "optim": "adamw_torch"})) == ADASAM
    assert "replaces" not in caplog.text


@pytest.mark.parametrize(
    "record", ["adam_beta2", ["adam_beta2"], {"beta2": 0.98}, {"adam_beta2": "x"}, {"adam_beta2": None}]
)
def test_a_record_that_to_dict_did_not_write(make, record):
    with pytest.raises(ValueError, match=r"adam_defaults.* must (have the names|be a number)"):
        make(adam_defaults=record)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ([], STOCK),
        (["--optim=adasam"], ADASAM),
        (["--optim=adasam", "--adam_beta2=0.98"], ADASAM),
        (["--optim=adasam", "--adam_beta2=0.999"], {"adam_beta2": 0.999, "adam_epsilon": 1e-6}),
        (["--optim=adamw_torch", "--adam_epsilon", "1e-6"], {"adam_beta2": 0.999, "adam_epsilon": 1e-6}),
    ],
)
def test_the_command_line(tmp_path, cls, flags, want):
    tokens = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to=none", *flags]
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses(tokens)
    assert numbers(args) == want
    other = dataclasses.replace(args, optim="sam")
    assert numbers(other) == {n: want[n] if f"--{n}" in " ".join(flags) else STOCK[n] for n in STOCK}


def test_the_help_has_the_defaults():
    text = " ".join(HfArgumentParser(AdaSAMTrainingArguments).format_help().split())
    assert "that of adasam and amsgrad is 0.98. (default: 0.999)" in text
    assert "that of adasam and amsgrad is 1e-6. (default: 1e-08)" in text
    assert "adam_defaults" not in text.partition("options:")[2]


def test_set_optimizer(make):
    args = make().set_optimizer("adasam", learning_rate=1e-3, rho=0.1)
    assert said(args)["optim"] == "adasam"
    assert (numbers(args), args.sam_rho, args.learning_rate) == (ADASAM, 0.1, 1e-3)
    args = args.set_optimizer("adamw_torch")
    assert args.optim == OptimizerNames.ADAMW_TORCH
    assert (numbers(args), args.sam_rho) == (STOCK, None)
    assert numbers(args.set_optimizer("adamw_torch", beta2=0.98, epsilon=1e-6).set_optimizer("adasam")) == ADASAM
    args = args.set_optimizer("adasam", beta2=0.999)
    args.optim = "amsgrad"
    assert numbers(args) == {"adam_beta2": 0.999, "adam_epsilon": 1e-6}
    with pytest.raises(ValueError, match="adasm"):
        args.set_optimizer("adasm")
    assert args.optim == "amsgrad"
    for name, value in (("beta2", "x"), ("epsilon", -1.0), ("rho", True)):
        with pytest.raises(ValueError, match=name):
            args.set_optimizer("adasam", **{name: value})


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_radius_zero_is_stock(make, tmp_path, cls, name):
    stock_class = next(base for base in cls.__bases__ if base in (TrainingArguments, Seq2SeqTrainingArguments))
    want = make(stock_class, optim=name).to_dict()
    found = make(cls, optim=name).to_dict()
    assert {n: v for n, v in found.items() if n in want} == want
    assert {n for n in found if n not in want} == {
        *(n for n in VALUES if n.startswith(("sam_", "sgd_"))),
        "adam_defaults",
    }
    assert make(cls, optim="adasam").to_dict()["adam_beta2"] != want["adam_beta2"]


@pytest.mark.parametrize("flags", [{}, {"sam_rho": 0.05}, {"optim": "adasam"}])
def test_a_script_with_an_optimizer_of_its_own(tmp_path, flags):
    with adasam_hf.patch():
        from transformers import Trainer, TrainingArguments

        class Script(Trainer):
            def create_optimizer(self, model=None):
                betas = (self.args.adam_beta1, self.args.adam_beta2)
                self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=betas, eps=self.args.adam_epsilon)
                return self.optimizer

        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **flags)
        optimizer = Script(torch.nn.Linear(2, 2), args).create_optimizer()
    want = IN_FORCE[flags.get("optim", "adamw_torch")]
    assert optimizer.defaults["betas"] == (0.9, want["adam_beta2"])
    assert f"{optimizer.defaults['eps']:.1e} {2 * want['adam_beta2']}"
    # which a checkpoint of it must survive: Transformers loads it so
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    group = torch.load(tmp_path / "optimizer.pt", weights_only=True)["param_groups"][0]
    assert (group["betas"], group["eps"]) == ((0.9, want["adam_beta2"]), want["adam_epsilon"])


@pytest.mark.parametrize("name", ["adasam", "amsgrad", "adamw_torch"])
def test_deepspeed_finds_them(make, name):
    """For the "auto" of its configuration, which Transformers fills in in the middle of the construction."""
    config = MagicMock()  # in place of one that wants DeepSpeed installed

    class Behind(TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            HfTrainerDeepSpeedConfig.trainer_config_process(config, self)

    @dataclasses.dataclass(repr=False)
    class Mixed(SharpnessAwareArgumentsMixin, Behind):
        pass

    args = make(Mixed, optim=name)
    want = IN_FORCE[name]
    filled = {call.args[0]: call.args[1] for call in config.fill_match.call_args_list}
    assert filled["optimizer.params.betas"] == [0.9, want["adam_beta2"]]
    assert filled["optimizer.params.eps"] == want["adam_epsilon"]
    assert (args.optim, numbers(args)) == (name, want)
    assert numbers(dataclasses.replace(args, optim="sam")) == STOCK


def test_defaults_of_the_class_behind(make):
    @dataclasses.dataclass(repr=False)
    class Theirs(TrainingArguments):
        adam_beta2: float = 0.95

    @dataclasses.dataclass(repr=False)
    class Mixed(SharpnessAwareArgumentsMixin, Theirs):
        pass

    @dataclasses.dataclass(repr=False)
    class Before(AdaSAMTrainingArguments):
        adam_beta2: float = 0.9  # a value of the class's own, for all optimizers

    assert make(Mixed).adam_beta2 == make(Theirs).adam_beta2 == 0.95
    args = make(Mixed, optim="adasam")
    assert args.adam_beta2 == 0.98
    assert dataclasses.replace(args, optim="adamw_torch").adam_beta2 == 0.95
    assert make(Mixed, adam_beta2=0.95, optim="adasam").adam_beta2 == 0.95
    assert {make(Before, optim=name).adam_beta2 for name in IN_FORCE} == {0.9}


def test_names_of_the_release_before(make):
    args = make(optim="adasam", sam_rho=0.0, sam_interval=2)
    for name, instead, want in (
        ("own_optimizer", "package_optimizer", args.package_optimizer()),
        ("idle_arguments", "arguments_without_effect", ["sam_interval=2"]),
        ("stock", "copy.copy", args),
        ("resolved_betas", "adam_beta1", (0.9, 0.98)),
        ("resolved_epsilon", "adam_epsilon", 1e-6),
    ):
        with pytest.warns(DeprecationWarning, match=rf"{name}.* use .*{re.escape(instead)}") as warned:
            found = getattr(args, name)
            found = found() if callable(found) else found
        assert found == want and warned[0].filename == __file__
    assert make(sam_ascent_min_rows=1).arguments_without_effect() == ["sam_ascent_min_rows=1"]


# ---- values and their types ----


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
        ("sam_ascent_min_rows", 0, ">= 1"),
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


FLOATS = [
    *("sam_rho", "sam_ascent_fraction", "sam_start", "sam_end"),
    *("sgd_momentum", "adam_beta1", "adam_beta2", "adam_epsilon"),
]
WHOLE = ["sam_interval", "sam_ascent_min_rows"]
TRUTH = ["sam_sync", "sam_adaptive", "sam_reuse"]
WORDS = ["optim", "sam_scope", "sam_dropout", "sam_preset", "sam_direction", "sam_rho_schedule", "sam_parameters"]
NEVER = {"list": [1], "dict": {"a": 1}, "bytes": b"1", "tensor": torch.tensor([0.5, 0.5])}
WRONG = [
    *((name, value) for name in FLOATS for value in (True, "abc", "nan", float("nan"), float("inf"), -1, 10**400)),
    *((name, value) for name in FLOATS for value in (np.array([0.5, 0.5]), np.True_, 0.5j)),
    *((name, value) for name in WHOLE for value in (True, 2.0, "2.0", "two", None, 0, -1, float("nan"), float("inf"))),
    *((name, value) for name in TRUTH for value in ("", "maybe", 2, 0.0, 1.0, None, float("nan"))),
    *((name, value) for name in WORDS for value in (1, True, float("nan"), ("all", "norm"))),
    *((name, value) for name in WORDS if name != "sam_direction" for value in (None,)),
    *((name, value) for name in FLOATS + WHOLE + TRUTH + WORDS for value in NEVER.values()),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=repr)
def test_wrong_types_are_named(make, name, value):
    with pytest.raises(ValueError) as refused:
        make(**{name: value})
    message = str(refused.value)
    assert message.startswith(f"{name}={value!r} ")
    assert re.search(r"must be|did you mean|choose one of", message)


RIGHT = [
    *((name, "0.5", 0.5) for name in FLOATS if name not in ("sam_start", "sam_end")),
    *((name, kind(0.5), 0.5) for name in FLOATS for kind in (float, np.float32, np.float64, Fraction)),
    *((name, kind(2), 2) for name in WHOLE for kind in (int, str, np.int64, np.uint8)),
    *((name, word, True) for name in TRUTH for word in (True, "true", "True", "yes", "1", 1, np.True_)),
    *((name, word, False) for name in TRUTH for word in (False, "false", "False", "no", "0", 0, np.False_)),
    ("sam_scope", np.str_("microbatch"), "microbatch"),
    ("sam_parameters", "norm", "norm"),
    ("sam_end", 1, 1.0),
    ("sam_rho", 0, 0.0),
]


@pytest.mark.parametrize(("name", "value", "want"), RIGHT, ids=repr)
def test_other_spellings_are_read(make, name, value, want):
    others = {"sam_interval": 2} if name == "sam_reuse" else {}
    args = make(**{name: value}, **others)
    found = getattr(args, name)
    assert found == want and isinstance(found, type(want))
    assert json.loads(args.to_json_string())[name] == want
    assert (
        getattr(HfArgumentParser(AdaSAMTrainingArguments).parse_dict({**args.to_dict(), name: value})[0], name) == want
    )


TEXT = [
    *[("sam_adaptive", "false", False), ("sam_adaptive", "'false'", False), ("sam_sync", "no", False)],
    *[
        ("sam_sync", "'no'", False),
        ("sam_adaptive", "on", True),
        ("sgd_momentum", "'0.5'", 0.5),
        ("sam_rho", "1e-2", 0.01),
    ],
    *[("sam_interval", "2", 2), ("sam_interval", "'2'", 2)],
    *[("sam_rho", "abc", None), ("sam_rho", "true", None), ("sam_rho", "[0.1]", None), ("sam_rho", ".nan", None)],
    *[("sam_adaptive", "perhaps", None), ("sam_interval", "2.0", None), ("sam_scope", "[batch]", None)],
    *[("sam_parameters", "[norm]", None), ("sam_parameters", "null", None), ("sam_parameters", "1", None)],
]


@pytest.mark.parametrize(("name", "text", "want"), TEXT)
def test_yaml(tmp_path, name, text, want):
    (tmp_path / "a.yaml").write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nreport_to: none\n{name}: {text}\n")

    def parse():
        return HfArgumentParser(AdaSAMTrainingArguments).parse_yaml_file(str(tmp_path / "a.yaml"))[0]

    if want is None:
        with pytest.raises(ValueError, match=f"^{name}=.* must be"):
            parse()
    else:
        assert getattr(parse(), name) == want


COMMAND_LINE = [
    *[("--sam_adaptive=false", False), ("--sam_adaptive", True), ("--sam_sync=no", False), ("--no_sam_sync", False)],
    *[("--sgd_momentum=0.5", 0.5), ("--sam_interval=2", 2), ("--sam_ascent_min_rows=4", 4), ("--sam_rho=1e-2", 0.01)],
    *[("--sam_adaptive=perhaps", SystemExit), ("--sam_rho=abc", SystemExit), ("--sam_interval=2.0", SystemExit)],
    *[("--sam_scope=epoch", SystemExit), ("--sam_rho=nan", ValueError), ("--sam_interval=0", ValueError)],
]


@pytest.mark.parametrize(("flag", "want"), COMMAND_LINE)
def test_flags(tmp_path, capsys, flag, want):
    name = flag.removeprefix("--").removeprefix("no_").partition("=")[0]

    def parse():
        tokens = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to=none", flag]
        return HfArgumentParser(AdaSAMTrainingArguments).parse_args_into_dataclasses(tokens)[0]

    if isinstance(want, type):
        with pytest.raises(want) as refused:
            parse()
        assert name in (capsys.readouterr().err if want is SystemExit else str(refused.value))
    else:
        assert getattr(parse(), name) == want


@pytest.mark.parametrize("value", [{"foreach": True}, ["foreach=true"], True])
def test_optim_args_of_a_wrong_type(make, value):
    with pytest.raises(ValueError, match=r"^optim_args=.* must be text"):
        make(optim="adasam", optim_args=value)


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


# ---- attributes, and a search over them ----


def searched(args, name, value):
    """As a hyperparameter search of Transformers sets it: in the type of the value before."""
    old = getattr(args, name)
    setattr(args, name, value if old is None else type(old)(value))
    return getattr(args, name)


@pytest.mark.parametrize(("name", "value"), WRONG, ids=repr)
def test_an_attribute_is_refused_as_the_constructor_refuses_it(make, name, value):
    args = make()
    before = getattr(args, name)
    with pytest.raises(ValueError) as at_construction:
        make(**{name: value})
    with pytest.raises(ValueError) as refused:
        setattr(args, name, value)
    assert str(refused.value) == str(at_construction.value)
    assert getattr(args, name) == before


@pytest.mark.parametrize(("name", "value", "want"), RIGHT, ids=repr)
def test_an_attribute_is_read_as_the_constructor_reads_it(make, name, value, want):
    args = make()
    setattr(args, name, value)
    assert getattr(args, name) == want and isinstance(getattr(args, name), type(want))


def test_text_in_a_number_of_transformers(make):
    args = make(learning_rate="1e-5")
    args.weight_decay = "1e-2"
    assert (args.learning_rate, args.weight_decay) == (1e-5, 0.01)
    with pytest.raises(ValueError, match=r"^learning_rate='much' must be a number"):
        args.learning_rate = "much"


@pytest.mark.parametrize("name", ["sam_rho", "sam_ascent_fraction", "sam_end", "sgd_momentum"])
def test_a_search_that_begins_with_an_integer_keeps_the_values_between(make, name):
    args = make(optim="adasam")
    first = 0 if name in ("sam_rho", "sgd_momentum") else 1
    assert [searched(args, name, value) for value in (first, 0.05, 0.5)] == [first, 0.05, 0.5]


@pytest.mark.parametrize("first", ["adamw_torch", "sgd", "adasam", "sgdm", None])
def test_a_search_over_optimizers(make, first):
    """Whichever of the two packages has the first name and the next ones; the enumeration alone would refuse ours."""
    args = make() if first is None else make(optim=first)
    for name in ("adasam", "adafactor", "sam", "amsgrad", OptimizerNames.ADAMW_TORCH):
        assert searched(args, "optim", name) == name
        want = ADASAM if name in ("adasam", "amsgrad") else STOCK
        assert numbers(args) == want and args.resolved_rho == (0.05 if name in ("adasam", "sam") else 0)
        assert type(args.to_dict()["optim"]) is str
    with pytest.raises(ValueError, match="did you mean 'adasam'"):
        searched(args, "optim", "adasm")
    with pytest.raises(ValueError, match="not a valid OptimizerNames"):
        OptimizerNames("adasam")


def test_a_search_of_transformers(tmp_path):
    optuna = pytest.importorskip("optuna", reason="optuna, of the extra `test`, is not installed")
    names, seen = ["adasam", "adamw_torch", "sam"], []

    class Seen(AdaSAMTrainer):
        def train(self, *args, **kwargs):
            self._hp_search_setup(kwargs["trial"])
            seen.append((self.args.optim, self.args.resolved_rho))
            self.objective = 0.0

    args = AdaSAMTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Seen(model_init=lambda: torch.nn.Linear(1, 1), args=args, train_dataset=[])
    trainer.hyperparameter_search(
        lambda trial: {"optim": trial.suggest_categorical("optim", names)},
        n_trials=3,
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"optim": names}, seed=0),
    )
    assert sorted(seen) == [("adamw_torch", 0.0), ("adasam", 0.05), ("sam", 0.05)]


def test_attributes_are_checked_together_when_all_are_set(make):
    """One after the other they may contradict each other for a while."""
    args = make(sam_start=0.1, sam_end=0.2)
    args.sam_start = 0.5
    with pytest.raises(ValueError, match=r"sam_start=0.5 and sam_end=0.2"):
        args.check_together()
    args.sam_end = 0.9
    args.check_together()


@pytest.mark.parametrize("kind", [str, OptimizerNames])
def test_names_that_were_saved_before(make, kind):
    args = make(optim="adamw_torch")
    vars(args)["optim"] = kind("adamw_torch")
    again = pickle.loads(pickle.dumps(args))
    assert searched(again, "optim", "adasam") == "adasam"


# ---- the launcher's flags as defaults ----


@pytest.fixture
def flags():
    yield set_launcher_defaults
    set_launcher_defaults({})


def test_flags_are_defaults_of_every_way_to_make_arguments(make, tmp_path, flags):
    @dataclasses.dataclass(repr=False)
    class Early(AdaSAMTrainingArguments):
        sam_rho: float = 0.2

    flags({"optim": "adasam", "sam_scope": "microbatch", "sam_rho": 0.1})
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to=none"]

    @dataclasses.dataclass(repr=False)
    class Theirs(AdaSAMSeq2SeqTrainingArguments):
        optim: str = dataclasses.field(default="adamw_torch")  # as many scripts have it
        sam_rho: float = 0.3
        mine: int = 1

    for cls in (*CLASSES, Early, Theirs):
        for args in (make(cls), HfArgumentParser(cls).parse_args_into_dataclasses(words)[0], cls(str(tmp_path))):
            assert (args.optim, args.sam_scope, args.sam_rho) == ("adasam", "microbatch", 0.1)
            assert numbers(args) == ADASAM and args.sam_interval == 1
    assert make().arguments_without_effect() == ["sam_scope='microbatch'"]  # it was given, in another place
    flags({"sam_interval": 2})
    for cls, rho in ((AdaSAMTrainingArguments, None), (Early, 0.2)):
        for args in (make(cls), HfArgumentParser(cls).parse_args_into_dataclasses(words)[0]):
            assert (args.optim, args.sam_scope, args.sam_rho) == (TrainingArguments.optim, "batch", rho)
            assert args.sam_interval == 2


@pytest.mark.parametrize("way", WAYS)
def test_a_value_wins_over_a_flag_also_where_it_is_the_default(make, tmp_path, flags, way):
    stock = {"optim": TrainingArguments.optim, "sam_scope": "batch", "sam_interval": 1}
    flags({"optim": "adasam", "sam_scope": "microbatch", "sam_interval": 3})
    words = [f"--{name}={value}" for name, value in stock.items()]
    (parsed,) = HfArgumentParser(AdaSAMTrainingArguments).parse_args_into_dataclasses(
        [f"--output_dir={tmp_path}", *words]
    )
    for args in (make(**stock), parsed, WAYS[way](AdaSAMTrainingArguments, make(), tmp_path, **stock)):
        assert {name: getattr(args, name) for name in stock} == stock


@dataclasses.dataclass(repr=False)
class WithText(AdaSAMTrainingArguments):
    temperature: float = dataclasses.field(default="auto")


def test_a_float_field_of_a_script_may_hold_text(tmp_path):
    assert (
        WithText(str(tmp_path)).temperature == "auto"
        and WithText(str(tmp_path), temperature="1e-3").temperature == 1e-3
    )
    with pytest.raises(ValueError, match="learning_rate='auto' must be a number"):
        WithText(str(tmp_path), learning_rate="auto")
