"""What only an accelerator can show. ADASAM_DEVICE=cpu runs the same code on a CPU, as far as that shows anything.

Each test says what it needs with the marker `accelerator`; without that hardware it is skipped with the name of it.
"""

import gc
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import DEVICE, Sharp, flat, make_model, make_rows
from distributed.cases import NO_DROPOUT, train
from distributed.on_devices import CASES, by_hand, plain_model
from helpers import ROOT, OneProcess
from oracle import Oracle
from torch import nn

from adasam_hf import AdaSAM, Perturbation, SharpnessAwareLoop, kernels, rng
from adasam_hf.directions import Friendly, Gradient, Momentum, Noise, Preconditioned
from adasam_hf.step import StepSettings, TwoPassStep
from adasam_hf.step_metrics import StepMetrics
from adasam_hf.window import StepPlan, Window

accelerator = pytest.mark.accelerator
RHO = 0.1


class Net(nn.Module):
    """A classifier with an embedding, normalization and dropout, whose forward pass reads nothing back."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Dropout(dropout))
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids, labels):
        logits = self.head(self.body(self.embed(input_ids).mean(1)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def batch(i=0, device=DEVICE, rows=8):
    generator = torch.Generator().manual_seed(i)
    ids = torch.randint(40, (rows, 9), generator=generator)
    labels = torch.randint(3, (rows,), generator=generator)
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def two_pass_steps(model, optimizer, batches, forward=None, autocast=nullcontext, scaler=None):
    """As one would write them in a plain loop."""
    scaler = scaler or torch.amp.GradScaler(DEVICE.type, enabled=False)

    def backward(one):
        with autocast():
            loss = (model if forward is None else forward)(**one)["loss"]
        scaler.scale(loss).backward()

    for one in batches:
        masks = rng.capture()
        backward(one)
        with optimizer.perturbed(), rng.replay(masks):
            backward(one)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return flat(model)


def trained(dtype=torch.float32, steps=4, dropout=0.0, **options):
    """Weights after a few steps on DEVICE."""
    net = Net(dropout).to(DEVICE, dtype)
    return two_pass_steps(
        net, AdaSAM(net.parameters(), lr=1e-2, eps=1e-3, rho=RHO), map(batch, range(steps)), **options
    )


def apart(one, other):
    """How far two trainings ended apart, as a share of the way that they went."""
    way = (other.double() - flat(Net()).double()).norm()
    assert way > 1e-2
    return ((one.double() - other.double()).norm() / way).item()


# ---- kernels ----

GROUP = {"lr": 0.02, "betas": (0.9, 0.98), "eps": 1e-2, "weight_decay": 0.1, "rho": 0.3}
SHAPES = [(3, 4), (4, 6), (5,)]
PATHS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "loop": {"foreach": False, "fused": False},
    "default": {},
}


def weights(dtype, strided):
    """Parameters; `strided`: one transposed and one a slice, which a fused kernel and a loop share between them."""
    values = [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate(SHAPES)]
    tensors = [torch.tensor(v, dtype=dtype, device=DEVICE) for v in values]
    if strided:
        tensors[0] = tensors[0].t().contiguous().t()
        tensors[1] = torch.zeros(4, 9, dtype=dtype, device=DEVICE)[:, 1:7].copy_(tensors[1])
    return values, [nn.Parameter(t) for t in tensors]


def follows_the_oracle(dtype, strided, fault=None, **implementation):
    """The largest difference from Algorithm 1 in NumPy after a few steps, relative to the largest move."""
    start, params = weights(dtype, strided)
    oracle = Oracle(start, [{**GROUP, "index": range(len(SHAPES))}], fault)
    optimizer = AdaSAM(params, **GROUP, **implementation)
    for t in range(5):
        for p in params:
            p.grad = torch.sin(p.detach() + t)
        with optimizer.perturbed():
            for p in params:
                p.grad = torch.sin(p.detach() + t)
        optimizer.step()
        optimizer.zero_grad()
        oracle.update([np.sin(x + t) for x in oracle.perturbed([np.sin(x + t) for x in oracle.x])])
    moved = max(np.abs(x - s).max() for x, s in zip(oracle.x, start, strict=True))
    got = [p.detach().cpu().double().numpy() for p in params]
    return max(np.abs(g - x).max() for g, x in zip(got, oracle.x, strict=True)) / moved


@accelerator("an accelerator")
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("climb", ["fused", "loop"])
def test_kernels_follow_algorithm_1(path, strided, climb, monkeypatch):
    if climb == "loop":
        monkeypatch.setattr(kernels, "_get_fused_kernels_supported_devices", list)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 5e-5)):
        assert follows_the_oracle(dtype, strided, **PATHS[path]) < tolerance
    assert follows_the_oracle(torch.float64, strided, fault="norm_per_parameter", **PATHS[path]) > 1e-3


# ---- precision ----


@accelerator("an accelerator")
def test_fp16_with_the_real_scaler():
    """Autocast in float16 strays little from float32, and the weights are finite; another radius strays far."""
    net = Net().to(DEVICE)
    optimizer = AdaSAM(net.parameters(), lr=1e-2, eps=1e-3, rho=RHO)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    options = {"autocast": lambda: torch.autocast(DEVICE.type, torch.float16), "scaler": scaler}
    got = two_pass_steps(net, optimizer, map(batch, range(4)), **options)
    assert apart(got, trained()) < 0.1 < apart(trained(steps=3), trained())
    assert scaler.get_scale() == 1024.0


@accelerator("an accelerator")
def test_an_overflow_in_fp16_skips_the_update():
    net = Net().to(DEVICE)
    optimizer = AdaSAM(net.parameters(), lr=1e-2, eps=1e-3, rho=RHO)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    hook = net.head.bias.register_hook(lambda g: torch.full_like(g, torch.inf))
    before = flat(net)
    assert torch.equal(two_pass_steps(net, optimizer, [batch()], scaler=scaler), before)
    assert scaler.get_scale() == 512.0
    hook.remove()
    assert not torch.equal(two_pass_steps(net, optimizer, [batch()], scaler=scaler), before)


@accelerator("an accelerator", rehearsal=False)  # on a CPU Accelerate turns fp16 off, and says nothing
@pytest.mark.parametrize("scope", ["batch", "microbatch"])
def test_the_trainer_in_fp16(build, device, scope):
    model = make_model("bert", torch.float32, **NO_DROPOUT)
    flags = {"optim": "adasam", "sam_scope": scope, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    trainer = build(Sharp, model, fp16=True, **flags)
    assert trainer.accelerator.scaler is not None
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "sam_loss" in entry]
    plain = make_model("bert", torch.float32, **NO_DROPOUT)
    build(Sharp, plain, folder="float32", **flags).train()
    start = flat(make_model("bert", torch.float32, **NO_DROPOUT))
    assert losses and flat(model).isfinite().all()
    assert (flat(model) - flat(plain)).norm() < 0.3 * (flat(plain) - start).norm()


@accelerator("an accelerator")
def test_bf16_autocast_strays_little_from_float32():
    got = trained(autocast=lambda: torch.autocast(DEVICE.type, torch.bfloat16))
    assert 0 < apart(got, trained()) < 0.2 < apart(trained(steps=3), trained())


@accelerator("an accelerator")
def test_half_precision_weights_say_what_rounding_leaves():
    net = Net().to(DEVICE, torch.bfloat16)
    net(**batch())["loss"].backward()
    params = list(net.parameters())
    before = torch.cat([p.detach().double().reshape(-1) for p in params])
    gradient = torch.cat([p.grad.double().reshape(-1) for p in params])
    perturbation = Perturbation(torch.optim.SGD(params, lr=0.1))
    with perturbation.perturbed(RHO):
        moved = torch.cat([p.detach().double().reshape(-1) for p in params]) - before
    delta = RHO * gradient / gradient.norm()
    want = (moved @ delta / (delta @ delta)).item()
    assert perturbation.applied.item() == pytest.approx(want, rel=1e-3)
    assert 0.3 < want < 1.1 and abs(want - 1) > 1e-3
    assert torch.equal(torch.cat([p.detach().double().reshape(-1) for p in params]), before)


@contextmanager
def tf32(on):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@accelerator("a CUDA GPU with TF32")
@pytest.mark.parametrize("on", [False, True], ids=["off", "on"])
def test_tf32_changes_the_passes_and_not_the_move(on):
    with tf32(on):
        net = Net().to(DEVICE)
        before = flat(net).double()
        net(**batch())["loss"].backward()
        gradient = torch.cat([p.grad.double().reshape(-1) for p in net.parameters()])
        want = (RHO * gradient / gradient.norm()).cpu()
        optimizer = AdaSAM(net.parameters(), rho=RHO)
        with optimizer.perturbed():
            assert (flat(net).double() - before - want).norm() < 1e-5 * RHO
        assert torch.equal(flat(net).double(), before)
        got = trained()
    with tf32(False):
        exact = trained()
    assert apart(got, exact) < (0.05 if on else 1e-6)


# ---- compilation and graphs ----


BACKEND = "aot_eager" if DEVICE.type == "cpu" else "inductor"  # which needs a compiler of C++ on a CPU


@accelerator("an accelerator")
def test_a_compiled_model():
    net = Net().to(DEVICE)
    optimizer = AdaSAM(net.parameters(), lr=1e-2, eps=1e-3, rho=RHO)
    compiled = torch.compile(net, backend=BACKEND)
    got = two_pass_steps(net, optimizer, map(batch, range(4)), forward=compiled)
    assert apart(got, trained()) < 1e-3 < apart(trained(steps=3), trained())


@accelerator("an accelerator")
def test_a_compiled_step():
    net = Net().to(DEVICE)
    optimizer = AdaSAM(net.parameters(), lr=1e-2, eps=1e-3, rho=RHO)
    optimizer.step = torch.compile(optimizer.step, backend=BACKEND)
    got = two_pass_steps(net, optimizer, map(batch, range(4)))
    assert apart(got, trained()) < 1e-3 < apart(trained(steps=3), trained())


@accelerator("a CUDA GPU", rehearsal=False)
def test_a_graph_of_the_step_is_refused():
    net = Net().to(DEVICE)
    optimizer = AdaSAM(net.parameters(), rho=RHO)
    two_pass_steps(net, optimizer, [batch()])
    before, graph = flat(net), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(graph):
        optimizer.step()
    assert torch.equal(flat(net), before)


def test_a_graph_of_the_step_is_refused_by_name(monkeypatch):
    """Without a GPU: what torch says while it captures, and the argument that torch's own optimizers have for it."""
    p = nn.Parameter(torch.ones(3))
    optimizer = AdaSAM([p], rho=0.0)
    p.grad = torch.ones(3)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"capturable=True.*learning rate.*outside the graph"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    optimizer.step()
    assert not torch.equal(p, torch.ones(3))
    with pytest.raises(TypeError, match="capturable"):
        AdaSAM([p], capturable=True)


