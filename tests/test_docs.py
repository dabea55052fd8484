"""README, CONTRIBUTING and docs/: their links lead somewhere, their Python runs, their commands exist."""

import ast
import configparser
import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from types import ModuleType

import pytest
import torch
from helpers import ROOT, snapshot
from transformers import AutoModelForSequenceClassification, TrainingArguments

import adasam_hf
from adasam_hf.cli import COMMANDS, run_command
from adasam_hf.glue.tasks import get_task

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
# What replaces names on the hub, and numbers that only make a run longer.
LONG = {"range(400)": "range(8)", "range(400, 1200)": "range(8, 12)", '"num_train_epochs": 3': '"num_train_epochs": 1'}


def code_of(page: str) -> list[str]:
    """Its Python, of the tutorial that of the notebook."""
    if page != "docs/tutorial.md":
        return blocks(PAGES[page], "python")
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("page", PYTHON)
def test_python(page, tiny, tmp_path, monkeypatch):
    """A page's blocks, in their order, with a small model and small data in place of the hub's."""
    task = get_task("sst2" if '"sst2"' in PAGES[page] else "rte")
    names = {
        "roberta-base": tiny,
        "sentence-transformers/all-MiniLM-L6-v2": tiny,
        "nyu-mll/glue": snapshot(tmp_path / "glue", task, labels=[0, 1] * 6),
    }
    model, rows = torch.nn.Linear(2, 2), None
    before = model.weight.detach().clone()
    if page == "README.md":
        model = AutoModelForSequenceClassification.from_pretrained(tiny)
        rows = [{"input_ids": [101, 102, 103 + i], "labels": i % 2} for i in range(16)]
    module = ModuleType("page")  # where pickle finds the page's classes
    monkeypatch.setitem(sys.modules, "page", module)
    module.__dict__.update(
        {
            "model": model,
            "train_set": rows,
            "loss_fn": torch.nn.functional.cross_entropy,
            "loader": [(torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))],
        }
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    patches, patch = [], adasam_hf.patch
    monkeypatch.setattr(adasam_hf, "patch", lambda: patches.append(patch()), raising=False)
    try:
        for code in code_of(page):
            for name, ours in names.items():
                code = code.replace(f'"{name}"', repr(str(ours)))
            for long, short in LONG.items():
                code = code.replace(long, short)
            exec(compile(code, page, "exec"), module.__dict__)
    finally:
        for patched in patches:
            patched.undo()
    if page == "docs/existing-script.md":
        assert patches and not torch.equal(model.weight, before)


def test_python_is_found():
    pages = "existing-script extending hyperparameter-search index lora-trl own-loop sentence-transformers tracking"
    assert ["README.md", *(f"docs/{page}.md" for page in pages.split()), "docs/tutorial.md"] == PYTHON
    assert all(long in PAGES["docs/tutorial.md"] for long in LONG)


# ---- what pages take from the code ----


@pytest.fixture(scope="module")
def hooks() -> dict:
    return runpy.run_path(str(ROOT / "scripts" / "docs_hooks.py"))


