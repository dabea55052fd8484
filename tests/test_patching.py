"""`adasam_hf.patch()`: the names of Transformers, and the relations between the classes under them."""

import copy
import dataclasses
import pickle
import sys
from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar, runtime_checkable

import pytest
import torch
import transformers
from conftest import flat, make_model, make_rows
from transformers import HfArgumentParser

import adasam_hf
from adasam_hf import (
    AdaSAMSeq2SeqTrainer,
    AdaSAMSeq2SeqTrainingArguments,
    AdaSAMTrainer,
    AdaSAMTrainingArguments,
    SharpnessAwareArgumentsMixin,
    SharpnessAwareTrainerMixin,
)

ADASAM = {
    "Trainer": AdaSAMTrainer,
    "Seq2SeqTrainer": AdaSAMSeq2SeqTrainer,
    "TrainingArguments": AdaSAMTrainingArguments,
    "Seq2SeqTrainingArguments": AdaSAMSeq2SeqTrainingArguments,
}
STOCK = {name: getattr(transformers, name) for name in ADASAM}
QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}


def patched(name="Trainer"):
    """Whether the sharpness-aware class stands under the name."""
    return issubclass(getattr(transformers, name), ADASAM[name])


# ---- names ----


def test_patch_and_undo():
    with adasam_hf.patch():
        from transformers import Trainer, TrainingArguments
        from transformers.trainer import Trainer as FromModule

        assert Trainer is FromModule is transformers.Trainer
        assert all(patched(name) for name in ADASAM)
        assert TrainingArguments("out", optim="adasam", use_cpu=True, report_to="none").resolved_rho == 0.05

        class Mine(Trainer):
            pass

    assert all(getattr(transformers, name) is stock for name, stock in STOCK.items())
    assert transformers.trainer.Trainer is STOCK["Trainer"] and not patched()
    assert issubclass(Mine, AdaSAMTrainer)  # made while it held
    again = adasam_hf.patch()
    assert patched("TrainingArguments")
    again.undo()
    assert not patched("TrainingArguments")
    with pytest.raises(ZeroDivisionError), adasam_hf.patch():
        1 / 0  # noqa: B018
    assert transformers.Trainer is STOCK["Trainer"]


def test_names_that_a_notebook_already_has(monkeypatch):
    notebook = sys.modules["__main__"]
    monkeypatch.setattr(notebook, "Tr", transformers.Trainer, raising=False)
    with adasam_hf.patch():
        assert notebook.Tr is transformers.Trainer and patched()
    assert notebook.Tr is transformers.Trainer is STOCK["Trainer"]


def test_what_is_imported_meanwhile_is_put_back(monkeypatch):
    notebook = sys.modules["__main__"]
    monkeypatch.setattr(notebook, "Mine", AdaSAMTrainer, raising=False)  # of this package, and known to be
    for name in ("Later", "AdaSAMTrainer"):
        monkeypatch.setattr(notebook, name, None, raising=False)
    with adasam_hf.patch():
        notebook.Later, notebook.AdaSAMTrainer = transformers.Trainer, adasam_hf.AdaSAMTrainer
        assert issubclass(notebook.Later, AdaSAMTrainer)
    assert notebook.Later is transformers.Trainer is not AdaSAMTrainer
    assert notebook.Mine is notebook.AdaSAMTrainer is AdaSAMTrainer


def test_of_several_patches_the_last_to_be_undone_counts():
    first, second = adasam_hf.patch(), adasam_hf.patch()
    first.undo()
    first.undo()
    assert patched()
    second.undo()
    assert transformers.Trainer is STOCK["Trainer"]


def test_globals_that_answer_to_everything(monkeypatch):
    class Proxy:
        def __getattr__(self, name):
            raise RuntimeError(name)

        @property
        def __class__(self):
            raise RuntimeError("class")

    monkeypatch.setattr(sys.modules["__main__"], "proxy", Proxy(), raising=False)
    with adasam_hf.patch():
        assert patched()


