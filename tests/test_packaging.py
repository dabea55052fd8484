"""The wheel and the sdist, as `python -m build` makes them."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import adasam_hf

ROOT = Path(__file__).parent.parent


def test_names_are_those_that_are_loaded():
    assert set(adasam_hf.__all__) == {*adasam_hf._HOME, "__version__"}
    for name in adasam_hf.__all__:
        assert getattr(adasam_hf, name) is not None


def test_what_is_imported_is_required():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = {re.match(r"[\w-]+", line)[0] for line in setup["options"]["install_requires"].split()}
    names = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
    imported = set()
    for path in (ROOT / "adasam_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    foreign = {names.get(name, name) for name in imported - set(sys.stdlib_module_names) - {"adasam_hf"}}
    assert {"torch", "transformers", "scipy"} <= foreign <= required


def git(folder, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Of the files of this repository, committed and tagged v3.2.1 in one of its own."""
    source = tmp_path_factory.mktemp("source")
    for name in git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    git(source, "init", "--quiet")
    git(source, "add", "--all")
    git(source, "commit", "--quiet", "--message=all")
    git(source, "tag", "v3.2.1")
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(source)], check=True, capture_output=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
def test_the_version_is_that_of_the_tag_and_nothing_is_missing(archives):
    wheel, sdist = archives
    assert wheel.name == "adasam_hf-3.2.1-py3-none-any.whl" and sdist.name == "adasam_hf-3.2.1.tar.gz"
    names = zipfile.ZipFile(wheel).namelist()
    package = {f"adasam_hf/{p.relative_to(ROOT / 'adasam_hf')}" for p in (ROOT / "adasam_hf").rglob("*.py")}
    assert package | {"adasam_hf/py.typed"} == {name for name in names if name.startswith("adasam_hf/")}
    with tarfile.open(sdist) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    assert package | {"README.md", "scripts/quickstart.py", "configs/quickstart.yaml", "docs/index.md"} <= inside


@pytest.mark.slow
def test_they_install_and_run_the_quickstart(archives, tmp_path):
    """The wheel beside the dependencies of this environment, the script from the sdist."""
    wheel, sdist = archives
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "theirs.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch is not installed once more
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    shutil.rmtree(folder / "adasam_hf")
    words = [python, "scripts/quickstart.py", "--output_dir=out", "--max_steps=2", "--disable_tqdm=true", "--use_cpu"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # and the sdist by itself
    words = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "built"), str(sdist)]
    subprocess.run(words, check=True)
    built = {path.relative_to(tmp_path / "built").as_posix() for path in (tmp_path / "built" / "adasam_hf").rglob("*")}
    assert {"adasam_hf/trainer.py", "adasam_hf/glue/run.py", "adasam_hf/py.typed"} <= built
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["versions"]["adasam_hf"] == "3.2.1" and results["commit"] is None
