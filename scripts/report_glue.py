#!/usr/bin/env python
"""The report on the records of a sweep; the same as `adasam report`. See --help for the rules of its verdicts."""

import sys

from adasam_hf.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("report"))
