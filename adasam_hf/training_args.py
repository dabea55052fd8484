"""What a user may say about sharpness-aware training, checked when it is said."""

import copy
import difflib
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypedDict, get_args

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.training_args import OptimizerNames

from .directions import DIRECTIONS, DirectionName
from .optim import AdaSAM
from .perturbation import check_radius
from .schedule import SHAPES, Schedule, Shape

# The paper's four methods: two updates, each with and without the ascent.
ADASAM_NAMES = ("adasam", "amsgrad")
SGD_NAMES = ("sam", "sgdm")
RADIUS_ZERO = {"amsgrad": "adasam", "sgdm": "sam"}
OPTIM_ARGS = {"adasam": {"foreach", "fused"}, "sam": {"foreach", "fused", "nesterov"}}

# As a field has them, with and without ``from __future__ import annotations``.
FLOATS = (float, float | None, "float", "float | None", "Optional[float]")

Scope = Literal["batch", "microbatch"]
Dropout = Literal["same", "fresh"]
Preset = Literal["full", "fast", "free"]


class PresetValues(TypedDict):
    """The arguments that a preset stands for."""

    sam_direction: DirectionName
    sam_ascent_fraction: float
    sam_rho: float


# What a preset stands for where the argument itself is unset. Costs: results/benchmark_step; what each keeps:
# results/benchmark_flatness.
PRESETS: dict[Preset, PresetValues] = {
    "full": {"sam_direction": "gradient", "sam_ascent_fraction": 1.0, "sam_rho": 0.05},
    "fast": {"sam_direction": "gradient", "sam_ascent_fraction": 0.125, "sam_rho": 0.1},
    "free": {"sam_direction": "momentum", "sam_ascent_fraction": 1.0, "sam_rho": 0.4},
}

if TYPE_CHECKING:  # what the mixin finds behind it

    class _Base(TrainingArguments):
        output_dir: str  # never None after __post_init__
        adam_beta2: Any  # the mixin's may be None
        adam_epsilon: Any

