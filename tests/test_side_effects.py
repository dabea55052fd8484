"""What a loss does besides: what it moves moves once and is the same for both passes, or is refused or told of."""

import dataclasses
import functools
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import InOrder, Plain, Sharp, flat, make_rows
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize
from transformers import Trainer
from transformers.modeling_outputs import BaseModelOutput

from adasam_hf import AdaSAMTrainer, SharpnessAwareTrainerMixin, buffers, containers, step

SCOPES = pytest.mark.parametrize("scope", ["batch", "microbatch"])


class Words(nn.Module):
    """A classifier of bags of words whose features are taken relative to what `remember` knows of earlier ones."""

    def __init__(self, remember=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(40, 8).double(), nn.Linear(8, 3).double()
        self.bank = remember

    def forward(self, input_ids, labels=None):
        h = self.embed(input_ids).mean(1)
        if isinstance(self.bank, dict):
            self.bank["mean"] = 0.9 * self.bank.get("mean", torch.zeros(8)) + 0.1 * h.detach().mean(0)
            h = h - self.bank["mean"]
        elif self.bank is not None:
            self.bank.append(h.detach().mean(0))
            h = h - torch.stack(list(self.bank)).mean(0)
        logits = self.head(h)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def compare_with_stock(build, make_model, behaviour=None, scope="batch", state=lambda trainer: (), **arguments):
    """Largest differences from the stock run at a tiny radius, in weights and in `state`; and at a large one."""

    def trained(base, **more):
        kind = type("Mine", (behaviour, base), {}) if behaviour else base
        trainer = build(
            kind, make_model(), make_rows(24), gradient_accumulation_steps=2, optim="sgd", **more, **arguments
        )
        trainer.train()
        return torch.cat([flat(trainer.model), *(torch.as_tensor(s).double().flatten() for s in state(trainer))])

    stock = trained(Plain)
    tiny, large = (trained(Sharp, sam_rho=rho, sam_scope=scope) for rho in (1e-10, 0.5))
    assert tiny.shape == stock.shape == large.shape  # a list that has grown twice is longer
    return (tiny - stock).abs().max(), (large - stock).abs().max()


BANKS = {"list": list, "deque": lambda: deque(maxlen=4), "dict": dict}


@SCOPES
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.compat("Model features", "lists, deques and dictionaries of a module, such as a memory bank")
def test_what_a_module_keeps_in_collections(build, bank, scope):
    def state(trainer):
        bank = trainer.model.bank
        return list(bank.values() if isinstance(bank, dict) else bank)

    tiny, large = compare_with_stock(build, lambda: Words(BANKS[bank]()), scope=scope, state=state)
    assert tiny < 1e-8 and large > 1e-5


def test_the_control_of_collections(build, monkeypatch):
    monkeypatch.setattr(buffers, "_COPIED", set())
    tiny, _ = compare_with_stock(build, lambda: Words({}), state=lambda trainer: trainer.model.bank.values())
    assert tiny > 1e-5


def test_collections_are_put_back_as_the_same_objects():
    module = Words([torch.ones(8)])
    module.seen, module.sizes = {"a": 1}, {3}
    before, contents = (module.bank, module.seen, module.sizes), ([*module.bank], {"a": 1}, {3})
    state = buffers.ModelState([module])
    module.bank.append(torch.zeros(8))
    module.seen, module.later = {"b": 2}, [1]
    module.sizes.clear()
    assert not state.is_present()
    state.restore()
    assert state.is_present() and not hasattr(module, "later")
    module.later = [1]
    assert not state.is_present()
    del module.later
    now = module.bank, module.seen, module.sizes
    assert all(a is b for a, b in zip(now, before, strict=True)) and now == contents


# ---- of the trainer ----


class Carries(InOrder):
    """Truncated backpropagation: the state of one micro-batch goes into the next."""

    carried = torch.zeros(8)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        holder = model if self.on_model else self
        h = model.embed(inputs["input_ids"]).mean(1) + getattr(holder, "carried", self.carried)
        holder.carried = h.detach().mean(0)
        return cross_entropy(model.head(h), inputs["labels"])


class Accumulates(InOrder):
    """A number that the loss is weighted with, or a tensor that is changed in place."""

    weight, running = 1.0, None

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if self.how == "number":
            self.weight *= 0.9
        if self.how == "in place":
            self.running.mul_(0.9)
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


@pytest.mark.parametrize("how", ["number", "in place", "nothing"])
def test_numbers_and_changes_in_place_on_the_trainer_are_told_of(build, how, caplog):
    trainer = build(type("Mine", (Accumulates, Sharp), {"how": how}), Words(), make_rows(8), optim="sam")
    trainer.weight, trainer.running = 1.0, torch.ones(2)
    trainer.train()
    told = {"number": "(weight)", "in place": "(running)"}.get(how)
    found = [record.message for record in caplog.records if "the trainer keeps what a pass changes" in record.message]
    assert len(found) == (told is not None) and all(told in message for message in found)


@SCOPES
@pytest.mark.compat("Trainer behaviour", "state that `compute_loss` keeps: on the model; told of if on the trainer")
def test_what_a_loss_keeps_on_the_trainer_is_told_of(build, scope, caplog):
    """There are also flags, caches and counters of others, which nobody may put back."""
    on_model, on_trainer = (type("Carries", (Carries,), {"on_model": where}) for where in (True, False))
    tiny, large = compare_with_stock(build, Words, on_model, scope)
    assert tiny < 1e-8 and large > 1e-5 and "the trainer keeps what" not in caplog.text
    tiny, _ = compare_with_stock(build, Words, on_trainer, scope)
    assert tiny > 1e-5
    told = [r.message for r in caplog.records if "the trainer keeps what a pass changes (carried)" in r.message]
    assert len(told) == 2  # once in each run with a radius


class Keeps(InOrder):
    """What scripts keep on a trainer, and expect to find there."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher, self.cache, self.asked = None, {}, 0

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if self.teacher is None:
            self.teacher = nn.Linear(8, 3).double()
            self.first = self.teacher
        key = tuple(inputs["input_ids"].flatten().tolist())
        if key not in self.cache:
            self.asked += 1
            self.cache[key] = len(self.cache)
        return super().compute_loss(model, inputs, return_outputs, **kwargs)

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        self.gradient = model.head.weight.grad  # for a log
        return loss


@SCOPES
def test_caches_flags_and_references_on_the_trainer_stay(build, scope):
    def trained(base, **more):
        trainer = build(
            type("Mine", (Keeps, base), {}), Words(), make_rows(16), gradient_accumulation_steps=2, optim="sgd", **more
        )
        trainer.train()
        return trainer

    stock, tiny = trained(Plain), trained(Sharp, sam_rho=1e-10, sam_scope=scope)
    assert tiny.teacher is tiny.first and tiny.asked == stock.asked == 4 and tiny.cache == stock.cache
    assert (flat(tiny.model) - flat(stock.model)).abs().max() < 1e-8


def test_what_is_made_on_first_use_stays():
    module = Words()
    module.inner = module.numbers = None
    state = buffers.ModelState([module])
    module.inner, module.numbers = nn.Linear(8, 8), iter([1, 2])
    made = module.inner, module.numbers
    state.restore()
    assert (module.inner, module.numbers) == made and "inner" not in vars(module)


# ---- of a loss function ----


def loss_with(norm, outputs, labels, num_items_in_batch=None):
    return cross_entropy(norm(outputs["logits"]), labels)


class Bound:
    def __init__(self, norm):
        self.norm = norm

    def loss(self, outputs, labels, num_items_in_batch=None):
        return loss_with(self.norm, outputs, labels)


def closure_over(norm):
    return lambda outputs, labels, num_items_in_batch=None: loss_with(norm, outputs, labels)


WAYS = {
    "closure": closure_over,
    "partial": lambda norm: functools.partial(loss_with, norm),
    "method": lambda norm: Bound(norm).loss,
    "default": lambda norm: (
        lambda outputs, labels, num_items_in_batch=None, norm=norm: loss_with(norm, outputs, labels)
    ),
}


@SCOPES
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.compat("Model features", "modules that a `compute_loss_func` holds on to")
def test_a_module_that_a_loss_function_holds_moves_once(build, way, scope):
    norm = nn.BatchNorm1d(3).double()
    build(Sharp, Words(), make_rows(16), compute_loss_func=WAYS[way](norm), optim="sam", sam_scope=scope).train()
    assert norm.num_batches_tracked == 4


GENERATOR = np.random.default_rng(0)


class MixesUp(InOrder):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        share = GENERATOR.beta(0.4, 0.4)
        vars(self).setdefault("shares", []).append(share)
        h = model.embed(inputs["input_ids"]).mean(1)
        return cross_entropy(model.head(share * h + (1 - share) * h.flip(0)), inputs["labels"])


@SCOPES
@pytest.mark.compat("Trainer behaviour", "a global generator that `compute_loss` draws from")
def test_a_global_generator_of_a_loss(build, scope):
    start, results = GENERATOR.bit_generator.state, []
    for base, more in ((Plain, {}), (Sharp, {"sam_rho": 1e-10, "sam_scope": scope})):
        GENERATOR.bit_generator.state = start
        trainer = build(type("Mine", (MixesUp, base), {}), Words(), make_rows(16), optim="sgd", **more)
        trainer.train()
        results.append((flat(trainer.model), trainer.shares))
    (stock, shares), (got, again) = results
    assert (
        again == [share for share in shares for _ in range(2)]
        and len(set(shares)) == 4
        and (got - stock).abs().max() < 1e-8
    )


# ---- weights outside the optimizer ----


class Adversary(InOrder):
    """Trains a second model, with an optimizer of its own, inside `compute_loss`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.critic = nn.Linear(8, 3).double()
        self.second = torch.optim.SGD(self.critic.parameters(), lr=0.1)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        h = model.embed(inputs["input_ids"]).mean(1)
        loss = cross_entropy(self.critic(h.detach()), inputs["labels"])
        loss.backward()
        self.second.step()
        self.second.zero_grad()
        return cross_entropy(model.head(h), inputs["labels"])


def test_a_second_optimizer_inside_the_loss_is_refused(build):
    kind = type("Mine", (Adversary, Sharp), {})
    trainer = build(kind, Words(), make_rows(8), optim="sam")
    with pytest.raises(NotImplementedError, match="written to parameters that are not in the optimizer"):
        trainer.train()
    build(kind, Words(), make_rows(8), optim="sam", sam_rho=0.0).train()


class FreezesLate(InOrder):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        model.embed.requires_grad_(False)
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


class CastsTeacher(InOrder):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        self.teacher.double()
        h = model.embed(inputs["input_ids"]).mean(1)
        return cross_entropy(model.head(h) + self.teacher(h.detach()), inputs["labels"])


def test_what_is_no_moving_average_is_not_taken_for_one(build):
    """A layer that is frozen inside the loss; rows that are kept below a norm; a teacher that is cast at first use."""
    build(type("Mine", (FreezesLate, Sharp), {}), Words(), make_rows(8), optim="sam").train()
    model = Words()
    model.embed = nn.Embedding(40, 8, max_norm=0.5).double().requires_grad_(False)
    build(Sharp, model, make_rows(8), optim="sam").train()
    trainer = build(type("Mine", (CastsTeacher, Sharp), {}), Words(), make_rows(8), optim="sam")
    trainer.teacher = nn.Linear(8, 3).requires_grad_(False)
    trainer.train()


# ---- parametrizations that somebody caches ----


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).T


