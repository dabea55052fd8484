"""Each direction against an equation of its own in float64, which knows neither optimizers nor the package."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEVICE
from distributed import directions as workers
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from adasam_hf import AdaSAM, Perturbation
from adasam_hf.directions import DIRECTIONS, Direction, Friendly, Noise, Preconditioned

RHO = 0.3
B2, EPS = 0.9, 1e-2
SHAPES = [(3, 4), (5,)]


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE)) for shape in SHAPES]


def gradients(t):
    """Of two parameters in step t; the second one has none in the first two steps, as if it had been frozen."""
    rng = np.random.default_rng(t)
    scales = [10.0 ** rng.uniform(-3, 0, size=shape) for shape in SHAPES]
    both = [scale * rng.normal(size=shape) for scale, shape in zip(scales, SHAPES, strict=True)]
    return [both[0], both[1] if t >= 2 else None]


def set_gradients(params, values):
    for p, value in zip(params, values, strict=True):
        p.grad = None if value is None else torch.as_tensor(value, dtype=p.dtype, device=p.device)


def moves(params, perturbation, direction, **options):
    """By how much each parameter moves, and its gradient afterwards that of the update."""
    before = [p.detach().clone() for p in params]
    with perturbation.perturbed(RHO, direction, **options):
        return [(p.detach() - b).cpu().numpy() for p, b in zip(params, before, strict=True)]


def sphere(vectors):
    norm = np.sqrt(sum(float(np.square(v).sum()) for v in vectors if v is not None))
    return [None if v is None else RHO * v / norm for v in vectors]


def difference(got, want):
    return max(np.abs(g - (0.0 if w is None else w)).max() for g, w in zip(got, want, strict=True))


# ---- preconditioned ----


class SecondMoment:
    """v̂ as each optimizer's paper has it."""

    def __init__(self, kind, fault=None):
        self.kind, self.fault, self.v, self.v_hat, self.t = kind, fault, 0.0, EPS**2 if kind == "AdaSAM" else 0.0, 0

    def update(self, g):
        self.t += 1
        self.v = B2 * self.v + (1 - B2) * g**2
        self.v_hat = np.maximum(self.v_hat, self.v)

    def direction(self, s):
        if not self.t or self.fault == "gradient":
            return s
        value = self.v_hat if self.kind in ("AdaSAM", "AMSGrad") and self.fault != "no maximum" else self.v
        corrected = self.kind in ("AdamW", "AMSGrad") and self.fault != "no correction"
        return s / (np.sqrt(value / (1 - B2**self.t if corrected else 1.0)) + EPS)


SECOND = {
    "AdaSAM": lambda p: AdaSAM(p, lr=0.1, betas=(0.5, B2), eps=EPS, rho=0.0),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.5, B2), eps=EPS),
    "AMSGrad": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.5, B2), eps=EPS, amsgrad=True, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=B2, eps=EPS),
}


def preconditioned(kind, fault=None, steps=5):
    """The largest difference of a move from the equation, relative to the radius."""
    params = parameters()
    optimizer = SECOND[kind](params)
    perturbation, direction = Perturbation(optimizer), Preconditioned(optimizer)
    oracle = [SecondMoment(kind, fault) for _ in params]
    worst = 0.0
    for t in range(steps):
        set_gradients(params, gradients(t))
        got = moves(params, perturbation, direction)
        wanted = [None if g is None else o.direction(g) for o, g in zip(oracle, gradients(t), strict=True)]
        worst = max(worst, difference(got, sphere(wanted)) / RHO)
        descent = [None if g is None else g + 0.1 for g in gradients(t)]
        set_gradients(params, descent)
        optimizer.step()
        for o, g in zip(oracle, descent, strict=True):
            if g is not None:
                o.update(g)
    return worst


@pytest.mark.parametrize("kind", SECOND)
def test_preconditioned_follows_its_equation(kind):
    assert preconditioned(kind) < 1e-12


