"""How far each step goes: the radius as a share of each group's own peak rate, before and after a resume."""

import os

import pytest
import torch
from conftest import Plain, Sharp, flat, make_model, make_rows
from torch.optim import lr_scheduler
from transformers import TrainerCallback

RHO = 0.05


class Radii(TrainerCallback):
    """The planned radii of each step."""

    def __init__(self):
        self.found = []

    def on_step_end(self, *args, **kwargs):
        self.found.append(list(self.trainer._sam_run._window.plan.radii))


def radii_with(build, make_scheduler, rates=(1e-3, 1e-3), callbacks=(), **flags):
    model = make_model("bert")
    layers = [*model.bert.encoder.parameters()], [*model.classifier.parameters()]
    optimizer = torch.optim.SGD([{"params": p, "lr": lr} for p, lr in zip(layers, rates, strict=True)], lr=1e-3)
    look = Radii()
    options = {"max_steps": 12, "sam_rho": RHO, "sam_rho_schedule": "lr", **flags}
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    trainer = build(
        Sharp, model, make_rows(48), callbacks=[look, *callbacks], optimizers=(optimizer, scheduler), **options
    )
    look.trainer = trainer
    trainer.train()
    return look.found


def shares(rates):
    peak, found = 0.0, []
    for rate in rates:
        peak = max(peak, rate)
        found.append(rate / peak if peak else 0.0)
    return found


SCHEDULERS = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-3, total_steps=13),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=1e-4, max_lr=1e-3, step_size_up=4, cycle_momentum=False),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.compat(
    "Cheap ascents", "`sam_rho_schedule=lr` with OneCycleLR, CyclicLR, ReduceLROnPlateau, groups of their own rates"
)
def test_each_group_follows_its_own_rate(build, name):
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=1e-3)
    scheduler = SCHEDULERS[name](optimizer)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = radii_with(build, SCHEDULERS[name])
    assert [one[0] for one in found] == pytest.approx([RHO * share for share in shares(rates)])
    assert all(one[0] == one[1] for one in found) and max(max(one) for one in found) <= RHO


def test_a_group_without_a_rate_stays_and_the_others_climb(build):
    found = radii_with(build, None, rates=(0.0, 1e-3), lr_scheduler_type="constant")
    assert found == [[0.0, RHO]] * 12


def test_a_rate_that_is_no_argument_is_no_matter(build):
    """The optimizer is the trainer's own; `learning_rate` is at its default."""
    found = radii_with(build, lr_scheduler.ReduceLROnPlateau, learning_rate=5e-5)
    assert found == [[RHO, RHO]] * 12


class Falls(TrainerCallback):
    """Halves the rates after steps 3 and 7, as a plateau does."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            if state.global_step in (3, 7):
                group["lr"] /= 2


def test_the_peak_survives_a_resume(build, tmp_path):
    """No group has an initial rate to read it from."""

    def trained(resume=None):
        look, model = Radii(), make_model("bert")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        flags = {"save_strategy": "steps", "save_steps": 5, "max_steps": 12, "sam_rho": 0.3, "sam_rho_schedule": "lr"}
        optimizers = optimizer, lr_scheduler.ReduceLROnPlateau(optimizer)
        trainer = build(Sharp, model, make_rows(48), callbacks=[Falls(), look], optimizers=optimizers, **flags)
        look.trainer = trainer
        trainer.train(resume_from_checkpoint=resume)
        return flat(model), [radius for (radius,) in look.found]

    straight, radii = trained()
    assert radii == pytest.approx([0.3] * 3 + [0.15] * 4 + [0.075] * 5)
    resumed, after = trained(os.path.join(tmp_path, "out", "checkpoint-5"))
    assert after == radii[5:]
    assert torch.equal(resumed, straight)


def test_a_plain_run_leaves_no_file_of_ours(build, tmp_path):
    for kind, more in ((Plain, {}), (Sharp, {"sam_rho": RHO})):
        build(kind, make_model("bert"), make_rows(8), save_strategy="epoch", **more).train()
        assert not list(tmp_path.rglob("sharpness_aware_state.json"))
