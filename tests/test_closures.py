"""step(closure) in other people's loops: right, against a loop by hand, or refused before anything is updated."""

import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.distributed.fsdp import fully_shard

from adasam_hf import AdaSAM, Perturbation
from adasam_hf.directions import innermost

RHO, LR = 0.5, 0.1


def problem(batches=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(6, 4, generator=generator).double(), torch.randint(0, 3, (6,), generator=generator))
        for _ in range(batches)
    ]
    return model, data


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def by_hand(accumulate=1, rho=RHO, betas=(0.9, 0.98), eps=1e-6):
    """Algorithm 1 without the package."""
    model, data = problem()
    params = list(model.parameters())
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    top = [torch.full_like(p, eps**2) for p in params]

    def gradient(window):
        return torch.autograd.grad(sum(loss_of(model, batch) for batch in window) / len(window), params)

    for i in range(0, len(data), accumulate):
        window = data[i : i + accumulate]
        s = gradient(window)
        norm = sum(g.square().sum() for g in s).sqrt()
        with torch.no_grad():
            for p, g in zip(params, s, strict=True):
                p += rho * g / norm
        descent = gradient(window)
        with torch.no_grad():
            for p, a, g, x, y, z in zip(params, s, descent, m, v, top, strict=True):
                p -= rho * a / norm
                x.mul_(betas[0]).add_((1 - betas[0]) * g)
                y.mul_(betas[1]).add_((1 - betas[1]) * g * g)
                z.copy_(torch.maximum(z, y))
                p -= LR * x / z.sqrt()
    return weights(model)


def optimizer_for(model, rho=RHO):
    return AdaSAM(model.parameters(), lr=LR, rho=rho)


def agree(model, *args, **kwargs):
    return (weights(model) - by_hand(*args, **kwargs)).abs().max() < 1e-13


def test_the_loop_by_hand_tells_them_apart():
    """The control: accumulation and the radius matter."""
    ends = [by_hand(), by_hand(accumulate=2), by_hand(rho=0.0), by_hand(accumulate=2, rho=0.0)]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(ends) for b in ends[:i])


CLEAR = {
    "zero_grad()": lambda model, optimizer: optimizer.zero_grad(),
    "in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "by the model": lambda model, optimizer: model.zero_grad(),
    "by the model, in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("where", ["inside", "outside", "outside, after the loss"])
@pytest.mark.parametrize("clear", CLEAR)
def test_a_closure(clear, where):
    model, data = problem()
    optimizer = optimizer_for(model)
    for batch in data:

        def closure(batch=batch):
            loss = loss_of(model, batch)
            if where == "inside":
                CLEAR[clear](model, optimizer)
            loss.backward()
            return loss

        if where == "outside":
            CLEAR[clear](model, optimizer) if "in place" not in clear or batch is not data[0] else None
        optimizer.step(closure)
        if where == "outside, after the loss":
            CLEAR[clear](model, optimizer)
    assert agree(model)


@pytest.mark.parametrize("clear", CLEAR)
def test_a_closure_that_adds_to_gradients_is_refused(clear):
    model, data = problem()
    optimizer = optimizer_for(model)
    loss_of(model, data[0]).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match="would have no second pass"):
        optimizer.step(lambda: loss_of(model, data[1]).backward())
    assert torch.equal(before, weights(model))
    CLEAR[clear](model, optimizer)  # and one can go on
    optimizer.step(lambda: loss_of(model, data[1]).backward())
    assert not torch.equal(before, weights(model))


def test_at_radius_zero_accumulation_with_a_closure_is_right():
    model, data = problem()
    optimizer = optimizer_for(model, rho=0.0)
    for i in (0, 2):
        optimizer.zero_grad()
        (loss_of(model, data[i]) / 2).backward()
        optimizer.step(lambda i=i: (loss_of(model, data[i + 1]) / 2).backward())
    assert agree(model, accumulate=2, rho=0.0)


@pytest.mark.parametrize("who", ["optimizer", "perturbation"])
@pytest.mark.parametrize("after", ["nothing", "clipping"])
def test_a_closure_that_does_nothing_after_an_ascent(who, after):
    model, data = problem()
    optimizer = optimizer_for(model)
    perturbation = Perturbation(optimizer)

    def closure():
        if after == "clipping":  # as a Lightning hook may, between the closure and the update
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)

    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        with optimizer.perturbed() if who == "optimizer" else perturbation.perturbed(RHO):
            loss_of(model, batch).backward()
        optimizer.step(closure)
    assert agree(model)


@pytest.mark.parametrize("clears", [False, True])
@pytest.mark.parametrize("rho", [0.0, RHO])  # of the groups, in which a Perturbation is not bound to believe
def test_a_closure_that_computes_after_an_ascent_is_refused(clears, rho):
    model, data = problem()
    optimizer = optimizer_for(model, rho)
    loss_of(model, data[0]).backward()
    with Perturbation(optimizer).perturbed(RHO):
        loss_of(model, data[0]).backward()
    before = weights(model)

    def closure():
        if clears:
            optimizer.zero_grad()
        loss_of(model, data[0]).backward()

    with pytest.raises(RuntimeError, match="those of the second pass are already there"):
        optimizer.step(closure)
    assert torch.equal(before, weights(model))