@accelerator("a CUDA GPU", rehearsal=False)
def test_graphs_of_the_passes():
    """Forward and backward replayed from a graph, the moves and the update outside it: the same training."""
    net = Net().to(DEVICE)
    optimizer = AdaSAM(net.parameters(), lr=1e-2, eps=1e-3, rho=RHO)
    static = batch()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            net(**static)["loss"].backward()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        net(**static)["loss"].backward()
    gradients = [p.grad for p in net.parameters()]

    def backward():
        for p, g in zip(net.parameters(), gradients, strict=True):
            p.grad = g.zero_()
        graph.replay()

    for i in range(4):
        for name, value in batch(i).items():
            static[name].copy_(value)
        backward()
        with optimizer.perturbed():
            backward()
        optimizer.step()
    assert apart(flat(net), trained()) < 1e-5


# ---- streams, memory, waiting ----


@accelerator("an accelerator")
def test_on_another_stream():
    """All of a training on a stream of its own, while the default one is busy with something else."""
    want = trained()
    if DEVICE.type == "cpu":
        assert torch.equal(trained(), want)
        return
    side = torch.Stream(DEVICE)
    torch.accelerator.synchronize()
    busy = torch.randn(2048, 2048, device=DEVICE)
    for _ in range(20):
        busy = busy @ busy / 2048
    with side:
        got = trained()
    side.synchronize()
    assert torch.equal(got, want) and busy.shape == (2048, 2048)


