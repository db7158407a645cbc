"""The sublayers of a post-norm co-attention layer in its graph: what passes on such layers look for.

    stream -> (attention or FFN) -> branch ;  norm(branch + stream)

The stream of the self attention is the layer's input, that of the cross attention the self attention's norm, that of
the FFN the cross attention's norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from vte_compile.passes.manager import Refusal
from vte_compile.passes.residual import SDPA

if TYPE_CHECKING:
    from vte_compile.capture.co_attention import CoAttentionGraph

aten = torch.ops.aten


@dataclass(frozen=True)
class Sublayer:
    """One of a layer's three sublayers."""

    first: list[fx.Node]
    """The linears that read the stream: q, k and v of the self attention, q of the cross attention, or the FFN's."""
    stream: fx.Node
    branch: fx.Node
    add: fx.Node
    norm: fx.Node


@dataclass(frozen=True)
class Sublayers:
    """A whole layer."""

    self_attention: Sublayer
    cross_attention: Sublayer
    ffn: Sublayer


def find_sublayers(graph: CoAttentionGraph, level: int) -> Sublayers | Refusal:
    """The sublayers of an unchanged layer, or why it is not of this form."""
    try:
        return _find(graph)
    except _NotFoundError as error:
        return Refusal(error.reason, error.node, level)


class _NotFoundError(Exception):
    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node.name


def _find(graph: CoAttentionGraph) -> Sublayers:
    hidden = graph.placeholder("hidden_states")
    other = graph.placeholder("encoder_hidden_states")
    output = next(n for n in graph.graph.nodes if n.op == "output")
    attentions = [n for n in graph.graph.nodes if n.target is SDPA]
    if len(attentions) != 2:
        raise _NotFoundError(f"{len(attentions)} attentions in this layer, expected self and cross attention.", output)
    first = [_projection(graph, attentions[0], i, hidden) for i in range(3)]
    self_attention = _sublayer(first, attentions[0], hidden)
    first = [_projection(graph, attentions[1], i, s) for i, s in enumerate((self_attention.norm, other, other))]
    cross_attention = _sublayer(first[:1], attentions[1], self_attention.norm)
    linears = [n for n in cross_attention.norm.users if n.target is aten.linear.default]
    if len(linears) != 1:
        raise _NotFoundError(f"{len(linears)} linears read the FFN's input, expected 1.", cross_attention.norm)
    _check_linear(graph, linears[0], cross_attention.norm)
    ffn = _sublayer(linears, linears[0], cross_attention.norm)
    if output.args[0] != (ffn.norm,):
        raise _NotFoundError("the layer's output is not the norm behind the FFN.", ffn.norm)
    return Sublayers(self_attention, cross_attention, ffn)


def _projection(graph: CoAttentionGraph, attention: fx.Node, argument: int, stream: fx.Node) -> fx.Node:
    """The linear that makes an attention's q, k or v of the stream."""
    node = attention.args[argument]
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target is not aten.linear.default:
        if len(node.users) != 1:
            raise _NotFoundError("an attention's q, k or v is used twice.", node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "call_function":
        raise _NotFoundError(f"no linear makes the attention's {'qkv'[argument]}.", attention)
    _check_linear(graph, node, stream)
    if len(node.users) != 1:
        raise _NotFoundError(f"the linear of the attention's {'qkv'[argument]} is used twice.", node)
    return node


def _check_linear(graph: CoAttentionGraph, linear: fx.Node, stream: fx.Node) -> None:
    source, *weights = linear.args
    if source is not stream:
        raise _NotFoundError(f"this linear reads {source}, expected {stream}.", linear)
    if len(weights) != 2:
        raise _NotFoundError("this linear has no bias, into which an adapter's could go.", linear)
    for weight in weights:
        if not isinstance(weight, fx.Node) or graph.path_of(weight) is None or len(weight.users) != 1:
            raise _NotFoundError("this linear's weights are computed, or used elsewhere too.", linear)


def _sublayer(first: list[fx.Node], start: fx.Node, stream: fx.Node) -> Sublayer:
    """Follow `start` to where it meets the stream again, and the norm behind."""
    branch = start
    while True:
        if len(branch.users) != 1:
            raise _NotFoundError("what comes before the residual addition is used more than once.", branch)
        add = next(iter(branch.users))
        if add.op == "output":
            raise _NotFoundError("the output is not added to the sublayer's input (not a post-norm layer).", start)
        if stream in add.all_input_nodes:
            break
        branch = add
    if add.target is not aten.add.Tensor or add.kwargs.get("alpha", 1) != 1:
        raise _NotFoundError("the output meets the sublayer's input in something else than a plain sum.", add)
    norm = next(iter(add.users))
    if len(add.users) != 1 or norm.target is not aten.layer_norm.default or norm.args[0] is not add:
        raise _NotFoundError("the residual sum goes elsewhere than into one layer norm.", add)
    return Sublayer(first, stream, branch, add, norm)