def test_a_closure_after_an_ascent_whose_step_was_left_out():
    model, data = problem()
    optimizer = optimizer_for(model)
    loss_of(model, data[0]).backward()
    with optimizer.perturbed():
        loss_of(model, data[0]).backward()
    optimizer.zero_grad()
    for batch in data:

        def closure(batch=batch):
            optimizer.zero_grad()
            loss_of(model, batch).backward()

        optimizer.step(closure)
    assert agree(model)


def test_a_closure_that_skips_its_batch():
    """As Lightning's where training_step returns None: gradients are cleared, nothing is computed, nothing moves."""
    model, data = problem()
    optimizer = optimizer_for(model)
    for batch in (data[0], None, *data[1:]):

        def closure(batch=batch):
            optimizer.zero_grad()
            if batch is not None:
                loss_of(model, batch).backward()

        optimizer.step(closure)
    assert agree(model)


def test_step_on_perturbed_weights_calls_no_closure():
    model, data = problem()
    optimizer = optimizer_for(model)
    loss_of(model, data[0]).backward()
    optimizer.ascend()
    with pytest.raises(RuntimeError, match="still perturbed"):
        optimizer.step(lambda: pytest.fail("called"))
    optimizer.restore()


# ---- a radius, and nothing ascends ----


def plain_step(model, optimizer, batch, closure):
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step(closure)


@pytest.mark.parametrize("closure", [None, lambda: None])
def test_a_plain_step_with_a_radius_warns_once(closure):
    model, data = problem()
    optimizer = optimizer_for(model)
    optimizer.step()  # without gradients, which some do to make the state
    with pytest.warns(UserWarning, match=r"rho=0.5 but no ascent has come before step.*set rho=0") as seen:
        for batch in data:
            plain_step(model, optimizer, batch, closure)
    assert len(seen) == 1
    assert agree(model, rho=0.0)
    with pytest.warns(UserWarning, match="no ascent"):  # once for each optimizer
        plain_step(model, optimizer_for(model), data[0], closure)


@pytest.mark.parametrize("silent", ["radius 0", "ascended", "by a Perturbation", "in a wrapper", "told"])
def test_no_warning_where_it_is_meant_so(silent):
    model, data = problem()
    optimizer = optimizer_for(model, rho=0.0 if silent == "radius 0" else RHO)
    if silent == "told":
        optimizer.warn_without_ascent = False
    elif silent != "radius 0":
        wrapper = Wrapper(optimizer)
        loss_of(model, data[0]).backward()
        perturbed = {
            "ascended": optimizer.perturbed,
            "by a Perturbation": lambda: Perturbation(optimizer).perturbed(0.1),
            "in a wrapper": lambda: Perturbation(wrapper).perturbed(0.1),
        }[silent]
        with perturbed():
            loss_of(model, data[0]).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in data:
            plain_step(model, optimizer, batch, None)