def test_the_notebook_is_the_tutorial(hooks):
    """`python scripts/docs_hooks.py` writes it."""
    text = (ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8")
    assert text == hooks["notebook"](PAGES["docs/tutorial.md"])
    assert code_of("docs/tutorial.md") == [block.strip() for block in blocks(PAGES["docs/tutorial.md"], "python")]


def test_every_argument_of_this_package_is_in_the_table(hooks):
    theirs = {f.name: f.metadata for f in fields(TrainingArguments)}
    ours = {f.name for f in fields(adasam_hf.AdaSAMTrainingArguments) if theirs.get(f.name) != f.metadata}
    ours -= {"adam_defaults"}  # written by to_dict, and hidden from --help
    rows = hooks["argument_table"]().splitlines()[2:]
    names = [re.match(r"\| `--(\w+)` \|", row)[1] for row in rows]
    assert set(names) == ours and len(names) == len(ours) and {"optim", "sam_rho", "sgd_momentum"} < ours
    for row in rows:
        assert len(re.split(r"(?<!\\)\|", row)) == 5, row


def test_every_command_is_on_its_page(hooks):
    page = hooks["command_help"]()
    for name in COMMANDS:
        assert f"## `adasam {name}`" in page and f"usage: adasam {name} [-h]" in page
    assert "--sam_rho" in page and "adasam benchmark step" in page


# ---- troubleshooting ----

# Whose warnings and refusals are on the page, all of them. (Errors of a wrong value say all there is to say.)
COMPLETE = ["checkpoints", "launcher_flags", "monitor", "patching", "plan", "refusals", "run", "step"]
MESSAGES = ("warning", "_warn_once", "Obstacle", "NotImplementedError", "RuntimeError")


def said(node: ast.AST) -> str | None:
    """A string of the source, with … for what is put in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def messages(module: str) -> list[str]:
    """The first string, not a single word, of each call that warns or refuses."""
    tree = ast.parse((ROOT / "adasam_hf" / f"{module}.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [call for call in calls if getattr(call.func, "attr", getattr(call.func, "id", "")) in MESSAGES]
    texts = [[text for arg in call.args if (text := said(arg)) and " " in text] for call in named]
    return [found[0] for found in texts if found]


def quoted() -> list[str]:
    """What the page's tables have, as code, in their first column."""
    rows = re.findall(r"^\| `([^`]+)` \|", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    assert len(rows) > 40
    return rows


def fits(quote: str, message: str) -> bool:
    parts = [re.escape(part) for part in quote.split("…") if part]
    return re.search(".*".join(parts), message) is not None


def test_what_troubleshooting_quotes_is_said():
    sources = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "adasam_hf").glob("*.py")]
    strings = [text for tree in sources for node in ast.walk(tree) if (text := said(node))]
    assert [quote for quote in quoted() if not any(fits(quote, text) for text in strings)] == []
    assert not any(fits("this is said nowhere", text) for text in strings)


@pytest.mark.parametrize("module", COMPLETE)
def test_troubleshooting_has_each_warning_and_refusal(module):
    found = messages(module)
    assert found
    assert [message for message in found if not any(fits(quote, message) for quote in quoted())] == []


def test_what_is_remembered_of_the_paper_is_said_in_one_place():
    """The table of its claims. (The report repeats it beside each verdict.)"""
    pages = [page for page, text in PAGES.items() if "re-read" in text]
    assert pages == ["docs/paper.md"]


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
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
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
    elif program == "adasam" and ("-m" in words or any(word.endswith(".py") or "$" in word for word in words)):
        for flag in (word.split("=")[0] for word in words if word.startswith("--")):
            assert flag[2:] in adasam_hf.AdaSAMTrainingArguments.__dataclass_fields__, words
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
        "adasam x.py --sam_rhoo 1",
    ],
)
def test_commands_that_do_not_exist_are_found(line, capsys, monkeypatch):
    with pytest.raises(AssertionError):
        check(commands(f"```bash\n{line}\n```")[0], capsys, monkeypatch)


# ---- the site ----


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """Strictly: a link, an anchor or a name of the API that is not there is an error."""
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("trainer.AdaSAMTrainer", "optim.AdaSAM", "sharpness_measures.top_eigenvalues", "directions.Momentum"):
        assert f'id="adasam_hf.{name}"' in api
    assert "<math" in (tmp_path / "site" / "step" / "index.html").read_text(encoding="utf-8")
    remote = re.compile(r'(?:src|rel="stylesheet" href)="https?://')  # nothing is fetched from elsewhere
    for path in (tmp_path / "site").rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        assert not remote.search(page), path
        assert all(re.search(r'alt="[^"]+"', image) for image in re.findall(r"<img [^>]*>", page)), path
