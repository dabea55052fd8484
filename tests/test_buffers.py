import pytest
import torch
from conftest import Plain, Sharp, flat, make_rows
from distributed.cases import BatchNormed
from helpers import Moving
from torch import nn

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
