"""`adasam report`: the command line."""

from collections.abc import Sequence
from pathlib import Path

from ...console import CommandParser
from .claims import RULES

DESCRIPTION = f"""Make a report from the records of sweeps: tables, figures, and a verdict on each claim of the paper.

    adasam report results/small

This reads only results/small/records, and writes results/small/REPORT.md and its figures.

{RULES}"""


def main(argv: Sequence[str] | None = None) -> int:
    """`adasam report`."""
    parser = CommandParser("report", DESCRIPTION)
    parser.add_argument("folder", type=Path, help="output_dir of finished sweeps")
    args = parser.parse_args(argv)
    from .page import report

    text = report(args.folder)
    (args.folder / "REPORT.md").write_text(text, encoding="utf-8")
    print(text)
    return 0
