"""Two processes against one, through torchrun. The runs are in distributed/cases.py; each is launched once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import flat
from distributed.cases import DDP, FSDP, MODELS, rows_for, train
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def launch(folder, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    script = str(HERE / "distributed" / "cases.py")
    done = subprocess.run(
        [*command, script, str(folder), *words], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("fsdp"), "--fsdp")


def one_process(tmp_path, case):
    """The same rows per step in one process: twice the micro-batches, of the same size, so that bf16 rounds alike."""
    k = case.get("gradient_accumulation_steps", 1)
    ours = ("bucket_view", "logs", "sync_each_batch")
    stock = {n: v for n, v in case.items() if not n.startswith("ddp_") and n not in ours}
    if stock.get("model") == "channels last":
        stock["model"] = "contiguous"
    stock["sam_cache_frozen"] = False
    return train(tmp_path, **{**stock, "gradient_accumulation_steps": 2 * k})


def start_of(case):
    return flat(MODELS["float32" if case.get("bf16") else case.get("model", "bert")]())


def distance(got, want, case):
    """How far two runs ended apart, as a share of the way that they went."""
    way = (want["weights"] - start_of(case)).norm()
    assert way > 1e-3
    return ((got["weights"] - want["weights"]).norm() / way).item()


def check_logs(got, want, case, rel):
    names = {"loss", "grad_norm", "sam_loss", "sam_gap", "sam_grad_norm"}
    if case.get("sam_scope") == "microbatch":
        names.remove("sam_grad_norm")  # of the last micro-batch; with two processes, their mean
    assert len(got["logs"]) == len(want["logs"]) >= 3
    for entry, wanted in zip(got["logs"], want["logs"], strict=True):
        keys = names & set(wanted)
        assert {k: entry[k] for k in keys} == pytest.approx({k: wanted[k] for k in keys}, rel=rel, abs=1e-6)


LABELS = {
    "one micro-batch": "DDP",
    "accumulation": "DDP × accumulation, shorter last window",
    "causal": "DDP × causal LM with unequal numbers of labels (`average_tokens_across_devices`)",
    "unused": "DDP with `find_unused_parameters`",
    "bucket view": "DDP with `gradient_as_bucket_view`",
    "combined": "DDP × accumulation × bf16 × clipping",
    "fraction": "DDP × `sam_ascent_fraction`",
    "norm": "DDP × `sam_parameters`",
    "channels last": "DDP × `sam_parameters` × channels-last weights",
    "momentum": "DDP × `sam_direction=momentum`",
    "adaptive": "DDP × `sam_adaptive`",
    "frozen": "DDP × reuse of what frozen layers compute",
    "functional": "DDP × `sam_descent=functional`",
    "preconditioned": "DDP × `sam_direction=preconditioned`",
    "friendly": "DDP × `sam_direction=friendly`",
    "noise": "DDP × `sam_direction=noise`",
    "reuse": "DDP × `sam_reuse`",
}


@pytest.mark.parametrize(
    "name",
    [
        *(
            pytest.param(f"{case} {scope}", marks=pytest.mark.compat("Many processes", label, scope=scope))
            for case, label in LABELS.items()
            for scope in ("batch", "microbatch")
            # there the last direction, and the mean gradient, are those of each process's own micro-batches
            if (case, scope) not in {("reuse", "microbatch"), ("friendly", "microbatch")}
        ),
        pytest.param(
            "static graph",
            marks=pytest.mark.compat("Many processes", "DDP with `ddp_static_graph`, no accumulation", scope="batch"),
        ),
        pytest.param(
            "process 0 logs",
            marks=pytest.mark.compat("Logs", "process 0 logging alone, with DDP", scope="batch"),
        ),
        "plain",
    ],
)
def test_ddp_follows_one_process(ddp, tmp_path, name):
    case = DDP[name]
    first, second = ddp[f"{name}-0"], ddp[f"{name}-1"]
    assert first["digests"] == second["digests"]  # bit-identical after each step
    want = one_process(tmp_path, case)
    # the same sums in another order, in float64 or, with bf16 autocast, in float32
    assert distance(first, want, case) < (1e-4 if case.get("bf16") else 1e-11)
    check_logs(first, want, case, rel=1e-3)


FSDP_LABELS = {
    "one micro-batch": "FSDP2",
    "accumulation": "FSDP2 × accumulation, shorter last window",
    "causal": "FSDP2 × causal LM with unequal numbers of labels",
    "any optimizer": "FSDP2 with AdamW inside",
    "clipping": "FSDP2 × accumulation × clipping",
    "fraction": "FSDP2 × `sam_ascent_fraction`",
    "momentum": "FSDP2 × `sam_direction=momentum`",
    "adaptive": "FSDP2 × `sam_adaptive`",
    "reuse": "FSDP2 × `sam_reuse`",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(case, marks=pytest.mark.compat("Many processes", label, scope="batch"))
        for case, label in FSDP_LABELS.items()
    ],
)
def test_fsdp2_follows_one_process(fsdp, tmp_path, name):
    got, want = fsdp[f"{name}-0"], one_process(tmp_path, FSDP[name])
    assert got["sharded"]
    assert torch.equal(got["weights"], fsdp[f"{name}-1"]["weights"])
    assert distance(got, want, FSDP[name]) < 1e-11
    check_logs(got, want, FSDP[name], rel=1e-3)


@pytest.mark.compat("Many processes", "FSDP2 with CPU offload", scope="batch")
def test_fsdp2_offload_needs_an_accelerator():
    if torch.accelerator.is_available():
        pytest.skip("nobody has run it on an accelerator yet")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="Cannot access accelerator device"):
            fully_shard(torch.nn.Linear(2, 2), offload_policy=CPUOffloadPolicy())
    finally:
        torch.distributed.destroy_process_group()
    pytest.skip("torch's FSDP2 offloads from an accelerator only, and there is none")


@pytest.mark.compat("Many processes", "FSDP2 × accumulation × bf16 × clipping", scope="batch")
def test_fsdp2_in_bf16_strays_no_farther_than_a_plain_run(fsdp, tmp_path):
    """FSDP2 computes and reduces in bf16 where one process only autocasts, so that plain runs differ, too."""
    apart = {}
    for name in ("combined", "combined plain"):
        got, want = fsdp[f"{name}-0"], one_process(tmp_path, FSDP[name])
        apart[name] = distance(got, want, FSDP[name])
    assert 0 < apart["combined"] < 2 * apart["combined plain"] < 0.02
    # the control: a radius of 0.04 instead of 0.05
    other = one_process(tmp_path, {**FSDP["combined"], "sam_rho": 0.04})
    assert distance(fsdp["combined-0"], other, FSDP["combined"]) > 0.04


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("plain", 1),
        ("accumulation batch", 2),
        ("local", 1),
        ("one micro-batch microbatch", 1),
        ("norm batch", 2),
        ("momentum batch", 1),
        pytest.param(
            "accumulation microbatch",
            1,
            marks=pytest.mark.compat(
                "Many processes", "DDP: no gradient traffic in the first pass", scope="microbatch"
            ),
        ),
    ],
)
def test_gradient_traffic(ddp, name, count):
    """One all-reduce for the descent, and one for the ascent only where it is shared. (The model is one bucket.)"""
    assert set(ddp[f"{name}-0"]["reductions"][1:]) == {count}


def test_the_scopes_are_different_trajectories(ddp):
    """The control of the tests above: they could not all pass if the ascent were not what it says."""
    runs = [ddp[f"{name}-0"]["weights"] for name in ("plain", "local", "accumulation batch", "accumulation microbatch")]
    for i, one in enumerate(runs):
        assert all((one - other).abs().max() > 1e-5 for other in runs[:i])


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
@pytest.mark.compat("Many processes", "DDP × BatchNorm: statistics move once per step")
def test_batchnorm_moves_as_in_stock(ddp, scope):
    """Radius 1e-30 runs all the machinery and moves no weight, so both processes must have stock's statistics."""
    for rank in range(2):
        got, want = ddp[f"batchnorm {scope}-{rank}"], ddp[f"batchnorm plain-{rank}"]
        assert torch.equal(got["weights"], want["weights"])
        assert got["buffers"].keys() == want["buffers"].keys() != set()
        assert all(torch.equal(got["buffers"][key], value) for key, value in want["buffers"].items())
        assert want["buffers"]["norm.running_mean"].abs().max() > 0