else:
    _Base = object


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
    adam_beta2: float | None = field(
        default=None,
        metadata={"help": "β2 of Adam-like optimizers. Unset: 0.98 for adasam and amsgrad, 0.999 for the others."},
    )
    adam_epsilon: float | None = field(
        default=None,
        metadata={"help": "ε of Adam-like optimizers. Unset: 1e-6 for adasam and amsgrad, 1e-8 for the others."},
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
            "help": "Whose gradient is climbed: that of the whole optimizer step (batch), or each "
            "micro-batch's own (microbatch, m-sharpness)."
        },
    )
    sam_sync: bool = field(
        default=True,
        metadata={
            "help": "With several processes in scope batch: average the ascent gradient over them, so that the run "
            "follows one process with the same global batch; --no_sam_sync: each climbs its own, without gradient "
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
            "help": "What is climbed; momentum, the optimizer's own, needs no second pass (Momentum-SAM, "
            "arXiv:2401.12033; its radii are many times larger). Unset: that of sam_preset, gradient."
        },
    )
    sam_adaptive: bool = field(
        default=False,
        metadata={"help": "Radius relative to the size of each weight (ASAM, arXiv:2102.11600)."},
    )
    sam_ascent_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of each micro-batch's rows that the ascent sees, in (0, 1] (arXiv:2110.08529: a quarter). "
            "Unset: that of sam_preset, 1."
        },
    )
    sam_parameters: str = field(
        default="all",
        metadata={
            "help": "Which parameters climb: all; norm, those of normalization layers (SAM-ON, arXiv:2306.04226); or "
            "a regular expression over their names. The ascent computes no weight gradient for the others."
        },
    )
    sam_start: float = field(
        default=0.0, metadata={"help": "Share of training before the first ascent (arXiv:2609.17575: 0.7)."}
    )
    sam_end: float = field(default=1.0, metadata={"help": "Share of training after which no step ascends."})
    sam_interval: int = field(default=1, metadata={"help": "Ascend in every k-th step only."})
    sam_reuse: bool = field(
        default=False,
        metadata={"help": "With sam_interval > 1: climb the last gradient again in the steps between, in one pass."},
    )
    sam_rho_schedule: Shape = field(
        default="constant",
        metadata={
            "help": "The radius from sam_start to sam_end: constant, falling to 0 (linear, cosine), or following the "
            "learning rate (lr)."
        },
    )

    # What the launcher was given before the script's name; it stands where an argument is at its default.
    launcher_defaults: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name in self.launcher_defaults and getattr(self, f.name) == f.default:
                setattr(self, f.name, self.launcher_defaults[f.name])
        self._read_numbers()
        self._check_sharpness()
        # The optimizer names of Transformers are a closed enumeration, and it converts ours to it.
        ours = self.optim if self.optim in ADASAM_NAMES + SGD_NAMES else None
        if ours:
            self.optim = TrainingArguments.optim
        try:
            super().__post_init__()
        finally:
            if ours:
                self.optim = ours

    def _read_numbers(self) -> None:
        """Accept '1e-5': YAML takes a number without a dot for text, and parse_yaml_file passes it on."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, str) and f.type in FLOATS:
                try:
                    setattr(self, f.name, float(value))
                except ValueError:
                    raise ValueError(f"{f.name}={value!r} must be a number") from None

    def _check_sharpness(self) -> None:
        known = [*ADASAM_NAMES, *SGD_NAMES, *(o.value for o in OptimizerNames)]
        if self.optim not in known:
            close = difflib.get_close_matches(str(self.optim).lower(), known, n=1)
            meant = f"did you mean {close[0]!r}? Or " if close else ""
            raise ValueError(f"optim={self.optim!r} is no optimizer; {meant}choose one of {', '.join(known)}")
        if self.sam_rho is not None:
            check_radius(self.sam_rho, "sam_rho")
        if self.sam_rho and self.optim in RADIUS_ZERO:
            raise ValueError(
                f"sam_rho={self.sam_rho!r} contradicts optim={self.optim!r}, which is {RADIUS_ZERO[self.optim]} at "
                f"radius 0; use optim={RADIUS_ZERO[self.optim]!r}, or leave sam_rho unset"
            )
        for name, allowed in (
            ("sam_scope", get_args(Scope)),
            ("sam_dropout", get_args(Dropout)),
            ("sam_preset", PRESETS),
            ("sam_direction", (*DIRECTIONS, None)),
            ("sam_rho_schedule", SHAPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(filter(None, allowed))}")
        self._check_cheap_ascents()
        for name in ("sgd_momentum", "adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            if (value is None and name != "adam_beta2") or (value is not None and not 0.0 <= value < 1.0):
                raise ValueError(f"{name}={value!r} must be in [0, 1); 0 switches it off")
        if self.adam_epsilon is not None and not 0.0 <= self.adam_epsilon < float("inf"):
            raise ValueError(f"adam_epsilon={self.adam_epsilon!r} must be finite and >= 0; try 1e-6")
        if self.optim in ADASAM_NAMES and self.adam_epsilon == 0:
            raise ValueError("adam_epsilon=0.0 must be > 0 for AdaSAM, whose denominator starts at ε; try 1e-6")
        if self.optim in ADASAM_NAMES + SGD_NAMES:
            self._own_optim_args()

    def _check_cheap_ascents(self) -> None:
        if self.sam_ascent_fraction is not None and not 0.0 < self.sam_ascent_fraction <= 1.0:
            raise ValueError(f"sam_ascent_fraction={self.sam_ascent_fraction!r} must be in (0, 1]; try 0.25")
        if not 0.0 <= self.sam_start < self.sam_end <= 1.0:
            raise ValueError(
                f"sam_start={self.sam_start!r} and sam_end={self.sam_end!r} must be shares of training with "
                "0 <= sam_start < sam_end <= 1; try sam_start=0.7 with sam_end=1"
            )
        if isinstance(self.sam_interval, bool) or not isinstance(self.sam_interval, int) or self.sam_interval < 1:
            raise ValueError(f"sam_interval={self.sam_interval!r} must be a whole number >= 1; 1 ascends in every step")
        if self.sam_reuse and self.sam_interval == 1:
            raise ValueError("sam_reuse=True has no steps to reuse a direction in; set sam_interval to 2 or more")
        try:
            re.compile(self.sam_parameters)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"sam_parameters={self.sam_parameters!r} is no regular expression ({error}); use 'all', 'norm', or one"
            ) from None
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

    @property
    def resolved_direction(self) -> DirectionName:
        """What is climbed: `sam_direction`, or else the preset's."""
        return self.sam_direction or PRESETS[self.sam_preset]["sam_direction"]

    @property
    def resolved_ascent_fraction(self) -> float:
        """The share of the rows that the ascent sees: `sam_ascent_fraction`, or else the preset's."""
        if self.sam_ascent_fraction is not None:
            return self.sam_ascent_fraction
        has_first_pass = DIRECTIONS[self.resolved_direction].first_pass
        return PRESETS[self.sam_preset]["sam_ascent_fraction"] if has_first_pass else 1.0

    @property
    def sam_schedule(self) -> Schedule:
        """When the weights climb and how far."""
        return Schedule(self.sam_start, self.sam_end, self.sam_interval, self.sam_rho_schedule)

    def __repr__(self) -> str:
        return str(self)  # that of Seq2SeqTrainingArguments prints the hub token

    def set_optimizer(
        self,
        name: str = TrainingArguments.optim,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        beta1: float = 0.9,
        beta2: float | None = None,
        epsilon: float | None = None,
        args: str | None = None,
        rho: float | None = None,
    ) -> Self:
        """As in Transformers, with the names and the radius of this package."""
        self.optim = name if name in ADASAM_NAMES + SGD_NAMES else OptimizerNames(name)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.adam_beta1, self.adam_beta2, self.adam_epsilon = beta1, beta2, epsilon
        self.optim_args, self.sam_rho = args, rho
        self._check_sharpness()
        return self

    # Defaults that depend on the optimizer are resolved when they are read and never written back, so that
    # `dataclasses.replace(args, optim=...)` and hyperparameter search do not carry one optimizer's to the next.

    @property
    def resolved_betas(self) -> tuple[float, float]:
        """(β1, β2) of the chosen optimizer."""
        beta2 = 0.98 if self.optim in ADASAM_NAMES else TrainingArguments.adam_beta2
        return self.adam_beta1, beta2 if self.adam_beta2 is None else self.adam_beta2

    @property
    def resolved_epsilon(self) -> float:
        """ε of the chosen optimizer."""
        default = 1e-6 if self.optim in ADASAM_NAMES else TrainingArguments.adam_epsilon
        return default if self.adam_epsilon is None else self.adam_epsilon

    @property
    def resolved_rho(self) -> float:
        """The radius that the arguments alone imply; an `AdaSAM` instance given to the trainer brings its own."""
        if self.sam_rho is not None:
            return self.sam_rho
        if self.optim not in RADIUS_ZERO.values():
            return 0.0
        preset = PRESETS[self.sam_preset]
        if preset["sam_direction"] != self.resolved_direction:  # radii of one direction mean nothing to another
            same = (p for p in PRESETS.values() if p["sam_direction"] == self.resolved_direction)
            preset = next(same, PRESETS["full"])
        return preset["sam_rho"]

    def stock(self) -> Self:
        """A copy as Transformers reads it: its own β2 and ε where unset."""
        args = copy.copy(self)
        args.adam_beta2, args.adam_epsilon = self.resolved_betas[1], self.resolved_epsilon
        return args

    def idle_arguments(self) -> list[str]:
        """Arguments of the ascent that are set although, at radius 0, there is none."""
        defaults = {f.name: f.default for f in fields(SharpnessAwareArgumentsMixin) if f.name.startswith("sam_")}
        found = {name: getattr(self, name) for name in defaults if name != "sam_rho"}
        return [f"{name}={value!r}" for name, value in found.items() if value != defaults[name]]

    def own_optimizer(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
        """Class and keyword arguments for this package's optimizer names; None for those of Transformers."""
        if self.optim in ADASAM_NAMES:
            values = {"betas": self.resolved_betas, "eps": self.resolved_epsilon, "rho": self.resolved_rho}
            return AdaSAM, {"lr": self.learning_rate, **values, **self._own_optim_args()}
        if self.optim in SGD_NAMES:
            return torch.optim.SGD, {
                "lr": self.learning_rate,
                "momentum": self.sgd_momentum,
                **self._own_optim_args(),
            }
        return None

    def _own_optim_args(self) -> dict[str, bool]:
        allowed = OPTIM_ARGS[RADIUS_ZERO.get(self.optim, self.optim)]
        flags = {}
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


@dataclass(repr=False)
class AdaSAMTrainingArguments(SharpnessAwareArgumentsMixin, TrainingArguments):
    """`transformers.TrainingArguments` with AdaSAM."""


@dataclass(repr=False)
class AdaSAMSeq2SeqTrainingArguments(SharpnessAwareArgumentsMixin, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with AdaSAM."""
