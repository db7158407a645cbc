"""lower_piecewise: cut a rewritten graph at its layers and exits into pieces to compile, with host decisions between.

A piece is one layer (or what comes before or behind the layers). Its weights are inputs, so that equal layers are one
piece and compile once. Lengths are read from the piece's own inputs, so one piece serves before and behind an exit.

In decode, and where attentions are fused, the graph is also cut at attentions, which run between pieces: they write
into the cache, and no piece depends on its length. There, a piece is what stands between the attentions of two layers;
one whose attention is skipped stays a piece of its own, so that the number of distinct pieces does not depend on which
are skipped.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import sympy
import torch
from torch import Tensor, fx

from vte_compile.errors import CaptureError
from vte_compile.kernels.append_attention import append_attention
from vte_compile.kernels.exit_gate import exit_gate, static_exit
from vte_compile.kernels.fused_attention import rotary_append_attention, rotary_packed_attention
from vte_compile.kernels.packed_exit import packed_exit, packed_gate, packed_static_exit
from vte_compile.kernels.token_exit import token_exit, unpack_dims

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph
    from vte_compile.runtime.prompt_value import PromptValue

Parameter = Callable[[], Tensor]
AttendKind = Literal["append", "rotary_append", "rotary_packed"]
"""Of attentions that run between pieces, as the ops are called that they do the work of."""
_GATES = (exit_gate._opoverload, packed_gate._opoverload)
_MARKERS = (token_exit._opoverload, packed_exit._opoverload)
_ATTENDING: dict[Any, AttendKind] = {
    append_attention._opoverload: "append",
    rotary_append_attention._opoverload: "rotary_append",
    rotary_packed_attention._opoverload: "rotary_packed",
}
_EXIT_OPS = (*_GATES, *_MARKERS, static_exit._opoverload, packed_static_exit._opoverload)


@dataclass
class Piece:
    """A subgraph without state: values and weights in, values out. Values are named as in the whole graph."""

    module: fx.GraphModule
    key: str
    """Equal for pieces that do the same to values of the same (symbolic) shapes."""
    inputs: list[str]
    parameters: list[Parameter]
    outputs: list[str]
    examples: list[Tensor]
    """Fake tensors with symbolic shapes, for all inputs and then all parameters."""
    weights: list[str]
    """Names of the parameters (see ``DecoderGraph.parameters``)."""
    layer: int
    """Its first node's: -1 before the layers, 0 .. L-1, L behind them."""


@dataclass
class ExitPoint:
    """A place where the host decides whether the visual tokens leave."""

    layer: int
    stream: str
    gate: tuple[Parameter, Parameter, float] | None
    """How to read w1 and w2, and the threshold; None for a static exit."""
    inputs: list[str]
    dims: list[list[int]]
    """Which dims of each input are as long as the sequence; none: it says where packed rows end."""
    outputs: list[str]


@dataclass
class AttendPoint:
    """The attention of one layer, which writes into the cache in place."""

    kind: AttendKind
    inputs: list[str]
    """As the op takes them; without starts where it has none."""
    outputs: list[str]
    """The attention's output, keys and values."""
    scale: float | None
    """Of the scores; None for 1 / sqrt(head size)."""
    window: int
    """How many columns the token sees, the last ones; 0: all."""
    softcap: float
    """Scores s become ``softcap * tanh(s / softcap)``; 0: as they are."""


@dataclass
class PiecewiseGraph:
    """The steps of one phase, in order."""

    inputs: list[str]
    input_examples: list[Tensor]
    """Fake tensors with symbolic shapes."""
    steps: list[Piece | ExitPoint | AttendPoint]
    outputs: list[str]
    """logits, then key and value of each layer that has them, then what adapters know of the prompt (in prefill)."""
    logits_example: Tensor
    """A fake tensor."""
    kv: list[int | None]
    """For each layer, where its key and value are among the pairs of ``outputs``; None where attention is skipped."""
    prompt_state: list[PromptValue]
    """What adapters know of the prompt: prefill's last outputs, the other phases' last inputs."""
    weights: frozenset[str]
    """Names of the weights that are read (see ``DecoderGraph.parameters``)."""


