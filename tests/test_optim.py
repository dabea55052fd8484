import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import DEVICE
from oracle import FAULTS, Oracle
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.adam import adam

from adasam_hf import AdaSAM

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}  # relative to the distance travelled
IMPLEMENTATIONS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False, "fused": False}}
GROUPS = [
    {"lr": 0.02, "betas": (0.9, 0.98), "eps": 1e-2, "weight_decay": 0.1, "rho": 0.3, "index": [0, 1]},
    {"lr": 0.01, "betas": (0.0, 0.9), "eps": 1e-1, "weight_decay": 0.0, "rho": 0.1, "index": [2]},
    {"lr": 0.03, "betas": (0.8, 0.7), "eps": 1e-3, "weight_decay": 0.0, "rho": 0.0, "index": [3]},
]
SHAPES = [(3, 4), (4,), (2, 2), (5,)]


def problem(dtype=torch.float64):
    """Parameters, and a smooth loss whose gradient is known in closed form, so that the oracle needs no autograd."""
    rng = np.random.default_rng(0)
    start = [rng.normal(size=shape) for shape in SHAPES]
    # Scales far apart and shrinking in time, so that ε, the maximum and the norm all matter.
    scales = [10.0 ** rng.uniform(-3, 1, size=shape) for shape in SHAPES]

    def gradients(x, t):
        return [s * np.sin(a + t) / (1 + t) for s, a in zip(scales, x, strict=True)]

    def loss(params, t):
        wide = [torch.as_tensor(s, dtype=dtype, device=p.device) for s, p in zip(scales, params, strict=True)]
        return sum((-s * torch.cos(p + t) / (1 + t)).sum() for s, p in zip(wide, params, strict=True))

    return start, gradients, loss


def run_optimizer(dtype, steps=6, groups=GROUPS, **implementation):
    start, _, loss = problem(dtype)
    params = [nn.Parameter(torch.as_tensor(p, dtype=dtype, device=DEVICE)) for p in start]
    optimizer = AdaSAM(
        [{**{k: v for k, v in g.items() if k != "index"}, "params": [params[i] for i in g["index"]]} for g in groups],
        **implementation,
    )
    for t in range(steps):
        loss(params, t).backward()
        with optimizer.perturbed():
            loss(params, t).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().cpu().double().numpy() for p in params]


def run_oracle(steps=6, groups=GROUPS, fault=None):
    start, gradients, _ = problem()
    oracle = Oracle(start, groups, fault)
    for t in range(steps):
        oracle.update(gradients(oracle.perturbed(gradients(oracle.x, t)), t))
    return oracle.x


def distance(a, b):
    """The largest difference, relative to the largest move from the start."""
    start = problem()[0]
    travelled = max(np.abs(x - s).max() for x, s in zip(a, start, strict=True))
    return max(np.abs(x - y).max() for x, y in zip(a, b, strict=True)) / travelled


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_algorithm_1(name, dtype):
    got = run_optimizer(dtype, **IMPLEMENTATIONS[name])
    assert distance(got, run_oracle()) < TOLERANCE[dtype]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_tells_faults_apart(fault):
    """The control: with a fault put in, the comparison of `test_algorithm_1` fails by far, in float32 too."""
    assert distance(run_oracle(), run_oracle(fault=fault)) > 50 * TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("asked", "fused", "foreach"),
    [({}, True, False), ({"foreach": True}, False, True), ({"foreach": False, "fused": False}, False, False)],
)
def test_the_default_implementation_is_the_fused_kernel(monkeypatch, asked, fused, foreach):
    seen = set()

    def spy(*args, **kwargs):
        seen.add((kwargs["fused"], kwargs["foreach"]))
        return adam(*args, **kwargs)

    monkeypatch.setattr("adasam_hf.optim.adam", spy)
    run_optimizer(torch.float32, **asked)
    assert seen == {(fused, foreach)}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_radius_zero_is_amsgrad(name):
    """Two passes at radius 0 equal one pass bit for bit, and both are the paper's AMSGrad."""
    flat_groups = [{**g, "rho": 0.0} for g in GROUPS]
    two_passes = run_optimizer(torch.float64, groups=flat_groups, **IMPLEMENTATIONS[name])
    start, _, loss = problem()
    params = [nn.Parameter(torch.as_tensor(p, device=DEVICE)) for p in start]
    optimizer = AdaSAM(
        [
            {**{k: v for k, v in g.items() if k not in ("index", "rho")}, "params": [params[i] for i in g["index"]]}
            for g in GROUPS
        ],
        rho=0.0,
        **IMPLEMENTATIONS[name],
    )
    for t in range(6):
        optimizer.zero_grad()
        loss(params, t).backward()
        optimizer.step()
    assert all(np.array_equal(a, p.detach().cpu().numpy()) for a, p in zip(two_passes, params, strict=True))
    assert distance(two_passes, run_oracle(groups=flat_groups)) < TOLERANCE[torch.float64]
    assert distance(two_passes, run_oracle()) > 1e-3  # the radius does matter here


