#!/usr/bin/env python
"""AdaSAM beside AMSGrad on real sentences; the same as `adasam quickstart`. See --help."""

import sys

from adasam_hf.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("quickstart"))
