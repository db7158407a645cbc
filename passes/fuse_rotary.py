"""fuse_rotary: x cos + rotate_half(x) sin as one op, in front of the transposition that brings heads forward.

Exporters have an op for that, which takes x as the linear layer gives it and half of the tables. In graphs of the phase
"chunk" only: where Inductor compiles, it fuses these operations by itself, or fuse_attention takes them along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from vte_compile.kernels.cached_attention import cached_attention, rotary
from vte_compile.passes.manager import PassResult, PassSettings, Refusal
from vte_compile.passes.rotations import equal_halves, heads_back, rotation

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

aten = torch.ops.aten


def fuse_rotary(graph: DecoderGraph, settings: PassSettings) -> PassResult:
    """Fuse the rotations of queries and keys; ``applied`` counts them."""
    result = PassResult("fuse_rotary")
    if graph.phase != "chunk":
        return result
    halves: dict[fx.Node, fx.Node] = {}
    for attention in [n for n in graph.graph.nodes if n.target is cached_attention._opoverload]:
        for index, heads in ((0, attention.args[7]), (1, attention.args[8])):
            found = _match(attention.args[index])
            if isinstance(found, str):
                result.refusals.append(Refusal(found, attention.name, graph.layer_of.get(attention)))
                continue
            x, tables = found
            if not all(table in halves or equal_halves(graph, table) for table in tables):
                reason = f"the halves of {tables[0].name} are not proven equal."
                result.refusals.append(Refusal(reason, attention.name, graph.layer_of.get(attention)))
                continue
            with graph.graph.inserting_before(attention):
                for table in tables:
                    if table not in halves:
                        halves[table] = _first_half(graph, table)
                cos, sin = (halves[table] for table in tables)
                flat = _call(graph, attention, aten.flatten.using_ints, x, -2)
                rotated = _call(graph, attention, rotary._opoverload, flat, cos, sin, heads)
            attention.update_arg(index, rotated)
            result.applied += 1
    return result


def _match(node: Any) -> tuple[fx.Node, tuple[fx.Node, fx.Node]] | str:
    """x [B, T, heads, D] and the tables [B, T, D], if a node is their rotation, flattened to [B, T, heads * D]."""
    if node.target in (aten.reshape.default, aten.view.default):
        node = node.args[0]
    return rotation(heads_back(node))


def _first_half(graph: DecoderGraph, table: fx.Node) -> fx.Node:
    size = int(table.meta["val"].shape[-1])
    behind = table.next
    with graph.graph.inserting_before(behind):
        half = graph.graph.call_function(aten.slice.Tensor, (table, 2, 0, size // 2))
    half.meta["val"] = table.meta["val"][..., : size // 2]
    graph.layer_of[half] = graph.layer_of[table]
    return half


def _call(graph: DecoderGraph, beside: fx.Node, target: Any, *args: Any) -> fx.Node:
    node = graph.graph.call_function(target, args)
    with torch.no_grad(), beside.meta["val"][0].fake_mode:
        node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
    graph.layer_of[node] = graph.layer_of[beside]
    return node
