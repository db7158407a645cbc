"""companion_token: let a plan's companion token stand in front of a prompt, in prefill.

It is a token as others are, but that no other attends to it, and that it attends to itself alone: so each attention is
taken apart into its own and that of the tokens behind it. Keys and values that the graph gives out are without it.
fold_adapters counts it in the means of PIAs, and leaves it out of those of routers. Whoever runs the graph puts its
embedding in front of a row's, and takes its logits away (vte_compile/runtime/companion.py).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from vte_compile.errors import CaptureError
from vte_compile.passes.manager import PassResult, PassSettings
from vte_compile.passes.residual import SDPA

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

aten = torch.ops.aten
_TOKENS = 2
"""The dim of queries, keys and values."""


def companion_token(graph: DecoderGraph, settings: PassSettings) -> PassResult:
    """Take the first token out of the attentions of others; ``applied`` counts the attentions.

    Raises:
        CaptureError: An attention is not known to be plain causal, or the decoder takes more than embeddings and
            positions. (Without this pass, the numbers would be others.)
    """
    result = PassResult("companion_token")
    if settings.plan.companion is None or graph.phase != "prefill":
        return result
    if graph.spec.token_inputs:
        raise CaptureError(
            f"{type(graph.spec.decoder).__name__} takes {', '.join(graph.spec.token_inputs)} besides embeddings and "
            "positions: the plan's companion token has none of that."
        )
    behind = _Behind(graph)
    for node in [n for n in graph.graph.nodes if n.target is SDPA]:
        _take_apart(graph, node, behind)
        result.applied += 1
    output = next(n for n in graph.graph.nodes if n.op == "output")
    logits, *rest = output.args[0]
    count = 2 * len(graph.kv_layers)
    output.args = ((logits, *map(behind, rest[:count]), *rest[count:]),)
    return result


class _Behind:
    """What is left of queries, keys or values behind the first token, computed once."""

    def __init__(self, graph: DecoderGraph) -> None:
        self._graph = graph
        self._known: dict[fx.Node, fx.Node] = {}

    def __call__(self, source: fx.Node) -> fx.Node:
        if source not in self._known:
            with self._graph.graph.inserting_after(source):
                self._known[source] = _slice(self._graph, source, 1, sys.maxsize)
        return self._known[source]


def _slice(graph: DecoderGraph, source: fx.Node, start: int, end: int) -> fx.Node:
    node = graph.graph.call_function(aten.slice.Tensor, (source, _TOKENS, start, end))
    with torch.no_grad():
        node.meta["val"] = source.meta["val"][:, :, start:end]
    graph.layer_of[node] = graph.layer_of[source]
    return node


def _take_apart(graph: DecoderGraph, attention: fx.Node, behind: _Behind) -> None:
    arguments: Any = attention.args
    query, key, value = arguments[:3]
    mask = arguments[3] if len(arguments) > 3 else None
    causal = len(arguments) > 5 and bool(arguments[5])
    last_alone = query.meta["val"].shape[_TOKENS] == 1  # as last_layer_queries leaves it: it sees all keys
    if mask is not None or not (causal or last_alone) or attention.kwargs.keys() - {"scale", "enable_gqa"}:
        raise CaptureError(
            f"layer {graph.layer_of.get(attention)}: {attention.name} is not known to be plain causal (windows, or "
            "tokens that attend to later ones): the plan's companion token cannot be kept apart in it."
        )
    if not last_alone:
        with graph.graph.inserting_before(attention):
            own = graph.graph.call_function(
                SDPA, tuple(_slice(graph, n, 0, 1) for n in (query, key, value)), dict(attention.kwargs)
            )
        with graph.graph.inserting_after(attention):
            joined = graph.graph.call_function(aten.cat.default, ([own, attention], _TOKENS))
        whole = joined.meta["val"] = attention.meta["val"]
        attention.replace_all_uses_with(joined, delete_user_cb=lambda user: user is not joined)
        with torch.no_grad():
            own.meta["val"], attention.meta["val"] = whole[:, :, :1], whole[:, :, 1:]
        graph.layer_of[own] = graph.layer_of[joined] = graph.layer_of[attention]
        query = behind(query)
    attention.args = (query, behind(key), behind(value), *arguments[3:])
