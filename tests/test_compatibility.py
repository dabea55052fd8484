"""The compatibility table, against what the tests say."""

import re
import subprocess
import sys

import pytest
from conftest import load_script
from helpers import ROOT

compatibility = load_script("compatibility")


def shown(outcome="passed", scope=None, refused=False, what="DDP", group="Many processes", reason=""):
    test = f"tests/test_x.py::test_{outcome}[{scope}]"
    return {"group": group, "what": what, "test": test, "scope": scope, "refused": refused} | {
        "outcome": outcome,
        "reason": reason,
    }


@pytest.mark.parametrize(
    ("tests", "cell"),
    [
        ([], "not tried"),
        ([shown()], "works"),
        ([shown(refused=True)], "refused with an error"),
        ([shown(), shown("failed")], "**fails**"),
        ([shown(), shown("skipped", reason="Skipped: no GPU")], "not tried: no GPU"),
    ],
)
def test_cells(tests, cell):
    assert compatibility.cell(tests) == cell


def test_scopes_are_columns():
    table = compatibility.render([shown(scope="batch"), shown(scope="microbatch", refused=True), shown(what="LoRA")])
    assert "| DDP | works | refused with an error | `test_x.py::test_passed` |" in table
    assert "| LoRA | works | works |" in table
    assert "Many processes: of 2 rows 2 work, 1 refused" in table


def test_a_group_without_a_place_is_an_error():
    with pytest.raises(ValueError, match="Elsewhere"):
        compatibility.render([shown(group="Elsewhere")])


def test_the_page_has_the_rows_of_the_tests():
    """No cell that no test shows, and no test without its cell. (Outcomes are CI's business.)"""
    words = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "compat", "--compat", "-"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout
    wanted = {tuple(line.split("\t")[1:]) for line in listed.splitlines() if line.startswith("compat\t")}
    assert len(wanted) > 50
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    section = page.split(compatibility.BEGIN)[1].split(compatibility.END)[0]
    found, group = set(), None
    for line in section.splitlines():
        if heading := re.match(r"<details markdown='1'><summary>(.*?): of", line):
            group = heading[1]
        elif line.startswith("| ") and not line.startswith("| |"):
            found.add((group, line.split(" | ")[0].removeprefix("| ")))
    assert found == wanted
