"""The optimizer's groups own the parameters, at every step: loss weights, new groups, unfrozen and frozen layers."""

import pytest
import torch
from conftest import InOrder, Sharp, flat, make_model, make_rows
from helpers import LR, ByHand, windows
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback

from adasam_hf import AdaSAM, AdaSAMTrainer

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RHO = 0.3
SCOPES = pytest.mark.parametrize("scope", ["batch", "microbatch"])


def bert():
    return make_model("bert", **NO_DROPOUT)


class Scaled(InOrder):
    """A loss with weights of its own, which the optimizer has and the model does not."""

    scale = None

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return cross_entropy(model(input_ids=inputs["input_ids"]).logits * self.scale, inputs["labels"])


@SCOPES
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.compat("Parameters", "weights of the loss, in the optimizer alone")
def test_weights_of_the_loss_climb_and_lose_no_gradient(build, scope, k):
    rows = make_rows(24)

    def trained(base, **more):
        model, scale = bert(), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = torch.optim.SGD([*model.parameters(), scale], lr=LR)
        kind = type("Own", (Scaled, base), {"scale": scale})
        trainer = build(kind, model, rows, optimizers=(optimizer, None), gradient_accumulation_steps=k, **more)
        # `model.zero_grad()` does not reach it, in stock neither; here each step is to have a gradient of its own
        trainer.add_callback(Clears(scale))
        trainer.train()
        return torch.cat([flat(model), scale.detach()])

    class Clears(TrainerCallback):
        def __init__(self, p):
            self.p = p

        def on_step_end(self, *args, **kwargs):
            self.p.grad = None

    model, scale = bert(), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    by_hand = ByHand(model, lambda ids, y: cross_entropy(model(input_ids=ids).logits * scale, y), [scale])
    for window in windows(rows, k):
        by_hand.step(window, scope, dict.fromkeys(by_hand.params, RHO))
    want = torch.cat([flat(model), scale.detach()])
    got = trained(AdaSAMTrainer, sam_rho=RHO, sam_scope=scope)
    assert (got - want).abs().max() < 1e-12
    plain = trained(Trainer)
    assert (got - plain).abs().max() > 1e-4
    tiny = trained(AdaSAMTrainer, sam_rho=1e-10, sam_scope=scope)
    assert (tiny - plain).abs().max() < 1e-8


