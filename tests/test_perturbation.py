import signal
import threading
import time
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import DEVICE
from oracle import Oracle
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from adasam_hf import AdaSAM, Perturbation, activity, kernels
from adasam_hf.directions import Gradient, Last, Momentum, PreviousAscent

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),  # its groups have a "rho" that is none of ours
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "AdaSAM": lambda p: AdaSAM(p, lr=0.1, rho=0.0),
}
LOOP = "devices without fused kernels"


@pytest.fixture(params=["fused", LOOP])
def climb(request, monkeypatch):
    """Both ways of perturbing."""
    if request.param == LOOP:
        monkeypatch.setattr(kernels, "_get_fused_kernels_supported_devices", list)
    return request.param


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (2, 2)]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(DEVICE, dtype)
    return params


def bits(params):
    return [p.detach().clone() for p in params]


def same(a, b):
    return all(torch.equal(x.view(torch.uint8), y.detach().view(torch.uint8)) for x, y in zip(a, b, strict=True))


def test_direction_and_norm(climb):
    params = parameters()
    optimizer = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    gradients = [p.grad.cpu().numpy() for p in params]
    groups = [{"index": [0, 1], "rho": 0.3, "eps": 1.0}, {"index": [2], "rho": 0.7, "eps": 1.0}]
    start = [p.detach().cpu().numpy().copy() for p in params]
    want = Oracle(start, groups).perturbed(gradients)
    wrong = Oracle(start, groups, fault="norm_per_parameter").perturbed(gradients)

    norm = Perturbation(optimizer).ascend([0.3, 0.7])
    assert norm.item() == pytest.approx(np.sqrt(sum((g**2).sum() for g in gradients)), rel=1e-14)
    for p, x, y in zip(params, want, wrong, strict=True):
        np.testing.assert_allclose(p.detach().cpu().numpy(), x, rtol=1e-14)
        assert not np.allclose(p.detach().cpu().numpy(), y, rtol=1e-3)
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
    """The control of the test above: undoing the perturbation by arithmetic loses bits."""
    p = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    delta = 0.1 * torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert not same([p.clone()], [p.add_(delta).sub_(delta)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_climbs_by_a_float32_norm(dtype, climb):
    p = nn.Parameter(torch.zeros(4096, dtype=dtype, device=DEVICE))
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
    p = nn.Parameter(torch.ones((), dtype=torch.float32, device=DEVICE))
    p.grad = torch.full_like(p, 1e-42)  # ρ/‖s‖ is beyond float32
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
        p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 5)[:, :2])
        optimizer = AdaSAM([p])

        def backward():
            p.grad = torch.ones(3)

        for _ in range(2):
            backward()
            norm = optimizer.ascend()
            backward()
            optimizer.restore()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.step(backward)
        with Perturbation(optimizer).perturbed([0.1], Momentum(optimizer), adaptive=True):
            pass
        q.grad = torch.ones(4, 2)
        Perturbation(torch.optim.SGD([q], lr=0.1)).ascend(0.1)
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
    model = nn.Linear(8, 1, bias=False).to(DEVICE)
    optimizer = AdaSAM(model.parameters(), rho=3.0)
    x = torch.randn(16, 8).to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
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
    assert not handle._buffers and not handle.moved


def test_the_former_name_of_the_previous_ascent():
    assert Last is PreviousAscent


# ---- who moves ----


@pytest.mark.parametrize("how", ["at the ascent", "at construction"])
def test_only_the_chosen_move_and_count(climb, how):
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1)
    before, gradients = bits(params), [p.grad.clone() for p in params]
    handle = Perturbation(optimizer, only=iter(params[:1]) if how == "at construction" else None)
    with handle.perturbed(0.3, only=params[:1] if how == "at the ascent" else None) as norm:
        assert norm.item() == pytest.approx(gradients[0].norm().item(), rel=1e-14)
        torch.testing.assert_close(params[0].detach(), before[0] + 0.3 * gradients[0] / gradients[0].norm())
        assert same(before[1:], params[1:])
        assert handle.moved == params[:1]
        assert all(p.grad is None for p in params)  # all of them are computed again
    # Another choice at the next ascent, which goes before that of the construction.
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    with handle.perturbed(0.3, only=params[1:]):
        assert same(before[:1], params[:1]) and not same(before[1:2], params[1:2])
    # The control: all.
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    with Perturbation(optimizer).perturbed(0.3) as norm:
        assert norm.item() > 1.05 * gradients[0].norm().item()


