"""`adasam glue`: one fine-tuning run."""

from collections.abc import Sequence

from .run import main as run


def main(argv: Sequence[str] | None = None) -> int:
    """`adasam glue`."""
    run(argv)
    return 0