def test_closure_form_equals_written_out_form():
    start, _, loss = problem()
    params = [nn.Parameter(torch.as_tensor(p, device=DEVICE)) for p in start]
    groups = [
        {**{k: v for k, v in g.items() if k != "index"}, "params": [params[i] for i in g["index"]]} for g in GROUPS
    ]
    optimizer = AdaSAM(groups)
    calls = []
    for t in range(6):

        def closure(t=t):
            optimizer.zero_grad()
            value = loss(params, t)
            value.backward()
            calls.append(value.item())
            return value

        returned = optimizer.step(closure)
        assert returned.item() == calls[-2]  # the loss at the unperturbed weights
    assert len(calls) == 12
    written_out = run_optimizer(torch.float64)
    assert all(np.array_equal(a, p.detach().cpu().numpy()) for a, p in zip(written_out, params, strict=True))


def test_closure_is_called_once_at_radius_zero():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdaSAM([p], rho=0.0)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_tensor_learning_rate(name):
    def run(lr):
        p = nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64, device=DEVICE))
        optimizer = AdaSAM([p], lr=lr, rho=0.0, **IMPLEMENTATIONS[name])
        for _ in range(3):
            p.grad = p.detach() * 2 + 1
            optimizer.step()
        return p.detach()

    assert torch.allclose(run(torch.tensor(0.25)), run(0.25), rtol=1e-12, atol=0)
    assert not torch.allclose(run(torch.tensor(0.25)), run(0.5), rtol=1e-3, atol=0)


def test_composes_with_schedulers():
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = AdaSAM([p], lr=1.0, betas=(0.0, 0.0), eps=1e-3, rho=0.0)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, total_iters=1),
            torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        ],
        milestones=[1],
    )
    moves = []
    for _ in range(3):
        before = p.item()
        p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
        moves.append(before - p.item())
    assert moves == pytest.approx([0.5, 1.0, 1.0])  # γ m/√v̂ with m = g = v̂ = 1


