"""`adasam benchmark bundle`: a checkout, a model and data in one file, for a machine with a GPU and no network."""

import csv
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from ..glue.configs import PACKAGE
from ..glue.data import resolve_path
from ..glue.record import BUNDLE, provenance
from ..glue.sentences import SOURCE, read_sentences
from .settings import MINILM

LIMIT = 64 * 2**20
GLUE_TASKS = ("cola", "mrpc", "rte", "sst2", "stsb", "wnli")
PREFIX = "adasam_hf-bundle"
"""The folder in the bundle. `packages/` in it has what pip would install: `pip:` names are found there."""


def write_bundle(output: Path, glue: Path) -> int:
    """Write the .tar.gz. Returns its size in bytes.

    Raises:
        FileNotFoundError: outside a checkout, or where model or data are missing.
        ValueError: above 64 MiB; the file is not left behind.
    """
    missing = [task for task in GLUE_TASKS if not list((glue / task).glob("*.parquet"))]
    if missing:
        raise FileNotFoundError(f"--glue={str(glue)!r} has no {missing}; give a snapshot of nyu-mll/glue")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(output, "w:gz", compresslevel=9) as archive:
        for name, content in _files(glue):
            entry = tarfile.TarInfo(f"{PREFIX}/{name}")
            entry.size, entry.mode = len(content), 0o755 if name.startswith(".ci/") else 0o644
            archive.addfile(entry, io.BytesIO(content))
    size = output.stat().st_size
    if size > LIMIT:
        output.unlink()
        raise ValueError(f"the bundle has {size / 2**20:.1f} MiB, at most 64 are allowed; track no large files")
    return size


def _files(glue: Path) -> Iterator[tuple[str, bytes]]:
    """Name in the bundle and content."""
    for name in _tracked():
        yield name, (PACKAGE.parent / name).read_bytes()
    yield BUNDLE, json.dumps({key: provenance()[key] for key in ("commit", "dirty")}).encode()
    model = Path(resolve_path(MINILM))
    folder = f"packages/{MINILM.removeprefix('pip:')}"
    for path in sorted(model.iterdir()):
        if path.suffix in (".json", ".txt") and path.name != "data_config.json":
            yield f"{folder}/{path.name}", _config(path) if path.name == "config.json" else path.read_bytes()
    yield f"{folder}/model.safetensors", _halved(model / "model.safetensors")
    yield f"{Path(folder).parent}/__init__.py", b""
    sentences = f"packages/{SOURCE.removeprefix('pip:')}"
    yield sentences, _sentences()
    yield f"{Path(sentences).parents[1]}/__init__.py", b""
    for path in sorted(path for path in glue.rglob("*") if path.is_file()):
        inside = path.relative_to(glue)
        if inside.parts[0] in (*GLUE_TASKS, "README.md", "LICENSES"):
            yield f"glue/{inside}", path.read_bytes()


def _tracked() -> list[str]:
    found = subprocess.run(["git", "ls-files", "-z"], cwd=PACKAGE.parent, capture_output=True, check=False)
    names = [name for name in found.stdout.decode().split("\0") if name]
    if found.returncode or "Makefile" not in names:
        raise FileNotFoundError(f"{PACKAGE.parent} is not a checkout, whose tracked files a bundle has; make one there")
    return [name for name in names if (PACKAGE.parent / name).is_file()]


def _config(path: Path) -> bytes:
    """The model's, which says that it is to be trained in float32, whatever its file holds."""
    config = {
        k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k not in ("dtype", "torch_dtype")
    }
    return json.dumps({**config, "dtype": "float32"}, indent=2).encode()


def _halved(path: Path) -> bytes:
    tensors = {
        name: tensor.half() if tensor.dtype is torch.float32 else tensor for name, tensor in load_file(path).items()
    }
    return save(tensors, {"format": "pt"})


def _sentences() -> bytes:
    """The rows of the package's file that are used."""
    rows = read_sentences()
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()
