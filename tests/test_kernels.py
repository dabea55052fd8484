"""Parameters and gradients in any layout, against float64 NumPy, which knows no strides."""

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Oracle
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from adasam_hf import AdaSAM, Perturbation, kernels
from adasam_hf.directions import Direction, Momentum

# name: the shape of a piece of memory, and the parameters in it
LAYOUTS = {
    "contiguous": ((3, 4), lambda b: [b]),
    "columns": ((4, 6), lambda b: [b[:, 1:3]]),
    "every other": ((9,), lambda b: [b[::2]]),
    "one colour of a convolution": ((2, 3, 2, 2), lambda b: [b[:, :1]]),
    "one row": ((3, 4), lambda b: [b[1]]),
    "one number": ((3,), lambda b: [b[1]]),
    "transposed": ((3, 5), lambda b: [b.T]),
    "permuted": ((2, 3, 4), lambda b: [b.permute(2, 0, 1)]),
    "channels last": ((2, 3, 2, 4), lambda b: [b.permute(0, 3, 1, 2)]),
    "0-d": ((), lambda b: [b]),
    "empty": ((0, 3), lambda b: [b]),
    "two halves of one storage": ((4, 4), lambda b: [b[:2], b[2:]]),
    "interleaved columns": ((3, 4), lambda b: [b[:, ::2], b[:, 1::2]]),
    "transposed halves": ((4, 3), lambda b: [b[:2].T, b[2:].T]),
}


def as_autograd(g):
    return g


def reversed_order(g):
    """The same numbers, lying in memory as their transpose does."""
    back = tuple(reversed(range(g.dim())))
    return g.permute(back).contiguous().permute(back)


def slice_of_wider(g):
    return torch.stack([g, torch.full_like(g, 7.0)], -1)[..., 0]


def expanded(g):
    """One number in every place, and once in memory."""
    return (g.reshape(-1)[:1] if g.numel() else g.new_zeros(1)).reshape((1,) * g.dim()).expand(g.shape)


@dataclass(frozen=True)
class Piece:
    layout: str = "contiguous"
    gradient: object = as_autograd
    dtype: torch.dtype = torch.float64
    group: int = 0
    frozen: bool = False
    chosen: bool = True


