#!/usr/bin/env python
"""What each mode keeps of AdaSAM; the same as `adasam benchmark flatness`. See --help."""

import sys

from adasam_hf.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("benchmark", ["flatness", *sys.argv[1:]]))
