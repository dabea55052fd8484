#!/usr/bin/env python
"""Loss landscapes of several checkpoints; the same as `adasam landscape`. See --help."""

import sys

from adasam_hf.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("landscape"))