PIECES = st.builds(
    Piece,
    layout=st.sampled_from(sorted(LAYOUTS)),
    gradient=st.sampled_from([as_autograd, reversed_order, slice_of_wider, expanded]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    group=st.integers(0, 1),
    frozen=st.booleans(),
    chosen=st.booleans(),
)
RADII = st.sampled_from([0.0, 0.1, 0.7])
GROUPS = [
    {"lr": 0.02, "betas": (0.9, 0.98), "eps": 1e-2, "weight_decay": 0.1},
    {"lr": 0.03, "betas": (0.8, 0.7), "eps": 1e-3, "weight_decay": 0.0},
]


def check(pieces, radii=(0.3, 0.7), fault=None, seed=0, steps=2):
    """Ascend, restore and update with AdaSAM, and compare every number in memory with the oracle after each."""
    rng = np.random.default_rng(seed)
    memory, params, masks, where = [], [], [], []
    for piece in pieces:
        shape, views = LAYOUTS[piece.layout]
        base, mask = torch.from_numpy(rng.normal(size=shape)).to(piece.dtype), torch.zeros(shape, dtype=torch.bool)
        for view, inside in zip(views(base), views(mask), strict=True):
            params.append(nn.Parameter(view, requires_grad=not piece.frozen))
            where.append(piece)
            inside.fill_(True)
            assert params[-1].data_ptr() == view.data_ptr() and params[-1].stride() == view.stride()
        memory.append(base)
        masks.append(mask)
    index = [[i for i, piece in enumerate(where) if piece.group == k] for k in (0, 1)]
    optimizer = AdaSAM(
        [{**g, "rho": rho, "params": [params[i] for i in ks]} for g, rho, ks in zip(GROUPS, radii, index, strict=True)]
    )
    perturbation = Perturbation(optimizer)
    groups = [{**g, "rho": rho, "index": ks} for g, rho, ks in zip(GROUPS, radii, index, strict=True)]
    oracle = Oracle([p.detach().numpy() for p in params], groups)
    start = [x.copy() for x in oracle.x]
    only = {p for p, piece in zip(params, where, strict=True) if piece.chosen}

    def backward():
        """Gradients as numbers in the given layouts, as a backward pass or a hook of somebody leaves them."""
        values = [torch.from_numpy(rng.normal(size=p.shape)).to(p.dtype) for p in params]
        for p, piece, value in zip(params, where, values, strict=True):
            p.grad = None if piece.frozen else piece.gradient(value)
        truth = [None if p.grad is None else p.grad.double().numpy().copy() for p in params]
        if fault == "permuted":
            for p in params:
                p.grad = None if p.grad is None else p.grad.flatten().flip(0).view(p.shape)
        return truth

    for _ in range(steps):
        before = [base.clone() for base in memory]
        ascent = [g if p in only else None for p, g in zip(params, backward(), strict=True)]
        with np.errstate(invalid="ignore"):
            norm = np.sqrt(sum((g**2).sum() for g in ascent if g is not None))
        if all(p.grad is None for p in params):
            with pytest.raises(RuntimeError, match="no parameter has a gradient"):
                perturbation.ascend(list(radii), only=only)
            return
        got = perturbation.ascend(list(radii), only=only)
        np.testing.assert_allclose(got.item(), norm, rtol=1e-6)
        wanted = oracle.perturbed(ascent) if norm else oracle.x
        compare(params, wanted, start, 1.0)
        assert [p for p in params if any(p is q for q in perturbation.moved)] == [
            p
            for p, piece in zip(params, where, strict=True)
            if piece.chosen and not piece.frozen and radii[piece.group] > 0
        ]
        perturbation.restore()
        assert all(same_bits(a, b) for a, b in zip(before, memory, strict=True))
        oracle.update(backward())
        optimizer.step()
        compare(params, oracle.x, start, 0.1)
        for old, new, mask in zip(before, memory, masks, strict=True):
            assert same_bits(old[~mask], new[~mask])  # beside the parameters


def compare(params, wanted, start, scale):
    for p, x, x0 in zip(params, wanted, start, strict=True):
        tolerance = {torch.float64: 1e-12, torch.float32: 3e-6}[p.dtype]
        np.testing.assert_allclose(
            p.detach().double().numpy(), x, rtol=0, atol=tolerance * (scale + np.abs(x0).max(initial=0))
        )


def same_bits(a, b):
    return a.numpy().tobytes() == b.numpy().tobytes()


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(pieces=st.lists(PIECES, min_size=1, max_size=5), radii=st.tuples(RADII, RADII), seed=st.integers(0, 99))
def test_any_layout_follows_numpy(pieces, radii, seed):
    check(pieces, radii, seed=seed)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("gradient", [as_autograd, reversed_order, slice_of_wider, expanded])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_layout_follows_numpy(layout, gradient, dtype):
    check([Piece(layout, gradient, dtype), Piece(dtype=dtype, group=1)])


@pytest.mark.parametrize("layout", ["contiguous", "columns", "transposed", "channels last"])
def test_a_permuted_gradient_is_noticed(layout):
    """The control of the comparison."""
    with pytest.raises(AssertionError, match="Not equal"):
        check([Piece(layout)], fault="permuted")


@pytest.mark.parametrize(
    ("layout", "gradient"), [("one colour of a convolution", as_autograd), ("contiguous", reversed_order)]
)
def test_without_the_decision_it_would_be_wrong(monkeypatch, layout, gradient):
    """The control of the decision: fused kernels on whatever comes."""
    check([Piece(layout, gradient)])
    monkeypatch.setattr(kernels, "dense_order", lambda t: ())
    with pytest.raises(AssertionError, match="Not equal"):
        check([Piece(layout, gradient)])


def test_one_odd_tensor_leaves_the_others_to_the_fast_kernels(monkeypatch):
    odd = nn.Parameter(torch.randn(4, 6)[:, :3])
    plain = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2).T)]
    seen = []

    def spied(name, kernel):
        def spy(params, *args, **kwargs):
            seen.append((name, kwargs["fused"], [p.shape for p in params]))
            return kernel(params, *args, **kwargs)

        return spy

    monkeypatch.setattr("adasam_hf.kernels.sgd", spied("sgd", sgd))
    monkeypatch.setattr("adasam_hf.optim.adam", spied("adam", adam))
    optimizer = AdaSAM([plain[0], odd, plain[1]])
    for _ in range(2):
        for p in (odd, *plain):
            p.grad = torch.randn_like(p)
        if not seen:
            with optimizer.perturbed():
                for p in (odd, *plain):
                    p.grad = torch.randn_like(p)
            optimizer.step()
    shapes = [p.shape for p in plain]
    assert seen == [("sgd", True, shapes), ("adam", True, shapes), ("adam", False, [odd.shape])]


