"""Windows as trainers really hand them on: copied, filtered, emptied, failing in the second pass."""

import copy

import numpy as np
import pytest
import torch
from conftest import InOrder, Plain, Sharp, flat, make_model, make_rows
from helpers import LR, ByHand, Moving, RunsOutOfMemory, windows
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback

from adasam_hf import AdaSAMTrainer, Perturbation, SharpnessAwareTrainerMixin
from adasam_hf.containers import copy_containers, modules_in
from adasam_hf.window import Window

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RHO = 0.3
SCOPES = pytest.mark.parametrize("scope", ["batch", "microbatch"])


def trained(build, kind, rows=None, **more):
    options = {"optim": "sgd", "learning_rate": LR, "gradient_accumulation_steps": 2}
    trainer = build(kind, make_model("bert", **NO_DROPOUT), rows, **(options | more))
    trainer.train()
    return trainer


# ---- a get_batch_samples in front of ours ----


class Copies(InOrder):
    """Hands other dictionaries on, in another list."""

    def get_batch_samples(self, *args, **kwargs):
        samples, items = super().get_batch_samples(*args, **kwargs)
        return [copy.copy(one) for one in samples], items


class ChangesTheList(InOrder):
    """In place, and its tensors, too."""

    def get_batch_samples(self, *args, **kwargs):
        samples, items = super().get_batch_samples(*args, **kwargs)
        samples.reverse()
        for one in samples:
            one["input_ids"] %= 20
        return samples, items


@SCOPES
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_window_that_is_changed_in_place(build, scope, fraction):
    """In front of the mixin as behind it."""
    front = type("Front", (ChangesTheList, AdaSAMTrainer), {})
    behind = type("Behind", (SharpnessAwareTrainerMixin, ChangesTheList, Trainer), {})
    flags = {"sam_rho": RHO, "sam_scope": scope, "sam_ascent_fraction": fraction, "sam_ascent_min_rows": 1}
    found = [flat(trained(build, kind, copy.deepcopy(make_rows(24)), **flags).model) for kind in (front, behind)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], flat(trained(build, Sharp, make_rows(24), **flags).model))


def test_a_look_into_a_window_does_not_move_it():
    window = Window([1, 2, 3])
    found = any(one == 2 for one in window)
    first = next(iter(window))
    assert found and first == 1 and not window.iterating
    assert [window.position_of(one) for one in window] == [0, 1, 2]


class TakesTheFirst(InOrder):
    """Hands on one micro-batch less than there are."""

    def get_batch_samples(self, *args, **kwargs):
        samples, items = super().get_batch_samples(*args, **kwargs)
        return samples[:-1], items


@SCOPES
@pytest.mark.parametrize("flags", [{}, {"sam_ascent_fraction": 0.5}, {"sam_parameters": "classifier"}])
@pytest.mark.compat("Steps that cannot be perturbed", "a `get_batch_samples` that copies or filters micro-batches")
def test_a_window_that_is_copied_is_the_same_window(build, scope, flags):
    class Copied(Copies, AdaSAMTrainer):
        pass

    options = {"gradient_accumulation_steps": 3, "sam_rho": RHO, "sam_scope": scope, **flags}
    iterated, copied = (trained(build, kind, make_rows(24), **options) for kind in (Sharp, Copied))
    per_micro_batch = scope == "batch" and "sam_ascent_fraction" in flags  # rows are then chosen without the others
    if not per_micro_batch:
        assert torch.equal(flat(copied.model), flat(iterated.model))
    names = ("sam_perturbed_steps", "sam_rho")
    entries = [
        [{name: entry.get(name) for name in names} for entry in one.state.log_history if "loss" in entry]
        for one in (iterated, copied)
    ]
    assert entries[0] == entries[1] and all("sam_loss" in e for e in copied.state.log_history if "loss" in e)
    plain = trained(build, Plain, make_rows(24), gradient_accumulation_steps=3)
    assert (flat(copied.model) - flat(plain.model)).abs().max() > 1e-5


