"""insert_exits: behind each exit's layer, a gate and a token_exit marker, and all later users rewired to what is left.

Every value that is as long as the sequence and is used by later layers goes through the marker: the residual stream,
the rotary tables, masks (two dims), and the visual mask itself, so that no later gate can fire. Later uses of the
length become the new length. In packed graphs each row has a decision of its own, and ``cu_seqlens`` goes through, too.
``val`` metadata behind an exit keeps describing the case that no exit fires.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from vte_compile.kernels.exit_gate import exit_gate, static_exit
from vte_compile.kernels.packed_exit import packed_exit, packed_gate, packed_static_exit
from vte_compile.kernels.token_exit import pack_dims, token_exit
from vte_compile.passes.last_tokens import bounds_in
from vte_compile.passes.manager import PassResult, PassSettings, Refusal
from vte_compile.plan import GateExit

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph
    from vte_compile.plan import StaticExit


def insert_exits(graph: DecoderGraph, settings: PassSettings) -> PassResult:
    """Insert the plan's exits; ``applied`` counts them. Decode graphs are left alone: decode never gates.
    Graphs of all phases in one are cut where an exit is, and what leaves there is the engine's business.

    The graph gets an input ``visual_mask`` [1, S] bool, and one output more per exit: whether it fired ([] bool; of
    packed rows, [B]).
    """
    result = PassResult("insert_exits")
    if graph.phase in ("decode", "chunk") or not settings.plan.exits:
        return result
    visual_mask = _add_visual_mask(graph)
    fired: list[fx.Node] = []
    for planned in settings.plan.exits:
        crossing, refusal = _crossing(graph, planned.layer, visual_mask)
        if refusal is not None:
            result.refusals.append(refusal)
            continue
        fire, visual_mask = _insert(graph, planned, crossing, visual_mask)
        fired.append(fire)
        result.applied += 1
    output = next(n for n in graph.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], *fired),)
    return result


def _add_visual_mask(graph: DecoderGraph) -> fx.Node:
    with graph.graph.inserting_after(graph.placeholder("position_ids")):
        node = graph.graph.placeholder("visual_mask")
    embeds = graph.placeholder("inputs_embeds").meta["val"]
    node.meta["val"] = torch.empty_like(embeds[..., 0], dtype=torch.bool)
    return node


def _crossing(graph: DecoderGraph, layer: int, visual_mask: fx.Node) -> tuple[dict[fx.Node, list[int]], Refusal | None]:
    """Tensors that later layers use and that are as long as the sequence -> in which dims."""
    length = _sequence_length(graph)
    crossing: dict[fx.Node, list[int]] = {}
    for node in graph.graph.nodes:
        if node.op in ("get_attr", "output") or node is visual_mask or graph.layer_of.get(node, -1) > layer:
            continue
        value = node.meta.get("val")
        if not _later_users(graph, node, layer) or not isinstance(value, torch.Tensor):
            continue
        dims = [i for i, size in enumerate(value.shape) if _expression(size) == length]
        mixed = [i for i, size in enumerate(value.shape) if i not in dims and length in _free_symbols(size)]
        if mixed:
            reason = f"{node.name}: dim {mixed[0]} is {value.shape[mixed[0]]}, of which only a part is the sequence."
            return {}, Refusal(reason, node.name, layer)
        if dims:
            crossing[node] = dims
    return crossing, None


def _insert(
    graph: DecoderGraph, planned: GateExit | StaticExit, crossing: dict[fx.Node, list[int]], visual_mask: fx.Node
) -> tuple[fx.Node, fx.Node]:
    layer, stream = planned.layer, graph.streams[planned.layer]
    bounds = [bounds_in(graph, layer)] if graph.phase == "packed" else []
    old = [*crossing, *bounds, visual_mask]
    later = {node: _later_users(graph, node, layer) for node in old}
    lengths = _later_lengths(graph, layer)
    anchor = next(n for n in graph.graph.nodes if graph.layer_of.get(n, -1) > layer)
    with graph.graph.inserting_before(anchor):
        fire = _gate(graph, planned, stream, [visual_mask, *bounds])
        counts, dims = pack_dims([*crossing.values(), *([] for _ in bounds), [1]])
        op = packed_exit if bounds else token_exit
        marker = graph.graph.call_function(op._opoverload, (fire, visual_mask, *bounds, old, counts, dims))
        new = [graph.graph.call_function(operator.getitem, (marker, i)) for i in range(len(old))]
        marker.meta["val"] = [n.meta["val"] for n in old]
        for before, after in zip(old, new, strict=True):
            after.meta["val"] = before.meta["val"]
        for node in (fire, marker, *new):
            graph.layer_of[node] = layer
    for before, after in zip(old, new, strict=True):
        for user in later[before]:
            user.replace_input_with(before, after)
    graph.streams[layer] = new[old.index(stream)]
    _rewire_lengths(graph, lengths, graph.streams[layer], anchor, layer)
    return fire, new[-1]


def _gate(graph: DecoderGraph, planned: GateExit | StaticExit, stream: fx.Node, rows: list[fx.Node]) -> fx.Node:
    """Whether visual tokens leave; ``rows``: the visual mask, and of packed rows ``cu_seqlens``."""
    is_packed = len(rows) > 1
    if isinstance(planned, GateExit):
        weights = []
        for name in ("w1", "w2"):
            target = f"exit_{planned.layer}_{name}"
            graph.module.register_buffer(target, getattr(planned, name), persistent=False)
            graph.parameters[target] = partial(getattr, planned, name)
            weights.append(graph.graph.get_attr(target))
        args: tuple[Any, ...] = (stream, *rows, *weights, planned.threshold)
        fire = graph.graph.call_function((packed_gate if is_packed else exit_gate)._opoverload, args)
    else:
        op = packed_static_exit if is_packed else static_exit
        fire = graph.graph.call_function(op._opoverload, tuple(rows))
    visual_mask = rows[0].meta["val"]
    fire.meta["val"] = rows[1].meta["val"][1:] > 0 if is_packed else visual_mask[0, 0]
    return fire


def _later_lengths(graph: DecoderGraph, layer: int) -> list[fx.Node]:
    """SymInts computed up to this layer that contain the sequence length and are used by later layers."""
    length = _sequence_length(graph)
    return [
        node
        for node in graph.graph.nodes
        if graph.layer_of.get(node, -1) <= layer
        and isinstance(value := node.meta.get("val"), torch.SymInt)
        and length in _free_symbols(value)
        and _later_users(graph, node, layer)
    ]


def _rewire_lengths(graph: DecoderGraph, lengths: list[fx.Node], stream: fx.Node, anchor: fx.Node, layer: int) -> None:
    """Recompute lengths from the shortened stream, and let later layers use those."""
    plain = _sequence_length(graph)
    renewed: dict[fx.Node, fx.Node] = {}

    def renew(node: fx.Node) -> fx.Node:
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt) or plain not in _free_symbols(value):
            return node
        if node not in renewed:
            if _expression(value) == plain:
                copy = graph.graph.call_function(torch.ops.aten.sym_size.int, (stream, 1))
            else:
                copy = graph.graph.node_copy(node, renew)
            copy.meta["val"] = value
            graph.layer_of[copy] = layer
            renewed[node] = copy
        return renewed[node]

    for node in lengths:
        users = _later_users(graph, node, layer)
        with graph.graph.inserting_before(anchor):
            copy = renew(node)
        for user in users:
            user.replace_input_with(node, copy)


def _later_users(graph: DecoderGraph, node: fx.Node, layer: int) -> list[fx.Node]:
    return [user for user in node.users if graph.layer_of.get(user, -1) > layer]


def _sequence_length(graph: DecoderGraph) -> Any:
    return _expression(graph.placeholder("inputs_embeds").meta["val"].shape[1])


def _expression(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _free_symbols(size: int | torch.SymInt) -> set[Any]:
    return size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()
