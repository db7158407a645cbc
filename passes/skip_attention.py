"""skip_attention: delete the attentions a plan skips, with their keys and values and everything only they used.

A pre-norm block is h = x + attention(norm(x)); out = h + ffn(norm(h)). Without its attention it is
out = x + ffn(norm(x)): every use of h becomes x, and the rest is dead. That holds whatever norms stand on the
attention's branch, and with a PIA too, since fold_adapters gave the FFN another input than norm(h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from vte_compile.passes.dead_code import remove_dead_nodes
from vte_compile.passes.manager import PassResult, PassSettings, Refusal
from vte_compile.passes.residual import residual_add

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

aten = torch.ops.aten


def skip_attention(graph: DecoderGraph, settings: PassSettings) -> PassResult:
    """Delete the attentions of ``settings.plan.skips``; ``applied`` counts them.

    The layers' keys and values are no outputs any more, nor their past inputs; ``graph.kv_layers`` says which are left.
    """
    result = PassResult("skip_attention")
    for skip in settings.plan.skips:
        if skip.adapter is not None and skip.layer not in graph.adapted:
            result.refusals.append(Refusal("its adapter could not be put into the graph.", "", skip.layer))
            continue
        residual = residual_add(graph, skip.layer)
        if isinstance(residual, Refusal):
            result.refusals.append(residual)
            continue
        add, stream = residual
        add.replace_all_uses_with(stream)
        _drop_kv(graph, skip.layer)
        result.applied += 1
    return result


def _drop_kv(graph: DecoderGraph, layer: int) -> None:
    output = next(n for n in graph.graph.nodes if n.op == "output")
    at = 1 + 2 * graph.kv_layers.index(layer)
    results = list(output.args[0])
    output.args = ((*results[:at], *results[at + 2 :]),)
    graph.kv_layers = [other for other in graph.kv_layers if other != layer]
    remove_dead_nodes(graph.graph)
    names = (f"past_key_{layer}", f"past_value_{layer}", f"kv_start_{layer}")
    for node in [n for n in graph.graph.nodes if n.op == "placeholder" and n.name in names]:
        _read_sizes_elsewhere(graph, node)
        graph.graph.erase_node(node)
    alive = set(graph.graph.nodes)
    graph.layer_of = {node: own for node, own in graph.layer_of.items() if node in alive}


def _read_sizes_elsewhere(graph: DecoderGraph, placeholder: fx.Node) -> None:
    """The batch size of the whole graph may have been read from an input that goes."""
    embeds = graph.placeholder("inputs_embeds")
    for user in list(placeholder.users):
        if user.target is aten.sym_size.int and user.meta["val"].node.expr == embeds.meta["val"].shape[0].node.expr:
            user.args = (embeds, 0)