def test_rows_of_a_copied_window_are_those_of_the_micro_batch_at_hand(build):
    """In a window that has been turned around: against SAM by hand over a half of each of its micro-batches."""

    class TurnsAround(InOrder):
        def get_batch_samples(self, *args, **kwargs):
            samples, items = super().get_batch_samples(*args, **kwargs)
            return [copy.copy(one) for one in reversed(samples)], items

    class Turned(TurnsAround, AdaSAMTrainer):
        pass

    rows = make_rows(16)
    run = trained(build, Turned, rows, sam_rho=RHO, sam_scope="microbatch", sam_ascent_fraction=0.5)

    def by_hand(picked):
        model = make_model("bert", **NO_DROPOUT)
        hand = ByHand(model, lambda ids, labels: cross_entropy(model(input_ids=ids).logits, labels))
        for window in windows(rows, 2):
            total = {}
            for part in reversed(window):
                seen = [part[i] for i in picked]
                clean = hand.climbed(hand.gradients(seen, 1), dict.fromkeys(model.parameters(), RHO))
                for p, g in hand.gradients(part, 1 / 2).items():
                    total[p] = total.get(p, 0) + g
                with torch.no_grad():
                    for p, value in clean.items():
                        p.copy_(value)
            with torch.no_grad():
                for p, g in total.items():
                    p.sub_(LR * g)
        return flat(model)

    assert (flat(run.model) - by_hand([0, 2])).abs().max() < 1e-12
    assert (flat(run.model) - by_hand([0, 1])).abs().max() > 1e-6


@SCOPES
def test_a_window_with_a_micro_batch_less(build, scope):
    """Its second pass comes after the micro-batches that are really there."""

    class Filtered(TakesTheFirst, AdaSAMTrainer):
        pass

    class FilteredPlain(TakesTheFirst, Trainer):
        pass

    options = {"gradient_accumulation_steps": 2, "max_steps": 2}  # two windows of one make one update
    plain = trained(build, FilteredPlain, make_rows(32), **options)
    tiny = trained(build, Filtered, make_rows(32), sam_rho=1e-10, sam_scope=scope, **options)
    assert plain.state.global_step == tiny.state.global_step == 2
    assert (flat(tiny.model) - flat(plain.model)).abs().max() < 1e-8
    real = trained(build, Filtered, make_rows(32), sam_rho=RHO, sam_scope=scope, **options)
    assert (flat(real.model) - flat(plain.model)).abs().max() > 1e-5
    assert not any("sam_perturbed_steps" in entry for entry in real.state.log_history)


# ---- a training_step behind the mixin ----


class TakesOut(InOrder, Trainer):
    """Takes what is not the model's out of the inputs, as scripts do that weight their rows."""

    def training_step(self, model, inputs, *args, **kwargs):
        weight = inputs.pop("weight").mean()
        return super().training_step(model, inputs, *args, **kwargs) * weight


class TakesOutSharp(SharpnessAwareTrainerMixin, TakesOut):
    pass


@SCOPES
@pytest.mark.compat("Trainer behaviour", "a `training_step` behind the mixin that takes entries out of its inputs")
def test_inputs_are_whole_again_in_the_second_pass(build, scope):
    rows = [{**row, "weight": torch.tensor(2.0)} for row in make_rows()]
    plain = trained(build, TakesOut, rows, remove_unused_columns=False)
    tiny = trained(build, TakesOutSharp, rows, remove_unused_columns=False, sam_rho=1e-10, sam_scope=scope)
    assert (flat(tiny.model) - flat(plain.model)).abs().max() < 1e-8
    real = trained(build, TakesOutSharp, rows, remove_unused_columns=False, sam_rho=RHO, sam_scope=scope)
    assert (flat(real.model) - flat(plain.model)).abs().max() > 1e-5


def test_copies_of_containers():
    tensor = torch.zeros(2)
    value = {"a": [tensor, {"b": tensor}], "c": (tensor,), "d": 1}
    other = copy_containers(value)
    assert other == value and other["a"][1]["b"] is tensor
    other["a"][1].clear()
    other["a"].pop()
    other.pop("c")
    assert value == {"a": [tensor, {"b": tensor}], "c": (tensor,), "d": 1}


# ---- an out-of-memory of the second pass ----


