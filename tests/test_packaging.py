"""The wheel and the sdist, as `python -m build` makes them."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, read_setup

import adasam_hf
from adasam_hf.console import EXTRAS


def test_names_are_those_that_are_loaded():
    assert set(adasam_hf.__all__) == {*adasam_hf._HOME, "__version__"}
    for name in adasam_hf.__all__:
        assert getattr(adasam_hf, name) is not None


def imported_by_node(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    return {node.module.partition(".")[0]} if isinstance(node, ast.ImportFrom) and not node.level else set()


def imported_by(path: Path) -> set[str]:
    """The packages that a file imports, wherever in it."""
    found = {name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for name in imported_by_node(node)}
    return found - set(sys.stdlib_module_names) - {"adasam_hf"}


def test_what_is_imported_is_required():
    setup = read_setup()
    required = {re.match(r"[\w-]+", line)[0] for line in setup["options"]["install_requires"].split()}
    names = {"sklearn": "scikit-learn", "yaml": "pyyaml", "pytorch_optimizer": "pytorch-optimizer"}
    found = {path: imported_by(path) for path in (ROOT / "adasam_hf").rglob("*.py")}
    foreign = {names.get(name, name) for imported in found.values() for name in imported}
    optional = {names.get(name, name) for name in EXTRAS}
    assert {"torch", "transformers", "scipy"} <= foreign - optional <= required and not required & optional
    for name, extra in EXTRAS.items():
        assert names.get(name, name) in foreign and names.get(name, name) in setup["options.extras_require"][extra]
    at_the_top = {
        path.name
        for path in found
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom) and set(EXTRAS) & imported_by_node(node)
    }
    assert at_the_top == {"plots.py"}  # of the report; elsewhere what is optional is imported where it is used


def test_there_is_no_circle_of_imports():
    """Of the package's modules, as they are imported at their top."""
    package = ROOT / "adasam_hf"
    graph = {}
    for path in package.rglob("*.py"):
        name = ".".join(("adasam_hf", *path.relative_to(package).with_suffix("").parts)).removesuffix(".__init__")
        inside = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        found = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*inside[: len(inside) - node.level + 1], *(node.module or "").split(".")]
                module = ".".join(filter(None, base))
                found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        graph[name] = found
    graph = {name: {other for other in found if other in graph and other != name} for name, found in graph.items()}
    assert len(graph) > 90 and "adasam_hf.glue.run" in graph["adasam_hf.glue.comparison"]
    order = TopologicalSorter({name: found - {"adasam_hf"} for name, found in graph.items()})
    order.prepare()  # raises CycleError with the circle
    # One way: commands → benchmarks → experiments → trainer.
    levels = {"adasam_hf.glue": 1, "adasam_hf.benchmarks": 2}
    levels |= dict.fromkeys(("adasam_hf.quickstart", "adasam_hf.cli", "adasam_hf.__main__"), 3)

    def level(name: str) -> int:
        return max(value for prefix, value in {"": 0, **levels}.items() if name.startswith(prefix))

    assert [(one, other) for one, found in graph.items() for other in found if level(one) < level(other)] == []


def test_the_packages_of_setup_cfg_are_all():
    listed = set(read_setup()["options"]["packages"].split()) - {"adasam_hf.configs"}
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "adasam_hf").rglob("__init__.py")}
    assert listed == {".".join(folder.parts) for folder in folders}


def test_the_version_is_said_in_one_more_place():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == adasam_hf.__version__
    assert re.search(r"^version = attr: adasam_hf\._version\.", (ROOT / "setup.cfg").read_text(), re.MULTILINE)


def test_requirements_are_floors():
    """What is overridden in Transformers is checked where it is used; a newer one is not refused by its number."""
    lines = read_setup()["options"]["install_requires"].split()
    assert {"torch>=2.8", "transformers>=5.10", "accelerate>=1.12"} <= set(lines)
    assert not any(sign in line for line in lines for sign in ("<", "==", "~="))


