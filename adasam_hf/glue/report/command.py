"""`adasam report`: the command line."""

from collections.abc import Sequence
from pathlib import Path

from ...console import CommandParser
from .claims import RULES

DESCRIPTION = f"""Make the report on the records of sweeps: tables, pictures, and a verdict on each claim of the paper.

    adasam report results/small

reads results/small/records and nothing else, and writes results/small/REPORT.md and the pictures beside it.

{RULES}"""


def main(argv: Sequence[str] | None = None) -> int:
    """`adasam report`."""
    parser = CommandParser("report", DESCRIPTION)
    parser.add_argument("folder", type=Path, help="the output_dir of sweeps")
    args = parser.parse_args(argv)
    from .page import report

    text = report(args.folder)
    (args.folder / "REPORT.md").write_text(text, encoding="utf-8")
    print(text)
    return 0