def test_what_may_go_together():
    def layouts(*rows):
        together, apart = kernels.split(rows)
        numbers = {id(row): i for i, row in enumerate(rows)}
        return [numbers[id(row)] for row in together], [numbers[id(row)] for row in apart]

    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    last = a.to(memory_format=torch.channels_last)
    assert layouts((a, b)) == ([0], [])
    assert layouts((last, last.clone())) == ([0], [])
    assert layouts((last, b)) == layouts((b, last)) == ([], [0])
    assert layouts((a, b.double())) == layouts((a, b, b.bfloat16())) == ([], [0])
    # A lazily negated view has other numbers than its memory.
    assert layouts((a, b), (torch._neg_view(a.clone()), b), (b.clone(), torch._neg_view(b))) == ([0], [1, 2])
    # Strides of dimensions of size 1 mean nothing.
    one = torch.randn(3, 1, 2, 2)
    assert layouts((one, one.to(memory_format=torch.channels_last))) == ([0], [])
    # Views of one storage may go together where they lie side by side, and not where they share a number.
    base = torch.randn(12)
    assert layouts((base[:6],), (base[6:],)) == ([0, 1], [])
    assert layouts((base[:6],), (base[8:],), (base[5:9],)) == ([], [0, 1, 2])
    assert layouts((base[:6],), (base[6:],), (base[1:2],)) == ([1], [0, 2])


@pytest.mark.parametrize("layout", ["expanded", "as_strided"])
def test_elements_in_one_place_are_refused(layout):
    base = torch.ones(4)
    view = base[:1].expand(4) if layout == "expanded" else base.as_strided((3, 2), (1, 1))
    p = nn.Parameter(view)
    p.grad = torch.ones(p.shape)
    for ascend in (Perturbation(torch.optim.SGD([p], lr=0.1)).ascend, Perturbation(AdaSAM([p])).ascend):
        with pytest.raises(RuntimeError, match="several elements in one place in memory"):
            ascend(0.1)
    with pytest.raises(RuntimeError, match="several elements in one place in memory"):
        AdaSAM([p], rho=0.0).step()
    assert torch.equal(base, torch.ones(4))


def test_two_parameters_in_one_place():
    """Tied by their data and not by being one parameter: each adds its move, and all is restored."""
    base = torch.arange(6.0)
    before = base.clone()
    p, q = nn.Parameter(base), nn.Parameter(base[:3])
    p.grad, q.grad = torch.ones(6), torch.ones(3)
    with Perturbation(torch.optim.SGD([p, q], lr=0.1)).perturbed(3.0):
        torch.testing.assert_close(base, before + torch.tensor([2.0, 2, 2, 1, 1, 1]))  # the norm is 3
    assert torch.equal(base, before)


def test_the_saved_copy_follows_a_change_of_layout():
    p = nn.Parameter(torch.randn(2, 3, 4, 5))
    perturbation = Perturbation(torch.optim.SGD([p], lr=0.1))
    for change in (
        lambda t: t,
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.double(),
        lambda t: t[:1],
    ):
        p.data, p.grad = change(p.data), None
        p.grad = torch.randn_like(p)
        before, gradient = p.detach().clone(), p.grad.double()
        with perturbation.perturbed(0.5):
            wanted = before.double() + 0.5 * gradient / gradient.norm()
            torch.testing.assert_close(p.detach().double(), wanted, rtol=0, atol=1e-6)
        assert torch.equal(p, before)


# ---- moments of other optimizers ----


