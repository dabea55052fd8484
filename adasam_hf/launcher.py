"""Runs a script or module as `python` would, but with sharpness-aware trainers, in it and in its child processes.

Nothing is imported or set up before the program does it: `adasam_hf.patch` waits for the program's own import of
Transformers' trainers or arguments, so that what it sets at its top (HF_HOME, OMP_NUM_THREADS, …) has its effect.
"""

import atexit
import importlib.util
import io
import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any, NoReturn

from . import activity

FLAGS = "ADASAM_HF_FLAGS"  # the environment variable by which children learn the flags before the program's name
CHILDREN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "children")
SWITCHES = ("sam_adaptive", "sam_reuse", "sam_sync", "no_sam_sync")  # flags that can do without a value
BOOLEANS = ("true", "false", "yes", "no", "t", "f", "y", "n", "1", "0")


def main(usage: str | None) -> None:
    """Run the program that the command line names."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage)
        raise SystemExit(0 if words else 2)
    flags, program = split_flags(words)
    if program[0] == "-m":
        sys.argv = program  # ["-m", …] while Python looks for the module, then its path
        launch(flags, program[1:])
        try:
            module, code = _find_module(program[1])
        except SystemExit:
            atexit.unregister(_report)  # there was no program
            raise
        sys.argv = [code.co_filename, *program[2:]]
    else:
        script = program[0]
        if not os.path.isfile(script):
            raise SystemExit(f"adasam_hf: SCRIPT={script!r} is no file; give the path of a Python file")
        sys.argv = program
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(os.path.realpath(script))  # as for `python SCRIPT`
        launch(flags, program)
        module, code = _main_module(os.path.abspath(script)), None
    _run(module, code)


# ---- the command line ----


def split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of ours before the program's name, and the program with its own arguments.

    Only what does not need Transformers is checked here; `launcher_flags` reads the values.
    """
    end = 0
    while end < len(words) and words[end].startswith("--"):
        flag, has_value, _ = words[end].partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if name not in ("optim", "sgd_momentum") and not name.removeprefix("no_").startswith("sam_"):
            fail(f"before the script's name there can be --optim, --sgd_momentum and --sam_…, not {name}")
        end += 1
        following = words[end] if end < len(words) else "--"
        if has_value:
            continue
        if name in SWITCHES:
            end += following.lower() in BOOLEANS
        elif following.startswith("--"):
            fail(f"{flag} needs a value; try {flag}={'adasam' if name == 'optim' else 'VALUE'}")
        else:
            end += 1
    flags, program = list(words[:end]), list(words[end:])
    if not program or program == ["-m"]:
        fail(f"there is no {'module' if program else 'script'} after {words[-1]}; give one to run")
    return flags, program


