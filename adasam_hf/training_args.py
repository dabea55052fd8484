"""The arguments of sharpness-aware training: fields, checks, and what unset ones resolve to."""

import copy
import difflib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.training_args import OptimizerNames

from .defaults import ADASAM_DEFAULTS, ADASAM_NAMES, AdamDefaultsMixin
from .directions import DIRECTIONS, DirectionName
from .optim import AdaSAM
from .presets import PRESETS, Preset, preset_ascent_fraction, preset_radius
from .reading import read_choice, read_number, read_pattern, read_truth_value, read_whole_number
from .schedule import SHAPES, Schedule, Shape

# The paper's four methods: two updates, each with and without the ascent.
SGD_NAMES = ("sam", "sgdm")
RADIUS_ZERO = {"amsgrad": "adasam", "sgdm": "sam"}
OPTIM_ARGS = {"adasam": {"foreach", "fused"}, "sam": {"foreach", "fused", "nesterov"}}

# As a field has them, with and without ``from __future__ import annotations``.
FLOATS = (float, float | None, "float", "float | None", "Optional[float]")

Scope = Literal["batch", "microbatch"]
Dropout = Literal["same", "fresh"]

# What each number must be, and whether it is.
NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "sam_rho": (
        "a finite number >= 0 (0 switches the ascent off; try 0.05)",
        lambda rho: math.isfinite(rho) and rho >= 0.0,
    ),
    "sam_ascent_fraction": ("a number in (0, 1]; try 0.25", lambda share: 0.0 < share <= 1.0),
    "sam_start": ("a number with 0 <= sam_start < sam_end <= 1; try sam_start=0.7", lambda share: 0.0 <= share < 1.0),
    "sam_end": ("a number with 0 <= sam_start < sam_end <= 1; try sam_end=1", lambda share: 0.0 < share <= 1.0),
    "sgd_momentum": ("a number in [0, 1); 0 switches it off", lambda momentum: 0.0 <= momentum < 1.0),
    "adam_beta1": ("a number in [0, 1); 0 switches it off", lambda beta: 0.0 <= beta < 1.0),
    "adam_beta2": ("a number in [0, 1); 0 switches it off", lambda beta: 0.0 <= beta < 1.0),
    "adam_epsilon": ("a finite number >= 0; try 1e-6", lambda epsilon: math.isfinite(epsilon) and epsilon >= 0.0),
}
WHOLE_NUMBERS = {
    "sam_interval": "a whole number >= 1; 1 ascends in every step",
    "sam_ascent_min_rows": "a whole number >= 1; use 2 or more where the loss needs several rows",
}
CHOICES: dict[str, Collection[str]] = {
    "sam_scope": get_args(Scope),
    "sam_dropout": get_args(Dropout),
    "sam_preset": PRESETS,
    "sam_direction": DIRECTIONS,
    "sam_rho_schedule": SHAPES,
}
TRUTH_VALUES = ("sam_sync", "sam_adaptive", "sam_reuse")
MAY_BE_UNSET = ("sam_rho", "sam_direction", "sam_ascent_fraction")  # and then have a meaning of their own

if TYPE_CHECKING:  # what the mixin finds behind it

    class _Base(AdamDefaultsMixin):
        output_dir: str  # never None after __post_init__

else:
    _Base = AdamDefaultsMixin


