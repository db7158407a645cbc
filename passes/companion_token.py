"""companion_token: let a plan's companion token stand beside a prompt: in prefill in front of it, in chunks behind it.

It is a token as others are, but that no other attends to it, and that it attends to itself alone. In prefill each
attention is taken apart into its own and that of the tokens behind it, and keys and values that the graph gives out are
without it. Whoever runs the graph puts its embedding in front of a row's, and takes its logits away
(vte_compile/runtime/companion.py).

A chunk of an engine has padding behind its rows, which nothing attends to and nothing keeps. There it takes the place
behind a row's last token, which whoever runs the graph leaves free in a row's first chunk; its embedding is a weight of
the graph. What attends to itself alone gets its own value.

fold_adapters counts it in the means of PIAs, and leaves it out of those of routers.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from vte_compile.errors import CaptureError
from vte_compile.kernels.cached_attention import cached_attention
from vte_compile.passes.last_tokens import LastTokens
from vte_compile.passes.manager import PassResult, PassSettings
from vte_compile.passes.residual import SDPA
from vte_compile.runtime.companion import NAME

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
    if settings.plan.companion is None or graph.phase not in ("prefill", "chunk"):
        return result
    if graph.spec.token_inputs:
        raise CaptureError(
            f"{type(graph.spec.decoder).__name__} takes {', '.join(graph.spec.token_inputs)} besides embeddings and "
            "positions: the plan's companion token has none of that."
        )
    if graph.phase == "chunk":
        result.applied = _BehindRows(graph).put(settings.plan.companion)
        return result
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


class _BehindRows:
    """Puts it behind the rows of a chunk: at place n of a row with n tokens, where its chunk is longer than that."""

    def __init__(self, graph: DecoderGraph) -> None:
        self._graph = graph
        self._embeds = graph.placeholder("inputs_embeds")

    def put(self, embedding: Tensor) -> int:
        """With an embedding [C]; returns how many attentions were told of it."""
        told = 0
        for node in [n for n in self._graph.graph.nodes if n.target is cached_attention._opoverload]:
            told += self._tell(node)
        self._embed(embedding.detach().to(self._graph.spec.device, self._graph.spec.dtype))
        return told

    def _embed(self, embedding: Tensor) -> None:
        readers = [n for n in self._graph.graph.nodes if self._embeds in n.all_input_nodes]
        readers = [n for n in readers if n.target is not aten.sym_size.int]
        first, layer = readers[0], min(self._graph.layer_of[reader] for reader in readers)
        self._graph.module.register_buffer(NAME, embedding, persistent=False)
        self._graph.parameters[NAME] = lambda: embedding
        with self._graph.graph.inserting_before(first):
            weight = self._graph.graph.get_attr(NAME)
        weight.meta["val"] = self._embeds.meta["val"].fake_mode.from_tensor(embedding, static_shapes=True)
        placed = self._place(first, layer, weight, self._embeds)
        for reader in readers:
            reader.replace_input_with(self._embeds, placed)

    def _tell(self, attention: fx.Node) -> bool:
        """Give it its own value; not where the last token alone goes on from this attention."""
        output = next(n for n in attention.users if n.args[1] == 0)
        readers = list(output.users)
        if all(map(LastTokens.is_cut, readers)):
            return False
        arguments: Any = attention.args
        own, (heads, kv_heads), layer = arguments[2], arguments[7:9], self._graph.layer_of[attention]
        before = output.next
        if heads != kv_heads:  # query heads of a group get the value of their key
            size = own.meta["val"].shape[2] // kv_heads
            own = self._call(before, layer, aten.unflatten.int, own, 2, [kv_heads, 1, size])
            own = self._call(before, layer, aten.expand.default, own, [-1, -1, -1, heads // kv_heads, -1])
            own = self._call(before, layer, aten.flatten.using_ints, own, 2)
        placed = self._place(before, layer, own, output)
        for reader in readers:
            reader.replace_input_with(output, placed)
        return True

    def _place(self, before: fx.Node, layer: int, own: fx.Node, others: fx.Node) -> fx.Node:
        """``own`` at its place, and elsewhere ``others`` [B, T, N]."""
        tokens = self._call(before, layer, aten.sym_size.int, others, 1)
        index = self._call(before, layer, aten.arange.default, tokens)
        lengths = self._call(before, layer, aten.unsqueeze.default, self._graph.placeholder("new_lengths"), 1)
        here = self._call(before, layer, aten.eq.Tensor, index, lengths)  # [B, T]
        here = self._call(before, layer, aten.unsqueeze.default, here, 2)
        return self._call(before, layer, aten.where.self, here, own, others)

    def _call(self, before: fx.Node, layer: int, target: Any, *args: Any) -> fx.Node:
        with self._graph.graph.inserting_before(before):
            node = self._graph.graph.call_function(target, args)
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        # With the dispatcher in Python, composite operations take symbolic sizes (torch 2.11 needs it).
        with torch.no_grad(), self._embeds.meta["val"].fake_mode, enable_python_dispatcher():
            node.meta["val"] = target(*values)
        self._graph.layer_of[node] = layer
        return node
