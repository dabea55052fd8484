"""What Python imports by itself when it starts, in the processes that a program under `python -m adasam_hf` starts."""

# Other Pythons, also older ones, may find this file: nothing here may be too new for them.
import importlib
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [_folder for _folder in sys.path if os.path.abspath(_folder) != _here]

if "ADASAM_HF_FLAGS" in os.environ and sys.version_info >= (3, 11):
    from importlib.util import module_from_spec, spec_from_file_location

    # By its place: the program may have been run from a clone, which its children cannot import by name.
    _package = os.path.dirname(_here)
    _spec = spec_from_file_location(
        "adasam_hf", os.path.join(_package, "__init__.py"), submodule_search_locations=[_package]
    )
    if _spec is not None and _spec.loader is not None:
        sys.modules["adasam_hf"] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["adasam_hf"])

        from adasam_hf.launcher import follow

        follow()

# The one that stands behind this one, if there is one.
_this = sys.modules.pop("sitecustomize", None)
try:
    importlib.import_module("sitecustomize")
except ImportError as _error:
    if getattr(_error, "name", None) != "sitecustomize":
        raise
    if _this is not None:
        sys.modules["sitecustomize"] = _this
