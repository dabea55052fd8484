"""The page on an accelerator, from the records of `adasam benchmark accelerator`."""

import json
import statistics
from pathlib import Path
from typing import Any, TypeAlias

from .settings import BASE, HALF_FROZEN, ON_ACCELERATOR
from .timing import ratios

Records: TypeAlias = dict[str, dict[str, Any]]
Parts: TypeAlias = dict[str, tuple[float, str]]
"""Name → limit in seconds, and what of it waits for an accelerator."""
MOVES = {  # bytes read and written for each parameter in float32; see `Perturbation` and `AdaSAM`
    "norm": 4,
    "copy": 8,
    "move": 12,
    "restore": 8,
    "update": 36,
    "AdamW update": 28,
}
ORDER = (BASE, *ON_ACCELERATOR, *HALF_FROZEN)
TARGETS = (
    "AdaSAM takes at most 2.02 times AdamW (fused) at RoBERTa-large's size in bf16",
    "what is outside the passes reaches 80 % of a plain copy's bandwidth, or more",
    "the host does not wait inside a step",
    "peak memory is at most one copy of the weights above AMSGrad's",
)


def write_page(output_dir: Path, parts: Parts) -> None:
    """README.md from the records that are in the folder."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "README.md").write_text(page(output_dir, parts), encoding="utf-8")


def page(output_dir: Path, known: Parts) -> str:
    """What was measured, on what, and what was not."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(output_dir.glob("*.json"))}
    parts = {path.stem: json.loads(path.read_text()) for path in sorted((output_dir / "parts").glob("*.json"))}
    first = next(iter(records.values()), None)
    rehearsal = first is None or first["device"] == "cpu"
    lines = ["# Rehearsal on a CPU of what is to run on an accelerator" if rehearsal else "# On an accelerator", ""]
    if first is not None:
        lines.append(f"Made by `adasam benchmark accelerator` on {_machine(first)}.")
    if rehearsal:
        lines += ["", "It shows that everything runs within its limits. Its times are those of small models on a CPU"]
        lines[-1] += " with other work, one contender after the other, and say nothing about a GPU."
    lines += ["", "## Parts", "", "| part | took | limit | |", "|---|---|---|---|"]
    for name, (limit, _) in known.items():
        took = parts.get(name, {"seconds": 0.0, "failure": "not run"})
        lines.append(f"| {name} | {took['seconds']:.0f} s | {limit:.0f} s | {took['failure'] or 'done'} |")
    for name, record in records.items():
        if name.startswith("step-"):
            lines += ["", *step_table(record)]
    if "bandwidth" in records:
        lines += ["", *bandwidth_table(records["bandwidth"])]
    if "tests" in records:
        lines += ["", *tests_table(records["tests"])]
    lines += ["", *targets(records, rehearsal)]
    if rehearsal:
        lines += ["", "## What waits for hardware", ""]
        lines += [f"- {name}: {waits_for}" for name, (_, waits_for) in known.items()]
        lines.append("- all other tests of `tests/test_accelerator.py`: they ran, but on the CPU")
        waiting = records.get("tests", {}).get("tests", {})
        lines += [
            f"- `{test}`: {outcome['reason'].partition(':')[0].removeprefix('Skipped').strip()}"
            for test, outcome in waiting.items()
            if outcome["outcome"] == "skipped" and "waits for" in outcome["reason"]
        ]
    return "\n".join(lines) + "\n"


def _machine(record: dict[str, Any]) -> str:
    hardware, versions = record["hardware"], record["versions"]
    cards = ", ".join(sorted(set(hardware["accelerators"]))) if record["device"] != "cpu" else "a CPU"
    changed = " with changes" if record["dirty"] else ""
    packages = f"torch {versions['torch']}, Transformers {versions['transformers']}"
    return f"{cards}, {hardware['cpus']} CPU cores; commit {record['commit']}{changed}; {packages}"


def step_table(record: dict[str, Any]) -> list[str]:
    """Milliseconds, ratio, tokens per second and memory of each contender."""
    times = {name: record["seconds"][name] for name in ORDER if record["seconds"].get(name)}
    of_base = _ratios({name: spent for name, spent in times.items() if name not in HALF_FROZEN})
    of_base |= _ratios({HALF_FROZEN[name]: spent for name, spent in times.items() if name in HALF_FROZEN}, frozen=True)
    place = record["part"].removeprefix("step-")
    place = "" if place == record["model"] else f" (in the place of {place})"
    lines = [f"## {record['model']}{place}, {record['dtype']}, batches of {record['batch_size']}", ""]
    lines += ["| | ms | of AdamW | quartiles | tokens/s | peak MiB |", "|---|---|---|---|---|---|"]
    for name, spent in times.items():
        middle = statistics.median(spent)
        row = of_base.get(name)
        of = f"{row['ratio']:.2f} | {row['low']:.2f}–{row['high']:.2f}" if row else "– | –"
        peak = record["peak_memory_mib"].get(name)
        memory = "–" if peak is None else f"{peak:.0f}"
        lines.append(f"| {name} | {1000 * middle:.1f} | {of} | {record['tokens'] / middle:.0f} | {memory} |")
    lines += [""] if record["absent"] else []
    return lines + [f"Not measured: {name} ({why})." for name, why in record["absent"].items()]


