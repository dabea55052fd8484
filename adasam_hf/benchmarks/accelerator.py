"""`adasam benchmark accelerator`: all that is to be known of one accelerator, in parts with a time limit each."""

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..glue.configs import PACKAGE
from ..glue.record import provenance, write_json
from ..kernels import add_along, copy_all, gradient_norm, split
from ..optim import AdaSAM
from .accelerator_page import MOVES, write_page
from .contenders import Batch, build, build_batches, build_model, freeze
from .device import REHEARSAL, chosen_device
from .settings import BASE, DTYPES, HALF_FROZEN, ON_ACCELERATOR, RHO
from .timing import one_by_one, seconds

STARTED = time.monotonic()  # of the process; a part counts its imports, too


@dataclass(frozen=True)
class Part:
    """One part: what does it, within how many seconds, and what of it only an accelerator can show."""

    run: Callable[[Path, float], None]
    limit: float
    waits_for: str


def _origin(part: str) -> dict[str, Any]:
    """What every record of a part begins with."""
    return {**provenance(), "part": part, "device": chosen_device().type}


# ---- the tests ----

TESTS = ("accelerator", "optim", "perturbation", "directions", "rng", "precision", "trainer")
OUTCOME = re.compile(r"^(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?: \((.*)\))? +\[")


