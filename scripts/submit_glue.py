#!/usr/bin/env python
"""The zip that the GLUE leaderboard takes; the same as `adasam submit`. See --help."""

import sys

from adasam_hf.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("submit"))
