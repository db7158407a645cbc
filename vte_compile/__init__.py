"""vte_compile: let visual tokens leave an MLLM's decoder at a learned layer.

Public names are imported on first use, so that ``import vte_compile`` stays cheap.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from vte_compile.version import __version__

if TYPE_CHECKING:
    from vte_compile.dynamo.explain import explain
    from vte_compile.export import export, load_engine
    from vte_compile.optimizer import optimize
    from vte_compile.oracle import Oracle
    from vte_compile.plan import CoAttention, GateExit, KeptAdapter, Plan, SkippedAttention, StaticExit
    from vte_compile.tuning.calibrate import calibrate
    from vte_compile.tuning.search import search_skips

__all__ = [
    "CoAttention",
    "GateExit",
    "KeptAdapter",
    "Oracle",
    "Plan",
    "SkippedAttention",
    "StaticExit",
    "__version__",
    "calibrate",
    "explain",
    "export",
    "load_engine",
    "optimize",
    "search_skips",
]

_HOME = {
    "CoAttention": "vte_compile.plan",
    "GateExit": "vte_compile.plan",
    "KeptAdapter": "vte_compile.plan",
    "Oracle": "vte_compile.oracle",
    "Plan": "vte_compile.plan",
    "SkippedAttention": "vte_compile.plan",
    "StaticExit": "vte_compile.plan",
    "calibrate": "vte_compile.tuning.calibrate",
    "explain": "vte_compile.dynamo.explain",
    "load_engine": "vte_compile.export",
    "optimize": "vte_compile.optimizer",
    "search_skips": "vte_compile.tuning.search",
}

# passes/, kernels/ and export/ are subpackages: an installed copy has them inside this folder, a source checkout
# has them beside it. In a checkout found through sys.path (pytest from its root), look for subpackages there too.
_here = Path(__file__).resolve().parent
if not (_here / "passes").is_dir():
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> object:
    if name == "export":  # a package that can be called: importing it already makes it an attribute of this one
        return import_module("vte_compile.export")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access skips this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