def lower_piecewise(graph: DecoderGraph) -> PiecewiseGraph:
    """Cut a graph that went through the passes. The graph is not modified."""
    nodes = list(graph.graph.nodes)
    output = next(n for n in nodes if n.op == "output")
    markers = [n for n in nodes if n.target in _MARKERS]
    of_exits = {n for n in nodes if n.target in _EXIT_OPS}
    of_exits |= {n for n in nodes if n.target is operator.getitem and n.args[0] in of_exits}
    appended = {n for n in nodes if n.target is operator.getitem and _appends(n.args[0])}
    by_layer: dict[int, list[fx.Node]] = {}
    for node in nodes:
        if node in graph.layer_of and node not in of_exits | appended:
            by_layer.setdefault(graph.layer_of[node], []).append(node)
    exits = {graph.layer_of[marker]: _exit_point(graph, marker) for marker in markers}
    results = [n for n in output.args[0] if n not in of_exits]
    attending = {graph.layer_of[n] for n in nodes if _appends(n)} | {-1, graph.spec.num_layers}
    steps: list[Piece | ExitPoint | AttendPoint] = []
    part: list[fx.Node] = []
    modules: dict[str, fx.GraphModule] = {}
    for layer in sorted(by_layer):
        for appends, own in groupby(by_layer[layer], _appends):
            if appends:
                steps += [*_pieces(graph, part, modules), *map(_attend_point, own)]
                part = []
            else:
                part += own
        if layer in exits or not {layer, layer + 1} <= attending:
            steps += _pieces(graph, part, modules)
            part = []
        if layer in exits:
            steps.append(exits[layer])
    placeholders = [n for n in nodes if n.op == "placeholder" and n.name != "visual_mask"]
    kv = [graph.kv_layers.index(i) if i in graph.kv_layers else None for i in range(graph.spec.num_layers)]
    weights = frozenset(str(n.target) for n in nodes if n.op == "get_attr")
    names, examples = [n.name for n in placeholders], [n.meta["val"] for n in placeholders]
    outputs = [n.name for n in results]
    logits = results[0].meta["val"]
    return PiecewiseGraph(names, examples, steps, outputs, logits, kv, graph.prompt_state, weights)


def _exit_point(graph: DecoderGraph, marker: fx.Node) -> ExitPoint:
    arguments: Any = marker.args
    fire, *_, values, counts, dims = arguments
    outputs = {user.args[1]: user.name for user in marker.users if user.target is operator.getitem}
    layer = graph.layer_of[marker]
    gate = None
    if fire.target in _GATES:
        *_, w1, w2, threshold = fire.args
        gate = (graph.parameters[w1.target], graph.parameters[w2.target], threshold)
        stream = fire.args[0].name
    else:
        stream = values[0].name
    # The last value is the visual mask, which the host keeps; values without users were dropped as dead.
    alive = [i for i in range(len(values) - 1) if i in outputs]
    unpacked = unpack_dims(counts, dims)
    return ExitPoint(
        layer, stream, gate, [values[i].name for i in alive], [unpacked[i] for i in alive], [outputs[i] for i in alive]
    )


