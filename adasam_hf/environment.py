"""`adasam env`: what a bug report needs, and nothing private."""

import platform
from collections.abc import Sequence
from importlib import metadata

from .console import CommandParser

DESCRIPTION = """Print versions and devices for a bug report, without paths, host names or settings.

    adasam env
"""
PACKAGES = (
    "adasam_hf",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "numpy",
    "scipy",
    "scikit-learn",
)
OPTIONAL = ("peft", "trl", "sentence-transformers", "setfit", "pytorch-lightning", "ray", "matplotlib")


def environment() -> dict[str, str]:
    """Name → version or description. Optional packages that are not installed are left out."""
    found = {"Python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    found |= {name: _version(name) or "not installed" for name in PACKAGES}
    found |= {name: version for name in OPTIONAL if (version := _version(name))}
    return found | {"devices": devices()}


def _version(package: str) -> str | None:
    if package == "adasam_hf":
        from . import __version__  # works even in a checkout that is not installed

        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def devices() -> str:
    """The accelerators that torch sees, or how many CPU threads it uses."""
    import torch

    if not torch.accelerator.is_available():
        return f"CPU ({torch.get_num_threads()} threads)"
    kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    names = {torch.cuda.get_device_name(i) for i in range(count)} if torch.cuda.is_available() else {str(kind)}
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return f"{count} × {', '.join(sorted(names))}{cuda}"


def main(argv: Sequence[str] | None = None) -> int:
    """`adasam env`."""
    CommandParser("env", DESCRIPTION).parse_args(argv)
    print("\n".join(f"- {name}: {value}" for name, value in environment().items()))
    return 0
