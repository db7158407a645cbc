"""last_layer_queries: where only the last token's logits are wanted, the last layers ask for that token alone.

The last layer that attends needs keys and values of all tokens, for the cache, but its query, attention, residual
stream and FFN for the last token only. Layers above it, whose attentions are skipped, need nothing else either: but for
what adapters want to know of the prompt, which is a mean over all tokens. Lossless; about three quarters of one layer's
prefill, and all of each skipped layer's.

In chunks of engines, rows have padding behind, and the operators that append to a cache take as many queries as keys:
there all tokens ask, and what stands behind the attention is computed for each row's last token only.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from vte_compile.kernels.cached_attention import cached_attention
from vte_compile.passes.last_tokens import LastTokens, last_tokens
from vte_compile.passes.manager import PassResult, PassSettings, Refusal
from vte_compile.passes.residual import CAUSAL, PACKED, SDPA, residual_add

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

aten = torch.ops.aten
CACHED = cached_attention._opoverload


def last_layer_queries(graph: DecoderGraph, settings: PassSettings) -> PassResult:
    """Cut the last layers to the last token, keys, values and means excepted; ``applied`` counts the layers."""
    result = PassResult("last_layer_queries")
    if not settings.last_token_logits or graph.phase == "decode":
        return result
    # Chunks are cut at exits, where all tokens are wanted; in other graphs an exit is a node, which refuses.
    cut_behind = {planned.layer for planned in settings.plan.exits} if graph.phase == "chunk" else set()
    for layer in reversed(range(graph.spec.num_layers)):
        if layer in cut_behind:
            break
        attends = layer in graph.kv_layers
        refusal = _cut_attention(graph, layer) if attends else _cut_skipped(graph, layer)
        if refusal is not None:
            result.refusals.append(refusal)
            break
        result.applied += 1
        if attends or layer == 0 or not _enters_as_last_token(graph, layer):
            break
    return result


def _length(graph: DecoderGraph) -> Any:
    return _size(graph.placeholder("inputs_embeds").meta["val"].shape[1])


def _cut_attention(graph: DecoderGraph, layer: int) -> Refusal | None:
    found = residual_add(graph, layer)
    if isinstance(found, Refusal):
        return found
    add, stream = found
    own = [n for n in graph.graph.nodes if graph.layer_of.get(n) == layer]
    attention = next(n for n in own if n.target in (SDPA, CAUSAL, PACKED, CACHED))
    if attention.target is CACHED:  # its other results are what the layer caches
        attention = next(n for n in attention.users if n.args[1] == 0)
    length = _length(graph)
    behind = _behind(graph, attention, layer)
    refusal = _refuse(behind, add, stream, attention, length, layer)
    if refusal is not None:
        return refusal
    last = last_tokens(graph, layer, own[0])
    if graph.phase == "chunk":
        behind = behind[1:]
        cut = last.of(attention, 1, behind[0])
        for node in behind:
            node.replace_input_with(attention, cut)
        _cut(last, add, add.args.index(stream), 1)
        _shorten(last, behind, length)
        _join_cuts(graph, last, layer)
        return None
    _cut(last, attention, 0, 2)
    if attention.target is PACKED:
        attention.update_arg(3, last.cu_seqlens())
    elif len(attention.args) > 3 and attention.args[3] is not None:
        _cut(last, attention, 3, 2)
    elif attention.target is SDPA:  # one query, the last: it sees all keys
        query, key, value = attention.args[:3]
        attention.args = (query, key, value, None, 0.0, False)
    _cut(last, add, add.args.index(stream), 1)
    _shorten(last, behind, length)
    _join_cuts(graph, last, layer)
    return None


def _cut_skipped(graph: DecoderGraph, layer: int) -> Refusal | None:
    """A layer without attention: tokens meet in the mean over the prompt only, if it has one."""
    length = _length(graph)
    own = [n for n in graph.graph.nodes if graph.layer_of.get(n) == layer and n.meta.get("val") is not None]

    def is_long(node: fx.Node) -> bool:
        return any(_size(size) == length for size in getattr(node.meta.get("val"), "shape", ()))

    if taken := [n for n in own if isinstance(n.meta["val"], list)]:
        return Refusal(f"{taken[0].name} takes the tokens of the layer apart.", taken[0].name, layer)
    whole: set[fx.Node] = set()
    for node in reversed(own):
        # Means over channels, of norms, are of each token. In chunks, a mean is a sum of what is no padding.
        of_all = node.target in (aten.mean.dim, aten.sum.dim_IntList) and node.args[1] == [1]
        if of_all or any(user in whole for user in node.users):
            whole.add(node)
    entering = _entering(graph, layer)
    rest = [n for n in own if n not in whole and is_long(n)]
    inputs = dict.fromkeys(n for node in rest for n in node.all_input_nodes if n not in rest)
    long = [n for n in inputs if is_long(n)]
    if flat := [n for n in long if graph.phase == "chunk" and n.meta["val"].ndim != 3]:
        return Refusal(f"{flat[0].name} has not a vector of each token.", flat[0].name, layer)
    if others := [n for n in long if n is not entering and n not in whole]:
        return Refusal(f"the layer also uses {others[0].name}.", others[0].name, layer)
    if not long:
        return None
    last = last_tokens(graph, layer, own[0])
    for source in long:
        first = next(n for n in rest if source in n.all_input_nodes)
        cut = last.of(source, 1, first)
        for node in rest:
            node.replace_input_with(source, cut)
    _shorten(last, rest, length)
    _join_cuts(graph, last, layer)
    return None


def _entering(graph: DecoderGraph, layer: int) -> fx.Node:
    return graph.streams[layer - 1] if layer else graph.placeholder("inputs_embeds")


def _enters_as_last_token(graph: DecoderGraph, layer: int) -> bool:
    """Whether a layer that was cut reads the last token of the stream only, and no exit stands before it."""
    entering = _entering(graph, layer)
    own = [n for n in entering.users if graph.layer_of.get(n) == layer]
    return entering.target is not operator.getitem and all(map(LastTokens.is_cut, own))


def _join_cuts(graph: DecoderGraph, last: LastTokens, layer: int) -> None:
    """The stream behind a layer that was cut has last tokens only: what cut it above goes."""
    stream = graph.streams[layer]
    for user in list(stream.users):
        if last.is_cut(user):
            user.replace_all_uses_with(stream)
            graph.graph.erase_node(user)
            del graph.layer_of[user]


def _shorten(last: LastTokens, nodes: list[fx.Node], length: Any) -> None:
    for node in nodes:
        node.args = fx.node.map_arg(node.args, lambda n: last.count if _size(n.meta.get("val")) == length else n)
        value = node.meta["val"]
        for dim in [i for i, size in enumerate(value.shape) if _size(size) == length]:
            value = last.example(value, dim)
        node.meta["val"] = value


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
            return Refusal(f"{node.name} takes the tokens of the layer apart.", node.name, layer)
        for source in node.all_input_nodes:
            known = source in behind or source.op == "get_attr" or (node is add and source is stream)
            if not known and not _is_size(source.meta.get("val"), length):
                return Refusal(f"{node.name} also uses {source.name}.", node.name, layer)
    if attention.target is not SDPA:
        return None
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    if mask is None and not (len(attention.args) > 5 and attention.args[5]):
        return Refusal(f"{attention.name} is not causal.", attention.name, layer)
    if "attn_mask" in attention.kwargs:
        return Refusal(f"{attention.name} is called in another way than torch.export does.", attention.name, layer)
    return None


def _cut(last: LastTokens, node: fx.Node, argument: int, dim: int) -> None:
    """Keep the last positions of one of a node's arguments."""
    source: Any = node.args[argument]
    node.update_arg(argument, last.of(source, dim, node))


def _size(value: Any) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt) else None


def _is_size(value: Any, length: Any) -> bool:
    """Whether a value is the number of tokens, or a size that has nothing to do with it: the batch."""
    size = _size(value)
    return size is not None and (size == length or not size.free_symbols & length.free_symbols)
