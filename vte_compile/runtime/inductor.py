"""Compile pieces with Inductor, each distinct one once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx
from torch._inductor.cpp_builder import get_cpp_compiler
from torch.compiler._cache import CacheArtifactManager
from torch.utils._triton import has_triton

from vte_compile.errors import CaptureError

if TYPE_CHECKING:
    from vte_compile.passes.lower_piecewise import AttendPoint, ExitPoint, Piece, PiecewiseGraph

logger = logging.getLogger(__name__)
Function = Callable[..., Sequence[Tensor]]


def find_backend(device: torch.device, wanted: bool | None) -> bool:
    """Whether to compile for a device.

    Args:
        device: Where the model is.
        wanted: True: yes, False: no, None: if Inductor's own compiler (C++, or Triton on a GPU) is there.

    Raises:
        CaptureError: ``wanted`` is True and the compiler is missing.
    """
    if wanted is False:
        return False
    missing = missing_compiler(device)
    if missing and wanted:
        raise CaptureError(f"compile=True, but {missing}")
    if missing:
        logger.warning("the graphs run uncompiled, because %s", missing)
    return not missing


def missing_compiler(device: torch.device) -> str | None:
    """Why Inductor cannot compile for a device; None if it can."""
    if device.type != "cpu":
        return None if has_triton() else f"Triton, which Inductor needs on {device}, is not installed."
    try:
        get_cpp_compiler()
    except Exception as error:
        return f"Inductor finds no C++ compiler ({error}): install g++ or clang++."
    return None


class PieceCompiler:
    """Compiles pieces on demand and keeps them by structure.

    Compiled functions carry no guards: the graphs are symbolic in every length, and nothing else may vary (see
    ``compile``), so nothing ever recompiles.
    """

    packs = True
    """Rows of a batch can be compiled as one sequence."""

    def __init__(self) -> None:
        self._functions: dict[str, Function] = {}

    def steps(self, lowered: PiecewiseGraph) -> list[Piece | ExitPoint | AttendPoint]:
        """What is compiled: the pieces as they are."""
        return lowered.steps

    def compile_piece(self, piece: Piece, lowered: PiecewiseGraph) -> Function:
        """See :meth:`compile`."""
        return self.compile(piece.module, piece.key, piece.examples)

    def __getstate__(self) -> dict[str, Any]:
        return {"_functions": {}}  # compiled functions can be neither copied nor pickled: copies compile anew

    @property
    def compilations(self) -> int:
        """How many distinct pieces were compiled so far."""
        return len(self._functions)

    def compile(self, module: fx.GraphModule, key: str, examples: Sequence[Tensor]) -> Function:
        """Compile a graph for inputs like ``examples`` (fake tensors with symbolic sizes), or return it ready made.

        Raises:
            CaptureError: Inductor failed, or specialized the graph to the example lengths.
        """
        if key not in self._functions:
            environment = _shape_environment(examples)
            before = len(environment.guards) if environment is not None else 0
            with torch.no_grad():
                function = compile_standalone(module, examples, "from_graph")
            if environment is not None and (added := environment.guards[before:]):
                raise CaptureError(f"Inductor specialized a piece to {', '.join(str(g.expr) for g in added)}.")
            logger.debug("compiled piece %d", len(self._functions))
            self._functions[key] = function
        return self._functions[key]


def compile_standalone(
    module: fx.GraphModule, examples: Sequence[Any], dynamic_shapes: Literal["from_graph", "from_tracing_context"]
) -> Function:
    """Compile a graph with Inductor, without guards, such that torch.compiler.save_cache_artifacts() has it, too.

    Args:
        module: The graph.
        examples: Its inputs: fake tensors and symbolic sizes.
        dynamic_shapes: Where the symbols come from: torch.export, or the Dynamo that is tracing.
    """
    with _quiet_artifacts():
        compiled: Any = torch._inductor.standalone_compile(module, list(examples), dynamic_shapes=dynamic_shapes)
    if compiled._artifacts is not None:
        _hand_on(compiled._artifacts[0])
    return compiled


def _hand_on(serialized: bytes) -> None:
    """Add what one standalone_compile() gathered, apart from everything else, to what the process has to save."""
    manager = CacheArtifactManager
    for artifact in chain(*(manager.deserialize(serialized) or {}).values()):
        if artifact not in manager._seen_artifacts:
            manager._seen_artifacts.add(artifact)
            manager._new_cache_artifacts[artifact.type()].append(artifact)


def _shape_environment(examples: Sequence[Tensor]) -> Any:
    return next((e.fake_mode.shape_env for e in examples if hasattr(e, "fake_mode")), None)


@contextlib.contextmanager
def _quiet_artifacts() -> Iterator[None]:
    """standalone_compile warns when a compilation left nothing to save, as if somebody wanted to."""
    log = logging.getLogger("torch._inductor.standalone_compile")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