def train(model, optimizer, data, steps):
    for t in steps:
        torch.manual_seed(t)
        model(data).square().mean().backward()
        with optimizer.perturbed():
            model(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("transport", ["state_dict", "pickle", "deepcopy"])
def test_interrupted_equals_uninterrupted(tmp_path, transport):
    def fresh():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2)).to(DEVICE)
        return model, AdaSAM(model.parameters(), lr=0.05)

    data = torch.randn(6, 4, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    whole, optimizer = fresh()
    train(whole, optimizer, data, range(6))

    first, optimizer = fresh()
    train(first, optimizer, data, range(3))
    if transport == "state_dict":
        torch.save([first.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
        second, optimizer = fresh()
        weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        second.load_state_dict(weights)
        optimizer.load_state_dict(state)
    elif transport == "pickle":
        second, optimizer = pickle.loads(pickle.dumps((first, optimizer)))
    else:
        second, optimizer = copy.deepcopy((first, optimizer))
    train(second, optimizer, data, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(second.parameters()))


def test_state_is_what_the_algorithm_needs_and_no_more():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdaSAM([p], eps=1e-3)
    p.grad = torch.zeros_like(p)
    p.grad[0] = 1.0
    optimizer.ascend()
    assert not optimizer.state  # the saved weights are no part of it
    optimizer.restore()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert optimizer.state[p]["step"] == 1
    torch.testing.assert_close(optimizer.state[p]["max_exp_avg_sq"], torch.full((3,), 1e-6))


def test_parameters_without_gradient_are_untouched():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdaSAM([p, q], weight_decay=0.5)
    p.grad = torch.ones(3)
    with optimizer.perturbed():
        p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(q, torch.ones(3))
    assert q not in optimizer.state
    assert not torch.equal(p, torch.ones(3))


def test_step_refuses_perturbed_weights():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdaSAM([p])
    p.grad = torch.ones(3)
    optimizer.ascend()
    with pytest.raises(RuntimeError, match="restore"):
        optimizer.step()
    optimizer.restore()
    assert torch.equal(p, torch.ones(3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rho", -0.1),
        ("rho", float("nan")),
        ("rho", float("inf")),
        ("rho", "0.05"),
        ("rho", True),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", torch.ones(2)),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, -0.1)),
        ("eps", 0.0),
        ("eps", -1e-6),
        ("eps", 1e-30),  # its square is 0 in float32
        ("weight_decay", -0.1),
        ("rho", None),
        ("rho", 1j),
        ("rho", torch.tensor(0.05)),
        ("rho", np.array([0.05])),
        ("rho", np.bool_(True)),
        ("lr", "1e-3"),
        ("lr", None),
        ("lr", True),
        ("lr", torch.tensor(-1.0)),
        ("betas", None),
        ("betas", 0.9),
        ("betas", (0.9,)),
        ("betas", (0.9, 0.98, 0.99)),
        ("betas", ("0.9", "0.98")),
        ("betas", "99"),
        ("betas", (0.9, None)),
        ("betas", (0.9, float("nan"))),
        ("betas", (False, 0.9)),
        ("eps", None),
        ("eps", "1e-6"),
        ("eps", float("inf")),
        ("weight_decay", "0"),
        ("weight_decay", None),
        ("weight_decay", False),
        ("foreach", "yes"),
        ("foreach", 1),
        ("fused", "no"),
    ],
)
def test_bad_values_are_named(name, value):
    """In one sentence with the value, wherever it comes in."""
    optimizer = AdaSAM([nn.Parameter(torch.ones(2))])
    calls = [
        lambda: AdaSAM([nn.Parameter(torch.ones(2))], **{name: value}),
        lambda: AdaSAM([{"params": [nn.Parameter(torch.ones(2))], name: value}]),
        lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], name: value}),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"{name}[= ]") as error:
            call()
        assert "\n" not in str(error.value)
        assert isinstance(value, torch.Tensor) or repr(value) in str(error.value)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64, int])
def test_numbers_of_numpy_are_numbers(kind):
    values = {"lr": kind(1), "betas": (kind(0), kind(0)), "eps": kind(1), "weight_decay": kind(0), "rho": kind(2)}
    p = nn.Parameter(torch.ones(2))
    optimizer = AdaSAM([p], **values)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **values})
    for group in (*optimizer.param_groups, optimizer.defaults):
        numbers = [group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["rho"]]
        assert numbers == [1.0, 0.0, 0.0, 1.0, 0.0, 2.0]
        assert all(type(number) is float for number in numbers)
    p.grad = torch.tensor([3.0, 4.0])
    with optimizer.perturbed():
        torch.testing.assert_close(p.detach(), torch.tensor([1 + 2 * 0.6, 1 + 2 * 0.8]))


def test_a_radius_that_is_set_later_is_checked_at_the_ascent():
    p = nn.Parameter(torch.ones(2))
    optimizer = AdaSAM([p])
    p.grad = torch.ones(2)
    optimizer.param_groups[0]["rho"] = "0.1"
    with pytest.raises(ValueError, match=r"rho='0\.1'"):
        optimizer.ascend()
    assert torch.equal(p, torch.ones(2)) and p.grad is not None


