"""Random small models, windows, radii and groups: the Trainer's runs against NumPy, gradients included."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import Sharp, flat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Oracle
from torch import nn

from adasam_hf import AdaSAM, AdaSAMTrainingArguments

LR, BETAS, EPS = 1e-2, (0.9, 0.98), 1e-3
DENORMAL, TINY, HUGE = 5e-324, 1e-12, 1e8


@dataclass(frozen=True)
class Case:
    """A ReLU network `widths` with squared error, trained on `rows` examples in windows of k batches."""

    widths: tuple[int, ...] = (3, 4, 2)
    rows: int = 13
    batch: int = 2
    k: int = 3
    epochs: int = 2
    scope: str = "batch"
    radii: tuple[float, ...] = (0.3, 0.05)  # of matrices and biases
    decay: float = 0.1
    frozen: int | None = None  # a layer that does not learn
    unused: bool = False  # a parameter without gradients
    blank: bool = False  # inputs and targets are 0, and with them some or all gradients
    seed: int = 0

    def arrays(self):
        """Parameters (matrix, bias, matrix, ...), inputs and targets."""
        random = np.random.default_rng(self.seed)
        shapes = [s for n, m in zip(self.widths, self.widths[1:], strict=False) for s in ((n, m), (m,))]
        params = [random.normal(size=s) * (not self.blank or len(s) == 2) for s in shapes]
        data = [random.normal(size=(self.rows, n)) * (not self.blank) for n in (self.widths[0], self.widths[-1])]
        return params + [random.normal(size=3)] * self.unused, *data

    def groups(self):
        """Positions of matrices and of biases that learn."""
        learning = [i for i in range(2 * len(self.widths) - 2 + self.unused) if i // 2 != self.frozen]
        return [[i for i in learning if i % 2 == 0], [i for i in learning if i % 2 == 1]]


CASES = st.builds(
    Case,
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple),
    rows=st.integers(1, 13),
    batch=st.integers(1, 4),
    k=st.integers(1, 4),
    epochs=st.integers(1, 2),
    scope=st.sampled_from(["batch", "microbatch"]),
    radii=st.tuples(*[st.sampled_from([0.0, DENORMAL, TINY, HUGE]) | st.floats(0.01, 2.0)] * 2),
    decay=st.sampled_from([0.0, 0.1]),
    frozen=st.sampled_from([None, 0]),
    unused=st.booleans(),
    blank=st.sampled_from([False] * 7 + [True]),
    seed=st.integers(0, 99),
).filter(lambda case: case.frozen is None or len(case.widths) > 2)  # something must learn


# ---- in NumPy ----


def gradient(params, x, y, layers):
    """Of the mean squared error, by backpropagation written out."""
    inputs, h = [], x
    for i in range(layers):
        inputs.append(h)
        h = h @ params[2 * i] + params[2 * i + 1]
        if i < layers - 1:
            h = np.maximum(h, 0.0)
    error = 2 * (h - y) / y.size
    out = [None] * len(params)
    for i in reversed(range(layers)):
        out[2 * i], out[2 * i + 1] = inputs[i].T @ error, error.sum(0)
        error = (error @ params[2 * i].T) * (inputs[i] > 0)
    return out


def by_hand(case, fault=None):
    """The run's parameters. Faults: those of the oracle that concern the ascent or the update, and the loop's own."""
    params, x, y = case.arrays()
    layers = len(case.widths) - 1
    groups = [
        {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": case.decay, "rho": rho, "index": index}
        for rho, index in zip(case.radii, case.groups(), strict=True)
    ]
    if fault == "one radius":
        groups[1]["rho"] = groups[0]["rho"]
    oracle = Oracle(params, groups, fault)
    learning = {i for index in case.groups() for i in index}

    def mean(at, batches):
        total = None
        for one in batches:
            g = [
                None if g is None or i not in learning else g
                for i, g in enumerate(gradient(at, x[one], y[one], layers))
            ]
            g = [None if v is None else v / len(batches) for v in g]
            total = g if total is None else [v if u is None else u + v for u, v in zip(total, g, strict=True)]
        return total

    def perturbed(s):
        if not any(np.any(g) for g in s if g is not None):
            return oracle.x  # no direction
        return oracle.perturbed(s)

    batches = [slice(i, i + case.batch) for i in range(0, case.rows, case.batch)]
    for _ in range(case.epochs):
        for t in range(0, len(batches), case.k):
            window = batches[t : t + case.k]
            climbs = [window] if (case.scope == "batch") != (fault == "other scope") else [[one] for one in window]
            total = None
            for part in climbs:
                g = mean(oracle.x if fault == "no ascent" else perturbed(mean(oracle.x, part)), part)
                g = [None if v is None else v * len(part) / len(window) for v in g]
                total = g if total is None else [u if u is None else u + v for u, v in zip(total, g, strict=True)]
            if fault == "summed window":
                total = [None if v is None else v * len(window) for v in total]
            oracle.update(total)
    return np.concatenate([p.reshape(-1) for p in oracle.x])


# ---- by the Trainer ----


class Network(nn.Module):
    def __init__(self, case):
        super().__init__()
        arrays, _, _ = case.arrays()
        self.p = nn.ParameterList(torch.from_numpy(a) for a in arrays)
        self.layers = len(case.widths) - 1

    def forward(self, x, labels):
        for i in range(self.layers):
            x = x @ self.p[2 * i] + self.p[2 * i + 1]
            if i < self.layers - 1:
                x = torch.relu(x)
        return {"loss": (x - labels).square().mean()}


def trained(case, folder):
    model = Network(case)
    _, x, y = case.arrays()
    rows = [{"x": a, "labels": b} for a, b in zip(torch.from_numpy(x), torch.from_numpy(y), strict=True)]
    groups = [
        {"params": [model.p[i] for i in index], "rho": rho}
        for rho, index in zip(case.radii, case.groups(), strict=True)
    ]
    if case.frozen is not None:
        for i in (2 * case.frozen, 2 * case.frozen + 1):
            model.p[i].requires_grad_(False)
    optimizer = AdaSAM(groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=case.decay)
    args = AdaSAMTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=case.batch,
        gradient_accumulation_steps=case.k,
        num_train_epochs=case.epochs,
        sam_scope=case.scope,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    Sharp(model=model, args=args, train_dataset=rows, optimizers=(optimizer, None)).train()
    return flat(model).numpy()


def distance(a, b):
    """Of two ends, relative to how far a step can lead."""
    return np.abs(a - b).max() / LR


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=CASES)
def test_any_run_follows_numpy(tmp_path_factory, case):
    assert distance(trained(case, tmp_path_factory.getbasetemp() / "property"), by_hand(case)) < 1e-11


@pytest.mark.parametrize(
    "fault", ["norm_per_parameter", "coupled_decay", "no ascent", "one radius", "other scope", "summed window"]
)
@pytest.mark.parametrize("scope", ["batch", "microbatch"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_a_fault_in_numpy_is_noticed(tmp_path, scope, fault):
    """The control."""
    case = replace(Case(), scope=scope)
    got = trained(case, tmp_path)
    assert distance(got, by_hand(case)) < 1e-11
    assert not distance(got, by_hand(case, fault)) < 1e-4  # NaN is noticed too