@pytest.mark.parametrize("clears", [False, True])
@pytest.mark.parametrize("flags", [{}, {"sam_parameters": "layer"}])
@pytest.mark.compat("Steps that cannot be perturbed", "an out-of-memory in the second pass")
def test_what_a_failing_second_pass_leaves_is_stock(build, clears, flags, caplog):
    """The micro-batch that fails is left out, as in stock; what has not had its second pass keeps its first."""

    class Fails(RunsOutOfMemory, AdaSAMTrainer):
        """In the second pass of the first micro-batch of the second step."""

        failing = (2,)

    Fails.clears = clears
    rows = make_rows()
    run = trained(build, Fails, rows, sam_rho=RHO, **flags)

    def by_hand(failing=True):
        model = make_model("bert", **NO_DROPOUT)
        hand = ByHand(model, lambda ids, labels: cross_entropy(model(input_ids=ids).logits, labels))
        may_move = {p: RHO for name, p in model.named_parameters() if "layer" in name or not flags}
        for i, window in enumerate(windows(rows, 2)):
            if i == 1 and failing:
                found = hand.gradients(window[1], 1 / 2)
                with torch.no_grad():
                    for p, g in found.items():
                        p.sub_(LR * g)
            else:
                hand.step(window, "batch", may_move)
        return flat(model)

    assert (flat(run.model) - by_hand()).abs().max() < 1e-12
    assert (flat(run.model) - by_hand(failing=False)).abs().max() > 1e-6
    counts = [entry.get("sam_perturbed_steps", 1) for entry in run.state.log_history if "loss" in entry]
    assert counts == [1, 0, 1] and "1 of 1 sharpness-aware steps were plain steps" in caplog.text


# ---- modules that a trainer holds ----


class LossOf(InOrder):
    """The loss runs through a module that is no part of the model: in a dictionary, or put there in mid-training."""

    holds = "dict"

    def compute_loss(self, model, inputs, *args, **kwargs):
        beside = self.losses["one"] if self.holds == "dict" else self.later[0][1]
        return beside(**inputs)["loss"] + 0 * sum(p.sum() for p in model.parameters())