def run_tests(output_dir: Path, deadline: float) -> None:
    """The tests that take the device as it comes, in a process of their own; each outcome counts at once."""
    folder = PACKAGE.parent / "tests"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: the tests are in a checkout, or in a bundle of one")
    files = [f"tests/test_{name}.py" for name in TESTS]
    options = ["-v", "-p", "no:cacheprovider", "-m", "slow or not slow", "-k", "not minilm"]
    environment = os.environ | {"COLUMNS": "400", "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *_paths()])}
    found: dict[str, dict[str, str]] = {}
    start, said, rest = _origin("tests"), time.monotonic(), list[str]()
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=PACKAGE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    for line in process.stdout or ():
        if outcome := OUTCOME.match(line):
            test, word, reason = outcome.groups()
            found[test] = {"outcome": word.lower(), "reason": reason or ""}
            if time.monotonic() - said > 2:
                write_json(output_dir / "tests.json", {**start, "tests": found, "complete": False})
                said = time.monotonic()
        else:
            rest.append(line)
    complete = process.wait() in (0, 1)  # all have passed, or some have failed
    record = {**start, "tests": found, "complete": complete}
    failed = any(outcome["outcome"] in ("failed", "error") for outcome in found.values())
    write_json(output_dir / "tests.json", record | ({"output": "".join(rest)[-20000:]} if failed or not found else {}))


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


# ---- the step ----

WARM_UP = 1 if REHEARSAL else 3  # batches


def run_step(name: str, batch_size: int, rounds: int, output_dir: Path, deadline: float) -> None:
    """The step benchmark of one model in each precision; the record of each is written after every contender."""
    label, name = name, STANDS_FOR.get(name, name) if REHEARSAL else name
    model = build_model(name)
    batches = build_batches(rounds + WARM_UP, batch_size, model.config.vocab_size)
    for i, dtype in enumerate(DTYPES):
        share = deadline - (deadline - time.monotonic()) * (len(DTYPES) - 1 - i) / (len(DTYPES) - i)
        record: dict[str, Any] = {
            **_origin(f"step-{label}"),
            "model": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": dtype,
            "batch_size": batch_size,
            "tokens": statistics.median(batch["input_ids"].numel() for batch in batches[WARM_UP:]),
            "seconds": {},
            "peak_memory_mib": {},
            "absent": {},
        }
        path = output_dir / f"step-{label}-{dtype}.json"
        for contender, spent, peak in _contenders(model, dtype, batches, share, record["absent"]):
            record["seconds"][contender], record["peak_memory_mib"][contender] = spent, peak
            write_json(path, record | {"complete": False})
        for contender in (BASE, *ON_ACCELERATOR, *HALF_FROZEN):
            if contender not in record["seconds"]:
                record["absent"].setdefault(contender, "its time was over")
        write_json(path, record | {"complete": True})


def _contenders(
    model: nn.Module, dtype: str, batches: Sequence[Batch], deadline: float, absent: dict[str, str]
) -> Iterator[tuple[str, list[float], float | None]]:
    """What `one_by_one` gives for each contender; why one is absent goes into `absent`."""

    def over() -> bool:
        return time.monotonic() > deadline

    for name in (BASE, *ON_ACCELERATOR):
        yield from _one(name, partial(build, name, model, dtype), batches, over, absent)
    if over():
        return
    freeze(model, "half")  # type: ignore[arg-type]  # a PreTrainedModel
    try:
        for label, name in HALF_FROZEN.items():
            yield from _one(label, partial(build, name, model, dtype), batches, over, absent)
    finally:
        model.requires_grad_(True)


def _one(
    name: str,
    make: Callable[[], Callable[[Batch], object]],
    batches: Sequence[Batch],
    over: Callable[[], bool],
    absent: dict[str, str],
) -> Iterator[tuple[str, list[float], float | None]]:
    try:
        yield from one_by_one({name: make}, batches, over, WARM_UP)
    except ModuleNotFoundError as error:
        absent[name] = f"the package {error.name} is not installed"
    except (
        ValueError,
        RuntimeError,
        TypeError,
    ) as error:  # of somebody else's package, on a device that it may not know
        absent[name] = " ".join(str(error).split())[:300]


# ---- bandwidth ----


def run_bandwidth(name: str, output_dir: Path, deadline: float) -> None:
    """The share of a plain copy's bandwidth that each part of a step outside its passes reaches."""
    name = STANDS_FOR.get(name, name) if REHEARSAL else name
    params = [nn.Parameter(p.detach()) for p in build_model(name).parameters()]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    gradients = [p.grad for p in params if p.grad is not None]
    saved = [torch.empty_like(p) for p in params]
    together, apart = split([(p, g, s) for p, g, s in zip(params, gradients, saved, strict=True)])
    adasam, adamw = AdaSAM(params, lr=1e-6, rho=0.0), torch.optim.AdamW(params, lr=1e-6, fused=True)
    norm: Tensor = gradient_norm(gradients)
    calls: dict[str, Callable[[], object]] = {
        "norm": lambda: gradient_norm(gradients),
        "copy": lambda: copy_all(saved, params),
        "move": lambda: add_along(together, apart, RHO, norm),
        "restore": lambda: copy_all(params, saved),
        "update": adasam.step,
        "AdamW update": adamw.step,
    }
    count = sum(p.numel() for p in params)
    large = torch.empty(min(2**28, 4 * count), device=chosen_device())  # 1 GiB, unless the model is small
    target = torch.empty_like(large)
    record: dict[str, Any] = {**_origin("bandwidth"), "model": name, "parameters": count}
    with torch.no_grad():
        copy = 2 * large.nbytes / _quickest(lambda: target.copy_(large))
        record |= {"copy_gb_per_s": copy / 1e9, "gb_per_s": {}, "share": {}, "seconds": {}}
        for what, call in calls.items():
            if time.monotonic() > deadline:
                break
            spent = _quickest(call)
            record["seconds"][what] = spent
            record["gb_per_s"][what] = MOVES[what] * count / spent / 1e9
            record["share"][what] = MOVES[what] * count / spent / copy
            write_json(output_dir / "bandwidth.json", record | {"complete": what == "AdamW update"})


def _quickest(call: Callable[[], object], rounds: int = 9, together: int = 4) -> float:
    """Seconds of one of several calls that the device gets together, the median over rounds after two that warm up."""

    def several() -> None:
        for _ in range(together):
            call()

    return statistics.median([seconds(several) for _ in range(rounds)][2:]) / together


# ---- all parts ----

STANDS_FOR = {"bert-base": "1m", "roberta-large": "4m"}
"""In a rehearsal: the small model that is measured in the place of a large one."""


def _step(name: str, batch_size: int) -> Callable[[Path, float], None]:
    rounds, rows = (2, 2) if REHEARSAL else (12, batch_size)
    return partial(run_step, name, rows, rounds)


PARTS = {
    "bandwidth": Part(
        partial(run_bandwidth, "roberta-large"), 35, "shares of an accelerator's bandwidth, at RoBERTa-large's size"
    ),
    "step-minilm": Part(_step("minilm", 32), 60, "MiniLM's step on an accelerator: times, tokens per second, memory"),
    "step-bert-base": Part(_step("bert-base", 32), 70, "BERT-base's step on an accelerator"),
    "step-roberta-large": Part(_step("roberta-large", 32), 110, "RoBERTa-large's step on an accelerator"),
    "tests": Part(run_tests, 200, "the tests that are skipped below"),
}
"""Name → part; all limits together are below eight minutes."""
LIMITS = {name: (part.limit, part.waits_for) for name, part in PARTS.items()}
SPARE = 20.0 if REHEARSAL else 6.0  # seconds that a part has for its last record


def run_part(name: str, output_dir: Path) -> None:
    """One part, in this process."""
    PARTS[name].run(output_dir, STARTED + PARTS[name].limit - SPARE)


def run_parts(names: Sequence[str], output_dir: Path) -> list[str]:
    """Each part in a process of its own, which ends with its time; then the page. Returns what failed, in words."""
    failures = []
    for name in names:
        print(f"{name}: at most {PARTS[name].limit:.0f} s", flush=True)
        start = time.monotonic()
        failure = _run_in_time(name, output_dir)
        print(f"{name}: {failure or 'done'} after {time.monotonic() - start:.0f} s", flush=True)
        if failure:
            failures.append(f"{name} {failure}")
        took = {"part": name, "seconds": time.monotonic() - start, "limit": PARTS[name].limit, "failure": failure}
        write_json(output_dir / "parts" / f"{name}.json", took)
        write_page(output_dir, LIMITS)
    return failures


def _run_in_time(name: str, output_dir: Path) -> str:
    """Why it failed, or nothing."""
    command = [sys.executable, "-m", "adasam_hf", "--debug", "benchmark", "accelerator"]
    command += ["--part", name, "--output_dir", str(output_dir)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *_paths()])}
    if name != "tests":  # which are about several GPUs, too
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    log = Path("runs") / "accelerator" / f"{name}.log"  # a log, so not in the folder of records
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
        try:
            code = process.wait(PARTS[name].limit)
        except subprocess.TimeoutExpired:
            return f"was stopped at its limit of {PARTS[name].limit:.0f} s; what it had measured is there"
        finally:
            with suppress(ProcessLookupError):  # those that it has started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "" if code == 0 else f"failed ({lines[-1] if lines else code}; see {log})"