def test_epsilon_must_not_underflow_in_half_precision():
    with pytest.raises(ValueError, match="float16"):
        AdaSAM([nn.Parameter(torch.ones(2, dtype=torch.float16))], eps=1e-6)


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_half_after_construction(eps, steps_before):
    model = nn.Linear(3, 1)
    optimizer = AdaSAM(model.parameters(), lr=0.01, eps=eps, rho=0.0)
    for _ in range(steps_before):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.half()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    if eps == 1e-2 and not steps_before:  # the control: this is as if it had been half from the start
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in model.parameters())
        return
    error, words = (
        (ValueError, "eps=1e-06 is too small for torch.float16") if eps == 1e-6 else (RuntimeError, "float32; c")
    )
    with pytest.raises(error, match=words):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_checkpoint_in_float32_for_half_precision_weights():
    """Loading casts v̂, which then holds an underflown ε²."""
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2).half())
    saved, loaded = AdaSAM([p], rho=0.0), AdaSAM([q], rho=0.0, eps=1e-2)
    p.grad, q.grad = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]).half()
    saved.step()
    loaded.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match=r"eps=1e-06 is too small for torch\.float16"):
        loaded.step()
    assert torch.equal(q, torch.ones(2).half())


def test_state_of_another_shape_is_refused():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(200))
    saved, loaded = AdaSAM([p], rho=0.0), AdaSAM([q], rho=0.0)
    p.grad, q.grad = torch.ones(2), torch.ones(200)
    saved.step()
    loaded.load_state_dict(saved.state_dict())
    with pytest.raises(RuntimeError, match=r"shape \(200,\) meets a tensor of shape \(2,\)"):
        loaded.step()
    assert torch.equal(q, torch.ones(200))


def test_unsupported_parameters_are_refused():
    with pytest.raises(ValueError, match="complex64"):
        AdaSAM([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = AdaSAM(embedding.parameters(), rho=0.0)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    with pytest.raises(ValueError, match="exclude"):
        AdaSAM([nn.Parameter(torch.ones(2))], foreach=True, fused=True)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_checkpoint_of_another_optimizer_is_refused(amsgrad):
    p = nn.Parameter(torch.ones(2))
    other = torch.optim.AdamW([p], amsgrad=amsgrad)
    p.grad = torch.ones(2)
    other.step()
    with pytest.raises(ValueError, match="not written by AdaSAM"):
        AdaSAM([p]).load_state_dict(other.state_dict())


@pytest.mark.filterwarnings("error")
def test_no_warnings():
    assert distance(run_optimizer(torch.float32), run_oracle()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("beta2", "highest"), [(0.98, 1.5), (0.999, 6.6)])
def test_how_far_the_first_steps_go_without_warm_up(beta2, highest):
    """In units of the rate, under a constant gradient: what the README says of warm-up."""
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = AdaSAM([w], lr=1.0, betas=(0.9, beta2), eps=1e-12, rho=0.0)
    moves = []
    for _ in range(100):
        before = w.item()
        w.grad = torch.ones_like(w)
        optimizer.step()
        moves.append(before - w.item())
    assert max(moves) == pytest.approx(highest, abs=0.06)
    assert moves[0] == pytest.approx(0.1 / (1 - beta2) ** 0.5)


def test_a_step_whose_second_pass_left_no_gradient():
    w = nn.Parameter(torch.ones(3))
    optimizer = AdaSAM([w], rho=0.05)
    (w**2).sum().backward()
    with optimizer.perturbed():
        (w**2).sum()  # without backward
    with pytest.raises(RuntimeError, match=r"call loss.backward\(\) inside `with optimizer.perturbed\(\):`"):
        optimizer.step()
    assert torch.equal(w, torch.ones(3))
    optimizer.step()  # a step without any gradient changes nothing, as in torch
    (w**2).sum().backward()
    optimizer.step()
    assert not torch.equal(w, torch.ones(3))


def trained(optimizer, p, steps):
    for _ in range(steps):
        p.grad = torch.sin(3 * p.detach()) + 0.1
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)])
def test_state_that_is_initialized_by_a_step_at_rate_zero_is_no_training(rate, recwarn):
    """As torch's distributed checkpoints do it."""
    model = nn.Linear(3, 1)
    optimizer = AdaSAM(model.parameters(), lr=rate, rho=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state and all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not [w for w in recwarn if "no ascent" in str(w.message)]
    model(torch.ones(1, 3)).sum().backward()
    with pytest.warns(UserWarning, match="no ascent has come before"):  # the control: a real one still warns
        optimizer.step()


def test_a_loaded_group_is_filled_in_and_checked():
    p, q = (nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64)) for _ in range(2))
    saved, loaded = AdaSAM([p], lr=0.1, rho=0.0, betas=(0.5, 0.7)), AdaSAM([q], lr=0.3, rho=0.0)
    trained(saved, p, 1)
    q.data.copy_(p)
    state = copy.deepcopy(saved.state_dict())
    for key in ("foreach", "fused", "weight_decay"):  # an older version may have had none of them
        del state["param_groups"][0][key]
    loaded.load_state_dict(state)
    assert torch.equal(trained(loaded, q, 2), trained(saved, p, 2))
    assert loaded.param_groups[0]["fused"] is None and loaded.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", "1e-3"),
        ("lr", -1.0),
        ("betas", (0.9, 1.0)),
        ("eps", 0.0),
        ("rho", "0.05"),
        ("rho", -1.0),
        ("fused", "yes"),
    ],
)
def test_a_loaded_group_with_a_bad_value_is_refused(name, value):
    p = nn.Parameter(torch.ones(2))
    optimizer = AdaSAM([p], rho=0.0)
    good = optimizer.state_dict()
    bad = {**good, "param_groups": [{**good["param_groups"][0], name: value}]}
    with pytest.raises(ValueError, match=f"^{name}=") as error:
        optimizer.load_state_dict(bad)
    assert repr(value) in str(error.value) and "\n" not in str(error.value)
    assert optimizer.state_dict() == good
    optimizer.load_state_dict(good)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_knows_what_the_optimizer_knew(again):
    """A shard of ZeroRedundancyOptimizer stays one, and the warning stays off where it was switched off."""
    p = nn.Parameter(torch.ones(2))
    optimizer = AdaSAM([p])
    assert again(optimizer).warn_without_ascent
    optimizer._is_shard, optimizer.warn_without_ascent = True, False  # as inside it; see distributed/zero.py
    copied = again(optimizer)
    assert not copied.warn_without_ascent
    copied.param_groups[0]["params"][0].grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="ZeroRedundancyOptimizer gives AdaSAM a shard"):
        copied.ascend()


