"""README, CONTRIBUTING and docs/: their links lead somewhere, their Python runs, their commands exist."""

import configparser
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_glue_data import snapshot

import adasam_hf
from adasam_hf.cli import COMMANDS, run_command
from adasam_hf.glue.tasks import get_task

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])}  # fmt: skip


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page: str, text: str) -> list[str]:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        if name.startswith("https://"):
            continue
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    assert not dead_links(page, PAGES[page])


def test_dead_links_are_found():
    text = "[a](docs/nothing.md) [b](docs/step.md#nowhere) [c](docs/step.md#how-one-step-works) [d](https://a.org)"
    assert dead_links("README.md", text) == ["docs/nothing.md", "docs/step.md#nowhere"]


# ---- Python ----


PYTHON = [page for page, text in PAGES.items() if blocks(text, "python")]


@pytest.mark.parametrize("page", PYTHON)
def test_python(page, tiny, tmp_path, monkeypatch):
    """A page's blocks, in their order, with a small model and small data in place of the hub's."""
    names = {"roberta-base": tiny, "nyu-mll/glue": snapshot(tmp_path / "glue", get_task("rte"), labels=[0, 1] * 6)}
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()
    scope = {
        "__name__": "page",
        "model": model,
        "loss_fn": torch.nn.functional.cross_entropy,
        "loader": [(torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))],
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    patches, patch = [], adasam_hf.patch
    monkeypatch.setattr(adasam_hf, "patch", lambda: patches.append(patch()), raising=False)
    try:
        for code in blocks(PAGES[page], "python"):
            for name, ours in names.items():
                code = code.replace(f'"{name}"', repr(str(ours)))
            exec(compile(code, page, "exec"), scope)
    finally:
        for patched in patches:
            patched.undo()
    if page == "docs/existing-script.md":
        assert patches and not torch.equal(model.weight, before)


def test_python_is_found():
    pages = ["existing-script", "extending", "index", "own-loop"]
    assert ["README.md", *(f"docs/{page}.md" for page in pages)] == PYTHON


# ---- commands ----


def commands(text: str) -> list[list[str]]:
    """The words of each command in the bash blocks, without comments and placeholders."""
    found = []
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if word not in ("...", "…")]
            if words:
                found.append(words)
    return found


def flags_of(script: str, capsys, monkeypatch) -> str:
    """What its --help says."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return capsys.readouterr().out


def check(words: list[str], capsys, monkeypatch) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    while "=" in words[0] and not words[0].startswith("-"):  # variables
        words = words[1:]
    program = words[0].removeprefix(".venv/bin/")
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif program == "pip":
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(extra.split(",")) <= set(setup["options.extras_require"])
    elif "adasam_hf" in words:  # python -m, torchrun -m, accelerate launch -m
        assert words[words.index("adasam_hf") - 1] == "-m"
        words = words[words.index("adasam_hf") :]
        for flag in (word for word in words if word.startswith("--")):
            assert flag[2:] in adasam_hf.AdaSAMTrainingArguments.__dataclass_fields__
    elif program == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file()
        for path in (word for word in words if word.startswith("configs/")):
            assert (ROOT / path).is_file()
        known = flags_of(words[1], capsys, monkeypatch)
        for flag in (word.split("=")[0] for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", known), f"{words[1]} has no {flag}"
    elif program == "adasam":
        assert words[1] in COMMANDS, words
        with pytest.raises(SystemExit):
            run_command(words[1], [*words[2:3], "--help"] if words[1] == "benchmark" else ["--help"])
        known = capsys.readouterr().out
        for flag in (word.split("=")[0] for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", known), f"adasam {words[1]} has no {flag}"
    elif (program, words[1]) == ("python", "-m"):
        assert importlib.util.find_spec(words[2]), words
    else:
        assert (program, words[1]) in {("mkdocs", "serve"), ("git", "tag")}, words


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text, "bash")])
def test_commands(page, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands(PAGES[page])
    assert found
    for words in found:
        check(words, capsys, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "pip install -e '.[nothing]'",
        "python scripts/run_glue.py --sam_rhoo 1",
        "rm -rf x",
        "python -m nothing",
        "adasam swep x.yaml",
        "adasam sweep x.yaml --dri_run",
    ],
)
def test_commands_that_do_not_exist_are_found(line, capsys, monkeypatch):
    with pytest.raises(AssertionError):
        check(commands(f"```bash\n{line}\n```")[0], capsys, monkeypatch)


# ---- the site ----


def test_the_site_builds(tmp_path):
    """Strictly: a link, an anchor or a name of the API that is not there is an error."""
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("trainer.AdaSAMTrainer", "optim.AdaSAM", "sharpness.top_eigenvalues", "directions.Momentum"):
        assert f'id="adasam_hf.{name}"' in api