def test_every_object_of_the_package_transformers_is_patched():
    """Transformers executes itself a second time while it is imported; here the first one is in a function's frame."""
    first = transformers.utils.import_utils._LazyModule(
        "transformers", transformers.__file__, transformers._import_structure, module_spec=transformers.__spec__
    )
    assert first.TrainingArguments is STOCK["TrainingArguments"] and first is not transformers
    with adasam_hf.patch():
        assert first.TrainingArguments is transformers.TrainingArguments is not STOCK["TrainingArguments"]
    assert first.TrainingArguments is STOCK["TrainingArguments"]


# ---- relations ----


def test_relations_between_classes_stay():
    class Early(STOCK["Trainer"]):
        pass

    args = {name: STOCK[name]("out", **QUIET) for name in ("TrainingArguments", "Seq2SeqTrainingArguments")}
    early = Early(model=torch.nn.Linear(1, 1), args=args["TrainingArguments"])

    def relations():
        t = transformers
        return [
            [issubclass(getattr(t, a), getattr(t, b)) for a in ADASAM for b in ADASAM],
            [isinstance(x, getattr(t, name)) for x in (*args.values(), early, 1, int) for name in ADASAM],
            [issubclass(Early, getattr(t, name)) for name in ADASAM],
            [issubclass(getattr(t, name), STOCK[name]) for name in ADASAM],
            [isinstance(getattr(t, kind)("out", **QUIET), getattr(t, name)) for kind in args for name in ADASAM],
            [type(getattr(t, kind)("out", **QUIET)) is getattr(t, kind) for kind in args],
            [getattr(t, name).__name__ == name for name in ADASAM],
        ]

    stock = relations()
    with adasam_hf.patch():
        assert patched() and relations() == stock
        # Nothing stock counts as sharpness-aware.
        assert not isinstance(args["TrainingArguments"], AdaSAMTrainingArguments | SharpnessAwareArgumentsMixin)
        assert not isinstance(early, AdaSAMTrainer | SharpnessAwareTrainerMixin) and not issubclass(
            Early, AdaSAMTrainer
        )
        assert issubclass(AdaSAMTrainer, transformers.Trainer)

        class Late(transformers.Trainer):
            pass

        assert Late.__bases__ == (transformers.Trainer,) and transformers.Trainer in Late.__mro__
        assert issubclass(Late, STOCK["Trainer"]) and not isinstance(early, Late) and not issubclass(Early, Late)
        with pytest.raises(TypeError):
            issubclass(1, transformers.Trainer)


def test_classes_that_scripts_make():
    """With an abstract class, with calls past their own base, and with a mixin of this package in front."""
    with adasam_hf.patch():

        class Abstract(transformers.Seq2SeqTrainer, ABC):
            @abstractmethod
            def reward(self): ...

            def evaluate(self, *args, **kwargs):
                return super(transformers.Seq2SeqTrainer, self).evaluate(*args, **kwargs)

        class Mine(SharpnessAwareTrainerMixin, Abstract):
            def reward(self):
                return 1.0

        @dataclasses.dataclass(repr=False)
        class MyArguments(SharpnessAwareArgumentsMixin, transformers.Seq2SeqTrainingArguments):
            mine: int = 3

        with pytest.raises(TypeError, match="abstract"):
            Abstract()
        args = MyArguments("out", optim="adasam", **QUIET)
        assert args.mine == 3 and args.resolved_rho == 0.05 and args.sortish_sampler is False
        trainer = Mine(model=make_model("bert"), args=args, eval_dataset=make_rows(4))
        assert trainer.evaluate()["eval_loss"] > 0


def test_protocols_generic_classes_and_metaclasses():
    T = TypeVar("T")

    class Rewards(Protocol):
        def reward(self) -> float: ...

    @runtime_checkable
    class Named(Protocol):
        name: str

    class Foreign(type):
        pass

    class WithStock(STOCK["Trainer"], metaclass=Foreign):
        pass

    with adasam_hf.patch():

        class Mine(transformers.Trainer, Rewards, Generic[T]):
            name = "mine"

            def reward(self):
                return 1.0

        assert Mine.reward(None) == 1.0 and isinstance(Mine.__new__(Mine), Named | transformers.Trainer)
        assert issubclass(Mine[int].__origin__, AdaSAMTrainer) and not isinstance(1, Mine)
        assert not isinstance(Mine.__new__(Mine), STOCK["Seq2SeqTrainer"])

        with pytest.raises(TypeError, match="metaclass conflict"):

            class Conflict(transformers.Trainer, metaclass=Foreign):
                pass

        class Both(type(transformers.Trainer), Foreign):  # the remedy that the documentation has
            pass

        class Theirs(transformers.Trainer, metaclass=Both):
            pass

        assert issubclass(Theirs, AdaSAMTrainer) and not issubclass(WithStock, AdaSAMTrainer)


