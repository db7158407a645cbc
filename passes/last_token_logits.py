"""last_token_logits: the final norm and lm_head see the last position only."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from vte_compile.passes.last_tokens import last_tokens
from vte_compile.passes.manager import PassResult, PassSettings, Refusal

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

aten = torch.ops.aten


def last_token_logits(graph: DecoderGraph, settings: PassSettings) -> PassResult:
    """Slice the residual stream before the tail; ``applied`` is 1 or 0. Decode has one token anyway."""
    result = PassResult("last_token_logits")
    if not settings.last_token_logits or graph.phase == "decode":
        return result
    last = graph.spec.num_layers
    stream = graph.streams[-1]
    tail = [n for n in graph.graph.nodes if graph.layer_of.get(n, -1) == last]
    for node in tail:
        foreign = [n for n in node.all_input_nodes if n is not stream and n.op != "get_attr" and n not in tail]
        if foreign:
            reason = f"{node.name} behind the last layer uses {foreign[0].name} besides the residual stream."
            result.refusals.append(Refusal(reason, node.name))
            return result
    result.applied = 1
    length, left = graph.placeholder("inputs_embeds").meta["val"].shape[1], stream.meta["val"].shape[1]
    if graph.phase == "chunk":
        with graph.graph.inserting_before(tail[0]):
            sliced = _last_of_each_row(graph, stream)
        example = partial(torch.narrow, dim=1, start=0, length=1)
    else:
        kept = last_tokens(graph, last, tail[0])
        # Of packed rows, last_layer_queries may have left nothing else.
        is_long = graph.phase != "packed" or str(length) == str(left)
        sliced, example = kept.of(stream, 1, tail[0]) if is_long else stream, partial(kept.example, dim=1)
    shortened = {sliced}
    for node in tail:
        node.replace_input_with(stream, sliced)
        if shortened & set(node.all_input_nodes):
            shortened.add(node)
            if isinstance(value := node.meta.get("val"), torch.Tensor):
                node.meta["val"] = example(value)
    return result


def _last_of_each_row(graph: DecoderGraph, stream: fx.Node) -> fx.Node:
    """Rows have padding behind them."""

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.graph.call_function(target, args)
        with torch.no_grad(), stream.meta["val"].fake_mode:
            node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
        graph.layer_of[node] = graph.spec.num_layers
        return node

    index = call(aten.sub.Tensor, graph.placeholder("new_lengths"), 1)
    index = call(aten.unsqueeze.default, call(aten.unsqueeze.default, index, 1), 2)
    index = call(aten.expand.default, index, [-1, -1, stream.meta["val"].shape[2]])
    return call(aten.gather.default, stream, 1, index)
