"""What `sam_preset` stands for: a direction, a share of the rows and a radius that suits both."""

from typing import Literal, TypedDict

from .directions import DIRECTIONS, DirectionName

Preset = Literal["full", "fast", "free"]


class PresetValues(TypedDict):
    """The arguments that a preset stands for, each where the argument itself is unset."""

    sam_direction: DirectionName
    sam_ascent_fraction: float
    sam_rho: float


# What each costs: results/benchmark_step; what each keeps of the flatness: results/benchmark_flatness.
PRESETS: dict[Preset, PresetValues] = {
    "full": {"sam_direction": "gradient", "sam_ascent_fraction": 1.0, "sam_rho": 0.05},
    "fast": {"sam_direction": "gradient", "sam_ascent_fraction": 0.125, "sam_rho": 0.1},
    "free": {"sam_direction": "momentum", "sam_ascent_fraction": 1.0, "sam_rho": 0.4},
}


def preset_ascent_fraction(preset: Preset, direction: DirectionName) -> float:
    """The share of the rows that `preset` asks for; 1 along a direction that needs no first pass."""
    return PRESETS[preset]["sam_ascent_fraction"] if DIRECTIONS[direction].first_pass else 1.0


def preset_radius(preset: Preset, direction: DirectionName) -> float:
    """ρ of `preset`, or, as radii of one direction mean nothing to another, of the first preset along `direction`."""
    same = (values for values in (PRESETS[preset], *PRESETS.values()) if values["sam_direction"] == direction)
    return next(same, PRESETS["full"])["sam_rho"]
