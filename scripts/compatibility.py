"""Writes the table of docs/compatibility.md from the outcomes of the tests that carry the marker `compat`.

python scripts/compatibility.py            runs those tests (about ten minutes on two cores), then writes
python scripts/compatibility.py FILE       reads what `pytest --compat FILE` wrote
"""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypedDict

import accelerate
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- compatibility: made by scripts/compatibility.py -->\n", "<!-- end of compatibility -->\n"
SCOPES = ("batch", "microbatch")
REFUSED = "refused with an error"
ORDER = [
    "Accumulation",
    "Parameters",
    "Steps that cannot be perturbed",
    "Precision",
    "Many processes",
    "Model features",
    "Data and loop",
    "Cheap ascents",
    "Cost",
    "Descent",
    "Combinations",
    "Interruption",
    "Trainer behaviour",
    "Logs",
    "Hyperparameter search",
]


class Outcome(TypedDict):
    """What one test shows, as tests/conftest.py writes it."""

    group: str
    what: str
    scope: str | None
    refused: bool
    outcome: str
    reason: str
    test: str


def run_tests() -> list[Outcome]:
    """What the marked tests show on this machine."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "compat.json"
        words = ["-q", "-m", "compat and (slow or not slow)", f"--compat={path}", "tests"]
        done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT)
        if done.returncode:
            sys.exit("some of the tests failed; the table is left as it is")
        return read(path)


def read(path: Path) -> list[Outcome]:
    outcomes: list[Outcome] = json.loads(path.read_text())
    return outcomes


def cell(shown: list[Outcome]) -> str:
    """One cell from all tests that speak of it."""
    if not shown:
        return "not tried"
    if any(test["outcome"] == "failed" for test in shown):
        return "**fails**"
    if skipped := [test for test in shown if test["outcome"] == "skipped"]:
        return "not tried: " + skipped[0]["reason"].removeprefix("Skipped: ").strip()
    return REFUSED if all(test["refused"] for test in shown) else "works"


def render(tests: list[Outcome]) -> str:
    """The tables, one to unfold for each group. A row without scopes says the same for both."""
    rows: defaultdict[str, defaultdict[str, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    for test in tests:
        rows[test["group"]][test["what"]].append(test)
    if unknown := set(rows) - set(ORDER):
        raise ValueError(f"groups {sorted(unknown)} have no place in ORDER")
    lines = []
    for group in (g for g in ORDER if g in rows):
        table, counts = [], Counter[str]()
        for what, shown in rows[group].items():
            common = [test for test in shown if test["scope"] is None]
            cells = [cell(common + [test for test in shown if test["scope"] == scope]) for scope in SCOPES]
            counts.update(set(cells))
            names = sorted({test["test"].split("[")[0] for test in shown})
            files = ", ".join(f"`{name.removeprefix('tests/')}`" for name in names)
            table.append(f"| {what} | {cells[0]} | {cells[1]} | {files} |")
        some = ", ".join(f"{counts[k]} {label}" for k, label in (("works", "work"), (REFUSED, "refused")) if counts[k])
        lines += ["", f"<details markdown='1'><summary>{group}: of {len(table)} rows {some}</summary>", ""]
        lines += ["| | scope `batch` | scope `microbatch` | shown by |", "|---|---|---|---|", *table, "", "</details>"]
    versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    total = f"{len({test['test'] for test in tests})} tests, on two CPU cores, {versions}, accelerate"
    return "\n".join([f"{total} {accelerate.__version__}.", *lines, ""])


def write(page: Path, table: str) -> None:
    """Put the table between its two marks."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(before + BEGIN + "\n" + table + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    results = read(Path(sys.argv[1])) if len(sys.argv) > 1 else run_tests()
    write(ROOT / "docs" / "compatibility.md", render(results))