def test_a_choice_out_of_reach_moves_nothing():
    params = parameters()
    optimizer = AdaSAM(params)
    before = bits(params)
    handle = Perturbation(optimizer)
    for only in ([], [nn.Parameter(torch.ones(2))]):
        for p in params:
            p.grad = torch.ones_like(p)
        with handle.perturbed(0.3, only=only) as norm:
            assert norm.item() == 0 and not handle.moved
        assert same(before, params)
        assert all(p.grad is None for p in params)
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):  # the control: nobody called backward
        handle.ascend(0.3)


@pytest.mark.parametrize("kind", ["gradient", "momentum", "previous"])
def test_what_is_frozen_in_mid_run_neither_moves_nor_counts(climb, kind):
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    optimizer.step()  # so that there is momentum
    direction = {"gradient": Gradient, "momentum": Momentum, "previous": PreviousAscent}[kind](optimizer)
    if kind == "previous":
        direction.remember(Gradient(optimizer))
    handle = Perturbation(optimizer)
    vectors = [direction.sign * direction(p).clone() for p in params]
    before = bits(params)
    params[1].requires_grad_(False)
    moving = [vectors[0], vectors[2]]
    norm = torch.cat([v.reshape(-1) for v in moving]).norm()
    with handle.perturbed(0.5, direction) as got:
        assert got.item() == pytest.approx(norm.item(), rel=1e-14)
        assert same(before[1:2], params[1:2])
        for i in (0, 2):
            torch.testing.assert_close(params[i].detach(), before[i] + 0.5 * vectors[i] / norm)
        assert [id(p) for p in handle.moved] == [id(params[0]), id(params[2])]
    assert params[1].grad is not None  # the update takes it, as torch's would
    params[1].requires_grad_(True)  # thawed again: the control
    params[0].grad = vectors[0]
    with handle.perturbed(0.5, direction):
        assert not same(before[1:2], params[1:2])


# ---- gradients of the second pass, which no ascent may take ----


def regression():
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    return model, lambda i: model(x[i]).square().mean()


