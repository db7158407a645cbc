"""last_token_logits: the final norm and lm_head see the last position only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vte_compile.passes.last_tokens import last_tokens
from vte_compile.passes.manager import PassResult, PassSettings, Refusal

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph


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
    kept = last_tokens(graph, last, tail[0])
    # Of packed rows and chunks, last_layer_queries may have left nothing else.
    is_long = graph.phase not in ("packed", "chunk") or str(length) == str(left)
    sliced = kept.of(stream, 1, tail[0]) if is_long else stream
    shortened = {sliced}
    for node in tail:
        node.replace_input_with(stream, sliced)
        if shortened & set(node.all_input_nodes):
            shortened.add(node)
            if isinstance(value := node.meta.get("val"), torch.Tensor):
                node.meta["val"] = kept.example(value, 1)
    return result