def fail(message: str) -> NoReturn:
    """End with one line and the exit code of a wrong command line."""
    atexit.unregister(_report)
    print(f"python -m adasam_hf: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- the patch, here and in child processes ----


class PatchOnImport(MetaPathFinder):
    """Patches once Transformers' trainers or arguments have been imported by whoever wants them.

    These modules import each other, and other modules of Transformers and of this package import them. So this waits
    until none of either is in the middle of its import.
    """

    modules = tuple(f"transformers.train{name}" for name in ("er", "er_seq2seq", "ing_args", "ing_args_seq2seq"))

    def __init__(self) -> None:
        self.flags: list[str] = []
        self._importing: set[str] = set()

    def install(self, flags: list[str]) -> None:
        """Watch imports in this process; twice does no more than once, and the later flags hold."""
        self.flags = flags
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        self._patch_if_ready()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What the other finders find, with a note of when it has been executed."""
        if name.partition(".")[0] not in ("transformers", __package__):
            return None
        others = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader, name)
        return spec

    def _watch(self, loader: Any, name: str) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # it is the loader's own again
            self._importing.add(name)
            try:
                execute(module)
            finally:
                self._importing.discard(name)
            self._patch_if_ready()

        loader.exec_module = exec_module

    def _patch_if_ready(self) -> None:
        if self in sys.meta_path and not self._importing and any(name in sys.modules for name in self.modules):
            sys.meta_path.remove(self)
            from .launcher_flags import patch_with

            patch_with(self.flags)


_hook = PatchOnImport()


def launch(flags: list[str], program: list[str]) -> None:
    """Patch this process and those that it starts, and look at its end whether that was of any use."""
    inherited = os.environ.get(FLAGS)  # of a launcher that has started this one, which looks for both
    flags = [*json.loads(inherited or "[]"), *flags]
    os.environ[FLAGS] = json.dumps(flags)
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if CHILDREN not in folders:
        os.environ["PYTHONPATH"] = os.pathsep.join([CHILDREN, *filter(None, folders)])
    if inherited is None:
        activity.collect()
        atexit.register(_report, [*flags, *program], os.getpid())
    _hook.install(flags)


def follow() -> None:
    """Patch a process that a launched program has started."""
    _hook.install(json.loads(os.environ[FLAGS]))


def _report(words: list[str], process: int) -> None:
    """The last line, if the program has trained plainly although it was launched to do otherwise."""
    if os.getpid() != process:  # a fork
        return
    found = activity.totals()
    activity.forget()
    wanted = not found["radius_zero"] and not asks_for_radius_zero(words) and not {"-h", "--help"} & set(words)
    if found["perturbed_steps"] or not wanted or os.environ.get("RANK", "0") != "0":
        return
    if found["trainings"]:
        why = (
            "every Trainer had radius 0, or none of its steps could be perturbed; give --optim adasam or "
            "--sam_rho 0.05 before the script's name, and see the warnings above"
        )
    else:
        why = (
            "no Trainer of Transformers has trained; the program ended before, has a loop of its own, or trains in a "
            "process that does not inherit its environment or was started by python -E, -I or -S"
        )
    print(f"adasam_hf: Warning: no training step was sharpness-aware: {why}.", file=sys.stderr, flush=True)


def asks_for_radius_zero(words: Sequence[str]) -> bool:
    """Whether a command line says so, wherever in it."""
    values: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, has_value, value = word.partition("=")
        values[name.replace("-", "_")] = value if has_value else following
    try:
        return values.get("__optim") in ("amsgrad", "sgdm") or float(values["__sam_rho"]) == 0
    except (KeyError, ValueError):
        return False


# ---- the program ----


def _main_module(path: str, spec: ModuleSpec | None = None) -> ModuleType:
    """The module that the program is executed in, as Python makes it for `python SCRIPT` or `python -m MODULE`."""
    module = ModuleType("__main__")
    loader: Any = SourceFileLoader("__main__", path) if spec is None else spec.loader
    package, cached = (None, None) if spec is None else (spec.parent, spec.cached)
    module.__dict__.update(__file__=path, __loader__=loader, __package__=package, __spec__=spec, __cached__=cached)
    return module


def _find_module(name: str) -> tuple[ModuleType, CodeType]:
    """As runpy finds it: of a package its ``__main__``.

    Raises:
        SystemExit: if there is none, with the exit code of `python -m`.
    """
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name = f"{name}.__main__"
            spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise SystemExit(f"adasam_hf: finding the module {name!r} failed ({type(error).__name__}: {error})") from error
    loader: Any = None if spec is None else spec.loader
    code = loader.get_code(spec.name) if spec is not None and hasattr(loader, "get_code") else None
    if spec is None or code is None:
        raise SystemExit(f"adasam_hf: there is no module {name!r} to run; see whether `python -m {name}` finds it")
    return _main_module(spec.origin or code.co_filename, spec), code


def _run(module: ModuleType, code: CodeType | None) -> None:
    # Threads and processes that outlive the program look for its names there.
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    path = module.__dict__["__file__"]
    try:
        if code is None:
            with io.open_code(path) as file:
                code = compile(file.read(), path, "exec")
        exec(code, module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:  # Ctrl-C, too
        _show_from(error, path)
        raise


def _show_from(error: BaseException, path: str) -> None:
    """Have the traceback printed from where the program begins; all of it, if it does not (a syntax error)."""
    found = error.__traceback__
    while found is not None and found.tb_frame.f_code.co_filename != path:
        found = found.tb_next
    show, begin = sys.excepthook, found or error.__traceback__

    def hook(kind: type[BaseException], value: BaseException, _: TracebackType | None) -> None:
        show(kind, value.with_traceback(begin), begin)

    sys.excepthook = hook
