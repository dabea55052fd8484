"""Runs a script or module as `python` would, but with sharpness-aware trainers, in it and in its child processes.

Nothing is imported or set up before the program does it: `adasam_hf.patch` waits for the program's own import of
Transformers' trainers or arguments, so that what it sets at its top (HF_HOME, OMP_NUM_THREADS, …) has its effect.
"""

import atexit
import builtins
import importlib.util
import io
import json
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any

from . import activity
from .command_line import PROGRAM, PROGRAM_VARIABLE, asks_for_radius_zero, fail, split_flags

FLAGS_VARIABLE = "ADASAM_HF_FLAGS"  # the environment variable by which children learn the flags before the program
CHILDREN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "children")


def main(usage: str | None, words: Sequence[str] | None = None, program: str = PROGRAM) -> None:
    """Run the script or module that `words` name.

    Args:
        usage: what ``--help`` prints.
        words: flags, the script or ``-m`` and a module, and its own arguments; those of the command line by default.
        program: the name of the command, with which messages begin.

    Raises:
        SystemExit: with code 2 and one sentence on stderr if the words are wrong; otherwise the program's own.
    """
    words = sys.argv[1:] if words is None else words
    os.environ[PROGRAM_VARIABLE] = program
    if not words or words[0] in ("-h", "--help"):
        print(usage)
        raise SystemExit(0 if words else 2)
    flags, launched = split_flags(words)
    if launched[0] == "-m":
        sys.argv = launched  # ["-m", …] while Python looks for the module, then its path
        if not sys.flags.safe_path:
            sys.path[0] = os.getcwd()  # as for `python -m MODULE`
        launch(flags, launched[1:])
        module, code = _find_module(launched[1])
        sys.argv = [code.co_filename, *launched[2:]]
    else:
        script = launched[0]
        if not os.path.isfile(script):
            fail(f"SCRIPT={script!r} does not exist; give the path of a Python file")
        sys.argv = launched
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(os.path.realpath(script))  # as for `python SCRIPT`
        launch(flags, launched)
        module, code = _main_module(os.path.abspath(script)), None
    _run(module, code)


# ---- the patch, here and in child processes ----


class PatchOnImport(MetaPathFinder):
    """Patches once Transformers' trainers or arguments have been imported by whoever wants them.

    These modules import each other, and other modules of Transformers and of this package import them. So this waits
    until none of either is in the middle of its import in this thread, nor any of these in another one.
    """

    modules = tuple(f"transformers.train{name}" for name in ("er", "er_seq2seq", "ing_args", "ing_args_seq2seq"))

    def __init__(self) -> None:
        self.flags: list[str] = []
        self._importing: defaultdict[int, set[str]] = defaultdict(set)  # by thread

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
            here = self._importing[threading.get_ident()]
            here.add(name)
            try:
                execute(module)
            finally:
                here.discard(name)
            self._patch_if_ready()

        loader.exec_module = exec_module

    def _patch_if_ready(self) -> None:
        busy = self._importing[threading.get_ident()] or any(
            name in names for names in list(self._importing.values()) for name in self.modules
        )
        if self in sys.meta_path and not busy and any(name in sys.modules for name in self.modules):
            sys.meta_path.remove(self)
            from .launcher_flags import patch_with

            patch_with(self.flags)


_hook = PatchOnImport()


def launch(flags: list[str], program: list[str]) -> None:
    """Patch this process and those that it starts, and look at its end whether that was of any use."""
    inherited = os.environ.get(FLAGS_VARIABLE)  # of a launcher that has started this one, which looks for both
    flags = [*json.loads(inherited or "[]"), *flags]
    os.environ[FLAGS_VARIABLE] = json.dumps(flags)
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if CHILDREN not in folders:
        os.environ["PYTHONPATH"] = os.pathsep.join([CHILDREN, *filter(None, folders)])
    if inherited is None:
        activity.collect()
        atexit.register(_report, [*flags, *program])
    _hook.install(flags)


def follow() -> None:
    """Patch a process that a launched program has started."""
    _hook.install(json.loads(os.environ[FLAGS_VARIABLE]))


def _report(words: list[str]) -> None:
    """The last line, if the program has trained plainly although it was launched to do otherwise."""
    if not activity.collecting():  # a fork, or no program has run
        return
    found = activity.totals()
    activity.forget()
    wanted = not found["radius_zero"] and not asks_for_radius_zero(words) and not {"-h", "--help"} & set(words)
    if found["perturbed_steps"] or found["ascents"] or not wanted or os.environ.get("RANK", "0") != "0":
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


# ---- the program ----


def _main_module(path: str, spec: ModuleSpec | None = None) -> ModuleType:
    """The module that the program is executed in, as Python makes it for `python SCRIPT` or `python -m MODULE`."""
    module = ModuleType("__main__")
    loader: Any = SourceFileLoader("__main__", path) if spec is None else spec.loader
    package, cached = (None, None) if spec is None else (spec.parent, spec.cached)
    module.__dict__.update(__package__=package, __loader__=loader, __spec__=spec)
    module.__dict__.update(__annotations__={}, __builtins__=builtins, __file__=path, __cached__=cached)
    return module


def _find_module(name: str) -> tuple[ModuleType, CodeType]:
    """As runpy finds it: of a package its ``__main__``.

    Raises:
        SystemExit: with code 2 if there is none.
    """
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name = f"{name}.__main__"
            spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        fail(f"finding the module {name!r} failed ({type(error).__name__}: {error})")
    loader: Any = None if spec is None else spec.loader
    try:
        code = loader.get_code(spec.name) if spec is not None and hasattr(loader, "get_code") else None
    except SyntaxError as error:
        _show_from(error, str(error.filename))
        raise
    if spec is None or code is None:
        fail(f"there is no module {name!r} to run; see whether `python -m {name}` finds it")
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
    """Have the traceback printed from where the program begins, and none if it has not begun (a syntax error)."""
    begin = error.__traceback__
    while begin is not None and begin.tb_frame.f_code.co_filename != path:
        begin = begin.tb_next
    show = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, _: TracebackType | None) -> None:
        show(kind, value.with_traceback(begin), begin)

    sys.excepthook = hook