def test_its_trainers_are_those_of_this_package(tmp_path):
    """Bit for bit, with a radius and without; and with one not as in stock."""

    def train(name, module, **kwargs):
        args = getattr(module, f"{name}ingArguments" if name == "Train" else "Seq2SeqTrainingArguments")
        trainer = getattr(module, "Trainer" if name == "Train" else "Seq2SeqTrainer")
        args = args(str(tmp_path), max_steps=2, learning_rate=1e-2, **kwargs, **QUIET)
        trainer = trainer(model=make_model("bert"), args=args, train_dataset=make_rows(16))
        trainer.train()
        return flat(trainer.model)

    class Own:
        Trainer, Seq2SeqTrainer, TrainingArguments, Seq2SeqTrainingArguments = ADASAM.values()

    for name in ("Train", "Seq2Seq"):
        stock = train(name, transformers)
        own = train(name, Own, sam_rho=0.05)
        with adasam_hf.patch():
            assert torch.equal(train(name, transformers, sam_rho=0.05), own) and not torch.equal(own, stock)
            assert torch.equal(train(name, transformers), stock)


# ---- arguments ----


@pytest.mark.parametrize("name", ["TrainingArguments", "Seq2SeqTrainingArguments"])
def test_arguments_are_parsed_replaced_copied_and_saved(name, tmp_path):
    with adasam_hf.patch():
        kind = getattr(transformers, name)
        defaults = [{f.name: f.default for f in dataclasses.fields(cls)} for cls in (kind, ADASAM[name], STOCK[name])]
        assert defaults[0] == defaults[1] != defaults[2]
        words = ["--output_dir=out", "--optim=adasam", "--sam_rho=0.1", "--use_cpu", "--report_to=none"]
        (args,) = HfArgumentParser(kind).parse_args_into_dataclasses(words)
        same = ADASAM[name]("out", optim="adasam", sam_rho=0.1, use_cpu=True, report_to="none")
        assert args.to_dict() == same.to_dict()
        assert dataclasses.replace(args, sam_rho=0.2).sam_rho == 0.2
        torch.save(args, tmp_path / "args.bin")
        assert copy.copy(args) == copy.deepcopy(args) == pickle.loads(pickle.dumps(args)) == args
        assert pickle.loads(pickle.dumps(kind)) is kind
    for again in (torch.load(tmp_path / "args.bin", weights_only=False), copy.deepcopy(args)):
        assert again == args and isinstance(again, ADASAM[name]) and isinstance(again, STOCK[name])


def test_arguments_made_before_can_still_be_saved(tmp_path):
    """Under their names pickle now finds other classes."""
    made = [STOCK[name](str(tmp_path), learning_rate=0.25, **QUIET) for name in list(STOCK)[2:]]
    with adasam_hf.patch():
        for args in made:
            torch.save(args, tmp_path / "args.bin")
            again = torch.load(tmp_path / "args.bin", weights_only=False)
            assert type(again) is type(args) and again.learning_rate == 0.25 and again.to_dict() == args.to_dict()
    torch.save(made[0], tmp_path / "args.bin")
    assert b"adasam_hf" not in (tmp_path / "args.bin").read_bytes()  # afterwards as in stock


def test_trainers_made_before_are_named(caplog):
    class Early(STOCK["Seq2SeqTrainer"]):
        pass

    with adasam_hf.patch():

        class Late(transformers.Seq2SeqTrainer):
            pass

    (said,) = (record.message for record in caplog.records)
    assert f"{__name__}.{Early.__qualname__}" in said and "made before adasam_hf.patch()" in said
    assert Late.__qualname__ not in said
