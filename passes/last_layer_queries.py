"""last_layer_queries: where only the last token's logits are wanted, the last layer asks for that token alone.

Its keys and values are those of all tokens, for the cache; its query, its attention, its residual stream and its FFN
are needed for the last token only. Lossless, and about three quarters of one layer's prefill.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from vte_compile.passes.manager import PassResult, PassSettings, Refusal
from vte_compile.passes.residual import SDPA, residual_add

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

aten = torch.ops.aten


def last_layer_queries(graph: DecoderGraph, settings: PassSettings) -> PassResult:
    """Cut the last layer to its last token, keys and values excepted; ``applied`` is 1 or 0."""
    result = PassResult("last_layer_queries")
    if not settings.last_token_logits or graph.phase == "decode":
        return result
    layer = graph.spec.num_layers - 1
    found = residual_add(graph, layer)
    if isinstance(found, Refusal):
        result.refusals.append(found)
        return result
    add, stream = found
    attention = next(n for n in graph.graph.nodes if n.target is SDPA and graph.layer_of.get(n) == layer)
    length = _size(graph.placeholder("inputs_embeds").meta["val"].shape[1])
    behind = _behind(graph, attention, layer)
    refusal = _refuse(behind, add, stream, attention, length, layer)
    if refusal is not None:
        result.refusals.append(refusal)
        return result
    _cut(graph, attention, 0, 2)
    if len(attention.args) > 3 and attention.args[3] is not None:
        _cut(graph, attention, 3, 2)
    else:  # one query, the last: it sees all keys
        query, key, value = attention.args[:3]
        attention.args = (query, key, value, None, 0.0, False)
    _cut(graph, add, add.args.index(stream), 1)
    for node in behind:
        node.args = fx.node.map_arg(node.args, lambda n: 1 if _size(n.meta.get("val")) == length else n)
        node.meta["val"] = _shortened(node.meta["val"], length)
    result.applied = 1
    return result


def _behind(graph: DecoderGraph, attention: fx.Node, layer: int) -> list[fx.Node]:
    """The attention and what follows from it in its layer."""
    behind = {attention: None}
    for node in graph.graph.nodes:
        computes = node.meta.get("val") is not None  # else an assertion of torch.export's
        if computes and graph.layer_of.get(node) == layer and any(n in behind for n in node.all_input_nodes):
            behind[node] = None
    return list(behind)


def _refuse(
    behind: list[fx.Node], add: fx.Node, stream: fx.Node, attention: fx.Node, length: Any, layer: int
) -> Refusal | None:
    for node in behind[1:]:
        if isinstance(node.meta.get("val"), list):
            return Refusal(f"{node.name} takes the tokens of the last layer apart.", node.name, layer)
        for source in node.all_input_nodes:
            known = source in behind or source.op == "get_attr" or (node is add and source is stream)
            if not known and _size(source.meta.get("val")) != length:
                return Refusal(f"{node.name} also uses {source.name}.", node.name, layer)
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    if mask is None and not (len(attention.args) > 5 and attention.args[5]):
        return Refusal(f"{attention.name} is not causal.", attention.name, layer)
    if "attn_mask" in attention.kwargs:
        return Refusal(f"{attention.name} is called in another way than torch.export does.", attention.name, layer)
    return None


def _cut(graph: DecoderGraph, node: fx.Node, argument: int, dim: int) -> None:
    """Keep the last position of one of a node's arguments."""
    source: Any = node.args[argument]
    with graph.graph.inserting_before(node):
        last = graph.graph.call_function(aten.slice.Tensor, (source, dim, -1, sys.maxsize))
    last.meta["val"] = source.meta["val"].narrow(dim, 0, 1)
    graph.layer_of[last] = graph.layer_of[node]
    node.update_arg(argument, last)


def _size(value: Any) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt) else None


def _shortened(value: torch.Tensor, length: Any) -> torch.Tensor:
    for dim, size in enumerate(value.shape):
        if _size(size) == length:
            value = value.narrow(dim, 0, 1)
    return value