def bytes_of_tensors():
    """That are alive in this process, of each piece of memory once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.layout is torch.strided and not thing.is_meta:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values()) + (torch.accelerator.memory_allocated() if DEVICE.type != "cpu" else 0)


@accelerator("an accelerator")
@pytest.mark.parametrize("scope", ["batch", "microbatch"])
def test_memory_does_not_grow(scope):
    net = Net(0.1).to(DEVICE)
    optimizer = AdaSAM(net.parameters(), lr=1e-3, rho=RHO)
    step = two_pass_object(net, optimizer, scope)
    batches, held, hoard = [batch(i) for i in range(2)], [], []
    for i in range(8):
        take_step(step, net, optimizer, batches, scope=scope)
        if i == 5:
            hoard.append(torch.ones(100_000, device=DEVICE))  # the control: 400 kB that are kept are seen
        if i % 2:  # (in the first the state is made)
            held.append(bytes_of_tensors())
    assert held[0] == held[1] and held[2] == held[3] >= held[1] + 400_000


def two_pass_object(model, optimizer, scope="batch", **settings):
    options = {"same_masks": True, "adaptive": False, **settings}
    return TwoPassStep(model, optimizer, StepSettings(scope, **options), metrics=StepMetrics())


def take_step(step, model, optimizer, batches, direction=None, scope="batch", rho=RHO):
    """One optimizer step of the plain object, as the Trainer takes it."""
    window = Window(batches, StepPlan([rho], direction or Gradient(optimizer)))

    def stock_step(inputs):
        loss = model(**inputs)["loss"] / len(batches)
        loss.backward()
        return loss.detach()

    for one in window:
        step(window, one, stock_step, OneProcess())
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def no_synchronization():
    """Whatever makes the host wait for a CUDA device is an error inside it."""
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# In a rehearsal tensors are on `meta`: they have no values, so that whatever reads one raises.
VALUELESS = torch.device("meta") if DEVICE.type == "cpu" else DEVICE
OPTIMIZERS = {
    "AdaSAM": lambda p: AdaSAM(p, lr=1e-3, rho=RHO),
    "AdaSAM, foreach": lambda p: AdaSAM(p, lr=1e-3, rho=RHO, foreach=True),
    "AdaSAM, loop": lambda p: AdaSAM(p, lr=1e-3, rho=RHO, foreach=False, fused=False),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
}
STEPS = {
    "gradient": (Gradient, {}),
    "momentum": (Momentum, {}),
    "preconditioned": (Preconditioned, {}),
    "friendly": (Friendly, {}),
    "noise": (Noise, {}),
    "adaptive": (Gradient, {"adaptive": True}),
    "functional": (Gradient, {"functional": True}),
    "fresh masks": (Gradient, {"same_masks": False}),
}


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [*((optimizer, "gradient") for optimizer in OPTIMIZERS), *(("AdaSAM", kind) for kind in STEPS if kind != "noise")],
)
def test_the_host_does_not_wait_inside_a_step(optimizer, kind, scope):
    """On CUDA by torch's own alarm; elsewhere on `meta` tensors, which have no values to wait for."""
    direction, settings = STEPS[kind]
    model = Net(0.1).to(VALUELESS)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    step, direction = two_pass_object(model, optimizer, scope, **settings), direction(optimizer)
    batches = [{name: value.to(VALUELESS) for name, value in batch(i).items()} for i in range(2)]
    optimizer_step(model, optimizer, batches[0])  # so that there are moments
    with no_synchronization():
        for _ in range(3):
            take_step(step, model, optimizer, batches, direction, scope)
    assert set(step.perturbation.moved) == set(model.parameters())  # a plain step would have nothing to wait for


