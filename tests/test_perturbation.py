import signal
import threading
import time

import numpy as np
import pytest
import torch
from oracle import Oracle
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from adasam_hf import AdaSAM, Perturbation, kernels

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),  # its groups have a "rho" that is none of ours
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "AdaSAM": lambda p: AdaSAM(p, lr=0.1),
}
LOOP = "devices without fused kernels"


@pytest.fixture(params=["fused", LOOP])
def climb(request, monkeypatch):
    """Both ways of climbing."""
    if request.param == LOOP:
        monkeypatch.setattr(kernels, "_get_fused_kernels_supported_devices", list)
    return request.param


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [(3, 4), (5,), (2, 2)]]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return params


def bits(params):
    return [p.detach().clone() for p in params]


def same(a, b):
    return all(torch.equal(x.view(torch.uint8), y.detach().view(torch.uint8)) for x, y in zip(a, b, strict=True))


def test_direction_and_norm(climb):
    params = parameters()
    optimizer = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    gradients = [p.grad.numpy() for p in params]
    groups = [{"index": [0, 1], "rho": 0.3, "eps": 1.0}, {"index": [2], "rho": 0.7, "eps": 1.0}]
    start = [p.detach().numpy().copy() for p in params]
    want = Oracle(start, groups).perturbed(gradients)
    wrong = Oracle(start, groups, fault="norm_per_parameter").perturbed(gradients)

    norm = Perturbation(optimizer).ascend([0.3, 0.7])
    assert norm.item() == pytest.approx(np.sqrt(sum((g**2).sum() for g in gradients)), rel=1e-14)
    for p, x, y in zip(params, want, wrong, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-14)
        assert not np.allclose(p.detach().numpy(), y, rtol=1e-3)
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_restored_to_the_bit(name, climb):
    params = parameters(torch.float32)
    params[0].data[0, 0] = -0.0
    optimizer = OPTIMIZERS[name](params)
    optimizer.step()  # so that there is state
    before, pointers = bits(params), [p.data_ptr() for p in params]
    state = {k: v.clone() for s in optimizer.state.values() for k, v in s.items() if isinstance(v, torch.Tensor)}
    for p in params:
        p.grad = torch.ones_like(p)
    with Perturbation(optimizer).perturbed(0.1) as norm:
        assert not same(before, params)
        moved = torch.cat([(p - b).reshape(-1) for p, b in zip(params, before, strict=True)])
        assert moved.norm().item() == pytest.approx(0.1, rel=1e-5)
        assert norm.item() == pytest.approx(21**0.5)
    assert same(before, params)
    assert pointers == [p.data_ptr() for p in params]
    after = {k: v for s in optimizer.state.values() for k, v in s.items() if isinstance(v, torch.Tensor)}
    assert state.keys() == after.keys() and all(torch.equal(state[k], after[k]) for k in state)


def test_subtracting_would_not_restore():
    """The control of the test above: undoing the climb by arithmetic loses bits."""
    p = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    delta = 0.1 * torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert not same([p.clone()], [p.add_(delta).sub_(delta)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_climbs_by_a_float32_norm(dtype, climb):
    p = nn.Parameter(torch.zeros(4096, dtype=dtype))
    p.grad = torch.full_like(p, 2.0**11)  # the sum of squares is far beyond float16
    norm = Perturbation(torch.optim.SGD([p], lr=0.1)).ascend(64.0)
    assert norm.dtype == torch.float32
    assert norm.item() == 2.0**17
    torch.testing.assert_close(p.detach(), torch.ones_like(p))  # 64 · 2¹¹ / 2¹⁷


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), float("-inf")])
def test_no_climb_on_a_zero_or_non_finite_norm(bad, climb):
    params = parameters(torch.float32)
    if bad == 0.0:
        for p in params:
            p.grad.zero_()
    else:
        params[1].grad[2] = bad
    before = bits(params)
    handle = Perturbation(torch.optim.SGD(params, lr=0.1))
    norm = handle.ascend(0.1)
    assert norm.item() == 0 if bad == 0.0 else not torch.isfinite(norm)
    assert same(before, params)
    handle.restore()
    assert same(before, params)


def test_no_climb_where_it_would_overflow(climb):
    p = nn.Parameter(torch.ones((), dtype=torch.float32))
    p.grad = torch.full((), 1e-42)  # ρ/‖s‖ is beyond float32
    norm = Perturbation(torch.optim.SGD([p], lr=0.1)).ascend(0.1)
    assert norm.item() > 0 and p.item() == 1.0


