"""What frozen modules compute in the first pass, handed out again in the second one.

These are the layers below the lowest trainable one, and whole models that a loss asks: a teacher, a reference model.

Between the two passes only trainable weights move. A module without any that is given the same inputs, random numbers
and buffers computes the same outputs, so that its second forward pass can be left out, bit for bit. This is a matter of
cost alone: with the lower half of an encoder frozen, a step costs about 1.7 plain steps instead of 2.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map

from . import rng
from .buffers import ModelState

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def frozen_modules(models: Iterable[nn.Module]) -> list[nn.Module]:
    """The outermost modules of `models` that have parameters, none of them trainable, and that can be left out.

    Those with hooks inside, which somebody may count on, are run; likewise those that talk to other processes. Where
    anything is compiled, or checkpoints activations, there are none.
    """
    models = list(models)
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return []
    if all(p.requires_grad for model in models for p in model.parameters()):
        return []
    if any(_runs_otherwise(module) for model in models for module in model.modules()):
        return []
    found: list[nn.Module] = []
    for model in models:
        deeper: list[nn.Module] = []
        found += [model] if _sort(model, deeper).outermost else deeper
    return list(dict.fromkeys(found))


class _Sort(NamedTuple):
    """Which sort of module one is: with parameters; one that can be left out; one that can inside another."""

    has_parameters: bool
    outermost: bool
    inside: bool


def _sort(module: nn.Module, found: list[nn.Module]) -> _Sort:
    """That of `module`. If it is not to be left out as a whole, what is inside it is added to `found`."""
    parameters = [p for p in module._parameters.values() if p is not None]
    quiet = not any(p.requires_grad for p in parameters) and not isinstance(module, nn.SyncBatchNorm)
    has_parameters, inner = bool(parameters), []
    for child in module.children():
        deeper: list[nn.Module] = []
        sort = _sort(child, deeper)
        has_parameters |= sort.has_parameters
        quiet &= sort.inside or (not sort.has_parameters and _unwatched(child))
        inner += [child] if sort.outermost else deeper
    outermost = has_parameters and quiet
    if not outermost:
        found += inner
    return _Sort(has_parameters, outermost, outermost and _unwatched(module))


def _unwatched(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks)


def _runs_otherwise(module: nn.Module) -> bool:
    """Whether its forward pass is compiled or scripted, or is taken again by a backward pass."""
    compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return compiled or isinstance(module, torch.jit.ScriptModule) or getattr(module, "gradient_checkpointing", False)


class _Call(NamedTuple):
    """One forward pass of a module: what it depended on, what came out, and what it left behind."""

    inputs: list[Any]
    structure: TreeSpec
    versions: list[int]
    attributes: list[Any]
    random: rng.RandomState
    outputs: Any
    output_versions: list[int]
    random_afterwards: rng.RandomState
    state_afterwards: ModelState

    def would_be_the_same(self, args: Any, kwargs: Any, modules: Iterable[nn.Module]) -> bool:
        """Whether a call with these arguments, now, would do what this one has done."""
        inputs, structure = tree_flatten((args, kwargs))
        if structure != self.structure or not all(map(_same, self.inputs, self.versions, inputs)):
            return False
        if self.output_versions != [t._version for t in _tensors(self.outputs)]:  # changed by whoever got them
            return False
        if self.attributes != _attributes(modules):
            return False
        drew = not _same_state(self.random, self.random_afterwards)
        return not drew or _same_state(self.random, rng.capture(g for g, _ in self.random.generators))

    def repeat(self) -> Any:
        """The outputs; generators, buffers and tensors kept as attributes are as the call has left them."""
        self.state_afterwards.restore()
        if not _same_state(self.random, self.random_afterwards):
            rng.rewind(self.random_afterwards)
        return tree_map(lambda leaf: leaf, self.outputs)  # containers of their own


class FrozenOutputs:
    """What `modules` (`frozen_modules`) compute in the first pass of one micro-batch.

    An output is kept if neither it nor an input needs a gradient, as below the lowest trainable parameter. It is handed
    out if the call in the second pass has inputs of the same bits, the generators stand where they stood (or the module
    draws nothing), and the numbers that the modules keep as attributes (such as ``training``) are the same. Else the
    module is run. Inputs other than tensors, numbers, strings and containers of them are not compared: it is run, too.

    Memory: the outputs, and inputs that are not outputs of others, from the first pass to the end of the second. A
    frozen transformer layer keeps batch · length · width numbers; one that is trained keeps over ten times as many for
    its backward pass.

    Inputs that are other tensors with the same bits (attention masks that the model makes itself) are compared, for
    which an accelerator must be waited for.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._modules = list(modules)
        self._calls: dict[nn.Module, list[_Call | None]] = {}
        self.reused: set[nn.Module] = set()
        """Modules that have been left out."""

    @property
    def nbytes(self) -> int:
        """Of the outputs that are kept."""
        calls = [call for kept in self._calls.values() for call in kept if call is not None]
        return sum({id(t): t.nbytes for call in calls for t in _tensors(call.outputs)}.values())

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

        def call(module: nn.Module, forward: Callable, args: Any, kwargs: Any) -> Any:
            known = next(coming[module], None)
            if known is None or not known.would_be_the_same(args, kwargs, module.modules()):
                return forward(*args, **kwargs)
            self.reused.add(module)
            return known.repeat()

        with self._instead(call) if self._calls else ExitStack():
            yield

    def _recorded(self, module: nn.Module, forward: Callable, args: Any, kwargs: Any) -> Any:
        inputs, structure = tree_flatten((args, kwargs))
        if torch.compiler.is_compiling() or not all(map(_comparable, inputs)):
            self._calls[module].append(None)
            return forward(*args, **kwargs)
        modules = list(module.modules())
        generators = rng.generators_of(modules)
        versions = [_version(value) for value in inputs]
        attributes, random = _attributes(modules), rng.capture(generators)
        outputs = forward(*args, **kwargs)
        call = None
        if all(map(_comparable, tree_leaves(outputs))):
            afterwards = rng.capture(generators), ModelState(modules)
            now = [t._version for t in _tensors(outputs)]
            call = _Call(inputs, structure, versions, attributes, random, outputs, now, *afterwards)
        self._calls[module].append(call)
        return outputs

    @contextmanager
    def _instead(self, call: Callable[[nn.Module, Callable, Any, Any], Any]) -> Iterator[None]:
        """Inside it, `call` is made in the place of each module's `forward`."""
        with ExitStack() as stack:
            for module in self._modules:
                stack.enter_context(_forward_of(module, call))
            yield


