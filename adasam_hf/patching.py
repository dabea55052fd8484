"""`Trainer` and `TrainingArguments` of Transformers, replaced by their sharpness-aware forms under the same names."""

import copyreg
import gc
import sys
from abc import ABCMeta
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import transformers
from transformers.utils import logging

from .trainer import AdaSAMSeq2SeqTrainer, AdaSAMTrainer, SharpnessAwareTrainerMixin
from .training_args import AdaSAMSeq2SeqTrainingArguments, AdaSAMTrainingArguments

logger = logging.get_logger(__name__)

# Where scripts and libraries import these classes from; and the script or notebook itself, if it already has.
MODULES = (
    "transformers",
    "transformers.trainer",
    "transformers.trainer_seq2seq",
    "transformers.training_args",
    "transformers.training_args_seq2seq",
    "__main__",
)


if TYPE_CHECKING:
    ProtocolMeta = ABCMeta  # which type checkers know
else:
    ProtocolMeta = type(Protocol)  # an ABCMeta


class StandIn(ProtocolMeta):
    """The metaclass of classes that stand under a stock class's name.

    Whoever asks `isinstance(x, Trainer)` means the Trainer of Transformers. So a stand-in answers as the stock class
    does, and objects and classes made before the patch keep their relations to it. Every other class, those that are
    based on a stand-in included, answers for itself: nothing stock is ever an `AdaSAMTrainer`.

    Python wants the metaclass of a class to be based on those of all its bases. As this one is based on that of
    protocols, which is based on `ABCMeta`, scripts can combine a trainer with abstract classes, protocols and generic
    classes. A metaclass of their own must be based on ``type(Trainer)`` while the patch is in effect.
    """

    def __new__(metacls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any) -> "StandIn":
        # A script may put a mixin of this package in front of a name that has it already.
        behind = {cls for base in bases for cls in base.__mro__[1:]}
        return super().__new__(metacls, name, tuple(base for base in bases if base not in behind), namespace, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:  # nothing based on a stand-in is a protocol
        return ABCMeta.__instancecheck__(cls, instance)

    def __subclasscheck__(cls, subclass: type) -> bool:  # isinstance() comes here, too
        stock = STOCK.get(cls)
        return ABCMeta.__subclasscheck__(cls, subclass) if stock is None else issubclass(subclass, stock)


STOCK: dict[type, type] = {}  # the class of Transformers for each stand-in


class Trainer(AdaSAMTrainer, metaclass=StandIn):
    """`AdaSAMTrainer` under the name of `transformers.Trainer`."""


class Seq2SeqTrainer(AdaSAMSeq2SeqTrainer, Trainer):
    """`AdaSAMSeq2SeqTrainer` under the name of `transformers.Seq2SeqTrainer`."""


class TrainingArguments(AdaSAMTrainingArguments, metaclass=StandIn):
    """`AdaSAMTrainingArguments` under the name of `transformers.TrainingArguments`."""


class Seq2SeqTrainingArguments(AdaSAMSeq2SeqTrainingArguments, TrainingArguments):
    """`AdaSAMSeq2SeqTrainingArguments` under the name of `transformers.Seq2SeqTrainingArguments`."""


for _stand_in in (Trainer, Seq2SeqTrainer, TrainingArguments, Seq2SeqTrainingArguments):
    STOCK[_stand_in] = getattr(transformers, _stand_in.__name__)


class patch:
    """Replace the four classes that scripts import from Transformers, from now on or for a ``with`` block:

        import adasam_hf

        adasam_hf.patch()                       # before libraries with trainers of their own are imported
        from transformers import Trainer, TrainingArguments
        args = TrainingArguments("out", optim="adasam", sam_rho=0.05)

        with adasam_hf.patch():                 # undone at the end of the block
            ...

    The classes under these names are based on `AdaSAMTrainer`, `AdaSAMTrainingArguments` and their Seq2Seq forms, and
    everything that is an instance or a subclass of the class of Transformers is one of the class in its place.

    Undoing puts back every name, also those that the script or notebook has imported meanwhile; of several patches, the
    last one to be undone does. A class that is made while this is in effect, such as ``trl.SFTTrainer`` when ``trl`` is
    imported, is sharpness-aware and stays it. One that was made before stays plain, and a warning names it. What other
    modules of yours have imported by name before stays as it was, too. Radius 0, which is the default of every
    optimizer but adasam and sam, is the stock run.

    Arguments that were pickled meanwhile, such as a checkpoint's ``training_args.bin``, can be loaded wherever this
    package is installed, patched or not; elsewhere pickle says that there is no module named ``adasam_hf``. Where only
    Transformers is to be needed, save ``args.to_dict()``.

    A class of yours that has a metaclass of its own and is based on one of the four needs one that is based on
    ``type(Trainer)`` meanwhile.
    """

    _active: int = 0

    def __init__(self) -> None:
        self._on = True
        patch._active += 1
        _replace({stock: stand_in for stand_in, stock in STOCK.items()})
        for cls in _STOCK_ARGUMENTS.values():  # pickle would look for them under their names
            copyreg.pickle(cls, _reduce)
        if early := sorted(_plain_subclasses()):
            logger.warning(
                f"{', '.join(early)}: made before adasam_hf.patch(), so they stay plain trainers; call it before their "
                "library is imported"
            )

    def undo(self) -> None:
        """Put the classes back, unless another patch is still in effect."""
        patch._active -= self._on
        self._on = False
        if not patch._active:
            _replace(STOCK)
            for cls in _STOCK_ARGUMENTS.values():
                copyreg.dispatch_table.pop(cls, None)

    def __enter__(self) -> "patch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def _replace(others: Mapping[type, type]) -> None:
    """Every class by its other one, in the modules that scripts import them from and in the script itself."""
    modules = [module for name in MODULES if (module := sys.modules.get(name)) is not None]
    # Transformers executes itself a second time while it is imported; who came first holds another module object.
    # (By type(): isinstance asks proxies, which import, warn or fail.)
    alive = (found for found in gc.get_objects() if issubclass(type(found), ModuleType))
    modules += [module for module in alive if vars(module).get("__name__") == "transformers"]
    by_identity = {id(cls): other for cls, other in others.items()}
    for module in modules:
        lazy = module.__name__ == "transformers"
        for name in {cls.__name__ for cls in STOCK} if lazy else set(vars(module)):
            if (other := by_identity.get(id(getattr(module, name, None)))) is not None:
                setattr(module, name, other)


_STOCK_ARGUMENTS: dict[str, Any] = {cls.__name__: STOCK[cls] for cls in (TrainingArguments, Seq2SeqTrainingArguments)}


def _reduce(args: Any) -> tuple[Callable[[str], Any], tuple[str], dict[str, Any]]:
    return _new_stock_arguments, (type(args).__name__,), args.__dict__


def _new_stock_arguments(name: str) -> Any:
    """Empty ones of the stock class, whatever bears its name just now."""
    cls = _STOCK_ARGUMENTS[name]
    return cls.__new__(cls)


def _plain_subclasses() -> set[str]:
    """Trainers of other libraries that are based on the original classes."""
    found: set[str] = set()
    queue: list[Any] = [STOCK[Trainer], STOCK[Seq2SeqTrainer]]
    while queue:
        for cls in queue.pop().__subclasses__():
            if issubclass(cls, SharpnessAwareTrainerMixin):
                continue
            if cls.__module__.partition(".")[0] != "transformers":
                found.add(f"{cls.__module__}.{cls.__qualname__}")
            queue.append(cls)
    return found
