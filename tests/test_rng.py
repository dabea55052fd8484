import random

import numpy as np
import pytest
import torch
from conftest import DEVICE, Plain, Sharp, flat
from torch import nn

from adasam_hf import rng


def draw():
    return torch.rand(3).tolist(), torch.rand(3, device=DEVICE).tolist(), random.random(), np.random.rand(3).tolist()


def test_replay_draws_the_same_and_leaves_no_trace():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    state = rng.capture()
    first = draw()
    middle = rng.capture()
    with rng.replay(state):
        assert draw() == first
        draw()
    after = draw()
    assert after != first
    with rng.replay(middle):
        assert draw() == after


def test_replay_resumes_after_an_exception():
    state = rng.capture()
    draw()
    here = rng.capture()
    try:
        with rng.replay(state):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    after = draw()
    with rng.replay(here):
        assert draw() == after


class OwnGenerators(nn.Module):
    """Dropout from a generator that the module holds."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.double()
        self.how = how
        self.torch = torch.Generator().manual_seed(0)
        self.numpy = {"inside": np.random.default_rng(0)}
        self.legacy = [np.random.RandomState(0)]
        self.python = random.Random(0)

    def keep(self, shape):
        count = int(np.prod(shape))
        draws = {
            "torch": lambda: torch.rand(shape, generator=self.torch),
            "numpy": lambda: torch.from_numpy(self.numpy["inside"].random(shape)),
            "legacy": lambda: torch.from_numpy(self.legacy[0].rand(*shape)),
            "python": lambda: torch.tensor([self.python.random() for _ in range(count)]).view(shape),
            "global": lambda: torch.rand(shape),
        }
        return draws[self.how]() > 0.5

    def forward(self, x, labels):
        h = torch.tanh(self.first(x))
        return {"loss": nn.functional.cross_entropy(self.second(h * self.keep(tuple(h.shape))), labels)}


def feature_rows():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    return [{"x": x[i], "labels": torch.tensor(i % 3)} for i in range(16)]


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
@pytest.mark.parametrize("how", ["torch", "numpy", "legacy", "python", "global"])
@pytest.mark.compat("Model features", "dropout from generators that modules hold (torch, NumPy, Python)")
def test_generators_of_modules_draw_the_same_in_both_passes(build, how, scope):
    """At a vanishing radius both passes then have one loss, and the run is the stock one."""
    flags = {"gradient_accumulation_steps": 2, "optim": "sgd"}
    model = OwnGenerators(how)
    trainer = build(Sharp, model, feature_rows(), sam_rho=1e-12, sam_scope=scope, **flags)
    trainer.train()
    gaps = [abs(entry["sam_gap"]) for entry in trainer.state.log_history if "loss" in entry]
    assert len(gaps) == 2 and max(gaps) < 1e-10
    stock = OwnGenerators(how)
    build(Plain, stock, feature_rows(), **flags).train()
    assert (flat(model) - flat(stock)).abs().max() < 1e-10


def test_other_masks_would_be_seen(build):
    """The control: with fresh global numbers the gap at a vanishing radius is that of two masks."""
    flags = {"sam_rho": 1e-12, "sam_dropout": "fresh", "optim": "sgd"}
    trainer = build(Sharp, OwnGenerators("global"), feature_rows(), **flags)
    trainer.train()
    assert max(abs(entry["sam_gap"]) for entry in trainer.state.log_history if "loss" in entry) > 1e-3