def _appends(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target in _ATTENDING


def _attend_point(node: fx.Node) -> AttendPoint:
    # torch.export leaves out arguments that are as by default.
    schema: Any = node.target._schema.arguments  # type: ignore[union-attr]
    arguments: Any = [*node.args, *(argument.default_value for argument in schema[len(node.args) :])]
    inputs = [n.name for n in arguments if isinstance(n, fx.Node)]
    outputs = {user.args[1]: user.name for user in node.users}
    return AttendPoint(_ATTENDING[node.target], inputs, [outputs[i] for i in range(3)], *arguments[-3:])


def _pieces(graph: DecoderGraph, nodes: list[fx.Node], modules: dict[str, fx.GraphModule]) -> list[Piece]:
    """One piece; none where nodes are sizes only, which other pieces read from their own inputs.

    Equal ones share their module, which is in ``modules`` by their key.
    """
    own = set(nodes)
    outputs = [n for n in nodes if not _is_size(n) and any(user not in own for user in n.users)]
    if not outputs:
        return []
    inputs, weights = _outside(nodes, own)
    piece = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(inputs):
        env[node] = piece.placeholder(f"value_{i}")
    for i, node in enumerate(weights):
        env[node] = piece.placeholder(f"weight_{i}")
    sizes = _size_reader(piece, inputs, env)
    for node in nodes:
        if not _is_size(node):
            env[node] = piece.node_copy(node, lambda n: sizes(n) if _is_size(n) else env[n])
    piece.output(tuple(env[n] for n in outputs))
    piece.eliminate_dead_code()
    parameters = [graph.parameters[str(n.target)] for n in weights]
    examples = [n.meta["val"] for n in inputs]
    mode = next(v.fake_mode for v in examples)
    with torch.no_grad():
        examples += [mode.from_tensor(read().detach(), static_shapes=True) for read in parameters]
    key = structure_key(piece, examples)
    if key not in modules:
        modules[key] = fx.GraphModule({}, piece)
    lowered = Piece(
        modules[key],
        key,
        [n.name for n in inputs],
        parameters,
        [n.name for n in outputs],
        examples,
        [str(n.target) for n in weights],
        graph.layer_of[nodes[0]],
    )
    return [lowered]


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool))


def _outside(nodes: list[fx.Node], own: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Tensors and weights that the nodes read and do not compute, in order of first use."""
    used = dict.fromkeys(n for node in nodes if not _is_size(node) for n in node.all_input_nodes if n not in own)
    weights = [n for n in used if n.op == "get_attr"]
    return [n for n in used if n.op != "get_attr" and not _is_size(n)], weights


def _size_reader(
    piece: fx.Graph, inputs: Iterable[fx.Node], env: dict[fx.Node, fx.Node]
) -> Callable[[fx.Node], fx.Node]:
    """How a piece gets a size that the whole graph computed elsewhere: from a dim of one of its inputs."""
    dims = {
        size.node.expr: (env[node], dim)
        for node in inputs
        for dim, size in enumerate(node.meta["val"].shape)
        if isinstance(size, torch.SymInt)
    }
    known: dict[Any, fx.Node] = {}

    def read(node: fx.Node) -> fx.Node:
        expression = node.meta["val"].node.expr
        if expression not in known:
            if expression in dims:
                known[expression] = piece.call_function(torch.ops.aten.sym_size.int, dims[expression])
            elif node.all_input_nodes and all(_is_size(n) for n in node.all_input_nodes):
                known[expression] = piece.node_copy(node, read)
            else:
                raise CaptureError(f"{node.name}: the size {expression} cannot be read from the piece's inputs.")
        return known[expression]

    return read


def structure_key(piece: fx.Graph, examples: list[Tensor]) -> str:
    """The piece as text, with nodes and symbols numbered by first appearance."""
    number = {node: f"%{i}" for i, node in enumerate(piece.nodes)}
    symbols: dict[Any, sympy.Symbol] = {}

    def size(value: int | torch.SymInt) -> str:
        if not isinstance(value, torch.SymInt):
            return str(value)
        for symbol in sorted(value.node.expr.free_symbols, key=str):
            symbols.setdefault(symbol, sympy.Symbol(f"s{len(symbols)}"))
        return str(value.node.expr.xreplace(symbols))  # all at once: a symbol may already have another's new name

    lines = [f"{v.dtype} {v.device} {[size(s) for s in v.shape]} {[size(s) for s in v.stride()]}" for v in examples]
    for node in piece.nodes:
        if node.op != "placeholder":
            args = fx.node.map_arg((node.args, node.kwargs), number.get)
            if node.target is operator.add:  # of sizes; export writes a + b or b + a
                args = (tuple(sorted(args[0], key=str)), {})
            lines.append(f"{node.target} {args}")
    return "\n".join(lines)