class Wrapper:
    """As AcceleratedOptimizer and LightningOptimizer: groups, and the optimizer in `.optimizer`."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups


def test_the_innermost_optimizer():
    optimizer = AdaSAM([nn.Parameter(torch.ones(2))])
    assert innermost(optimizer) is innermost(Wrapper(optimizer)) is innermost(Wrapper(Wrapper(optimizer))) is optimizer


# ---- Lightning ----


class Lightning:
    """How pytorch-lightning 2.6 drives an optimizer. (Automatic: the closure clears in the first micro-batch of a
    window alone, is called by Lightning itself for all but the last, and is passed to step() for that one, in a second
    closure that may clip. Manual: step() gets a closure that does nothing.)"""

    def __init__(self, model, optimizer, accumulate=1):
        self.model, self.optimizer, self.accumulate = model, optimizer, accumulate

    def closure(self, batch, i):
        loss = loss_of(self.model, batch) / self.accumulate
        if i % self.accumulate == 0:
            self.optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    def step(self, closure):
        def wrapped():
            result = closure()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1e9)
            return result

        return self.optimizer.step(closure=wrapped)

    def fit(self, data):
        for i, batch in enumerate(data):
            closure = partial(torch.enable_grad()(self.closure), batch, i)
            if (i + 1) % self.accumulate:
                closure()
            else:
                self.step(closure)

    def manual_step(self):
        self.step(lambda: None)


def test_as_lightning_does_automatically():
    model, data = problem()
    Lightning(model, optimizer_for(model)).fit(data)
    assert agree(model)


def test_as_lightning_accumulates():
    model, data = problem()
    before = weights(model)
    with pytest.raises(RuntimeError, match="would have no second pass"):
        Lightning(model, optimizer_for(model), accumulate=2).fit(data)
    assert torch.equal(before, weights(model))
    Lightning(model, optimizer_for(model, rho=0.0), accumulate=2).fit(data)
    assert agree(model, accumulate=2, rho=0.0)


def test_as_lightning_does_by_hand():
    model, data = problem()
    lightning = Lightning(model, optimizer_for(model))
    for batch in data:
        lightning.optimizer.zero_grad()
        loss_of(model, batch).backward()
        with lightning.optimizer.perturbed():
            loss_of(model, batch).backward()
        lightning.manual_step()
    assert agree(model)


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "manual"), [(1, False), (2, False), (1, True)])
def test_lightning_itself(accumulate, manual, tmp_path):
    lightning = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.data = problem()
            self.automatic_optimization = not manual

        def train_dataloader(self):
            return torch.utils.data.DataLoader(self.data, batch_size=None)

        def configure_optimizers(self):
            return optimizer_for(self.model)

        def training_step(self, batch, _):
            if not manual:
                return loss_of(self.model, batch)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss_of(self.model, batch))
            with optimizer.optimizer.perturbed():
                self.manual_backward(loss_of(self.model, batch))
            optimizer.step()

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    if accumulate > 1:
        with pytest.raises(RuntimeError, match="would have no second pass"):
            trainer.fit(module)
    else:
        trainer.fit(module)
        assert agree(module.model)


# ---- Accelerate ----


@pytest.fixture
def accelerator_for():
    def make(steps):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return Accelerator(cpu=True, gradient_accumulation_steps=steps)

    yield make
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_closure_under_accelerate(accelerator_for, steps):
    accelerator = accelerator_for(steps)
    model, data = problem()
    prepared, optimizer = accelerator.prepare(model, optimizer_for(model))
    before = weights(model)

    def train():
        for batch in data:
            with accelerator.accumulate(prepared):

                def closure(batch=batch):
                    optimizer.zero_grad()
                    accelerator.backward(loss_of(prepared, batch))

                optimizer.step(closure)

    if steps == 1:
        train()
        assert agree(model)
    else:
        with pytest.raises(RuntimeError, match="Accelerate accumulates gradients over 2 micro-batches"):
            train()
        assert torch.equal(before, weights(model))
        # What Accelerate does elsewhere is nobody's business.
        model, data = problem()
        optimizer = optimizer_for(model)
        Lightning(model, optimizer).fit(data)
        assert agree(model)


def test_accumulation_under_accelerate_with_both_passes_written_out(accelerator_for):
    """What the refusal above asks for."""
    accelerator = accelerator_for(2)
    model, data = problem()
    prepared, optimizer = accelerator.prepare(model, optimizer_for(model))
    perturbation = Perturbation(optimizer)
    for i in (0, 2):
        for batch in data[i : i + 2]:
            with accelerator.accumulate(prepared):
                accelerator.backward(loss_of(prepared, batch))
        with perturbation.perturbed(RHO):
            for batch in data[i : i + 2]:
                accelerator.backward(loss_of(prepared, batch))
        optimizer.step(lambda: None)
        optimizer.zero_grad()
    assert agree(model, accumulate=2)


# ---- FSDP2, whose gradients arrive without a hook ----


def test_under_fsdp2():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, data = problem()
        fully_shard(model)
        optimizer = optimizer_for(model)
        Lightning(model, optimizer).fit(data[:2])
        for batch in data[2:]:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            with optimizer.perturbed():
                loss_of(model, batch).backward()
            optimizer.step(lambda: None)
        whole = torch.cat([p.full_tensor().detach().reshape(-1) for p in model.parameters()])
        assert (whole - by_hand()).abs().max() < 1e-13
        with pytest.raises(RuntimeError, match="would have no second pass"):
            optimizer.step(lambda: loss_of(model, data[0]).backward())
        optimizer.zero_grad()
        loss_of(model, data[0]).backward()
        with optimizer.perturbed():
            loss_of(model, data[0]).backward()
        loss_of(model, data[1]).backward()
        with pytest.raises(RuntimeError, match="neither step"):
            optimizer.ascend()
    finally:
        torch.distributed.destroy_process_group()


# ---- ZeroRedundancyOptimizer ----


@pytest.mark.slow
def test_zero_redundancy_optimizer(tmp_path):
    """Two processes; what each of them finds is in distributed/zero.py."""
    script = Path(__file__).parent / "distributed" / "zero.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-4000:]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for one in found:
        assert torch.equal(one["zero"], found[0]["zero"]) and torch.equal(one["plain"], found[0]["plain"])
        assert (one["zero"] - one["plain"]).abs().max() < 1e-14
        assert (one["zero"] - one["radius 0"]).abs().max() > 1e-3
        assert 0 < one["parameters"] < sum(other["parameters"] for other in found) == 4  # each has a shard
        for refused in one["refused"]:
            assert "Perturbation(zero_optimizer).perturbed(rho)" in refused
        assert len(one["refused"]) == 3