class Keeps(torch.optim.SGD):
    """An optimizer whose first moment is what `make` makes of its parameter."""

    def __init__(self, params, make):
        super().__init__(params, lr=0.0)
        self.make = make

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["exp_avg"] = self.make(p.detach())


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda p: torch.full((1,), 1e-3), r"of shape \(1,\) for a parameter of shape \(20, 50\)"),  # as GaLore
        (lambda p: torch.ones(4, 50), r"of shape \(4, 50\)"),
        (lambda p: torch.ones_like(p, dtype=torch.int8), "quantized"),
        (lambda p: torch.quantize_per_tensor(torch.ones_like(p), 0.1, 0, torch.qint8), "quantized"),
        (lambda p: torch.ones_like(p).to_sparse(), "sparse"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_moment_that_is_no_direction_is_refused(make, problem):
    p = nn.Parameter(torch.zeros(20, 50))
    optimizer = Keeps([p], make)
    optimizer.step()
    with pytest.raises(RuntimeError, match=problem) as error:
        Perturbation(optimizer).ascend(0.4, Momentum(optimizer))
    assert "Keeps" in str(error.value) and "sam_direction='gradient'" in str(error.value)
    assert not p.any()


def test_a_moment_in_another_precision_or_order_is_right():
    p = nn.Parameter(torch.zeros(2, 3))
    moment = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]])
    for make in (lambda p: moment.bfloat16(), lambda p: reversed_order(moment), lambda p: moment.double()):
        optimizer = Keeps([p], make)
        optimizer.step()
        with Perturbation(optimizer).perturbed(0.4, Momentum(optimizer)):
            torch.testing.assert_close(p.detach(), -0.4 * moment / moment.norm(), rtol=1e-6, atol=0)
            assert not torch.allclose(p.detach(), (-0.4 * moment / moment.norm()).bfloat16().float(), rtol=1e-6, atol=0)


def test_a_direction_of_another_shape_is_refused():
    class Scalar(Direction):
        first_pass = False

        def __call__(self, p):
            return torch.ones(1)

    p = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([p], lr=0.1)
    for adaptive in (False, True):  # where multiplication would broadcast it
        with pytest.raises(RuntimeError, match=r"vector of shape \(1,\) for a parameter of shape \(4,\)"):
            Perturbation(optimizer).ascend(0.1, Scalar(optimizer), adaptive=adaptive)
    assert not p.any()


@pytest.mark.parametrize("adaptive", [False, True])
def test_adaptive_in_any_layout(adaptive):
    base = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = base.clone()
    p, q = nn.Parameter(base[:, :2]), nn.Parameter(base[:, 3:].T)
    p.grad, q.grad = reversed_order(torch.randn(4, 2).double()), torch.randn(3, 4).double()
    w, s = [t.detach().numpy().copy() for t in (p, q)], [t.grad.numpy().copy() for t in (p, q)]
    sizes = [np.abs(x) + 0.01 if adaptive else np.ones_like(x) for x in w]
    norm = np.sqrt(sum(((a * b) ** 2).sum() for a, b in zip(sizes, s, strict=True)))
    with Perturbation(torch.optim.SGD([p, q], lr=0.1)).perturbed(0.5, adaptive=adaptive):
        for t, x, g, size in zip((p, q), w, s, sizes, strict=True):
            np.testing.assert_allclose(t.detach().numpy(), x + 0.5 * size**2 * g / norm, rtol=1e-13)
    assert same_bits(base, before)


# ---- torch's own fused optimizers ----


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_fused_update_that_would_write_beside_a_slice_is_refused(kind):
    base = torch.ones(4, 6)
    for fused in (True, False):
        p = nn.Parameter(base[:, :2])
        p.grad = torch.ones(4, 2)
        optimizer = kind([p], lr=0.1, fused=fused)
        with (
            pytest.raises(RuntimeError, match=f"{kind.__name__} with fused=True") if fused else nullcontext(),
            Perturbation(optimizer).perturbed(0.1),
        ):
            p.grad = torch.ones(4, 2)
        if not fused:
            optimizer.step()
    assert torch.equal(base[:, 2:], torch.ones(4, 4)) and not torch.equal(base[:, :2], torch.ones(4, 2))


def test_a_fused_update_of_a_dense_layout_is_right():
    """The second pass leaves gradients in their parameters' order, so that torch's own kernels are right, too."""

    def run(order):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=order)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            model(x).square().mean().backward()
            with Perturbation(optimizer).perturbed(0.5):
                model(x).square().mean().backward()
            assert model.weight.grad.stride() == model.weight.stride()
            optimizer.step()
            optimizer.zero_grad()
        return model.weight.detach()

    torch.testing.assert_close(run(torch.channels_last), run(torch.contiguous_format), rtol=0, atol=1e-4)
    assert run(torch.channels_last).stride() != run(torch.contiguous_format).stride()


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("bucket_view", [False, True])
def test_gradients_of_ddp_lie_as_their_parameters_do(one_process, bucket_view):
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)(torch.randn(2, 3, 8, 8)).sum().backward()
    assert kernels.split([(model.weight, model.weight.grad)])[1] == []