@dataclass(repr=False)
class SharpnessAwareArgumentsMixin(_Base):
    """Adds the paper's optimizers and the ascent to a `TrainingArguments` class.

    Combine it in front of the class, with ``repr=False``: the `__repr__` that dataclass makes prints the hub token:

        @dataclass(repr=False)
        class MyArguments(SharpnessAwareArgumentsMixin, MyTrainingArguments): ...

    Raises:
        ValueError: at construction, naming the argument, its value, the range and the remedy.
    """

    optim: str = field(
        default=TrainingArguments.optim,
        metadata={
            "help": "The optimizer: adasam (AdaSAM), amsgrad (AdaSAM at radius 0), sam (SAM around SGD with "
            "momentum), sgdm (sam at radius 0), or any name of Transformers' OptimizerNames, unchanged."
        },
    )
    sgd_momentum: float = field(default=0.9, metadata={"help": "Momentum of sam and sgdm, in [0, 1)."})
    sam_rho: float | None = field(
        default=None,
        metadata={
            "help": "Radius ρ of the ascent, in weight units. Above 0 it makes any optimizer sharpness-aware. "
            "Unset: 0.05 for adasam and sam (0.1 with sam_preset=fast, 0.4 along the momentum), 0 for the others."
        },
    )
    sam_scope: Scope = field(
        default="batch",
        metadata={
            "help": "Whose gradient the ascent follows: that of the whole optimizer step (batch), or each "
            "micro-batch's own (microbatch, m-sharpness)."
        },
    )
    sam_sync: bool = field(
        default=True,
        metadata={
            "help": "With several processes in scope batch: average the ascent gradient over them, so that the run "
            "follows one process with the same global batch; --no_sam_sync: each follows its own, without gradient "
            "traffic in the first pass. In scope microbatch it never travels."
        },
    )
    sam_dropout: Dropout = field(
        default="same", metadata={"help": "Dropout masks of the second pass: the same as in the first, or fresh."}
    )
    sam_preset: Preset = field(
        default="full",
        metadata={
            "help": "How much the ascent may cost: full, a whole pass; fast, one on an eighth of the rows; free, none, "
            "along the momentum. Arguments that are set win over it."
        },
    )
    sam_direction: DirectionName | None = field(
        default=None,
        metadata={
            "help": "Along what the weights are perturbed; momentum, the optimizer's own, needs no second pass "
            "(Momentum-SAM, arXiv:2401.12033; its radii are many times larger), nor does noise, uniform on the sphere. "
            "preconditioned: the gradient over the root of the optimizer's second moment; friendly: the gradient minus "
            "its running mean. Unset: that of sam_preset, gradient."
        },
    )
    sam_adaptive: bool = field(
        default=False,
        metadata={"help": "Radius relative to the size of each weight (ASAM, arXiv:2102.11600)."},
    )
    sam_ascent_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the rows that the ascent sees, in (0, 1] (arXiv:2110.08529: a quarter). "
            "Unset: that of sam_preset, 1."
        },
    )
    sam_ascent_min_rows: int = field(
        default=2,
        metadata={
            "help": "With sam_ascent_fraction below 1: the fewest rows of an optimizer step that the ascent may see; "
            "at least 2 where the loss needs several rows (BatchNorm, in-batch negatives)."
        },
    )
    sam_parameters: str = field(
        default="all",
        metadata={
            "help": "Which parameters are perturbed: all; norm, those of normalization layers (SAM-ON, "
            "arXiv:2306.04226); or a regular expression over their names. The ascent computes no weight gradient for "
            "the others."
        },
    )
    sam_start: float = field(
        default=0.0, metadata={"help": "Share of training before the first ascent (arXiv:2609.17575: 0.7)."}
    )
    sam_end: float = field(default=1.0, metadata={"help": "Share of training after which no step ascends."})
    sam_interval: int = field(default=1, metadata={"help": "Ascend in every k-th step only."})
    sam_reuse: bool = field(
        default=False,
        metadata={
            "help": "With sam_interval > 1: perturb along the last gradient again in the steps between, in one pass."
        },
    )
    sam_rho_schedule: Shape = field(
        default="constant",
        metadata={
            "help": "The radius from sam_start to sam_end: constant, falling to 0 (linear, cosine), or each "
            "parameter group's learning rate as a share of its peak (lr)."
        },
    )

    # Those before the script's name in the launcher's command; each stands where an argument is at its default.
    launcher_defaults: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name in self.launcher_defaults and getattr(self, f.name) == f.default:
                setattr(self, f.name, self.launcher_defaults[f.name])
        self._read_text()
        self._check_optimizer_name(self.optim)
        self._read_values()
        self._read_adam_defaults()
        self._check_together()
        if self.optim in ADASAM_NAMES + SGD_NAMES:
            self._post_init_behind()
        else:
            super().__post_init__()

    def _post_init_behind(self) -> None:
        """That of Transformers, which converts `optim` to its own closed enumeration, without a name of this package.

        Meanwhile β2 and ε stay those in force, for DeepSpeed's "auto" reads them here: other objects of the same value
        are no defaults and do not follow the other name.
        """
        optim, numbers = self.optim, {name: getattr(self, name) for name in ADASAM_DEFAULTS}
        vars(self).update({name: float(repr(number)) for name, number in numbers.items()})
        self.optim = TrainingArguments.optim
        try:
            super().__post_init__()
        finally:
            vars(self).update(numbers, optim=optim)

    def _read_text(self) -> None:
        """Read '1e-5' in any field for a float: YAML takes a number without a dot for text."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, str) and f.type in FLOATS and f.name not in NUMBERS:
                setattr(self, f.name, read_number(f.name, value, "a number"))

    @staticmethod
    def _check_optimizer_name(name: object) -> None:
        known = [*ADASAM_NAMES, *SGD_NAMES, *(o.value for o in OptimizerNames)]
        if not isinstance(name, str) or name not in known:
            close = difflib.get_close_matches(str(name).lower(), known, n=1)
            meant = f"did you mean {close[0]!r}? Or " if close else ""
            raise ValueError(f"optim={name!r} is unknown; {meant}choose one of {', '.join(known)}")

    def _read_values(self) -> None:
        """Have each argument in its own type and range, or say what it must be."""
        for name, (must_be, allowed) in NUMBERS.items():
            if (value := getattr(self, name)) is not None or name not in MAY_BE_UNSET:
                setattr(self, name, read_number(name, value, must_be, allowed))
        for name, must_be in WHOLE_NUMBERS.items():
            setattr(self, name, read_whole_number(name, getattr(self, name), must_be, least=1))
        for name in TRUTH_VALUES:
            setattr(self, name, read_truth_value(name, getattr(self, name)))
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) is not None or name not in MAY_BE_UNSET:
                read_choice(name, value, choices)
        read_pattern(
            "sam_parameters", self.sam_parameters, "'all', 'norm' or a regular expression over parameter names"
        )

    def _check_together(self) -> None:
        """What each argument may be by itself, but not beside the others."""
        if self.sam_rho and self.optim in RADIUS_ZERO:
            raise ValueError(
                f"sam_rho={self.sam_rho!r} contradicts optim={self.optim!r}, which is {RADIUS_ZERO[self.optim]} at "
                f"radius 0; use optim={RADIUS_ZERO[self.optim]!r}, or leave sam_rho unset"
            )
        if self.optim in ADASAM_NAMES and self.adam_epsilon == 0:
            raise ValueError("adam_epsilon=0.0 must be > 0 for AdaSAM, whose denominator starts at ε; try 1e-6")
        if self.sam_start >= self.sam_end:
            raise ValueError(
                f"sam_start={self.sam_start!r} and sam_end={self.sam_end!r} must be shares of training with "
                "0 <= sam_start < sam_end <= 1; try sam_start=0.7 with sam_end=1"
            )
        if self.sam_reuse and self.sam_interval == 1:
            raise ValueError("sam_reuse=True has no steps to reuse a direction in; set sam_interval to 2 or more")
        if not DIRECTIONS[self.resolved_direction].first_pass:
            for name, value, off in (
                ("sam_ascent_fraction", self.resolved_ascent_fraction, 1.0),
                ("sam_reuse", self.sam_reuse, False),
            ):
                if value != off:
                    raise ValueError(
                        f"{name}={value!r} contradicts sam_direction={self.resolved_direction!r} (that of "
                        f"sam_preset='free'), which has no first pass; leave {name} unset, or use "
                        "sam_direction='gradient'"
                    )
        if self.resolved_direction == "momentum" and self.optim in SGD_NAMES and self.sgd_momentum == 0:
            raise ValueError("sam_direction='momentum' needs one: set sgd_momentum above 0, for example 0.9")
        if self.optim in ADASAM_NAMES + SGD_NAMES:
            self._package_optim_args()

    @property
    def resolved_direction(self) -> DirectionName:
        """The direction of the ascent: `sam_direction`, or else the preset's."""
        return self.sam_direction or PRESETS[self.sam_preset]["sam_direction"]

    @property
    def resolved_ascent_fraction(self) -> float:
        """The share of the rows that the ascent sees: `sam_ascent_fraction`, or else the preset's."""
        if self.sam_ascent_fraction is not None:
            return self.sam_ascent_fraction
        return preset_ascent_fraction(self.sam_preset, self.resolved_direction)

    @property
    def sam_schedule(self) -> Schedule:
        """When the ascent takes place, and its radius."""
        return Schedule(self.sam_start, self.sam_end, self.sam_interval, self.sam_rho_schedule)

    def __repr__(self) -> str:
        return str(self)  # that of Seq2SeqTrainingArguments prints the hub token

    def set_optimizer(
        self,
        name: str = TrainingArguments.optim,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        beta1: float = 0.9,
        beta2: float = AdamDefaultsMixin.adam_beta2,
        epsilon: float = AdamDefaultsMixin.adam_epsilon,
        args: str | None = None,
        rho: float | None = None,
    ) -> Self:
        """As in Transformers, with the names and the radius of this package; β2 and ε follow the name unless given."""
        self._check_optimizer_name(name)
        self.optim = name if name in ADASAM_NAMES + SGD_NAMES else OptimizerNames(name)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.adam_beta1, self.adam_beta2, self.adam_epsilon = beta1, beta2, epsilon
        self.optim_args, self.sam_rho = args, rho
        self._read_values()
        self._check_together()
        return self

    @property
    def resolved_rho(self) -> float:
        """The radius that the arguments alone imply; an `AdaSAM` instance given to the trainer brings its own."""
        if self.sam_rho is not None:
            return self.sam_rho
        if self.optim not in RADIUS_ZERO.values():
            return 0.0
        return preset_radius(self.sam_preset, self.resolved_direction)

    def arguments_without_effect(self) -> list[str]:
        """Arguments of the ascent that are set although, at radius 0, there is none."""
        defaults = {f.name: f.default for f in fields(SharpnessAwareArgumentsMixin) if f.name.startswith("sam_")}
        found = {name: getattr(self, name) for name in defaults if name != "sam_rho"}
        return [f"{name}={value!r}" for name, value in found.items() if value != defaults[name]]

    def package_optimizer(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
        """Class and keyword arguments for this package's optimizer names; None for those of Transformers."""
        if self.optim in ADASAM_NAMES:
            return AdaSAM, {
                "lr": self.learning_rate,
                "betas": (self.adam_beta1, self.adam_beta2),
                "eps": self.adam_epsilon,
                "rho": self.resolved_rho,
                **self._package_optim_args(),
            }
        if self.optim in SGD_NAMES:
            return torch.optim.SGD, {
                "lr": self.learning_rate,
                "momentum": self.sgd_momentum,
                **self._package_optim_args(),
            }
        return None

    def _package_optim_args(self) -> dict[str, bool]:
        allowed = OPTIM_ARGS[RADIUS_ZERO.get(self.optim, self.optim)]
        flags: dict[str, bool] = {}
        if self.optim_args is not None and not isinstance(self.optim_args, str):
            raise ValueError(
                f"optim_args={self.optim_args!r} must be text, NAME=true|false with NAME in {sorted(allowed)} and "
                f"commas between them, for optim={self.optim!r}"
            )
        for item in filter(None, (self.optim_args or "").replace(" ", "").split(",")):
            name, _, value = item.partition("=")
            if name not in allowed or value.lower() not in ("true", "false"):
                raise ValueError(
                    f"optim_args={self.optim_args!r}: {item!r} is not NAME=true|false with NAME in "
                    f"{sorted(allowed)}, which is what optim={self.optim!r} takes there; radius, β, ε and momentum "
                    "have arguments of their own (sam_rho, adam_beta1, adam_beta2, adam_epsilon, sgd_momentum)"
                )
            flags[name] = value.lower() == "true"
        return flags

    # The names before 0.1; to be removed in 0.2.

    def stock(self) -> Self:
        """A copy."""
        return copy.copy(self)

    @property
    def resolved_betas(self) -> tuple[float, float]:
        """(`adam_beta1`, `adam_beta2`)."""
        return self.adam_beta1, self.adam_beta2

    @property
    def resolved_epsilon(self) -> float:
        """`adam_epsilon`."""
        return self.adam_epsilon

    own_optimizer = package_optimizer
    idle_arguments = arguments_without_effect


@dataclass(repr=False)
class AdaSAMTrainingArguments(SharpnessAwareArgumentsMixin, TrainingArguments):
    """`transformers.TrainingArguments` with AdaSAM."""


@dataclass(repr=False)
class AdaSAMSeq2SeqTrainingArguments(SharpnessAwareArgumentsMixin, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with AdaSAM."""