@SCOPES
def test_cached_parametrizations_are_computed_from_the_perturbed_weights(build, scope):
    class Caches(InOrder):
        def training_step(self, *args, **kwargs):
            with parametrize.cached():
                return super().training_step(*args, **kwargs)

    def trained(*bases):
        model = Words()
        model.inner = nn.Linear(8, 8).double()
        parametrize.register_parametrization(model.inner, "weight", Symmetric())
        model.embed = nn.Sequential(model.embed, model.inner)
        build(type("Mine", bases, {}), model, make_rows(16), optim="sam", sam_rho=0.5, sam_scope=scope).train()
        return flat(model)

    assert torch.equal(trained(Caches, Sharp), trained(Sharp))


# ---- inputs at any depth ----


class Doubles(InOrder):
    """Changes an input of a nested batch, in place or by putting another one there."""

    in_place = True

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        batch = inputs["batch"]
        if self.in_place:
            batch.scale.mul_(2)
        else:
            batch.scale = batch.scale * 2
        h = model.embed(inputs["input_ids"]).mean(1) * batch.scale.mean()
        return cross_entropy(model.head(h), inputs["labels"])


def nested(rows):
    ids, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
    return {"input_ids": ids, "labels": labels, "batch": SimpleNamespace(scale=torch.ones(len(rows)).double())}


