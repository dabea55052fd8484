"""What frozen modules compute in the first pass, handed out again in the second one.

These are the layers below the lowest trainable one, and whole models that a loss asks: a teacher, a reference model.
Between the two passes only trainable weights move. A module without any that is given the same inputs, random numbers
and buffers computes the same outputs, so that its second forward pass can be left out, bit for bit. This is a matter of
cost alone: with the lower half of an encoder frozen, a step costs 1.7 plain steps instead of 2.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from . import rng
from .buffers import PLAIN, ModelState, same_bits

_COMPARABLE = (*PLAIN, bytes, torch.dtype, torch.device)

# ---- which modules ----


def frozen_modules(models: Iterable[nn.Module]) -> list[nn.Module]:
    """The outermost modules of `models` that have parameters, none of them trainable, and that can be left out.

    Those with hooks inside, which somebody may count on, are run; likewise those that talk to other processes, or share
    memory with trainable parameters. Where anything is compiled, or checkpoints activations, there are none.
    """
    models = list(models)
    parameters = {p for model in models for p in model.parameters()}
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return []
    if all(p.requires_grad for p in parameters):
        return []
    if any(_runs_otherwise(module) for model in models for module in model.modules()):
        return []
    moving = {p.untyped_storage().data_ptr() for p in parameters if p.requires_grad and type(p.data) is Tensor}
    found: list[nn.Module] = []
    for model in models:
        deeper: list[nn.Module] = []
        found += [model] if _classify(model, moving, deeper).outermost else deeper
    return list(dict.fromkeys(found))


class _Kind(NamedTuple):
    """Of a module: whether it has parameters; whether it can be left out; whether it can inside another one."""

    has_parameters: bool
    outermost: bool
    inside: bool


def _classify(module: nn.Module, moving: set[int], found: list[nn.Module]) -> _Kind:
    """The kind of `module`. If it is not to be left out as a whole, what is inside it is added to `found`."""
    own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    quiet = not isinstance(module, nn.SyncBatchNorm) and not any(t.requires_grad or _lies_in(t, moving) for t in own)
    has_parameters, inner = any(p is not None for p in module._parameters.values()), []
    for child in module.children():
        deeper: list[nn.Module] = []
        kind = _classify(child, moving, deeper)
        has_parameters |= kind.has_parameters
        quiet &= kind.inside
        inner += [child] if kind.outermost else deeper
    if not (outermost := has_parameters and quiet):
        found += inner
    return _Kind(has_parameters, outermost, quiet and not (module._forward_hooks or module._forward_pre_hooks))


def _lies_in(tensor: Tensor, memory: set[int]) -> bool:
    return type(tensor.data) is Tensor and tensor.untyped_storage().data_ptr() in memory


def _runs_otherwise(module: nn.Module) -> bool:
    """Whether its forward pass is compiled or scripted, or is taken again by a backward pass."""
    compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return compiled or isinstance(module, torch.jit.ScriptModule) or getattr(module, "gradient_checkpointing", False)


# ---- one forward pass ----


class _Tree(NamedTuple):
    """The leaves of containers, apart from the containers, which others may change; tensors with their versions."""

    leaves: list[Any]
    structure: TreeSpec
    versions: list[int]

    @classmethod
    def of(cls, *things: Any) -> "_Tree | None":
        """None if there is a leaf that cannot be compared."""
        leaves, structure = tree_flatten(things)
        if not all(map(_comparable, leaves)):
            return None
        return cls(leaves, structure, [leaf._version if isinstance(leaf, Tensor) else 0 for leaf in leaves])

    def is_unchanged(self) -> bool:
        """Whether nobody has written to its tensors, or made them need a gradient."""
        return all(map(_is_unchanged, self.leaves, self.versions))

    def equals(self, other: "_Tree | None") -> bool:
        """Whether `other` has the same structure, and leaves of the same bits."""
        if other is None or self.structure != other.structure:
            return False
        return all(map(_same, self.leaves, self.versions, other.leaves))


class _Call(NamedTuple):
    """One forward pass of a module: what it depended on, what came out, and what it left behind."""

    inputs: _Tree
    parameters: list[tuple[Any, ...]]
    state: ModelState
    random: rng.RandomState
    outputs: _Tree
    state_afterwards: ModelState | None
    random_afterwards: rng.RandomState

    def would_be_the_same(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        """Whether a call with these arguments, now, would do what this one has done, as far as can be seen."""
        return (
            self.inputs.equals(_Tree.of(args, kwargs))
            and self.outputs.is_unchanged()
            and self.parameters == _parameters(module)
            and self.state.is_present()
            and rng.same(self.random, rng.capture(generator for generator, _ in self.random.generators))
        )

    def repeat(self) -> Any:
        """The outputs; generators, buffers and attributes are as the call has left them."""
        if self.state_afterwards is not None:
            self.state_afterwards.restore(compare=True)
        if not rng.same(self.random, self.random_afterwards):
            rng.rewind(self.random_afterwards)
        (outputs,) = tree_unflatten(self.outputs.leaves, self.outputs.structure)
        return outputs


def _parameters(module: nn.Module) -> list[tuple[Any, ...]]:
    """Which they are, and how often they have been written to."""
    own = [p for m in module.modules() for p in m._parameters.values() if p is not None]
    return [(id(p), p.data_ptr(), 0 if p.is_inference() else p._version, p.requires_grad) for p in own]


def _comparable(value: Any) -> bool:
    if type(value) in (Tensor, nn.Parameter):
        return not value.requires_grad and not value.is_inference()
    return isinstance(value, _COMPARABLE)


def _is_unchanged(value: Any, version: int) -> bool:
    return not isinstance(value, Tensor) or (value._version == version and not value.requires_grad)


def _same(before: Any, version: int, now: Any) -> bool:
    if type(before) is not type(now) or not isinstance(before, Tensor):
        return type(before) is type(now) and before == now
    return _is_unchanged(before, version) and (before is now or same_bits(before, now))


# ---- both passes ----


class Trust:
    """Of which modules it has been seen that a second forward pass gives the same bits.

    Not all that an output may depend on can be looked at: lists, objects and globals. So in the first step in which a
    module could be left out it is run all the same, and left out from the next one on if its outputs were the same.
    Now and then, after 16, 32, 64, … steps, it is run once more to see.
    """

    def __init__(self) -> None:
        self._proved: WeakSet[nn.Module] = WeakSet()
        self._refuted: WeakSet[nn.Module] = WeakSet()
        self._seen: WeakSet[nn.Module] = WeakSet()  # in the present step
        self._steps = 0

    def has(self, module: nn.Module) -> bool:
        """Whether `module` can be left out."""
        looks_again = self._steps >= 16 and self._steps & (self._steps - 1) == 0
        return module in self._proved and module not in self._refuted and not looks_again

    def note(self, module: nn.Module, same: bool) -> None:
        """It has been run twice, with the same outputs or others."""
        (self._seen if same else self._refuted).add(module)

    def end_step(self) -> None:
        """What has been seen in this step holds from the next one on."""
        self._steps += 1
        for module in self._seen:
            self._proved.add(module)
        self._seen = WeakSet()


class FrozenOutputs:
    """What `modules` (`frozen_modules`) compute in the first pass of one micro-batch.

    An output is kept if neither it nor an input needs a gradient, as below the lowest trainable parameter. It is handed
    out if the call in the second pass has inputs, parameters, buffers, generators and plain attributes of the same
    bits, and `trust` has the module. Else the module is run; also where an input is something else than tensors,
    numbers, strings and containers of them, and where it changes a container that it is given.

    Without gradients (`torch.no_grad`) only `whole` models are left out: those of which nothing is trainable.
    `generators` are all that modules hold (`rng.generators_of`).

    Memory: the outputs, and inputs that are not outputs of others, from the first pass to the end of the second. A
    frozen transformer layer keeps batch · length · width numbers; one that is trained keeps over ten times as many for
    its backward pass.

    Inputs that are other tensors with the same bits (attention masks that the model makes itself) are compared, as are
    buffers, for which an accelerator must be waited for.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module] = (),
        trust: Trust | None = None,
        whole: Iterable[nn.Module] = (),
        generators: Iterable[rng.Generator] = (),
    ) -> None:
        self._modules = list(modules)
        self._generators = list(generators)
        self._trust = trust or Trust()
        self._whole = set(whole)
        self._calls: dict[nn.Module, list[_Call | None]] = {}
        self.reused: set[nn.Module] = set()
        """Modules that have been left out."""

    @property
    def nbytes(self) -> int:
        """Of the outputs that are kept."""
        calls = [call for kept in self._calls.values() for call in kept if call is not None]
        tensors = [leaf for call in calls for leaf in call.outputs.leaves if isinstance(leaf, Tensor)]
        return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())

    @contextmanager
    def record(self) -> Iterator[None]:
        """Around the first pass."""
        self._calls = {module: [] for module in self._modules}
        with self._instead(self._recorded):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Around the second pass."""
        coming = {module: iter(calls) for module, calls in self._calls.items()}

        def call(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            known = next(coming[module], None)
            if known is None or not known.would_be_the_same(module, args, kwargs):
                return forward(*args, **kwargs)
            if self._trust.has(module):
                self.reused.add(module)
                return known.repeat()
            outputs = forward(*args, **kwargs)
            self._trust.note(module, known.outputs.equals(_Tree.of(outputs)))
            return outputs

        with self._instead(call) if self._calls else ExitStack():
            yield

    def _recorded(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inputs = None
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or module in self._whole):
            inputs = _Tree.of(args, kwargs)
        if inputs is None:
            self._calls[module].append(None)
            return forward(*args, **kwargs)
        modules = list(module.modules())
        state, random, parameters = ModelState(modules), rng.capture(self._generators), _parameters(module)
        result = forward(*args, **kwargs)
        outputs, call = _Tree.of(result), None
        untouched = _is_as_it_was(inputs, _Tree.of(args, kwargs))
        if outputs is not None and untouched:
            afterwards = None if state.is_present() else ModelState(modules, like=state)
            call = _Call(inputs, parameters, state, random, outputs, afterwards, rng.capture(self._generators))
        self._calls[module].append(call)
        return result

    @contextmanager
    def _instead(self, call: Callable[[nn.Module, Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
        """Inside it, `call` is made in the place of each module's `forward`."""
        with ExitStack() as stack:
            for module in self._modules:
                stack.enter_context(_forward_of(module, call))
            yield


def _is_as_it_was(before: _Tree, now: _Tree | None) -> bool:
    """Whether a call has left the containers among its arguments alone, and the tensors in them."""
    if now is None or now.structure != before.structure or now.versions != before.versions:
        return False
    return all(a is b for a, b in zip(before.leaves, now.leaves, strict=True))


class _Instead:
    """Stands for a module's `forward`; in a copy of the module, for the copy's own."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Callable[..., Any], Any, Any], Any]) -> None:
        self._module, self._forward, self._call = module, module.forward, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # (Above the lowest trainable parameter; the quickest of all checks.)
        if any(isinstance(value, Tensor) and value.requires_grad for value in args):
            return self._forward(*args, **kwargs)
        return self._call(self._module, self._forward, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return MethodType(type(self._module).forward, memo[id(self._module)])


@contextmanager
def _forward_of(module: nn.Module, call: Callable[[nn.Module, Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
    attributes = vars(module)
    before = attributes.get("forward")  # libraries wrap it so, too
    attributes["forward"] = _Instead(module, call)
    try:
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before
