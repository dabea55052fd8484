#!/usr/bin/env python
"""How many seeds a paired t test needs to see a gain; the same as `adasam power`. See --help."""

import sys

from adasam_hf.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("power"))
