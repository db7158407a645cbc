"""skip_co_attention: delete the attentions of a co-attention layer that a plan skips, and insert their PIA.

A post-norm sublayer norm(x + attention) becomes norm(x + PIA(u, v)), or norm(x) without an adapter; u is the layer's
input, v that input again or, for the cross attention, the other side's tokens. What only the attention used goes: q,
k, v and o, masks, the other side's tokens.

The PIA stays the low-rank op it is, since a norm and a residual stand between it and all weights. Its constants are
merged, in float64, and the mean over tokens is taken before the projection A, which is the same and cheaper::

    p = (A / 2) mean(v) + (bC + bA) / 2 ;  PIA = M2 ((C / 2) u + p) + s * bB ,   M2 = s * blockdiag(B)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from vte_compile.adapters import PIA, StaticRouter
from vte_compile.folding import affine, blend
from vte_compile.passes.manager import PassResult, Refusal
from vte_compile.passes.post_norm import Sublayer, find_sublayers

if TYPE_CHECKING:
    from vte_compile.capture.co_attention import CoAttentionGraph
    from vte_compile.plan.co_attention import CoAttention

aten = torch.ops.aten


def skip_co_attention(graph: CoAttentionGraph, part: CoAttention) -> PassResult:
    """Delete the attentions that `part` skips; ``applied`` counts them.

    A PIA's weights are new weights of the graph, ``attention.pia.*`` or ``crossattention.pia.*``, in the dtype and on
    the device of the layer's.
    """
    result = PassResult("skip_co_attention")
    if not (part.skip_self or part.skip_cross):
        return result
    found = find_sublayers(graph, part.level)
    if isinstance(found, Refusal):
        result.refusals.append(found)
        return result
    hidden, other = graph.placeholder("hidden_states"), graph.placeholder("encoder_hidden_states")
    for skipped, sublayer, adapter, path, source in (
        (part.skip_self, found.self_attention, part.self_adapter, "attention", hidden),
        (part.skip_cross, found.cross_attention, part.cross_adapter, "crossattention", other),
    ):
        if not skipped:
            continue
        if isinstance(adapter, PIA):
            _insert_pia(graph, sublayer, adapter, path, hidden, source)
        else:
            sublayer.add.replace_all_uses_with(sublayer.stream)
        result.applied += 1
    graph.remove_dead()
    return result


def _insert_pia(
    graph: CoAttentionGraph, sublayer: Sublayer, pia: PIA, path: str, hidden: fx.Node, source: fx.Node
) -> None:
    assert isinstance(pia.router, StaticRouter)
    parts = affine(pia)
    assert parts.pool is not None
    merged = {
        "pool.weight": parts.pool[0],
        "pool.bias": parts.pool[1],
        "down.weight": parts.down,
        "up.weight": blend(pia.router, parts.up),
        "up.bias": blend(pia.router, parts.offset),
    }
    like = next(iter(graph.weights.values()))
    nodes = {name: graph.add_weight(f"{path}.pia.{name}", value.to(like)) for name, value in merged.items()}
    with graph.graph.inserting_before(sublayer.add):
        mean = graph.graph.call_function(aten.mean.dim, (source, [1]))
        pooled = graph.graph.call_function(aten.linear.default, (mean, nodes["pool.weight"], nodes["pool.bias"]))
        down = graph.graph.call_function(aten.linear.default, (hidden, nodes["down.weight"]))
        z = graph.graph.call_function(
            aten.add.Tensor, (down, graph.graph.call_function(aten.unsqueeze.default, (pooled, 1)))
        )
        term = graph.graph.call_function(aten.linear.default, (z, nodes["up.weight"], nodes["up.bias"]))
    sublayer.add.replace_input_with(sublayer.branch, term)