def optimizer_step(model, optimizer, one):
    model(**one)["loss"].backward()
    optimizer.warn_without_ascent = False
    optimizer.step()
    optimizer.zero_grad()


@accelerator("a CUDA GPU", rehearsal=False)  # `meta` has no generator
def test_the_host_does_not_wait_for_noise():
    model = Net().to(DEVICE)
    optimizer = AdaSAM(model.parameters(), rho=RHO)
    step, direction, one = two_pass_object(model, optimizer), Noise(optimizer), batch()
    take_step(step, model, optimizer, [one], direction)
    with no_synchronization():
        take_step(step, model, optimizer, [one], direction)
    assert step.metrics.perturbed_here == 2


class Reads(Gradient):
    """Asks the device for a number, as a direction that is written carelessly would."""

    def __call__(self, p):
        return p.grad if p.grad is not None and p.grad.abs().max().item() >= 0 else None


def test_a_step_that_waits_is_found():
    """The control of the tests above. (On `meta` it is an error of any device without values.)"""
    model = Net().to(VALUELESS)
    optimizer = AdaSAM(model.parameters(), rho=RHO)
    one = {name: value.to(VALUELESS) for name, value in batch().items()}
    with pytest.raises(RuntimeError, match=r"synchroniz|meta"), no_synchronization():
        take_step(two_pass_object(model, optimizer), model, optimizer, [one], Reads(optimizer))