class HoldsLater(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.trainer.later = [(self.trainer.later[0][0], self.module)]


@pytest.mark.parametrize("holds", ["dict", "later"])
@pytest.mark.parametrize("kind", ["counter", "codebook"])
@pytest.mark.compat("Model features", "buffers of modules in a trainer's collections, or added in mid-training")
def test_buffers_of_modules_in_collections_move_once(build, holds, kind):
    def run(base, **more):
        class Mine(LossOf, base):
            pass

        Mine.holds = holds
        first, second = Moving(kind), Moving(kind)
        host = nn.Linear(1, 1).double()
        callback = HoldsLater()
        parameters = [*host.parameters(), *first.parameters(), *second.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=LR)
        trainer = build(Mine, host, callbacks=[callback], optimizers=(optimizer, None), label_names=["labels"],
                        remove_unused_columns=False, gradient_accumulation_steps=2, **more)  # fmt: skip
        trainer.losses, trainer.later = {"one": first, "two": second}, [(first, first)]
        callback.trainer, callback.module = trainer, second
        trainer.train()
        state = [b.double().flatten() for module in (first, second) for b in module.buffers()]
        return torch.cat([flat(first), flat(second), *state])

    plain = run(Trainer)
    assert (run(AdaSAMTrainer, sam_rho=1e-10) - plain).abs().max() < 1e-8
    assert (run(AdaSAMTrainer, sam_rho=RHO) - plain).abs().max() > 1e-6


def test_which_modules_are_found():
    a, b, c = nn.Linear(1, 1), nn.Sequential(nn.ReLU()), nn.Tanh()
    values = [nn.DataParallel(a), {"x": b}, [(c,)], [1, nn.ELU()], "text", {}, [], range(3)]
    assert list(modules_in(values)) == [a, b, c]


# ---- trainings in which nothing ascends ----


class OwnPasses(Trainer):
    """A loop that takes its passes itself, in a class behind the mixin."""

    def _run_epoch(self, model, epoch, train_dataloader, **kwargs):
        for batch in train_dataloader:
            model(**batch).loss.backward()
            self.optimizer.step()
            model.zero_grad()
            self.state.global_step += 1


@pytest.mark.parametrize("rho", [0.05, 0.0])
def test_a_loop_that_bypasses_the_step_is_told_of(build, caplog, rho):
    kind = type("Own", (InOrder, SharpnessAwareTrainerMixin, OwnPasses), {})
    build(kind, make_model("bert"), optim="sgd", sam_rho=rho).train()
    text = "this was plain training, as no step was planned to be perturbed"
    assert (text in caplog.text) == (rho > 0)


def test_a_training_with_nothing_left_to_do_is_no_alarm(build, caplog):
    flags = {"optim": "sgd", "sam_rho": 0.05, "save_strategy": "epoch"}
    build(Sharp, make_model("bert"), **flags).train()
    build(Sharp, make_model("bert"), **flags).train(resume_from_checkpoint=True)
    assert "plain training" not in caplog.text


# ---- layers that are frozen, ascents that are used again ----


def test_steps_in_which_all_that_may_move_is_frozen_are_stock_steps(build, caplog):
    passes = []

    class Freezes(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.classifier.requires_grad_(state.global_step < 2)

    def run(kind, **more):
        options = {"optim": "sgd", "learning_rate": LR, "callbacks": [Freezes()]}
        model = make_model("bert", **NO_DROPOUT)
        model.register_forward_pre_hook(lambda *_: passes.append(trainer.state.global_step))
        trainer = build(kind, model, make_rows(16), **options, **more)
        passes.clear()
        trainer.train()
        return trainer

    sharp = run(Sharp, sam_rho=1e-10, sam_parameters="classifier")
    assert [passes.count(step) for step in range(4)] == [2, 2, 1, 1]
    counts = [entry.get("sam_perturbed_steps", 1) for entry in sharp.state.log_history if "loss" in entry]
    assert counts == [1, 1, 0, 0]
    assert caplog.text.count("plain steps: all parameters that sam_parameters names are frozen") == 1
    assert (flat(sharp.model) - flat(run(Plain).model)).abs().max() < 1e-8


def test_when_an_ascent_is_used_again_does_not_depend_on_the_process(build):
    """A first ascent that came to nothing leaves nothing to use again; the next one is where the interval has it."""
    passes = []

    class SkipsTheFirst(InOrder, AdaSAMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            passes.append(self.state.global_step)
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * 0 if self.state.global_step == 0 else loss

    flags = {"optim": "sgd", "sam_rho": RHO, "sam_interval": 3, "sam_reuse": True}
    build(SkipsTheFirst, make_model("bert", **NO_DROPOUT), make_rows(24), **flags).train()
    assert [passes.count(step) for step in range(6)] == [2, 1, 1, 2, 1, 1]


# ---- state of other kinds ----


MOVED: list[torch.Tensor] = []
"""The weights of each forward pass of a `Tied`. (A list of its own would be put back after the second one.)"""


class Tied(nn.Module):
    """A model some of whose tensors or numbers are unusual; `kind` says which."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.a, self.head = kind, nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()
        if kind == "a buffer in a weight's memory":
            self.register_buffer("tied", self.a.weight.detach())
        if kind == "an attribute in a weight's memory":
            self.tied = self.a.weight.data
        if kind == "an expanded buffer":
            self.register_buffer("mask", torch.ones(1).double().expand(4))
        self.temperature, self.length, self.count, self.recurrent = 1.0, None, np.int64(0), (torch.zeros(4).double(),)

    def forward(self, input_ids, labels):
        MOVED.append(self.a.weight.detach().clone())
        x = torch.nn.functional.one_hot(input_ids % 4, 4).double().mean(1)
        h = torch.tanh(self.a(x))
        if self.kind == "a number":
            self.temperature *= 0.5
            h = h * self.temperature
        if self.kind == "a number that there was not":
            self.length = 1.0 if self.length is None else self.length + 1
            h = h * self.length
        if self.kind == "a number of NumPy":
            self.count = self.count + 1
            h = h * float(self.count)
        if self.kind == "a tuple":
            h = h + self.recurrent[0]
            self.recurrent = (h.detach().mean(0),)
        if self.kind == "an attribute of the first pass":
            self.fresh = getattr(self, "fresh", 0) + 1
            h = h * self.fresh
        if self.kind == "an expanded buffer":
            h = h * self.mask
        return {"loss": cross_entropy(self.head(h), labels)}


TIED = [
    "a buffer in a weight's memory",
    "an attribute in a weight's memory",
    "an expanded buffer",
    "a number",
    "a number that there was not",
    "a number of NumPy",
    "a tuple",
    "an attribute of the first pass",
]


@SCOPES
@pytest.mark.parametrize("kind", TIED)
@pytest.mark.compat(
    "Model features", "numbers that a forward pass counts; buffers in the memory of weights; expanded ones"
)
def test_unusual_state(build, kind, scope):
    def run(base, **more):
        model = Tied(kind)
        options = {"optim": "sgd", "learning_rate": LR, "gradient_accumulation_steps": 2}
        build(base, model, make_rows(16), **options, **more).train()
        return model

    plain = run(Plain)
    tiny = run(Sharp, sam_rho=1e-10, sam_scope=scope)
    assert (flat(tiny) - flat(plain)).abs().max() < 1e-8
    assert (tiny.temperature, tiny.length) == (plain.temperature, plain.length)
    MOVED.clear()
    real = run(Sharp, sam_rho=RHO, sam_scope=scope)
    second = 2 if scope == "batch" else 1  # the first pass at w + δ
    away = (MOVED[second] - MOVED[0]).norm()
    assert away > 0.01  # the weights are there where the second pass begins
    assert (flat(real) - flat(plain)).abs().max() > 1e-6


@SCOPES
def test_generators_of_the_trainer(build, scope):
    """As for mixing rows in `compute_loss`: both passes draw the same."""

    class Mixes(InOrder):
        def compute_loss(self, model, inputs, *args, **kwargs):
            self.drawn = [*getattr(self, "drawn", []), self.numbers.random()]
            return super().compute_loss(model, inputs, *args, **kwargs) * (1 + self.drawn[-1])

    def run(base, **more):
        kind = type("Mixing", (Mixes, base), {})
        trainer = build(kind, make_model("bert", **NO_DROPOUT), optim="sgd", learning_rate=LR, **more)
        trainer.numbers = np.random.default_rng(0)
        trainer.train()
        return trainer

    plain, tiny = run(Trainer), run(AdaSAMTrainer, sam_rho=1e-10, sam_scope=scope)
    assert tiny.drawn == [number for number in plain.drawn for _ in range(2)] and len(set(plain.drawn)) > 1
    assert (flat(tiny.model) - flat(plain.model)).abs().max() < 1e-8


def test_optimizers_inside_backward_are_refused(build):
    model = make_model("bert")
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: None)
    for direction in ("gradient", "noise"):
        with pytest.raises(NotImplementedError, match=r"register_post_accumulate_grad_hook.*or set sam_rho=0"):
            build(Sharp, model, optim="sgd", sam_rho=RHO, sam_direction=direction).train()
    build(Sharp, model, optim="sgd").train()


def test_a_backward_pass_through_a_graph_of_the_old_weights_is_an_error():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    perturbation = Perturbation(torch.optim.SGD(model.parameters(), lr=0.1))
    loss = model(torch.randn(2, 3)).square().mean()
    loss.backward(retain_graph=True)
    with perturbation.perturbed(0.1), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- what callbacks change in mid-training ----


@SCOPES
def test_a_group_that_is_added_between_two_micro_batches(build, scope):
    class Adds(TrainerCallback):
        def on_substep_end(self, args, state, control, lr_scheduler=None, **kwargs):
            if state.global_step == 1 and len(optimizer.param_groups) == 1:
                optimizer.add_param_group({"params": [*model.bert.parameters()], "lr": LR})
                lr_scheduler.lr_lambdas.append(lr_scheduler.lr_lambdas[0])
                lr_scheduler.base_lrs.append(LR)

    model = make_model("bert", **NO_DROPOUT)
    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=LR)
    flags = {"sam_rho": RHO, "sam_scope": scope, "gradient_accumulation_steps": 2}
    before = flat(model)
    run = build(Sharp, model, callbacks=[Adds()], optimizers=(optimizer, None), **flags)
    run.train()
    assert len(optimizer.param_groups) == 2 and (flat(model) - before).abs().max() > 0
    assert not any("sam_perturbed_steps" in entry for entry in run.state.log_history)


def test_arguments_that_a_callback_changes_hold_from_the_next_step_on(build):
    class Changes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                args.sam_scope = "microbatch"

    passes = []

    class Counts(InOrder, AdaSAMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            passes.append((self.state.global_step, inputs["input_ids"][0, 0].item(), inputs["input_ids"][0, 1].item()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    flags = {"optim": "sgd", "sam_rho": RHO, "gradient_accumulation_steps": 2}
    build(Counts, make_model("bert", **NO_DROPOUT), make_rows(32), callbacks=[Changes()], **flags).train()
    orders = [[row for step, *row in passes if step == number] for number in range(4)]
    same_first = [order[0] == order[1] for order in orders]  # microbatch: both passes of one, then of the next
    assert same_first == [False, False, True, True]
