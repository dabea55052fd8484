"""The old import path, up to 0.1, of the power of paired t tests; it is now `report.statistics`."""

from .report.statistics import pairs_for, power, visible_gain

__all__ = ["pairs_for", "power", "visible_gain"]
