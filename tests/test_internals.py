"""Of Transformers' Trainer, what the step extends is there, or is missed before anything is trained."""

import pytest
from conftest import make_model
from helpers import ROOT, read_setup
from transformers import Trainer

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