class AtStep(TrainerCallback):
    """Does something when the step begins, as gradual unfreezing does."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_begin(self, args, state, control, optimizer=None, lr_scheduler=None, model=None, **kwargs):
        if state.global_step == self.step:
            self.what(model, getattr(optimizer, "optimizer", optimizer), lr_scheduler)


def by_hand_for(model):
    return ByHand(model, lambda ids, labels: model(input_ids=ids, labels=labels).loss)


@SCOPES
@pytest.mark.compat("Parameters", "a parameter group that a callback adds in mid-training")
def test_a_group_that_is_added_climbs_from_then_on(build, scope):
    rows = make_rows(24)
    model = bert()
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)

    def add(model, optimizer, scheduler):
        layer = list(model.bert.encoder.layer[1].parameters())
        for p in layer:
            p.requires_grad_(True)
        optimizer.add_param_group({"params": layer, "lr": LR})
        scheduler.lr_lambdas.append(scheduler.lr_lambdas[0])
        scheduler.base_lrs.append(LR)

    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=LR)
    build(
        Sharp, model, rows, callbacks=[AtStep(3, add)], optimizers=(optimizer, None), sam_rho=RHO, sam_scope=scope
    ).train()

    other = bert()
    other.requires_grad_(False)
    other.classifier.requires_grad_(True)
    hand = by_hand_for(other)
    moving = list(other.classifier.parameters())
    for step, window in enumerate(windows(rows, 1)):
        if step == 3:
            for p in other.bert.encoder.layer[1].parameters():
                p.requires_grad_(True)
                moving.append(p)
        hand.step(window, scope, dict.fromkeys(moving, RHO))
    assert (flat(model) - flat(other)).abs().max() < 1e-12
    without = bert()
    hand = by_hand_for(without)
    for window in windows(rows, 1):
        hand.step(window, scope, dict.fromkeys(without.classifier.parameters(), RHO), without.classifier.parameters())
    assert (flat(model) - flat(without)).abs().max() > 1e-4


def test_a_group_that_is_added_to_adasam_has_the_radius_of_the_argument(build):
    model = bert()
    optimizer = AdaSAM(model.classifier.parameters(), lr=LR, rho=0.9)

    def add(model, optimizer, scheduler):
        optimizer.add_param_group({"params": model.bert.pooler.parameters(), "lr": LR})
        scheduler.lr_lambdas.append(scheduler.lr_lambdas[0])
        scheduler.base_lrs.append(LR)

    radii = []

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            radii.append(list(trainer._sam_run.planner.radii))

    trainer = build(Sharp, model, callbacks=[AtStep(2, add), Look()], optimizers=(optimizer, None), sam_rho=0.1)
    trainer.train()
    assert radii[1] == [0.1] and radii[2] == [0.1, 0.1]


@SCOPES
@pytest.mark.parametrize("which", ["all", "encoder"])
@pytest.mark.compat("Parameters", "layers that are unfrozen or frozen in mid-training")
def test_layers_that_are_thawed_climb_from_then_on(build, scope, which):
    rows = make_rows(24)

    def chosen(name):
        return which == "all" or which in name

    def frozen(model):
        for name, p in model.named_parameters():
            p.requires_grad_("layer.1" in name or "classifier" in name)
        return model

    model = frozen(bert())
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    thaw = AtStep(3, lambda model, *_: model.requires_grad_(True))
    flags = {"sam_rho": RHO, "sam_scope": scope, "sam_parameters": which}
    build(Sharp, model, rows, callbacks=[thaw], optimizers=(optimizer, None), **flags).train()

    def by_hand(thawed_climb=True):
        other = frozen(bert())
        hand = by_hand_for(other)
        first = {p for p in other.parameters() if p.requires_grad}
        for step, window in enumerate(windows(rows, 1)):
            if step == 3:
                other.requires_grad_(True)
            climbing = {p: RHO for name, p in other.named_parameters() if chosen(name) and p.requires_grad}
            if not thawed_climb:
                climbing = {p: rho for p, rho in climbing.items() if p in first}
            hand.step(window, scope, climbing)
        return flat(other)

    assert (flat(model) - by_hand()).abs().max() < 1e-12
    assert (flat(model) - by_hand(thawed_climb=False)).abs().max() > 1e-6


def test_layers_that_are_frozen_stay_where_they_are(build):
    """Along the momentum, too, which the optimizer goes on holding for them; and they no longer count in the norm."""
    model, away = bert(), []

    def look(*_):
        if trainer._perturbation is not None and trainer._perturbation.active:
            now = [p.detach() for p in model.parameters()]
            moved = [(a - b).norm() for a, b in zip(now, clean, strict=True)]
            words = model.bert.embeddings.word_embeddings.weight
            index = next(i for i, p in enumerate(model.parameters()) if p is words)
            away.append((moved[index].item(), torch.stack(moved).norm().item()))

    clean = []

    class Note(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clean[:] = [p.detach().clone() for p in model.parameters()]
            if state.global_step == 3:
                model.bert.embeddings.requires_grad_(False)

    model.register_forward_pre_hook(look)
    trainer = build(Sharp, model, callbacks=[Note()], optim="adasam", sam_preset="free", sam_rho=RHO)
    trainer.train()
    words, everything = zip(*away, strict=True)
    assert [w > 0 for w in words] == [True, True, False, False, False]  # steps 1 to 5; step 0 has no momentum yet
    assert everything == pytest.approx([RHO] * 5, rel=1e-9)


@SCOPES
def test_an_optimizer_that_is_replaced_is_followed(build, scope):
    """From step 2 on another one updates, and what it has is perturbed."""
    rows = make_rows(16)
    model = bert()
    model.bert.requires_grad_(False)

    def replace(model, *_):
        model.requires_grad_(True)
        trainer.optimizer = trainer.accelerator.prepare(torch.optim.SGD(model.parameters(), lr=LR))

    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=LR)
    flags = {"optimizers": (optimizer, None), "sam_rho": RHO, "sam_scope": scope}
    trainer = build(Sharp, model, rows, callbacks=[AtStep(2, replace)], **flags)
    trainer.train()

    def by_hand(followed):
        other = bert()
        other.bert.requires_grad_(False)
        hand = by_hand_for(other)
        for step, window in enumerate(windows(rows, 1)):
            if step == 2:
                other.requires_grad_(True)
            climbing = other.parameters() if step >= 2 and followed else other.classifier.parameters()
            hand.step(window, scope, dict.fromkeys(climbing, RHO))
        return flat(other)

    assert (flat(model) - by_hand(followed=True)).abs().max() < 1e-12
    assert (flat(model) - by_hand(followed=False)).abs().max() > 1e-6
