#!/usr/bin/env python
"""Fine-tune a model on a GLUE task or on your own sentences; the same as `adasam glue`. See --help."""

import sys

from adasam_hf.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("glue"))