def _ratios(times: dict[str, list[float]], frozen: bool = False) -> dict[str, dict[str, float]]:
    """To BASE, as far as both have times; of what is frozen alike, to a frozen BASE."""
    shortest = min(map(len, times.values()), default=0)
    found = ratios({name: spent[:shortest] for name, spent in times.items()}) if BASE in times else {}
    labels = {name: label for label, name in HALF_FROZEN.items()} if frozen else {}
    return {labels.get(name, name): row for name, row in found.items()}


def bandwidth_table(record: dict[str, Any]) -> list[str]:
    """GB/s of each part outside the passes, and its share of a plain copy's."""
    lines = [f"## Bandwidth outside the passes, {record['model']}, {record['parameters'] / 1e6:.0f} M parameters", ""]
    lines += [f"A plain copy: {record['copy_gb_per_s']:.0f} GB/s.", ""]
    lines += ["| | bytes for each parameter | ms | GB/s | of a plain copy |", "|---|---|---|---|---|"]
    for what in filter(record["share"].__contains__, MOVES):
        share, spent, speed = (record[key][what] for key in ("share", "seconds", "gb_per_s"))
        lines.append(f"| {what} | {MOVES[what]} | {1000 * spent:.2f} | {speed:.0f} | {share:.0%} |")
    return lines


def tests_table(record: dict[str, Any]) -> list[str]:
    """How many had which outcome, and the names of those that failed."""
    outcomes = [outcome["outcome"] for outcome in record["tests"].values()]
    counted = ", ".join(f"{outcomes.count(word)} {word}" for word in dict.fromkeys(outcomes))
    lines = ["## Tests", "", f"{counted or 'none'}{'' if record['complete'] else '; not all have run'}."]
    bad = [test for test, outcome in record["tests"].items() if outcome["outcome"] in ("failed", "error")]
    known = [(t, o["reason"]) for t, o in record["tests"].items() if o["outcome"] in ("xfail", "xpass")]
    lines += [f"- failed: `{test}`" for test in bad]
    return lines + [f"- known ({record['tests'][test]['outcome']}): `{test}` {reason}" for test, reason in known]


def targets(records: Records, rehearsal: bool) -> list[str]:
    """Each target and whether it is met; what was not measured on an accelerator is neither."""
    results: list[bool | None] = [None] * len(TARGETS)
    if not rehearsal:
        results = [look(records) for look in (_ratio_target, _bandwidth_target, _waiting_target, _memory_target)]
    words = {None: "not measured", True: "met", False: "missed"}
    rows = [f"| {text} | {words[result]} |" for text, result in zip(TARGETS, results, strict=True)]
    return ["## Targets", "", "| | |", "|---|---|", *rows]


def _ratio_target(records: Records) -> bool | None:
    times = records.get("step-roberta-large-bf16", {}).get("seconds", {})
    if not (times.get("AdaSAM") and times.get(BASE)):
        return None
    return bool(statistics.median(times["AdaSAM"]) <= 2.02 * statistics.median(times[BASE]))


def _bandwidth_target(records: Records) -> bool | None:
    shares = {k: v for k, v in records.get("bandwidth", {}).get("share", {}).items() if k != "AdamW update"}
    return bool(min(shares.values()) >= 0.8) if len(shares) == len(MOVES) - 1 else None


def _waiting_target(records: Records) -> bool | None:
    tests = records.get("tests", {}).get("tests", {})
    words = [outcome["outcome"] for test, outcome in tests.items() if "not_wait" in test]
    return all(word in ("passed", "xpass") for word in words) if words else None


def _memory_target(records: Records) -> bool | None:
    excess = []
    for name, record in records.items():
        peaks = record.get("peak_memory_mib", {}) if name.startswith("step-") else {}
        if peaks.get("AdaSAM") and peaks.get("AMSGrad"):
            excess.append(peaks["AdaSAM"] - peaks["AMSGrad"] - 4 * record["parameters"] / 2**20)
    return bool(max(excess) <= 1.0) if excess else None  # MiB, for scalars and alignment