def test_make_smoke_runs_files_that_are_there():
    (names,) = re.findall(r"^SMOKE = \$\(addprefix tests/test_,(.+)\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert all((ROOT / "tests" / f"test_{name}").is_file() for name in names.split()) and len(names.split()) > 3


def test_scripts_only_call_commands():
    for path in (ROOT / "scripts").glob("*.py"):
        if path.stem not in ("compatibility", "docs_hooks"):
            lines = path.read_text(encoding="utf-8").splitlines()
            assert len(lines) < 12 and "run_command" in lines[-1], path
            name = re.search(r"`adasam (\w+)", lines[1])[1]
            assert f'run_command("{name}"' in lines[-1], path


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The wheel and the sdist of the files of this repository, as they are now, outside any git repository."""
    source = tmp_path_factory.mktemp("source")
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    for name in names:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(source)], check=True, capture_output=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist, source


@pytest.mark.slow
def test_the_version_is_that_of_the_package_and_nothing_is_missing(archives):
    wheel, sdist, _ = archives
    version = adasam_hf.__version__
    assert wheel.name == f"adasam_hf-{version}-py3-none-any.whl" and sdist.name == f"adasam_hf-{version}.tar.gz"
    names = zipfile.ZipFile(wheel).namelist()
    package = {f"adasam_hf/{p.relative_to(ROOT / 'adasam_hf')}" for p in (ROOT / "adasam_hf").rglob("*.py")}
    data = {f"adasam_hf/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    data |= {"adasam_hf/py.typed", "adasam_hf/glue/report/page.md.jinja"}
    assert package | data == {name for name in names if name.startswith("adasam_hf/")}
    with tarfile.open(sdist) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    tracked = {path.relative_to(archives[2]).as_posix() for path in archives[2].rglob("*") if path.is_file()}
    missing = {name for name in tracked - inside if not name.startswith((".", "adasam_hf.egg-info", "build"))}
    assert missing <= {"MANIFEST.in"} and package <= inside


def environment(folder: Path) -> Path:
    """A virtual environment beside the packages of this one, so that torch is not installed once more. Its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "theirs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


SWEEP = """
output_dir: found
configs: ["configs/optim/{method}.yaml"]
arguments: {model_name_or_path: "%s", do_train: true, do_eval: true, max_steps: 2, learning_rate: 1e-3,
            per_device_train_batch_size: 4, logging_steps: 1, report_to: none, save_strategy: "no"}
tasks: {mine: {train_file: "%s", validation_file: "%s", max_train_samples: 8}}
axes: {task_name: [mine], method: [amsgrad, adasam], seed: [1]}
"""


@pytest.mark.slow
def test_an_installed_wheel_does_all_its_commands_in_an_empty_folder(archives, tiny, files, tmp_path):
    python = environment(tmp_path / "venv")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(archives[0])], check=True)
    here = tmp_path / "an empty folder"
    here.mkdir()
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def adasam(*words: str) -> str:
        command = [str(python.with_name("adasam")), *words]
        done = subprocess.run(command, cwd=here, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr[-3000:]}"
        return done.stdout

    assert "adasam [FLAGS] SCRIPT" in adasam("--help")
    assert f"adasam_hf: {adasam_hf.__version__}" in adasam("env")
    adasam("quickstart", "--max_steps=2", "--disable_tqdm=true")
    results = json.loads((here / "runs" / "quickstart" / "results.json").read_text())
    assert results["versions"]["adasam_hf"] == adasam_hf.__version__ and results["commit"] is None
    train, validation, _ = (word.partition("=")[2] for word in files)
    (here / "mine.yaml").write_text(SWEEP % (tiny, train, validation))
    adasam("sweep", "mine.yaml")
    records = {path.stem: json.loads(path.read_text()) for path in (here / "found").glob("records/mine/*.json")}
    assert {name: record["arguments"]["sam_rho"] for name, record in records.items()} == {
        "mine-amsgrad-1": None,
        "mine-adasam-1": 0.01,  # of the package's configs
    }
    assert "## mine" in adasam("report", "found") and (here / "found" / "REPORT.md").is_file()
    assert {path.name for path in here.iterdir()} == {"found", "mine.yaml", "runs"}
    plan = adasam("sweep", "configs/sweeps/small/table1.yaml", "--dry_run")  # which comes with the package
    assert "trials:" in plan and "--init_from" not in plan


@pytest.mark.slow
def test_an_editable_install_finds_the_configs_of_the_checkout(archives, tmp_path):
    python = environment(tmp_path / "venv")
    words = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", str(archives[2])]
    subprocess.run(words, check=True)
    code = "from adasam_hf.glue.configs import find_config; print(find_config('configs/quickstart.yaml'))"
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(archives[2] / "configs" / "quickstart.yaml")
    shown = subprocess.run(
        [python.with_name("adasam"), "--help"], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert "Commands:" in shown.stdout, shown.stderr
