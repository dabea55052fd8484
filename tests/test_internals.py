"""Of Transformers' Trainer, what the step extends is there, or is missed before anything is trained."""

import functools
import inspect

import pytest
from conftest import make_model
from helpers import ROOT, read_setup
from transformers import Trainer, TrainingArguments

from adasam_hf import AdaSAMTrainer, AdaSAMTrainingArguments
from adasam_hf.card import ModelCardMixin
from adasam_hf.checkpoints import CompleteCheckpointsMixin
from adasam_hf.internals import EXTENDED, NEWEST_TESTED, OLDEST_TESTED, check_internals
from adasam_hf.trainer import SharpnessAwareTrainerMixin

MIXINS = (ModelCardMixin, CompleteCheckpointsMixin, SharpnessAwareTrainerMixin)


def test_the_list_is_what_the_mixins_extend():
    defined = {name for mixin in MIXINS for name in vars(mixin) if not name.startswith("__")}
    assert sorted(defined & set(dir(Trainer))) == sorted(EXTENDED)


@pytest.mark.parametrize("name", EXTENDED)
def test_one_that_is_missing_is_named(name):
    all_but_one = type("Trainer", (), {other: print for other in EXTENDED if other != name})
    with pytest.raises(ImportError, match=rf"^transformers 9\.9 has no Trainer\.{name}, .*=={NEWEST_TESTED}, the last"):
        check_internals(all_but_one, "9.9")
    setattr(all_but_one, name, print)
    check_internals(all_but_one, "9.9")


def test_it_is_missed_at_construction(tmp_path, monkeypatch):
    monkeypatch.delattr(Trainer, "_clip_grad_norm")
    arguments = AdaSAMTrainingArguments(str(tmp_path), optim="adasam", use_cpu=True, report_to="none")
    with pytest.raises(ImportError, match=r"no Trainer\._clip_grad_norm"):
        AdaSAMTrainer(model=make_model("bert"), args=arguments)
    Trainer(model=make_model("bert"), args=arguments)  # which can do without until it trains


def test_one_place_says_which_versions_were_tested():
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    assert f"the tests were run on {OLDEST_TESTED} and {NEWEST_TESTED}" in page
    floor = next(w for w in read_setup()["options"]["install_requires"].split() if w.startswith("transformers>="))
    assert OLDEST_TESTED.startswith(floor.removeprefix("transformers>="))


@pytest.mark.parametrize("name", ["__init__", *EXTENDED])
def test_methods_show_the_signature_of_the_stock_ones(name):
    """Scripts look there, to see which arguments a Trainer takes."""
    ours, stock = (list(inspect.signature(getattr(kind, name)).parameters) for kind in (AdaSAMTrainer, Trainer))
    assert ours == stock
    assert name != "__init__" or inspect.signature(AdaSAMTrainer) == inspect.signature(Trainer)


class TakesMore(Trainer):
    def __init__(self, model, more=None, args=None):
        super().__init__(model, args)
        self.more = more


class TakesAnything(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


def test_a_class_behind_the_mixin_shows_its_own(tmp_path):
    kind = type("Kind", (SharpnessAwareTrainerMixin, TakesMore), {})
    assert inspect.signature(kind.__init__) == inspect.signature(TakesMore.__init__)
    assert inspect.signature(type("Later", (kind,), {}).__init__) == inspect.signature(TakesMore.__init__)


@pytest.mark.parametrize("behind", [Trainer, TakesMore, TakesAnything])
def test_arguments_are_found_wherever_a_class_takes_them(behind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind, model = type("Kind", (SharpnessAwareTrainerMixin, behind), {}), make_model("bert")
    arguments = AdaSAMTrainingArguments(str(tmp_path), optim="adasam", use_cpu=True, report_to="none")
    assert kind(model=model, args=arguments).args is arguments
    before = (model, 3) if behind is TakesMore else (model,)
    assert kind(*before, arguments).args is arguments
    assert type(kind(*before, None).args) is type(kind(*before).args) is AdaSAMTrainingArguments
    stock = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    for positional, named in ((before, {"args": stock}), ((*before, stock), {})):
        with pytest.raises(TypeError, match="args=TrainingArguments has no sharpness-aware arguments"):
            kind(*positional, **named)


class MakesItsOwn(Trainer):
    def __init__(self, model, config):
        super().__init__(model, config.pop("kind")(**config))


def test_arguments_that_a_class_behind_makes_itself(tmp_path):
    kind = type("Kind", (SharpnessAwareTrainerMixin, MakesItsOwn), {})
    config = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    assert kind(make_model("bert"), {**config, "kind": AdaSAMTrainingArguments}).args.use_cpu
    with pytest.raises(TypeError, match="args=TrainingArguments has no sharpness-aware arguments"):
        kind(make_model("bert"), {**config, "kind": TrainingArguments})
    with pytest.raises(TypeError, match="args=int has no sharpness-aware arguments"):
        AdaSAMTrainer(make_model("bert"), 3)


def test_constructors_of_subclasses_are_all_called(tmp_path, monkeypatch):
    """In the order of inheritance, diamonds and patches included."""
    arguments = AdaSAMTrainingArguments(str(tmp_path), optim="adasam", use_cpu=True, report_to="none")

    class WithSampler(AdaSAMTrainer): ...

    class WithLoss(AdaSAMTrainer):
        def __init__(self, *args, alpha=0.5, **kwargs):
            super().__init__(*args, **kwargs)
            self.alpha = alpha

    class Extra(SharpnessAwareTrainerMixin):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = True

    assert type("Mine", (WithSampler, WithLoss), {})(make_model("bert"), arguments, alpha=1).alpha == 1
    assert type("Mine", (AdaSAMTrainer, Extra), {})(make_model("bert"), arguments).extra

    class Wrapped(AdaSAMTrainer):
        @functools.wraps(AdaSAMTrainer.__init__)
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.mine = True

    assert Wrapped(make_model("bert"), arguments).mine
    seen, plain = [], AdaSAMTrainer.__init__

    def patched(self, *args, **kwargs):
        seen.append(type(self))
        plain(self, *args, **kwargs)

    monkeypatch.setattr(AdaSAMTrainer, "__init__", patched)
    WithSampler(make_model("bert"), arguments)
    assert seen == [WithSampler]


def test_a_trainer_may_have_attributes_of_any_public_or_private_name(tmp_path):
    """What the mixin keeps on a trainer has names that a script's own attributes do not have."""
    added = {name for mixin in MIXINS for name in vars(mixin) if not name.startswith("__")} - set(EXTENDED)
    arguments = AdaSAMTrainingArguments(str(tmp_path), optim="adasam", use_cpu=True, report_to="none")
    added |= (
        vars(AdaSAMTrainer(make_model("bert"), arguments)).keys() - vars(Trainer(make_model("bert"), arguments)).keys()
    )
    assert {name for name in added if not name.startswith("_sam_")} == {"_perturbation"}