@pytest.mark.parametrize("in_place", [True, False])
def test_inputs_inside_others_that_a_loss_changes(build, in_place, caplog):
    trainer = build(
        type("Mine", (Doubles, Sharp), {"in_place": in_place}), Words(), make_rows(8), optim="sgd", sam_rho=1e-10
    )
    trainer.data_collator, trainer.args.remove_unused_columns = nested, False
    trainer.train()
    told = [r.message for r in caplog.records if "changes inputs['batch'].scale in place" in r.message]
    assert len(told) == in_place
    plain = build(type("Mine", (Doubles, Plain), {"in_place": in_place}), Words(), make_rows(8), optim="sgd")
    plain.data_collator, plain.args.remove_unused_columns = nested, False
    plain.train()
    same = (flat(trainer.model) - flat(plain.model)).abs().max() < 1e-8
    assert same != in_place  # told of, as nobody can tell whether it matters


@dataclasses.dataclass
class Tree:
    nodes: list
    root: object
    parent: object = None
    cache: object = dataclasses.field(init=False)  # filled later


def test_copies_of_inputs_keep_their_shape():
    """What is in two places, or inside itself, is so in the copy; what is not set is not asked for."""
    node = SimpleNamespace(x=torch.ones(2))
    tree = Tree([node], node)
    tree.parent = tree
    copy = containers.copy_containers({"tree": tree})["tree"]
    assert copy is not tree and copy.parent is copy and copy.root is copy.nodes[0] is not node
    assert copy.root.x is node.x and not hasattr(copy, "cache")
    assert dict(containers.leaves({"tree": tree})) == {"['tree'].nodes[0].x": node.x, "['tree'].root.x": node.x}
    shared = [torch.ones(2)]
    one, other = containers.copy_containers([shared, shared])
    assert one is other is not shared
    output = BaseModelOutput(last_hidden_state=torch.ones(2))
    assert containers.copy_containers([output])[0].last_hidden_state is output.last_hidden_state


