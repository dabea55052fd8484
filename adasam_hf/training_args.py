"""The arguments of sharpness-aware training: fields, checks, and what unset ones resolve to."""

import copy
import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache, partial
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .defaults import ADASAM_DEFAULTS, AdamDefaultsMixin
from .directions import DIRECTIONS, DirectionName
from .optim import AdaSAM
from .optimizer_names import ADASAM_NAMES, SGD_NAMES, WITHOUT_SECOND_MOMENT, read_optimizer_name
from .presets import PRESETS, Preset, preset_ascent_fraction, preset_radius
from .reading import read_choice, read_number, read_pattern, read_truth_value, read_whole_number
from .schedule import SHAPES, Schedule, Shape

RADIUS_ZERO = {"amsgrad": "adasam", "sgdm": "sam"}
OPTIM_ARGS = {"adasam": {"foreach", "fused"}, "sam": {"foreach", "fused", "nesterov"}}

# As a field has them, with and without ``from __future__ import annotations``.
FLOATS = (float, float | None, "float", "float | None", "Optional[float]")

Scope = Literal["batch", "microbatch"]
Dropout = Literal["same", "fresh"]
Descent = Literal["loss", "functional"]

Reader = Callable[[str, Any], Any]
"""From an argument's name and value to its value in its own type; ValueError in one sentence."""


def _number(must_be: str, allowed: Callable[[float], bool]) -> Reader:
    return partial(read_number, must_be=must_be, allowed=allowed)


def _whole_number(must_be: str) -> Reader:
    return partial(read_whole_number, must_be=must_be, least=1)


def _choice(choices: Collection[str]) -> Reader:
    return partial(read_choice, choices=choices)


def _or_unset(reader: Reader) -> Reader:
    """None is a value, too, with a meaning of its own."""
    return lambda name, value: None if value is None else reader(name, value)


_momentum = _number("a number in [0, 1); 0 switches it off", lambda beta: 0.0 <= beta < 1.0)
_start = _number("a number with 0 <= sam_start < sam_end <= 1; try sam_start=0.7", lambda share: 0.0 <= share < 1.0)
_end = _number("a number with 0 <= sam_start < sam_end <= 1; try sam_end=1", lambda share: 0.0 < share <= 1.0)
_share = _number("a number in (0, 1]; try 0.25", lambda share: 0.0 < share <= 1.0)
_epsilon = _number("a finite number >= 0; try 1e-6", lambda epsilon: math.isfinite(epsilon) and epsilon >= 0.0)
_radius = _number(
    "a finite number >= 0 (0 switches the perturbation off; try 0.05)", lambda rho: math.isfinite(rho) and rho >= 0.0
)

# How each argument is read, whoever sets it: a script, a parser, `dataclasses.replace`, a hyperparameter search.
READERS: dict[str, Reader] = {
    "optim": read_optimizer_name,
    "adam_beta1": _momentum,
    "adam_beta2": _or_unset(_momentum),
    "adam_epsilon": _or_unset(_epsilon),
    "sgd_momentum": _momentum,
    "sam_rho": _or_unset(_radius),
    "sam_scope": _choice(get_args(Scope)),
    "sam_sync": read_truth_value,
    "sam_dropout": _choice(get_args(Dropout)),
    "sam_preset": _choice(PRESETS),
    "sam_direction": _or_unset(_choice(DIRECTIONS)),
    "sam_adaptive": read_truth_value,
    "sam_ascent_fraction": _or_unset(_share),
    "sam_ascent_min_rows": _whole_number("a whole number >= 1; use 2 or more where the loss needs several rows"),
    "sam_parameters": partial(read_pattern, must_be="'all', 'norm' or a regular expression over parameter names"),
    "sam_start": _start,
    "sam_end": _end,
    "sam_interval": _whole_number("a whole number >= 1; 1 perturbs in every step"),
    "sam_reuse": read_truth_value,
    "sam_descent": _choice(get_args(Descent)),
    "sam_cache_frozen": read_truth_value,
    "sam_rho_schedule": _choice(SHAPES),
}