@contextmanager
def _forward_of(module: nn.Module, call: Callable[[nn.Module, Callable, Any, Any], Any]) -> Iterator[None]:
    attributes, forward = vars(module), module.forward
    before = attributes.get("forward")  # libraries wrap it so, too

    def instead(*args: Any, **kwargs: Any) -> Any:
        # (Above the lowest trainable parameter; the quickest of all checks.)
        if any(isinstance(value, Tensor) and value.requires_grad for value in args):
            return forward(*args, **kwargs)
        return call(module, forward, args, kwargs)

    attributes["forward"] = instead
    try:
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before


# ---- what can be compared, and how ----


def _comparable(value: Any) -> bool:
    if type(value) in (Tensor, nn.Parameter):
        return not value.requires_grad and not value.is_inference()
    return isinstance(value, _PLAIN)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


def _same(before: Any, version: int, now: Any) -> bool:
    if type(before) is not type(now) or not isinstance(before, Tensor):
        return type(before) is type(now) and before == now
    if now.requires_grad or before._version != version:
        return False
    return before is now or _same_bits(before, now)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    layouts = [(t.shape, t.dtype, t.device, t.layout, t.is_conj(), t.is_neg()) for t in (a, b)]
    if layouts[0] != layouts[1] or a.layout is not torch.strided or a.stride() != b.stride():
        return False
    bits = _BITS.get(a.element_size())  # 0 and -0 are equal numbers
    return torch.equal(a, b) if bits is None or not a.dim() else torch.equal(a.view(bits), b.view(bits))


def _attributes(modules: Iterable[nn.Module]) -> list[Any]:
    return [value for module in modules for value in vars(module).values() if type(value) in _PLAIN]


def _same_state(a: rng.RandomState, b: rng.RandomState) -> bool:
    ours, theirs = ([s.host, s.device, s.python, s.numpy, *(state for _, state in s.generators)] for s in (a, b))
    return all(map(_equal_states, ours, theirs))


def _equal_states(a: Any, b: Any) -> bool:
    """States of generators: tuples and dictionaries of numbers, strings, arrays and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal_states(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and not all(isinstance(item, int) for item in a):
        return len(a) == len(b) and all(map(_equal_states, a, b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)
