"""Functions that several files of tests use, and that are not fixtures."""

import configparser
import itertools
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from conftest import InOrder, make_rows, random_state
from datasets import ClassLabel, Dataset, Features, Value
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn.utils.parametrizations import spectral_norm
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

ROOT = Path(__file__).parent.parent


def read_setup() -> configparser.ConfigParser:
    """setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup


def snapshot(folder, task, labels=(0, 1, 0), test_labels=(-1, -1), texts=None, names=None):
    """A small GLUE task in the hub's layout."""
    columns = {c: Value("string") for c in texts or task.texts}
    label = Value("float32") if task.is_regression else ClassLabel(names=list(names or task.labels))
    features = Features({**columns, "label": label, "idx": Value("int32")})

    def rows(values):
        values = [float(v) for v in values] if task.is_regression else list(values)
        content = {c: [f"{c} {i}" for i in range(len(values))] for c in columns}
        return Dataset.from_dict({**content, "label": values, "idx": list(range(len(values)))}, features=features)

    splits = {"train": rows(labels)}
    splits |= {split: rows(labels) for split, _ in task.evaluations}
    splits |= {split: rows(test_labels) for split, _ in task.submissions}
    lines = ["---", "configs:", f"- config_name: {task.name}", "  data_files:"]
    for split, content in splits.items():
        path = folder / task.name / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        content.to_parquet(path)
        lines += [f"  - split: {split}", f"    path: {task.name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(folder)


class RunsOutOfMemory(InOrder):
    """Catches what an accelerator without memory raises, as training scripts do, and goes on.

    It is raised at the third micro-batch of `make_rows`, by those of its forward passes that are in `failing`, counted
    from 1, or by all.
    """

    failing = None
    clears = True  # the gradients, when it goes on

    def training_step(self, model, inputs, *args, **kwargs):
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            if self.clears:
                model.zero_grad()
            return torch.zeros((), dtype=torch.float64)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if torch.equal(inputs["input_ids"][0], make_rows()[8]["input_ids"]):
            forward_pass = next(vars(self).setdefault("counter", itertools.count(1)))
            if self.failing is None or forward_pass in self.failing:
                raise RuntimeError("CUDA out of memory")
        return super().compute_loss(model, inputs, *args, **kwargs)


class Moving(nn.Module):
    """A classifier of bags of words through one of several layers whose state moves with every forward pass."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed, self.layer, self.head = nn.Embedding(40, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.observe = nn.Identity()
        if kind == "spectral norm":
            self.layer = spectral_norm(self.layer)
        if kind == "quantization observer":
            self.observe = FakeQuantize(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
        self.register_buffer("centre", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.attribute = torch.zeros(8)
        self.double()

    def forward(self, input_ids, labels):
        h = self.layer(self.observe(self.embed(input_ids).mean(1)))
        if self.kind == "codebook":  # written through .data, as vector quantization does, which counts no version
            self.centre.data.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
            h = h - self.centre
        if self.kind == "replaced buffer":
            self.centre = 0.9 * self.centre + 0.1 * h.detach().mean(0)
            h = h - self.centre
        if self.kind == "counter":
            self.calls += 1
            h = h / self.calls
        if self.kind == "attribute":
            self.attribute = 0.9 * self.attribute + 0.1 * h.detach().mean(0)
            h = h - self.attribute
        return {"loss": nn.functional.cross_entropy(self.head(torch.relu(h)), labels)}


LR = 1e-2  # of `ByHand`


class ByHand:
    """SGD with SAM over windows of micro-batches; each step says which parameters may move, with their radii."""

    def __init__(self, model, loss, extra=()):
        self.model, self.loss = model.train(), loss
        self.params = [*model.parameters(), *extra]

    def gradients(self, rows, scale):
        """Of those that need one now."""
        active = [p for p in self.params if p.requires_grad]
        ids, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
        found = torch.autograd.grad(self.loss(ids, labels) * scale, active, materialize_grads=True)
        return dict(zip(active, found, strict=True))

    def climbed(self, ascent, may_move):
        """Moves the parameters along `ascent`, and returns what they were."""
        norm = math.sqrt(sum(ascent[p].square().sum().item() for p in may_move if p in ascent))
        clean = {p: p.detach().clone() for p in self.params}
        with torch.no_grad():
            for p, rho in may_move.items():
                if p in ascent:
                    p.add_(rho * ascent[p] / norm)
        return clean

    def step(self, window, scope, may_move, updated=None):
        k, total = len(window), {}
        for part in [window] if scope == "batch" else [[one] for one in window]:
            ascent = self.sum(part, k)
            clean = self.climbed(ascent, may_move)
            for p, g in self.sum(part, k).items():
                total[p] = total.get(p, 0) + g
            with torch.no_grad():
                for p, value in clean.items():
                    p.copy_(value)
        with torch.no_grad():
            for p in self.params if updated is None else updated:
                if p in total:
                    p.sub_(LR * total[p])
        return total

    def sum(self, part, k):
        found = [self.gradients(rows, 1 / k) for rows in part]
        return {p: sum(one[p] for one in found) for p in found[0]}


def windows(rows, k, batch=4):
    micro = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    return [micro[i : i + k] for i in range(0, len(micro), k)]


class OneProcess:
    """In place of `Synchronization`."""

    def of_ascent(self):
        return nullcontext()

    def of_descent(self, last):
        return nullcontext()

    def finish_ascent(self, parameters):
        pass


class Fingerprint(TrainerCallback):
    """The random stream as it is after each step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, *args, **kwargs):
        self.states.append(torch.cat([torch.get_rng_state(), random_state()]))


def causal_rows():
    """Sentences with unequal numbers of labels."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for i in range(18):
        ids = torch.randint(2, 40, (10,), generator=generator)
        labels = ids.clone()
        labels[: i % 7] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def causal_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    ).double()
