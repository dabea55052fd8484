"""`adasam benchmark step`: what a step costs."""

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
from pathlib import Path
from types import ModuleType
from typing import Any

from ..glue.configs import PACKAGE
from ..glue.record import provenance, write_json
from .contenders import build, build_batches, build_model, freeze, through_trainer
from .device import forget_peak, peak_mib
from .settings import BASE, FROZEN_MODES, MODES, PEERS, SIZES
from .timing import MOVE, clock, phases, ratios, take_turns


def package_at(revision: str) -> ModuleType:
    """This package as it was at a commit, under a name of its own."""
    archive = subprocess.run(["git", "archive", revision, "adasam_hf"], cwd=PACKAGE.parent, capture_output=True)
    if archive.returncode:
        raise ValueError(
            f"--against={revision!r}: {archive.stderr.decode(errors='replace').strip()}; name a commit of a checkout"
        )
    folder = Path(tempfile.mkdtemp())
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    (folder / "adasam_hf").rename(folder / "adasam_hf_before")
    sys.path.insert(0, str(folder))
    return importlib.import_module("adasam_hf_before")


def against(args: argparse.Namespace) -> None:
    """AdaSAM now and at another commit, beside AdamW; the ratio of the two on each batch, with its quartiles."""
    model = build_model(args.model)
    batches = build_batches(args.rounds + 2, args.batch_size, model.config.vocab_size)
    flags = MODES["AdaSAM"]
    steps = {
        BASE: build(BASE, model, args.dtype),
        "AdaSAM": through_trainer(model, args.dtype, flags),
        "before": through_trainer(model, args.dtype, flags, package_at(args.against)),
    }
    times = take_turns(steps, batches)
    paired = [now / before for now, before in zip(times["AdaSAM"], times["before"], strict=True)]
    low, middle, high = statistics.quantiles(paired, n=4)
    record = {**provenance(), "model": args.model, "dtype": args.dtype, "batch_size": args.batch_size}
    record |= {"against": args.against, "clock": clock(), "seconds": times, "ratios": ratios(times)}
    record["now / before"] = {"ratio": middle, "low": low, "high": high}
    write_json(args.output_dir / f"against-{args.model}-{args.dtype}.json", record)
    print(f"{args.model}, {args.dtype}: now / {args.against}: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")
    print({name: f"{row['ratio']:.2f}" for name, row in record["ratios"].items()})


def peak_memory(name: str, args: argparse.Namespace) -> float:
    """MiB that a process of its own holds at most over three steps of the contender."""
    words = ["--model", args.model, "--dtype", args.dtype, "--batch_size", str(args.batch_size), "--only_memory", name]
    done = subprocess.run(
        [sys.executable, "-m", "adasam_hf", "benchmark", "step", *words], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def table(record: dict[str, Any]) -> str:
    """The ratios, the memory and the parts of a step."""
    lines = ["| | time of a step | quartiles | peak memory |", "|---|---|---|---|"]
    base = record["peak_memory_mib"][BASE]
    for name, row in record["ratios"].items():
        memory = record["peak_memory_mib"][name] / base
        lines.append(f"| {name} | {row['ratio']:.2f} | {row['low']:.2f}–{row['high']:.2f} | {memory:.2f} |")
    part = record["phases"]
    lines += ["", "| part of a full AdaSAM step | share |", "|---|---|"]
    for name in ("ascent", MOVE, "descent", "restore", "update"):
        lines.append(f"| {name} | {part[name] / part['step']:.1%} |")
    lines.append(f"\nOutside the passes: {part['outside the passes / AdamW update']:.2f} × one fused AdamW update.")
    return "\n".join(lines)


def compare(args: argparse.Namespace) -> None:
    """One table for one model and dtype."""
    model = build_model(args.model)
    names = args.contenders or [*MODES, *PEERS]
    batches = build_batches(args.rounds + 2, args.batch_size, model.config.vocab_size)
    times = take_turns({name: build(name, model, args.dtype) for name in dict.fromkeys([BASE, *names])}, batches)
    gc.collect()
    record = {
        **provenance(),
        "model": args.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "clock": clock(),
        "seconds": times,
        "ratios": ratios(times),
        "phases": phases(model, args.dtype, batches),
        "peak_memory_mib": {name: peak_memory(name, args) for name in times},
    }
    write_json(args.output_dir / f"{args.model}-{args.dtype}.json", record)
    print(f"\n{args.model}, {args.dtype}, batches of {args.batch_size}; ratios to {BASE}\n\n{table(record)}\n")


def compare_frozen(args: argparse.Namespace) -> None:
    """AdaSAM where a part of the model is frozen, as ratios to AdamW there."""
    plain = build_model(args.model)
    batches = build_batches(args.rounds + 2, args.batch_size, plain.config.vocab_size)
    model = freeze(plain, args.frozen)
    times = take_turns({name: build(name, model, args.dtype) for name in (BASE, *FROZEN_MODES)}, batches)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    record = {
        **provenance(),
        "model": args.model,
        "frozen": args.frozen,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": trainable,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "clock": clock(),
        "seconds": times,
        "ratios": ratios(times),
    }
    write_json(args.output_dir / f"frozen-{args.model}-{args.dtype}-{args.frozen.replace(' ', '_')}.json", record)
    print(f"\n{args.model}, {args.dtype}, frozen: {args.frozen}; ratios to {BASE}\n")
    for name, row in record["ratios"].items():
        print(f"| {name} | {row['ratio']:.2f} | {row['low']:.2f}–{row['high']:.2f} |")


def scan(args: argparse.Namespace) -> None:
    """AdaSAM's ratio against the number of parameters and against the batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows: list[dict[str, Any]] = []
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
    record = {**provenance(), "dtype": args.dtype, "clock": clock(), "rows": rows}
    write_json(args.output_dir / f"scan-{args.dtype}.json", record)
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


def measure_memory(args: argparse.Namespace) -> None:
    """Print the most MiB that this process, or its accelerator, has held over three steps of one contender."""
    forget_peak()
    model = build_model(args.model)
    step = build(args.only_memory, model, args.dtype)
    for batch in build_batches(3, args.batch_size, model.config.vocab_size):
        step(batch)
    if (peak := peak_mib()) is not None:
        print(peak)
        return
    # not ru_maxrss, which a child inherits from its parent
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError("this system does not tell the peak memory of a process; use Linux")
    print(int(found[1]) / 1024)
