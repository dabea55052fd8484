import pytest
import torch
from conftest import Plain, Sharp, flat, make_rows
from distributed.cases import BatchNormed
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn.utils.parametrizations import spectral_norm

from adasam_hf import buffers


def statistics(model):
    return {name: b.clone() for name, b in model.named_buffers()}


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
@pytest.mark.compat("Model features", "BatchNorm: running statistics move once per step, at w")
def test_they_move_as_in_a_plain_run(build, scope):
    """Radius 1e-30 runs all the machinery and moves no weight."""
    results = []
    for kind, more in ((Plain, {}), (Sharp, {"sam_rho": 1e-30, "sam_scope": scope})):
        model = BatchNormed()
        build(kind, model, make_rows(16), gradient_accumulation_steps=2, mend=False, **more).train()
        results.append(statistics(model))
    want, got = results
    assert want["norm.num_batches_tracked"] == 4
    assert all(torch.equal(got[name], value) for name, value in want.items())


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
def test_they_come_from_the_clean_pass(build, scope):
    model = BatchNormed()
    fed = []
    model.norm.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].detach()))
    build(Sharp, model, make_rows(4), optim="adasam", sam_rho=0.5, sam_scope=scope, mend=False).train()
    clean, perturbed = fed
    assert torch.allclose(model.norm.running_mean, 0.1 * clean.mean(0), rtol=1e-12)
    assert not torch.allclose(model.norm.running_mean, 0.1 * perturbed.mean(0), rtol=1e-3)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)])
def test_unchanged(layer):
    x = torch.randn(4, 3, 5)
    layer(x)
    before = statistics(layer)
    with pytest.raises(KeyError), buffers.unchanged(layer):
        y = layer(2 * x)
        raise KeyError
    assert before and all(torch.equal(b, before[name]) for name, b in layer.named_buffers())
    assert torch.allclose(y.mean((0, 2)), torch.zeros(3), atol=1e-6)  # by its own batch
    layer(2 * x)
    assert not torch.equal(layer.running_mean, before["running_mean"])


def test_layers_without_statistics_are_left_alone():
    with buffers.unchanged(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3))) as nothing:
        assert nothing is None


# ---- what a forward pass leaves behind moves once, and the second pass starts from where the first one did ----


class Moving(nn.Module):
    """A classifier of bags of words through one of several layers whose state moves with every forward pass."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed, self.layer, self.head = nn.Embedding(40, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.observe = nn.Identity()
        if kind == "spectral norm":
            self.layer = spectral_norm(self.layer)
        if kind == "quantization observer":
            self.observe = FakeQuantize(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
        self.register_buffer("centre", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.attribute = torch.zeros(8)
        self.double()

    def forward(self, input_ids, labels):
        h = self.layer(self.observe(self.embed(input_ids).mean(1)))
        if self.kind == "codebook":  # written through .data, as vector quantization does, which counts no version
            self.centre.data.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
            h = h - self.centre
        if self.kind == "replaced buffer":
            self.centre = 0.9 * self.centre + 0.1 * h.detach().mean(0)
            h = h - self.centre
        if self.kind == "counter":
            self.calls += 1
            h = h / self.calls
        if self.kind == "attribute":
            self.attribute = 0.9 * self.attribute + 0.1 * h.detach().mean(0)
            h = h - self.attribute
        return {"loss": nn.functional.cross_entropy(self.head(torch.relu(h)), labels)}


KINDS = ["spectral norm", "quantization observer", "codebook", "replaced buffer", "counter", "attribute"]


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.compat("Model features", "buffers that forward passes move: spectral norm, observers, codebooks, counters")
def test_state_moves_once_and_is_the_same_in_both_passes(build, kind, scope):
    """Then a tiny radius is the stock run, in its weights as in its buffers, to the end."""

    def trained(base, **more):
        model = Moving(kind)
        build(base, model, make_rows(16), gradient_accumulation_steps=2, optim="sgd", **more).train()
        state = [b.double().flatten() for b in model.buffers()] + [model.attribute.double()]
        return torch.cat([flat(model), *state])

    stock = trained(Plain)
    assert (trained(Sharp, sam_rho=1e-10, sam_scope=scope) - stock).abs().max() < 1e-8
    assert (trained(Sharp, sam_rho=0.5, sam_scope=scope) - stock).abs().max() > 1e-5


def test_the_state_does_move(build):
    """The control: what the tests above compare is not at rest."""
    for kind in KINDS:
        model = Moving(kind)
        before = [b.clone() for b in model.buffers()] + [model.attribute]
        batch = {key: torch.stack([row[key] for row in make_rows(4)]) for key in ("input_ids", "labels")}
        model.train()(**batch)
        after = [*model.buffers(), model.attribute]
        assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)), kind


def test_a_replaced_buffer_is_the_same_object_again():
    model = Moving("replaced buffer")
    before = model.centre
    with buffers.unchanged(model):
        model.centre = torch.ones(8)
    assert model.centre is before and not before.any()