def test_the_closure_does_not_wait():
    model = Net().to(VALUELESS)
    optimizer = AdaSAM(model.parameters(), rho=RHO)
    one = {name: value.to(VALUELESS) for name, value in batch().items()}

    passes = []

    def closure():
        optimizer.zero_grad()
        loss = model(**one)["loss"]
        loss.backward()
        passes.append(loss)
        return loss

    optimizer.step(closure)
    with no_synchronization():
        optimizer.step(closure)
    assert len(passes) == 4  # two in each step


@pytest.fixture
def asked(monkeypatch):
    """Where there is no alarm: what the host has been told of values, as if they lay on another device."""
    found = []
    if DEVICE.type == "cpu":
        truth, equal = torch.Tensor.__bool__, torch.equal
        monkeypatch.setattr(torch.Tensor, "__bool__", lambda t: found.append("bool") or truth(t))
        monkeypatch.setattr(torch, "equal", lambda a, b: found.append("equal") or equal(a, b))
    return found


@accelerator("an accelerator")
@pytest.mark.xfail(strict=False, reason="compares what frozen layers are given, for which the host waits")
def test_frozen_layers_do_not_wait(asked):
    model = Net().to(DEVICE)
    model.embed.requires_grad_(False)
    optimizer = AdaSAM([p for p in model.parameters() if p.requires_grad], rho=RHO)
    step = two_pass_object(model, optimizer, cache_frozen=True)

    def stock_step(inputs):  # in each pass other tensors with the same numbers, as a model makes its masks
        loss = model(**{name: value.clone() for name, value in inputs.items()})["loss"]
        loss.backward()
        return loss.detach()

    one = batch()
    with no_synchronization():
        for _ in range(3):
            window = Window([one], StepPlan([RHO], Gradient(optimizer)))
            for inputs in window:
                step(window, inputs, stock_step, OneProcess())
            optimizer.step()
            optimizer.zero_grad()
    assert not asked


@accelerator("an accelerator")
def test_the_loop_with_accelerate_does_not_wait(asked):
    model = Net().to(DEVICE)
    optimizer = AdaSAM(model.parameters(), rho=RHO)
    loop = SharpnessAwareLoop(Accelerator(cpu=DEVICE.type == "cpu"), model, optimizer)
    loop.backward(lambda one: model(**one)["loss"], batch())
    asked.clear()
    with no_synchronization():
        optimizer.step()
    assert not asked