@pytest.mark.parametrize(
    ("kind", "fault"),
    [*((kind, "gradient") for kind in SECOND), ("AdamW", "no correction"), ("AdaSAM", "no maximum")],
)
def test_the_equation_of_preconditioned_tells_faults_apart(kind, fault):
    assert preconditioned(kind, fault) > 1e-4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), r"torch\.optim\.sgd\.SGD keeps no second moment.*adamw_torch"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "SGD keeps no second moment"),
        (lambda p: torch.optim.Adafactor(p, lr=0.1), "Adafactor keeps no second moment"),
    ],
)
def test_an_optimizer_without_a_second_moment_is_refused(make, words):
    """After its first update, before which nobody can know; the ascent until then is along the gradient."""
    params = parameters()
    optimizer = make(params)
    perturbation, direction = Perturbation(optimizer), Preconditioned(optimizer)
    for _ in range(2):  # a step that was left out, as by a gradient scaler, is no update
        set_gradients(params, gradients(2))
        assert difference(moves(params, perturbation, direction), sphere(gradients(2))) < 1e-12
    set_gradients(params, gradients(2))
    optimizer.step()
    before = [p.detach().clone() for p in params]
    set_gradients(params, gradients(3))
    with pytest.raises(RuntimeError, match=words) as error:
        perturbation.ascend(RHO, direction)
    assert "sam_direction='gradient'" in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


@pytest.mark.parametrize(
    ("second", "words"),
    [(torch.ones(2, 4), r"second moment of shape \(2, 4\)"), (torch.ones(3, 4).to(torch.uint8), "quantized")],
)
def test_a_second_moment_of_another_kind_is_refused(second, words):
    params = parameters()
    optimizer = torch.optim.AdamW(params)
    set_gradients(params, gradients(2))
    optimizer.state[params[0]]["exp_avg_sq"] = second
    with pytest.raises(RuntimeError, match=words):
        Perturbation(optimizer).ascend(RHO, Preconditioned(optimizer))


# ---- friendly ----


def friendly(fault=None, **options):
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1)
    perturbation, direction = Perturbation(optimizer), Friendly(optimizer)
    means = [0.0, 0.0]
    worst = 0.0
    for t in range(6):
        s = gradients(t)
        bad = t == 3  # an overflow, as with a gradient scaler: nothing moves, and the mean stays
        if bad:
            s[0] = np.full_like(s[0], np.inf)
        set_gradients(params, s)
        got = moves(params, perturbation, direction)
        if bad:
            assert difference(got, [None, None]) == 0
            continue
        means = [m if g is None else 0.9 * m + 0.1 * g for m, g in zip(means, s, strict=True)]
        factor = 0.0 if fault == "gradient" else 1.0
        wanted = sphere([None if g is None else g - factor * m for m, g in zip(means, s, strict=True)])
        worst = max(worst, difference(got, wanted) / RHO)
    return worst


def test_friendly_follows_its_equation():
    assert friendly() < 1e-12
    assert friendly("gradient") > 1e-2  # the control: along s itself


def test_friendly_keeps_a_float32_mean_of_half_precision_gradients():
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([p], lr=0.1)
    direction = Friendly(optimizer)
    total = torch.zeros(4)
    for t in range(1, 4):
        p.grad = torch.arange(1, 5, dtype=torch.bfloat16) / t
        total = 0.9 * total + 0.1 * p.grad.float()
        with Perturbation(optimizer).perturbed(RHO, direction):
            pass
    torch.testing.assert_close(direction.means[p], total, rtol=1e-6, atol=0)
    assert not torch.equal(total, total.bfloat16().float())


# ---- noise ----


def by_hand(seed, updates):
    """The numbers that `Noise` documents."""
    out = []
    for place, shape in enumerate(SHAPES):
        word = np.random.SeedSequence((seed, updates, place)).generate_state(1)[0]
        generator = torch.Generator(DEVICE).manual_seed(int(word))
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device=DEVICE)
        out.append(drawn.cpu().numpy())
    return sphere(out)


def test_noise_is_reproducible_and_changes_with_each_update():
    torch.manual_seed(7)
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.0)
    direction, perturbation = Noise(optimizer), Perturbation(optimizer)
    stream = torch.get_rng_state()
    for updates in range(3):
        for _ in range(2):  # two micro-batches of one step
            assert difference(moves(params, perturbation, direction), by_hand(7, updates)) < 1e-15
        assert difference(by_hand(7, updates), by_hand(7, updates + 1)) > 0.01  # the controls
        assert difference(by_hand(7, updates), by_hand(8, updates)) > 0.01
        set_gradients(params, gradients(2))
        optimizer.step()
    assert torch.equal(stream, torch.get_rng_state())  # dropout masks are those of a plain run
    torch.manual_seed(8)
    resumed = Noise(optimizer)
    resumed.load_state(direction.state())
    assert difference(moves(params, perturbation, resumed), by_hand(7, 3)) < 1e-15


