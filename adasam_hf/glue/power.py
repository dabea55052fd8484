"""The power of paired t tests by its name up to 0.1; it is in `report.statistics`."""

from .report.statistics import pairs_for, power, visible_gain

__all__ = ["pairs_for", "power", "visible_gain"]
