"""Where a block adds its attention's result to the residual stream: what passes that take attention apart look for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from vte_compile.kernels.append_attention import append_attention
from vte_compile.kernels.cached_attention import cached_attention
from vte_compile.kernels.causal_attention import causal_attention
from vte_compile.kernels.packed_attention import packed_attention
from vte_compile.passes.manager import Refusal

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
CAUSAL = causal_attention._opoverload
PACKED = packed_attention._opoverload
ATTENTIONS = (SDPA, CAUSAL, PACKED, append_attention._opoverload, cached_attention._opoverload)
"""Of a layer: in prefill and extend (torch's own, or ours), of packed rows, in decode, and in chunks of any phase."""
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.alias.default)


def residual_add(graph: DecoderGraph, layer: int) -> tuple[fx.Node, fx.Node] | Refusal:
    """The addition of the attention's branch to the residual stream, and the stream's side of it."""
    own = [n for n in graph.graph.nodes if graph.layer_of.get(n) == layer]
    attentions = [n for n in own if n.target in ATTENTIONS]
    if len(attentions) != 1:
        where = own[0].name if own else ""
        return Refusal(f"{len(attentions)} attentions in this layer, expected 1.", where, layer)
    result = attentions[0]
    if result.target not in (SDPA, CAUSAL, PACKED):  # its other results are what the layer caches
        result = next(n for n in result.users if n.args[1] == 0)
    behind = {result}
    for node in own:
        if behind & set(node.all_input_nodes):
            behind.add(node)
    entering = graph.streams[layer - 1] if layer else None
    for node in own:
        plain_sum = node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1
        if node not in behind or not plain_sum or len(node.all_input_nodes) != 2:
            continue
        for stream, branch in (node.all_input_nodes, node.all_input_nodes[::-1]):
            if branch in behind and stream not in behind and _is_stream(stream, entering):
                return _alone(graph, node, stream, behind, layer)
    return Refusal(
        "the attention's output is not added to the layer's input (not a pre-norm block).", result.name, layer
    )


def _is_stream(node: fx.Node, entering: fx.Node | None) -> bool:
    """Whether a node is the residual stream that enters the layer, up to casts; None: the decoder's input."""
    while node.op == "call_function" and node.target in _CASTS and node is not entering:
        node = node.all_input_nodes[0]
    return node is entering if entering is not None else node.op == "placeholder" and node.name == "inputs_embeds"


def _alone(
    graph: DecoderGraph, add: fx.Node, stream: fx.Node, behind: set[fx.Node], layer: int
) -> tuple[fx.Node, fx.Node] | Refusal:
    """Refuse if something besides the addition uses the attention's result."""
    after = {add}
    for node in graph.graph.nodes:
        if after & set(node.all_input_nodes):
            after.add(node)
    branch = behind - after
    for node in branch:
        for user in node.users:
            if user not in branch and user is not add:
                reason = f"{user.name} uses the attention's result besides the residual addition {add.name}."
                return Refusal(reason, user.name, layer)
    return add, stream
