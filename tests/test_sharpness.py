import pytest
import torch
from conftest import flat, make_model, make_rows

from adasam_hf.sharpness import sam_gap


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