CLEAR = {
    "zero_grad()": lambda model, optimizer: optimizer.zero_grad(),
    "zero_grad(set_to_none=False)": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model.zero_grad(set_to_none=False)": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "zero_()": lambda model, optimizer: [p.grad.zero_() for p in model.parameters()],
    "other tensors": lambda model, optimizer: [setattr(p, "grad", torch.zeros_like(p)) for p in model.parameters()],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("again", [0, 1, 2])
def test_accumulating_with_an_ascent_for_each_micro_batch_is_refused(name, again):
    model, loss = regression()
    optimizer = OPTIMIZERS[name](model.parameters())
    handle = Perturbation(optimizer)
    loss(0).backward()
    with handle.perturbed(0.1):
        loss(0).backward()
    before = bits(model.parameters())
    for _ in range(again):
        loss(1).backward()
    with pytest.raises(RuntimeError, match=r"neither step\(\) nor zero_grad\(\) came between"):
        handle.ascend(0.1)
    assert same(before, model.parameters()) and not handle.active


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clear", CLEAR)
def test_a_step_that_was_left_out(name, clear):
    """As GradScaler does where the second pass overflows: the gradients are cleared, the next ascent is right."""
    model, loss = regression()
    optimizer = OPTIMIZERS[name](model.parameters())
    handle = Perturbation(optimizer)
    loss(0).backward()
    with handle.perturbed(0.1):
        loss(0).backward()
    CLEAR[clear](model, optimizer)
    loss(1).backward()
    gradients, before = [p.grad.clone() for p in model.parameters()], bits(model.parameters())
    norm = torch.cat([g.reshape(-1) for g in gradients]).norm()
    with handle.perturbed(0.1):
        for p, w, g in zip(model.parameters(), before, gradients, strict=True):
            torch.testing.assert_close(p.detach(), w + 0.1 * g / norm)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_uses_them_up(name):
    """Gradients that are not cleared after a step are a mistake of another kind, and the same without an ascent."""
    model, loss = regression()
    optimizer = OPTIMIZERS[name](model.parameters())
    handle = Perturbation(optimizer)
    for _ in range(2):
        loss(0).backward()
        gradients, before = [p.grad.clone() for p in model.parameters()], bits(model.parameters())
        norm = torch.cat([g.reshape(-1) for g in gradients]).norm()
        with handle.perturbed(0.1):
            for p, w, g in zip(model.parameters(), before, gradients, strict=True):
                torch.testing.assert_close(p.detach(), w + 0.1 * g / norm)
            loss(0).backward()
        optimizer.step()
        assert not same(before, model.parameters())


@pytest.mark.parametrize("clear", CLEAR)
def test_with_a_gradient_scaler_that_skips(clear):
    model, loss = regression()
    optimizer = AdaSAM(model.parameters(), rho=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = bits(model.parameters())
    for factor in (float("inf"), 1.0):
        scaler.scale(loss(0)).backward()
        with optimizer.perturbed():
            scaler.scale(loss(0) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same(before, model.parameters()) == (factor != 1.0)
        CLEAR[clear](model, optimizer)
    scaler.scale(loss(0)).backward()
    with optimizer.perturbed():
        scaler.scale(loss(0) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.scale(loss(0)).backward()
    with pytest.raises(RuntimeError, match="neither step"):  # the control: skipped and not cleared
        optimizer.ascend()


@pytest.mark.parametrize("bucket_view", [False, True])
def test_accumulating_under_ddp(bucket_view):
    """DistributedDataParallel changes gradients in place and may put the same tensors there again."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, _ = regression()
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
        x = torch.randn(2, 3, dtype=torch.float64)
        optimizer = AdaSAM(model.parameters(), rho=0.1)
        for clear in CLEAR.values():
            model(x).square().mean().backward()
            with optimizer.perturbed():
                model(x).square().mean().backward()
            clear(model, optimizer)
        for _ in range(3):
            model(x).square().mean().backward()
            with optimizer.perturbed():
                model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        model(x).square().mean().backward()
        with optimizer.perturbed():
            model(x).square().mean().backward()
        model(x).square().mean().backward()
        with pytest.raises(RuntimeError, match="neither step"):
            optimizer.ascend()
    finally:
        torch.distributed.destroy_process_group()


def test_second_passes_of_many_micro_batches_add_up():
    model, loss = regression()
    handle = Perturbation(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        for i in range(3):
            (loss(i) / 3).backward()
        with handle.perturbed(0.1):
            want = torch.autograd.grad(sum(loss(i) for i in range(3)) / 3, list(model.parameters()))
            for i in range(3):
                (loss(i) / 3).backward()
        for p, g in zip(model.parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, g)
        handle.optimizer.step()
        handle.optimizer.zero_grad()


def test_nothing_stays_behind():
    """Neither the optimizer nor the parameters keep a perturbation, with its copy of the weights."""
    model, loss = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = Perturbation(optimizer)
    loss(0).backward()
    with handle.perturbed(0.1):
        loss(0).backward()
    copies = [weakref.ref(b) for b in handle._buffers.values()]
    assert all(copy() is not None for copy in copies)
    del handle
    assert not any(copy() is not None for copy in copies)
    loss(0).backward()  # with hooks that have nobody to tell
    optimizer.step()

    handle = Perturbation(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        loss(0).backward()
        with handle.perturbed(0.1):
            loss(0).backward()
    handle.release()
    assert len(optimizer._optimizer_step_post_hooks) == 1  # of the first one
    assert not any(p._backward_hooks for p in list(model.parameters())[1:])


@pytest.mark.parametrize("how", ["closure", "by hand", "another optimizer"])
def test_an_ascent_in_a_loop_of_ones_own_is_recorded(how, monkeypatch):
    """So that the launcher does not end with the words that nothing was sharpness-aware."""
    monkeypatch.setattr(activity, "_here", Counter())
    w = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([w], lr=0.1) if how == "another optimizer" else AdaSAM([w], rho=0.1)
    perturbation = Perturbation(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    closure()
    with perturbation.perturbed(0.0):  # the control: nothing has moved
        closure()
    optimizer.step()
    assert not activity.totals()["ascents"]
    for _ in range(2):
        if how == "closure":
            optimizer.step(closure)
        else:
            closure()
            with perturbation.perturbed(0.1):
                closure()
            optimizer.step()
    assert activity.totals()["ascents"] == 1
