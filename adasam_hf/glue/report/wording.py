"""Names and numbers in words."""

from collections.abc import Iterable

NAMES = {"sgdm": "SGD", "sam": "SAM", "amsgrad": "AMSGrad", "adasam": "AdaSAM", "adamw": "AdamW"}
PAPER = ("sgdm", "sam", "amsgrad", "adasam")


def name(method: str) -> str:
    return NAMES.get(method, method)


def in_order(methods: Iterable[str]) -> list[str]:
    """The paper's methods first, in the paper's order."""
    known = list(NAMES)
    return sorted(set(methods), key=lambda m: (known.index(m) if m in NAMES else len(known), m))


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def shown(tasks: Iterable[str]) -> str:
    return ", ".join(task.upper() for task in tasks)
