#!/usr/bin/env python
"""A grid of fine-tuning runs from one file; the same as `adasam sweep`. See --help."""

import sys

from adasam_hf.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("sweep"))
