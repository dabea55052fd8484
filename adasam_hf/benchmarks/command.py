"""`adasam benchmark`: which of the two."""

import sys
from collections.abc import Sequence
from importlib import import_module

from ..console import CommandParser

DESCRIPTION = """Measure AdaSAM beside its peers.

    adasam benchmark step --model minilm --dtype float32     time and memory of a step
    adasam benchmark flatness --dataset_name_or_path glue    score, flatness and time of each mode
    adasam benchmark step --help                             its own arguments
"""


def main(argv: Sequence[str] | None = None) -> int:
    """`adasam benchmark`."""
    parser = CommandParser("benchmark", DESCRIPTION)
    parser.add_argument("what", choices=["step", "flatness"])
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words[:1])
    return int(import_module(f".{args.what}", __package__).main(words[1:]))