def test_what_has_no_gradient_or_no_radius_is_untouched(climb):
    params = parameters()
    params[1].grad = None
    optimizer = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    before = bits(params)
    total = torch.cat([params[0].grad.reshape(-1), params[2].grad.reshape(-1)]).norm()
    with Perturbation(optimizer).perturbed([0.5, 0.0]) as norm:
        assert norm.item() == pytest.approx(total.item())  # a group of radius 0 counts in the norm
        assert not same(before[:1], params[:1])
        assert same(before[1:], params[1:])


def test_groups_added_later_are_seen():
    params = parameters()
    optimizer = torch.optim.SGD(params[:1], lr=0.1)
    handle = Perturbation(optimizer)
    with handle.perturbed(0.1):
        pass
    optimizer.add_param_group({"params": params[1:]})
    for p in params:
        p.grad = torch.ones_like(p)
    before = bits(params)
    with handle.perturbed(0.1):
        assert not any(torch.equal(b, p) for b, p in zip(before, params, strict=True))
    assert same(before, params)


def test_the_host_never_waits():
    """Fake tensors have no values: any `.item()`, `bool()` or `if` on one raises, as the last line shows."""
    with FakeTensorMode():
        p = nn.Parameter(torch.ones(3))
        optimizer = AdaSAM([p])
        p.grad = torch.ones(3)
        norm = optimizer.ascend()
        optimizer.restore()
        p.grad = torch.ones(3)
        optimizer.step()
        with pytest.raises(DataDependentOutputException):
            norm.item()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_restored_when_the_second_pass_fails(error):
    params = parameters(torch.float32)
    before = bits(params)
    with pytest.raises(error), AdaSAM(params).perturbed():
        assert not same(before, params)
        raise error
    assert same(before, params)


def test_restored_after_an_interrupt_at_any_instant():
    """A stream of real interrupts, so that many strike inside ascend(), restore() and the `finally` around them."""
    params = [nn.Parameter(torch.randn(200)) for _ in range(20)]
    before = bits(params)
    optimizer = AdaSAM(params)
    interrupted = 0
    deadline = time.monotonic() + 4.0
    main = threading.main_thread().ident
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    generator = np.random.default_rng(0)
    try:
        while interrupted < 150 and time.monotonic() < deadline:
            timer = threading.Timer(generator.uniform(0, 0.002), signal.pthread_kill, (main, signal.SIGINT))
            try:
                timer.start()
                while True:
                    for p in params:
                        p.grad = torch.ones_like(p)
                    with optimizer.perturbed():
                        for p in params:
                            p.grad = torch.ones_like(p)
            except KeyboardInterrupt:
                interrupted += 1
            timer.join()
            optimizer.restore()  # as the documentation asks of a handler
            assert same(before, params)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert interrupted > 20


def test_misuse_is_explained():
    params = parameters()
    handle = Perturbation(torch.optim.SGD(params, lr=0.1))
    for rho in (-1.0, float("nan"), "0.1"):
        with pytest.raises(ValueError, match="rho="):
            handle.ascend(rho)
    with pytest.raises(ValueError, match="2 radii for 1 parameter groups"):
        handle.ascend([0.1, 0.2])
    handle.ascend(0.1)
    with pytest.raises(RuntimeError, match="already perturbed"):
        handle.ascend(0.1)
    handle.restore()
    handle.restore()  # harmless
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        handle.ascend(0.1)
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        Perturbation(torch.optim.SGD(embedding.parameters(), lr=0.1)).ascend(0.1)


def test_autocast_uses_the_perturbed_weights():
    """Inside one autocast region, the casts of the old weights must not be used again."""
    model = nn.Linear(8, 1, bias=False)
    optimizer = AdaSAM(model.parameters(), rho=3.0)
    x = torch.randn(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        clean = model(x).float().square().mean()
        clean.backward()
        with optimizer.perturbed():
            inside = model(x).float().square().mean()
        after = model(x).float().square().mean()
    assert inside.item() > 1.5 * clean.item()
    assert after.item() == clean.item()


def test_the_saved_copy_is_kept_and_can_be_released():
    params = parameters(torch.float32)
    handle = Perturbation(torch.optim.SGD(params, lr=0.1))
    pointers = []
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        with handle.perturbed(0.1):
            pointers.append([b.data_ptr() for b in handle._buffers.values()])
    assert pointers[0] == pointers[1]
    handle.release()
    assert not handle._buffers