# ---- training steps behind the mixin ----


class Averages(InOrder, Trainer):
    """Keeps a moving average inside `training_step`."""

    average = 0.0

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        self.average = 0.9 * self.average + 0.1 * flat(model).norm()
        return loss


def test_a_training_step_behind_the_mixin_is_told_of(build, caplog):
    behind = type("Behind", (SharpnessAwareTrainerMixin, Averages), {})
    build(behind, Words(), make_rows(8), optim="sam").train()
    (told,) = [r.message for r in caplog.records if "behind SharpnessAwareTrainerMixin" in r.message]
    assert "Averages overrides training_step" in told
    caplog.clear()
    build(type("Front", (InOrder, AdaSAMTrainer), dict(vars(Sharp))), Words(), make_rows(8), optim="sam").train()
    assert not [r for r in caplog.records if "behind" in r.message]


def test_the_step_looks_at_the_weights_that_it_does_not_perturb():
    """Of a parameter outside the optimizer: a write, another memory, and a cast, which is none."""
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([module.bias], lr=0.1)

    def written(change):
        (weight,) = step._weights_beside(optimizer, [module])
        change()
        return weight.was_written_to()

    assert not written(lambda: None)
    with torch.no_grad():
        assert written(lambda: module.weight.mul_(2)) and not written(lambda: module.bias.mul_(2))
    assert not written(lambda: setattr(module.weight, "data", module.weight.data * 2))  # trained: moved to and fro
    module.weight.requires_grad_(False)
    assert written(lambda: setattr(module.weight, "data", module.weight.data * 2))
    assert not written(module.double)
