#!/usr/bin/env python
"""What a step costs; the same as `adasam benchmark step`. See --help."""

import sys

from adasam_hf.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("benchmark", ["step", *sys.argv[1:]]))
