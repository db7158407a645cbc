"""cleanup: drop assertions, dead nodes and unread weights, lint, recompile, check shapes with and without an exit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from vte_compile.errors import CaptureError
from vte_compile.kernels.packed_exit import packed_exit
from vte_compile.kernels.token_exit import token_exit, unpack_dims
from vte_compile.passes.dead_code import remove_dead_nodes
from vte_compile.passes.manager import PassResult, PassSettings

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

# Export records what it assumed; dtypes and devices are fixed per program, and lengths are free.
_ASSERTIONS = (
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
)
_MARKERS = (token_exit._opoverload, packed_exit._opoverload)
_VISUAL = 4  # how many tokens leave in the shape check


def cleanup(graph: DecoderGraph, settings: PassSettings) -> PassResult:
    """Remove what does nothing; ``applied`` counts the nodes removed.

    Raises:
        CaptureError: The graph does not fit together: a pass before left a use of the old sequence length.
    """
    before = len(graph.graph.nodes)
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in _ASSERTIONS:
            graph.graph.erase_node(node)
    remove_dead_nodes(graph.graph)
    alive = set(graph.graph.nodes)
    graph.layer_of = {node: layer for node, layer in graph.layer_of.items() if node in alive}
    used = {n.target for n in alive if n.op == "get_attr"}
    graph.parameters = {target: read for target, read in graph.parameters.items() if target in used}
    # A graph module made of another takes only what its graph refers to.
    graph.module = fx.GraphModule(graph.module, graph.graph)
    graph.graph.lint()
    graph.module.recompile()
    exits = [n for n in graph.graph.nodes if n.target in _MARKERS]
    shapes = _KnownShapes()
    for firing in (None, *dict.fromkeys([*exits[:1], *exits[-1:]])):
        _check_shapes(graph, firing, shapes)
    return PassResult("cleanup", applied=before - len(alive))


class _KnownShapes:
    """What operations gave for inputs of some shapes: layers are alike, and fake tensors take their time."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self._results: dict[Any, Any] = {}

    def result(self, key: Any, compute: Callable[[], Any]) -> Any:
        """That of an earlier call with this key, or what `compute` gives."""
        if key not in self._results:
            self._results[key] = compute()
        return self._results[key]


def _described(value: Any) -> Any:
    """An argument as far as shapes depend on it, to be compared."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, value.device)
    return (type(value), value)  # True is not 1 here


def _check_shapes(graph: DecoderGraph, firing: fx.Node | None, shapes: _KnownShapes) -> None:
    case = "without an exit" if firing is None else f"with {firing.name}"
    with torch.no_grad(), shapes.mode:
        inputs = [
            torch.empty([_hint(s) for s in n.meta["val"].shape], dtype=n.meta["val"].dtype, device=n.meta["val"].device)
            for n in graph.graph.nodes
            if n.op == "placeholder"
        ]
        try:
            _ShapeInterpreter(graph, shapes, firing).run(*inputs)
        except Exception as error:
            raise CaptureError(f"shapes do not fit {case}: {error}") from error


def _hint(size: int | torch.SymInt) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


class _ShapeInterpreter(fx.Interpreter):
    """Runs the graph on fake tensors; one chosen exit fires."""

    def __init__(self, graph: DecoderGraph, shapes: _KnownShapes, firing: fx.Node | None) -> None:
        super().__init__(graph.module)
        self.parameters, self.shapes, self.firing = graph.parameters, shapes, firing

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            weight = self.parameters[str(n.target)]()
            return self.shapes.result(_described(weight), lambda: self.shapes.mode.from_tensor(weight))
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target in _MARKERS:
            *_, values, counts, dims = args
            return self._exit(values, unpack_dims(counts, dims), n is self.firing)
        key = (n.target, fx.node.map_aggregate((args, kwargs), _described))
        return self.shapes.result(key, lambda: self.call_function(n.target, args, kwargs))

    @staticmethod
    def _exit(values: Sequence[Tensor], dims: Sequence[Sequence[int]], fires: bool) -> list[Tensor]:
        shortened = []
        for value, value_dims in zip(values, dims, strict=True):
            for dim in value_dims if fires else ():
                value = value.narrow(dim, 0, value.shape[dim] - _VISUAL)
            shortened.append(value)
        return shortened