@pytest.mark.compat(
    "Many processes", "DDP with a local ascent (`sam_sync=False`), `sync_each_batch` too", scope="batch"
)
@pytest.mark.parametrize("name", ["local", "local, synced each batch"])
def test_a_local_ascent_is_each_process_ascending_along_its_own_window(ddp, name):
    """scope batch with sam_sync=False, against a loop written by hand in one process."""
    first, second = ddp[f"{name}-0"], ddp[f"{name}-1"]
    assert first["digests"] == second["digests"]
    model, rows = MODELS["bert"]().train(), rows_for("bert")
    micro = [rows[i : i + 2] for i in range(0, 20, 2)]
    params = list(model.parameters())
    m = [torch.zeros_like(p) for p in params]
    v = [torch.zeros_like(p) for p in params]
    top = [torch.full_like(p, 1e-3**2) for p in params]

    def gradient(window):
        for p in params:
            p.grad = None
        for batch in window:
            inputs = {key: torch.stack([r[key] for r in batch]) for key in batch[0]}
            (model(**inputs).loss / len(window)).backward()
        return [p.grad for p in params]

    for step in range(3):
        here = micro[4 * step : 4 * step + 4]
        total = [torch.zeros_like(p) for p in params]
        for rank in range(2):
            window = here[rank::2]
            ascent = gradient(window)
            norm = sum(g.square().sum() for g in ascent).sqrt()
            clean = [p.detach().clone() for p in params]
            with torch.no_grad():
                for p, g in zip(params, ascent, strict=True):
                    p += 0.05 * g / norm
            descent = gradient(window)
            with torch.no_grad():
                for p, value, t, g in zip(params, clean, total, descent, strict=True):
                    p.copy_(value)
                    t += g / 2
        with torch.no_grad():
            for p, g, a, b, c in zip(params, total, m, v, top, strict=True):
                a.mul_(0.9).add_(0.1 * g)
                b.mul_(0.98).add_(0.02 * g * g)
                c.copy_(torch.maximum(c, b))
                p -= 1e-3 * a / c.sqrt()
    assert (flat(model) - first["weights"]).abs().max() < 1e-13