@accelerator("a CUDA GPU")
def test_the_trainer_does_not_wait_more_than_stock(build, device):
    """Inside `training_step`; the stock loop around it waits by itself, for the loss and the clipping."""
    trainer = build(Sharp, Net(0.1), optim="adasam", sam_rho=RHO, logging_steps=1000, max_steps=4)
    step, watched = trainer.training_step, []

    def watch(model, inputs, *args, **kwargs):
        if trainer.state.global_step == 0:  # where kernels are loaded and the state is made
            return step(model, inputs, *args, **kwargs)
        watched.append(trainer.state.global_step)
        with no_synchronization():
            return step(model, inputs, *args, **kwargs)

    trainer.training_step = watch
    trainer.train()
    assert watched == [1, 2, 3]


@accelerator("an accelerator")
def test_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        first, second = trained(dropout=0.1), trained(dropout=0.1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
    assert not torch.equal(first, trained())  # the control: other masks


@accelerator("an accelerator")
def test_masks_come_from_the_device_and_are_replayed():
    """At a vanishing radius both passes of a step have one loss, bit for bit; without a replay they do not."""
    net = Net(0.5).to(DEVICE)
    optimizer = AdaSAM(net.parameters(), rho=1e-30)

    def losses(replays):
        state = rng.capture()
        first = net(**batch())["loss"]
        first.backward()
        with optimizer.perturbed(), rng.replay(state) if replays else nullcontext():
            second = net(**batch())["loss"]
            second.backward()
        optimizer.zero_grad()
        return first.item(), second.item()

    one, other = losses(True)
    assert one == other
    one, other = losses(False)
    assert one != other
    assert losses(True)[0] != one  # the stream has gone on


# ---- several processes ----


def launch(folder, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = str(ROOT / "tests" / "distributed" / "on_devices.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    folder.mkdir()
    done = subprocess.run([*command, script, str(folder)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes",
    [pytest.param(1, marks=accelerator("a CUDA GPU")), pytest.param(2, marks=accelerator("two CUDA GPUs"))],
)
def test_nccl_and_fsdp2_with_offload(tmp_path, processes):
    """NCCL (in a rehearsal gloo) against one process on the CPU; FSDP2 shards and, on a GPU, offloads to the host."""
    found = launch(tmp_path / "many", processes)
    start = flat(make_model("bert", **NO_DROPOUT))
    for name, case in CASES.items():
        (tmp_path / name).mkdir()
        want = train(tmp_path / name, **{**case, "gradient_accumulation_steps": processes})["weights"]
        got = [found[f"{name}-{rank}"]["weights"] for rank in range(processes)]
        assert all(torch.equal(one, got[0]) for one in got)
        assert (got[0] - want).norm() < 1e-8 * (want - start).norm()
    assert (found["synchronized-0"]["weights"] - found["momentum-0"]["weights"]).norm() > 1e-3  # the control
    want = by_hand(plain_model(), torch.device("cpu"))
    assert (found["sharded-0"]["weights"] - want).abs().max() < 1e-5
    assert (want - torch.cat([p.detach().reshape(-1) for p in plain_model().parameters()])).abs().max() > 1e-2


# ---- the whole Trainer ----


@accelerator("an accelerator")
@pytest.mark.parametrize("scope", ["batch", "microbatch"])
def test_a_training_as_on_the_cpu(build, device, scope):
    """In float64, without dropout, on the device and by a trainer that is kept on the CPU."""
    weights_of = []
    for folder, options in (("there", {}), ("here", {"use_cpu": True})):
        model = make_model("bert", **NO_DROPOUT)
        flags = {"optim": "adasam", "sam_scope": scope, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
        build(Sharp, model, make_rows(), folder=folder, **flags, **options).train()
        weights_of.append(flat(model))
    start = flat(make_model("bert", **NO_DROPOUT))
    assert (weights_of[0] - weights_of[1]).norm() < 1e-8 * (weights_of[1] - start).norm()
    assert (weights_of[1] - start).norm() > 1e-3