def _read_spelled_number(name: str, value: Any) -> Any:
    """'1e-5' in a field for a float: YAML takes a number without a dot for text.

    (What other texts mean in a field that is not of Transformers, its author knows.)
    """
    try:
        return read_number(name, value, "a number") if isinstance(value, str) else value
    except ValueError:
        if name in TrainingArguments.__dataclass_fields__:
            raise
        return value


@cache
def _readers(cls: type) -> dict[str, Reader]:
    """For the arguments of this package, and for all other fields of `cls` that are floats."""
    return {**{f.name: _read_spelled_number for f in fields(cls) if f.type in FLOATS}, **READERS}


if TYPE_CHECKING:  # what the mixin finds behind it

    class _Base(AdamDefaultsMixin):
        output_dir: str  # never None after __post_init__

else:
    _Base = AdamDefaultsMixin


@dataclass(repr=False)
class SharpnessAwareArgumentsMixin(_Base):
    """Adds the paper's optimizers and the perturbation to a `TrainingArguments` class.

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
            "help": "Radius ρ of the perturbation, in weight units. Above 0 it makes any optimizer sharpness-aware. "
            "Unset: 0.05 for adasam and sam (0.1 with sam_preset=fast, 0.4 along the momentum), 0 for the others."
        },
    )
    sam_scope: Scope = field(
        default="batch",
        metadata={
            "help": "Whose gradient the perturbation follows: that of the whole optimizer step (batch), or each "
            "micro-batch's own (microbatch, m-sharpness)."
        },
    )
    sam_sync: bool = field(
        default=True,
        metadata={
            "help": "With several processes in scope batch: average the ascent gradient over them, so that a run on "
            "two processes matches a single-process run with the same global batch; --no_sam_sync: each follows its "
            "own, without gradient traffic in the first pass. In scope microbatch it is never averaged."
        },
    )
    sam_dropout: Dropout = field(
        default="same",
        metadata={
            "help": "Dropout masks of the second pass: the same as in the first, or fresh (always fresh with "
            "sam_ascent_fraction below 1)."
        },
    )
    sam_preset: Preset = field(
        default="full",
        metadata={
            "help": "What the ascent may cost: full, a whole pass; fast, a pass on an eighth of the rows; free, no "
            "pass, along the momentum. Arguments that you set yourself take precedence."
        },
    )
    sam_direction: DirectionName | None = field(
        default=None,
        metadata={
            "help": "Direction of the perturbation: gradient; the optimizer's momentum, which needs no first pass "
            "(Momentum-SAM, arXiv:2401.12033; its radii are many times larger); noise, uniform on the sphere, which "
            "needs none either; preconditioned, the gradient over the root of the optimizer's second moment; friendly, "
            "the gradient minus its running mean. Unset: that of sam_preset."
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
            "Unset: the preset's (0.125 for fast, otherwise 1)."
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
        default=0.0, metadata={"help": "Share of training before the first perturbed step (arXiv:2609.17575: 0.7)."}
    )
    sam_end: float = field(default=1.0, metadata={"help": "Share of training after which no step is perturbed."})
    sam_interval: int = field(default=1, metadata={"help": "Perturb only every N-th step, N being this value."})
    sam_reuse: bool = field(
        default=False,
        metadata={
            "help": "With sam_interval > 1: in the steps between, perturb along the last gradient again, in one pass."
        },
    )
    sam_descent: Descent = field(
        default="loss",
        metadata={
            "help": "What the second pass takes the gradient of: the loss, or the logits alone, weighted by the "
            "loss's derivative from the first pass (functional; Functional-SAM, arXiv:2502.02407)."
        },
    )
    sam_cache_frozen: bool = field(
        default=True,
        metadata={
            "help": "Reuse in the second pass what frozen layers computed in the first, where that gives the same "
            "bits. Their outputs stay in memory between the two passes."
        },
    )
    sam_rho_schedule: Shape = field(
        default="constant",
        metadata={
            "help": "The radius from sam_start to sam_end: constant, falling to 0 (linear, cosine), or each "
            "parameter group's learning rate as a share of its peak (lr)."
        },
    )

    _launcher_defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Flags before a launched program's name win over the defaults of its classes, but over no value."""
        super().__init_subclass__(**kwargs)
        for name in cls._launcher_defaults.keys() & vars(cls).get("__annotations__", {}).keys() & vars(cls).keys():
            if isinstance(own := vars(cls)[name], Field):
                own.default, own.default_factory = cls._launcher_defaults[name], MISSING
            else:
                setattr(cls, name, cls._launcher_defaults[name])

    def __setattr__(self, name: str, value: Any) -> None:
        """Read the value in the argument's own type.

        Raises:
            ValueError: naming the argument, its value, the range and the remedy.
        """
        cls: Any = type(self)
        reader = _readers(cls).get(name)
        super().__setattr__(name, value if reader is None else reader(name, value))

    def __post_init__(self) -> None:
        self._read_adam_defaults()
        self.check_together()
        if self.optim in ADASAM_NAMES + SGD_NAMES:
            self._post_init_behind()
        else:
            super().__post_init__()  # type: ignore[no-untyped-call]  # Transformers' types lack it

    def _post_init_behind(self) -> None:
        """That of Transformers, which converts `optim` to its own closed enumeration, without a name of this package.

        Meanwhile β2 and ε stay those in force, for DeepSpeed's "auto" reads them here: other objects of the same value
        do not count as defaults and do not follow the other name.
        """
        optim, numbers = self.optim, {name: getattr(self, name) for name in ADASAM_DEFAULTS}
        vars(self).update({name: float(repr(number)) for name, number in numbers.items()})
        self.optim = TrainingArguments.optim
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]  # Transformers' types lack it
        finally:
            vars(self).update(numbers, optim=optim)

    def check_together(self) -> None:
        """Refuse values that are allowed by themselves, but not together.

        Called at construction, and again when training begins, since attributes are set one after the other.

        Raises:
            ValueError: naming the arguments, their values and the remedy.
        """
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
        if self.sam_descent == "functional":
            self._check_functional()
        if self.resolved_direction == "momentum" and self.optim in SGD_NAMES and self.sgd_momentum == 0:
            raise ValueError("sam_direction='momentum' needs one: set sgd_momentum above 0, for example 0.9")
        if self.resolved_direction == "preconditioned" and self.optim in WITHOUT_SECOND_MOMENT:
            raise ValueError(
                f"sam_direction='preconditioned' divides by the root of the optimizer's second moment, and optim="
                f"{str(self.optim)!r} keeps none of the weights' shape; use adasam, adamw_torch or rmsprop, or "
                "sam_direction='gradient'"
            )
        if self.optim in ADASAM_NAMES + SGD_NAMES:
            self._package_optim_args()

    def _check_functional(self) -> None:
        """That every step has a first pass that brings the logits' gradient, of all rows."""
        contradictions = {
            "sam_direction": (self.resolved_direction, DIRECTIONS[self.resolved_direction].first_pass, "gradient"),
            "sam_ascent_fraction": (self.resolved_ascent_fraction, self.resolved_ascent_fraction == 1, 1.0),
            "sam_reuse": (self.sam_reuse, not self.sam_reuse, False),
            "torch_compile": (self.torch_compile, not self.torch_compile, False),
        }
        for name, (value, agrees, remedy) in contradictions.items():
            if not agrees:
                raise ValueError(
                    f"{name}={value!r} contradicts sam_descent='functional', which takes the gradient at the logits of "
                    f"all rows from a first pass in every step; set {name}={remedy!r}, or sam_descent='loss'"
                )

    @property
    def resolved_direction(self) -> DirectionName:
        """The direction of the perturbation: `sam_direction`, or else the preset's."""
        return self.sam_direction or PRESETS[self.sam_preset]["sam_direction"]

    @property
    def resolved_ascent_fraction(self) -> float:
        """The share of the rows that the ascent sees: `sam_ascent_fraction`, or else the preset's."""
        if self.sam_ascent_fraction is not None:
            return self.sam_ascent_fraction
        return preset_ascent_fraction(self.sam_preset, self.resolved_direction)

    @property
    def sam_schedule(self) -> Schedule:
        """When the weights are perturbed, and how far."""
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
        self.optim = name
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.adam_beta1, self.adam_beta2, self.adam_epsilon = beta1, beta2, epsilon
        self.optim_args, self.sam_rho = args, rho
        self.check_together()
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
        """Arguments of the perturbation that are set although, at radius 0, there is none."""
        names = [name for name in PACKAGE_DEFAULTS if name.startswith("sam_") and name != "sam_rho"]
        found = {name: getattr(self, name) for name in names}
        return [f"{name}={value!r}" for name, value in found.items() if value != PACKAGE_DEFAULTS[name]]

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
        _deprecated("stock()", "copy.copy(args)")
        return copy.copy(self)

    @property
    def resolved_betas(self) -> tuple[float, float]:
        """(`adam_beta1`, `adam_beta2`)."""
        _deprecated("resolved_betas", "(args.adam_beta1, args.adam_beta2)")
        return self.adam_beta1, self.adam_beta2

    @property
    def resolved_epsilon(self) -> float:
        """`adam_epsilon`."""
        _deprecated("resolved_epsilon", "args.adam_epsilon")
        return self.adam_epsilon

    def own_optimizer(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
        """`package_optimizer`."""
        _deprecated("own_optimizer()", "package_optimizer()")
        return self.package_optimizer()

    def idle_arguments(self) -> list[str]:
        """`arguments_without_effect`."""
        _deprecated("idle_arguments()", "arguments_without_effect()")
        return self.arguments_without_effect()


def _deprecated(name: str, instead: str) -> None:
    warnings.warn(f"{name} of the arguments will be removed in 0.2; use {instead}", DeprecationWarning, stacklevel=3)


@dataclass(repr=False)
class AdaSAMTrainingArguments(SharpnessAwareArgumentsMixin, TrainingArguments):
    """`transformers.TrainingArguments` with AdaSAM."""


@dataclass(repr=False)
class AdaSAMSeq2SeqTrainingArguments(SharpnessAwareArgumentsMixin, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with AdaSAM."""


PACKAGE_DEFAULTS = {
    f.name: f.default for f in fields(SharpnessAwareArgumentsMixin) if f.name.startswith(("optim", "sgd_", "sam_"))
}

_replaced: list[tuple[Any, str, Any]] = []  # what set_launcher_defaults has: an object, its attribute, the value before


def set_launcher_defaults(values: dict[str, Any]) -> None:
    """Make `values` the defaults of sharpness-aware arguments, instead of those of an earlier call.

    They are what parsers and constructors take, of classes that exist and of those to come, so that whatever is given
    explicitly wins over them, also where it equals the package's own default.
    """
    while _replaced:
        setattr(*_replaced.pop())
    SharpnessAwareArgumentsMixin._launcher_defaults = values
    classes: list[Any] = [SharpnessAwareArgumentsMixin]
    for cls in classes:
        classes += [subclass for subclass in cls.__subclasses__() if subclass not in classes]
        _replace_defaults(cls, values)


def _replace_defaults(cls: Any, values: dict[str, Any]) -> None:
    """In the fields that `cls` itself declares, and in its constructor."""

    def replace(target: Any, name: str, value: Any) -> None:
        _replaced.append((target, name, getattr(target, name)))
        setattr(target, name, value)

    for name in values.keys() & vars(cls).get("__annotations__", {}).keys() & vars(cls).keys():
        replace(cls, name, values[name])
        replace(cls.__dataclass_fields__[name], "default", values[name])
    init = vars(cls).get("__init__")
    if isinstance(init, FunctionType) and init.__defaults__:
        names = init.__code__.co_varnames[: init.__code__.co_argcount][-len(init.__defaults__) :]
        defaults = zip(names, init.__defaults__, strict=True)
        replace(init, "__defaults__", tuple(values.get(name, default) for name, default in defaults))
