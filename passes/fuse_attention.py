"""fuse_attention: on GPUs, attention takes the rotation of its queries and keys, and the writing of its cache, along.

In graphs of the phases "packed" and "decode", attentions whose queries and keys are rotated become
``vte::rotary_packed_attention`` and ``vte::rotary_append_attention``, which run as Triton kernels (docs/kernels.md). On
CPUs, where torch's own attention is what is fast, graphs stay as they are. All attentions of a graph, or none: a cache
that some layers write themselves would have two layouts.
"""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from vte_compile.kernels.append_attention import append_attention
from vte_compile.kernels.attention_support import unsupported
from vte_compile.kernels.fused_attention import rotary_append_attention, rotary_packed_attention
from vte_compile.passes.last_tokens import LastTokens
from vte_compile.passes.manager import PassResult, PassSettings, Refusal
from vte_compile.passes.residual import PACKED
from vte_compile.passes.rotations import equal_halves, heads_back, rotation

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

aten = torch.ops.aten
APPEND = append_attention._opoverload


@dataclass(frozen=True)
class _Match:
    """What a fused attention reads."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    tables: tuple[fx.Node, fx.Node]
    last: fx.Node | None
    """[B] int32: which tokens have queries; None: all."""
    cached: tuple[fx.Node, ...]
    """What a packed graph gives as the layer's keys and values."""


def fuse_attention(graph: DecoderGraph, settings: PassSettings) -> PassResult:
    """Fuse the attentions of packed prefill and decode; ``applied`` counts them."""
    result = PassResult("fuse_attention")
    wanted = settings.fuse_attention
    if wanted is None:
        wanted = graph.placeholder("inputs_embeds").meta["val"].device.type == "cuda"
    if not wanted or graph.phase not in ("packed", "decode"):
        return result
    attentions = [n for n in graph.graph.nodes if n.target in (PACKED, APPEND)]
    on_gpu = any(n.meta["val"].device.type == "cuda" for n in graph.graph.nodes if n.op == "placeholder")
    if on_gpu and find_spec("triton") is None:
        reason = "Triton, which has the fused kernels, is not installed."
        result.refusals += [Refusal(reason, n.name, graph.layer_of[n]) for n in attentions[:1]]
        return result
    proven: dict[fx.Node, bool] = {}
    matches = []
    for node in attentions:
        match = _match(graph, node, proven)
        if isinstance(match, str):
            result.refusals.append(Refusal(match, node.name, graph.layer_of[node]))
        else:
            matches.append(match)
    if result.refusals:
        return result
    for match in matches:
        (_fuse_packed if match.node.target is PACKED else _fuse_append)(graph, match)
        result.applied += 1
    return result


def _match(graph: DecoderGraph, node: fx.Node, proven: dict[fx.Node, bool]) -> _Match | str:
    query, key, value = (_stored_once(n) for n in node.args[:3])
    shapes = [n.meta["val"].shape for n in (query, key, value)]
    if shapes[1][3] != shapes[2][3]:
        return f"keys have heads of {shapes[1][3]}, values of {shapes[2][3]}."
    if reason := unsupported(shapes[0][3], query.meta["val"].dtype):
        return reason
    cached: tuple[fx.Node, ...] = ()
    last: fx.Node | None = None
    if node.target is PACKED:
        outputs: Any = next(n for n in graph.graph.nodes if n.op == "output").args[0]
        first = 1 + 2 * graph.kv_layers.index(graph.layer_of[node])
        cached = tuple(outputs[first : first + 2])
        if [_stored_once(n) for n in cached] != [key, value]:
            return "what is cached is not what is attended to."
        if node.args[3] is not node.args[4]:
            if query.target is not aten.index_select.default or query.args[1] != 2 or not LastTokens.is_cut(query):
                return "its queries are not known to be those of the last tokens."
            cut: Any = query.args
            query, last = cut[0], cut[2]
    of_query, of_key, v = rotation(query), rotation(key), heads_back(value)
    if isinstance(of_query, str):
        return of_query
    if isinstance(of_key, str):
        return of_key
    (q, tables), (k, of_keys) = of_query, of_key
    if tables != of_keys:
        return "queries and keys are rotated by different tables."
    if v is None:
        return "its values are not laid out by heads."
    for table in tables:
        if table not in proven:
            proven[table] = equal_halves(graph, table)
        if not proven[table]:
            return f"the halves of {table.name} are not proven equal."
    return _Match(node, q, k, v, tables, last, cached)


def _stored_once(node: Any) -> fx.Node:
    """Without copies, and without the repetition of key/value heads for the query heads of their group."""
    while node.target in (aten.contiguous.default, aten.clone.default):
        node = node.args[0]
    repeated = _before_repetition(node)
    return node if repeated is None else _stored_once(repeated)


def _before_repetition(node: fx.Node) -> fx.Node | None:
    """[B, heads, T, D], if a node is its heads, each repeated: expanded in a new dim behind them, and flattened."""
    chain: list[fx.Node] = []
    targets = (
        (aten.reshape.default, aten.view.default),
        (aten.expand.default,),
        (aten.slice.Tensor,),
        (aten.unsqueeze.default,),
    )
    for wanted in targets:
        if node.target not in wanted:
            if wanted == (aten.slice.Tensor,):  # of everything, which not all versions of transformers write
                continue
            return None
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    *sliced, unsqueezed = chain[2:]
    batch, heads, tokens, size = node.meta["val"].shape
    expanded = chain[1].meta["val"].shape
    kept = all(n.args[2:] == (0, sys.maxsize) for n in sliced)
    same = (expanded[0], expanded[1], expanded[3], expanded[4]) == (batch, heads, tokens, size)
    flat = chain[0].meta["val"].shape[1] == heads * expanded[2]
    return node if kept and same and flat and unsqueezed.args[1] == 2 else None


def _fuse_packed(graph: DecoderGraph, match: _Match) -> None:
    node, query, layer = match.node, match.query, graph.layer_of[match.node]
    bounds = node.args[3:5]
    with graph.graph.inserting_before(node):
        if match.last is not None:
            query = graph.graph.call_function(aten.index_select.default, (query, 1, match.last))
            with torch.no_grad():
                query.meta["val"] = match.query.meta["val"].index_select(1, match.last.meta["val"])
        op = rotary_packed_attention._opoverload
        arguments = (query, match.key, match.value, *match.tables, *bounds, *node.args[5:])
        fused = graph.graph.call_function(op, arguments)
        results = [graph.graph.call_function(operator.getitem, (fused, i)) for i in range(3)]
    with torch.no_grad(), node.meta["val"].fake_mode:
        fused.meta["val"] = op(*fx.node.map_arg(arguments, lambda n: n.meta["val"]))
    for new, value in zip(results, fused.meta["val"], strict=True):
        new.meta["val"] = value
    for new in (fused, *results, *([] if match.last is None else [query])):
        graph.layer_of[new] = layer
    node.replace_all_uses_with(results[0])
    output = next(n for n in graph.graph.nodes if n.op == "output")
    for old, new in zip(match.cached, results[1:], strict=True):
        output.replace_input_with(old, new)
    graph.graph.erase_node(node)
    del graph.layer_of[node]


def _fuse_append(graph: DecoderGraph, match: _Match) -> None:
    node = match.node
    node.target = rotary_append_attention._opoverload
    node.args = (match.query, match.key, match.value, *match.tables, *node.args[3:])
