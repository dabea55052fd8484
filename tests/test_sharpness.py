from types import SimpleNamespace

import pytest
import torch
from conftest import flat, make_model, make_rows
from torch import nn

from adasam_hf.sharpness import sam_gap, top_eigenvalues


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