def negated(t):
    """The same numbers, their negatives lying in memory."""
    return torch._neg_view(-t)


def imaginary(t):
    """The same numbers, as a lazily negated view of complex memory."""
    return torch.complex(torch.full_like(t, 7.0), -t).conj().imag


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("lazy", [negated, imaginary])
@pytest.mark.parametrize("which", ["parameter", "gradient", "both"])
def test_lazily_negated_tensors(name, lazy, which):
    def run(make_parameter, make_gradient):
        p, q = nn.Parameter(make_parameter(torch.linspace(-1, 1, 6))), nn.Parameter(torch.ones(3))
        optimizer = AdaSAM([p, q], lr=0.1, rho=0.3, **IMPLEMENTATIONS[name])
        seen = []
        for _ in range(3):
            for weights in (p, q):
                weights.grad = make_gradient(torch.sin(3 * weights.detach()) + 0.1)
            before = p.detach().clone()
            with optimizer.perturbed():
                seen.append(p.detach().clone())
                for weights in (p, q):
                    weights.grad = make_gradient(torch.sin(3 * weights.detach()) + 0.1)
            assert torch.equal(p.detach(), before)
            optimizer.step()
            seen.append(p.detach().clone())
        return torch.stack(seen)

    got = run(lazy if which != "gradient" else torch.clone, lazy if which != "parameter" else torch.clone)
    wanted = run(torch.clone, torch.clone)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert (wanted[0] - torch.linspace(-1, 1, 6)).abs().max() > 0.1  # a move the other way would be seen


@pytest.mark.parametrize(
    ("beta2", "first", "peak"), [(0.98, 0.71, 1.55), (0.999, 3.16, 6.57)], ids=["the default", "Transformers' own"]
)
def test_how_large_the_first_updates_are(beta2, first, peak):
    """In units of the learning rate, along a gradient that stays the same: what README and docstring say of warm-up."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdaSAM([p], lr=1.0, betas=(0.9, beta2), eps=1e-12)
    sizes = []
    for _ in range(60):
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer.step()
        sizes.append((before - p.detach()).item())
    assert sizes[0] == pytest.approx((1 - 0.9) / (1 - beta2) ** 0.5) == pytest.approx(first, abs=0.01)
    assert max(sizes) == pytest.approx(peak, abs=0.01) and 10 <= sizes.index(max(sizes)) <= 14