def test_noise_is_uniform_on_the_sphere():
    """Moments of the coordinates of a uniform unit vector in n dimensions: E u = 0, E uuᵀ = I/n, E u₁⁴ = 3/(n(n+2))."""
    p = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=0.0)
    direction, perturbation = Noise(optimizer), Perturbation(optimizer)
    p.grad = torch.zeros_like(p)
    drawn = []
    for _ in range(1500):
        drawn.append(moves([p], perturbation, direction)[0].reshape(-1) / RHO)
        optimizer.step()
    u = np.array(drawn)
    assert np.allclose(np.square(u).sum(1), 1)
    assert np.abs(u.mean(0)).max() < 0.06
    assert np.abs(u.T @ u / len(u) - np.eye(4) / 4).max() < 0.03
    assert abs((u**4).mean() - 3 / 24) < 0.01
    assert abs((u**4).mean() - 1 / 5) > 0.03  # the control: a point of the cube, pushed out to the sphere, has others


# ---- all of them ----


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    try:
        yield init_device_mesh("cpu", (3,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_shards_of_noise_are_parts_of_the_whole(mesh, placement):
    torch.manual_seed(7)
    whole = nn.Parameter(torch.zeros(4, 5))
    parted = nn.Parameter(distribute_tensor(whole.detach(), mesh, [placement], src_data_rank=None))
    one, other = (Noise(torch.optim.SGD([p], lr=0.1)) for p in (whole, parted))
    got, full = other(parted), one(whole)
    assert isinstance(got, DTensor) and got.shape == (4, 5)
    rows, columns = {Shard(0): (slice(2, 4), ...), Shard(1): (..., slice(2, 4)), Replicate(): (..., ...)}[placement]
    assert torch.equal(got.to_local(), full[rows][:, columns] if columns is not ... else full[rows])


@pytest.mark.parametrize("name", ["preconditioned", "friendly", "noise"])
def test_sharded_parameters_move_as_whole_ones(tmp_path, name):
    """One process, so that nothing is parted; that `DTensor` is met by no plain tensor."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        device_mesh = init_device_mesh("cpu", (1,))

        def run(wrap):
            torch.manual_seed(7)
            params = [nn.Parameter(wrap(p.detach())) for p in parameters()]
            optimizer = torch.optim.AdamW(params, lr=0.1)
            direction, perturbation = DIRECTIONS[name](optimizer), Perturbation(optimizer)
            seen = []
            for t in range(2, 5):
                for p, g in zip(params, gradients(t), strict=True):
                    p.grad = wrap(torch.as_tensor(g))
                with perturbation.perturbed(RHO, direction):
                    seen += [p.detach().clone() for p in params]
                    for p, g in zip(params, gradients(t), strict=True):
                        p.grad = wrap(torch.as_tensor(g))
                optimizer.step()
            return [p.full_tensor() if isinstance(p, DTensor) else p for p in seen]

        got = run(lambda t: distribute_tensor(t, device_mesh, [Shard(0)]))
        wanted = run(lambda t: t)
        assert max((a - b).abs().max() for a, b in zip(got, wanted, strict=True)) < 1e-14
        assert (wanted[0] - parameters()[0]).abs().max() > 0.01
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", DIRECTIONS)
def test_to_ask_twice_makes_no_difference(name):
    params = parameters()
    optimizer = torch.optim.AdamW(params)
    perturbation, direction = Perturbation(optimizer), DIRECTIONS[name](optimizer)
    for t in range(2, 4):
        set_gradients(params, gradients(t))
        asked = [[direction(p) for p in params] for _ in range(2)]
        assert all(a is b or torch.equal(a, b) for a, b in zip(*asked, strict=True))
        moves(params, perturbation, direction)
        set_gradients(params, gradients(t))
        optimizer.step()


@pytest.mark.parametrize("name", ["preconditioned", "noise"])
def test_a_direction_that_is_gone_leaves_no_hook(name):
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    direction: Direction | None = DIRECTIONS[name](optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    del direction
    gc.collect()
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.slow
def test_two_processes_move_their_shards_as_one_moves_the_whole(tmp_path):
    script = Path(workers.__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    command = [sys.executable, str(script)]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-4000:]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name in workers.NAMES:
            wanted = workers.moves(name, torch.clone)
            assert max((a - b).abs().max() for a, b in zip(found[name], wanted, strict=True)) < 1e-14
            assert (wanted[0] - wanted[2]).abs().max() > 0.01  # the control: the steps differ
