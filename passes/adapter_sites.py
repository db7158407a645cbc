"""Where in a graph an adapter goes: what it reads, and which linear layers read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from vte_compile.folding import LinearLayer
from vte_compile.passes.manager import Refusal
from vte_compile.passes.residual import ATTENTIONS, residual_add

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

aten = torch.ops.aten
_LINEAR = aten.linear.default
_CASTS = (aten.to.dtype, aten._to_copy.default)
_TOLERANCE = 1e-5
"""Norms of transformers compute in float32 even so."""


@dataclass(frozen=True)
class AdapterSite:
    """The place of one adapter."""

    layer: int
    source: fx.Node
    """[B, T, C]: the adapter's input, the layer's normed input."""
    readers: list[fx.Node]
    """The linear layers that are to read the adapter's output."""
    gain: Tensor | None
    """g [C], where the readers are the FFN's and the norm in front of them goes; None where they are q, k and v."""
    linears: list[LinearLayer] | None
    """The readers' weights; None if one of them is computed (quantized weights, say), so that nothing can be folded."""


def site_before_attention(graph: DecoderGraph, layer: int) -> AdapterSite | Refusal:
    """In front of q, k and v (also as one layer), for a plain adapter."""
    found = _attention(graph, layer)
    if isinstance(found, Refusal):
        return found
    source, readers, _ = found
    return AdapterSite(layer, source, readers, None, _weights(graph, readers))


def site_before_ffn(graph: DecoderGraph, layer: int) -> AdapterSite | Refusal:
    """In front of the FFN, for a PIA, which reads what the attention would; the norm between loses all but its gain."""
    found = _attention(graph, layer)
    if isinstance(found, Refusal):
        return found
    source, _, add = found
    behind = _descendants(graph, add, layer)
    first = _first_linears(graph, [n for n in _own(graph, layer) if n in behind])
    inputs = {n.args[0] for n in first}
    if len(inputs) != 1:
        return Refusal(f"{len(inputs)} inputs of linear layers behind the attention, expected 1.", add.name, layer)
    normed: Any = inputs.pop()
    if others := _other_readers(graph, add, normed, first, layer):
        return Refusal(f"{others[0].name} reads the FFN's input besides its linear layers.", others[0].name, layer)
    gain = _rms_gain(graph, add, normed, layer)
    if gain is None:
        return Refusal(f"{normed.name}, the FFN's input, is no RMSNorm of the residual stream.", normed.name, layer)
    return AdapterSite(layer, source, first, gain, _weights(graph, first))


def _attention(graph: DecoderGraph, layer: int) -> tuple[fx.Node, list[fx.Node], fx.Node] | Refusal:
    """What q, k and v are computed from, the linear layers that do so, and where the attention's output is added."""
    found = _attention_input(graph, layer)
    if isinstance(found, Refusal):
        return found
    add = _plain_add(graph, layer)
    return add if isinstance(add, Refusal) else (*found, add)


def _plain_add(graph: DecoderGraph, layer: int) -> fx.Node | Refusal:
    """Where the attention's last linear layer is added to the stream as it is.

    The adapters' formulas know no norm or scale there (Gemma2 and Granite have one).
    """
    residual = residual_add(graph, layer)
    if isinstance(residual, Refusal):
        return residual
    add, stream = residual
    branch = next(n for n in add.all_input_nodes if n is not stream)
    while branch.target in _CASTS:
        branch = branch.all_input_nodes[0]
    if branch.target is not _LINEAR:
        reason = f"{branch.name} stands between the attention and the residual addition (an extra norm, or a scale)."
        return Refusal(reason, branch.name, layer)
    return add


def _attention_input(graph: DecoderGraph, layer: int) -> tuple[fx.Node, list[fx.Node]] | Refusal:
    """What q, k and v are computed from, and the linear layers that do so."""
    own = _own(graph, layer)
    attentions = [n for n in own if n.target in ATTENTIONS]
    if len(attentions) != 1:
        return Refusal(f"{len(attentions)} attentions in this layer, expected 1.", own[0].name if own else "", layer)
    attention = attentions[0]
    ancestors = {attention}
    for node in reversed(own):
        if any(user in ancestors for user in node.users):
            ancestors.add(node)
    first = _first_linears(graph, [n for n in own if n in ancestors])
    inputs = {n.args[0] for n in first}
    if len(inputs) != 1:
        reason = f"q, k and v are computed by linear layers of {len(inputs)} inputs, expected 1 (quantized weights?)."
        return Refusal(reason, attention.name, layer)
    source: Any = inputs.pop()
    if source.meta["val"].ndim != 3:
        return Refusal(f"q, k and v read {source.name}, which is not [B, T, C].", source.name, layer)
    if others := [n for n in _users(source) if n not in first]:
        return Refusal(f"{others[0].name} reads the attention's input besides q, k and v.", others[0].name, layer)
    return source, first


def _own(graph: DecoderGraph, layer: int) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if graph.layer_of.get(n) == layer]


def _users(node: fx.Node) -> list[fx.Node]:
    """Users that compute something: torch.export also leaves assertions."""
    return [user for user in node.users if user.meta.get("val") is not None]


def _other_readers(
    graph: DecoderGraph, add: fx.Node, normed: fx.Node, first: list[fx.Node], layer: int
) -> list[fx.Node]:
    """What reads the norm behind `add`, its output or a view of that, besides the linear layers that read `normed`."""
    behind = _descendants(graph, add, layer)
    between = {normed}
    for node in reversed([n for n in _own(graph, layer) if n in behind]):
        if any(user in between for user in node.users):
            between.add(node)
    # The stream itself is also read by the FFN's residual addition.
    stream = {add, *(n for n in add.users if n.target in _CASTS)}
    inside = [n for n in _own(graph, layer) if n in between and n not in stream]
    return [user for node in inside for user in _users(node) if user not in between and user not in first]


def _descendants(graph: DecoderGraph, node: fx.Node, layer: int) -> set[fx.Node]:
    behind = {node}
    for other in _own(graph, layer):
        if any(n in behind for n in other.all_input_nodes):
            behind.add(other)
    return behind


def _first_linears(graph: DecoderGraph, nodes: list[fx.Node]) -> list[fx.Node]:
    """The linear layers among these nodes (of one layer, in order) with no other of them in front."""
    within = set(nodes)
    behind: set[fx.Node] = set()
    first = []
    for node in nodes:
        if any(n in behind for n in node.all_input_nodes if n in within):
            behind.add(node)
        elif node.target is _LINEAR:
            first.append(node)
            behind.add(node)
    return first


def _weights(graph: DecoderGraph, linears: list[fx.Node]) -> list[LinearLayer] | None:
    found = []
    for linear in linears:
        weight, bias = linear.args[1], linear.args[2] if len(linear.args) > 2 else None
        tensors = [_parameter(graph, n) for n in (weight, bias) if n is not None]
        if any(t is None for t in tensors):
            return None
        found.append(LinearLayer(*tensors, *[None] * (2 - len(tensors))))  # type: ignore[arg-type]
    return found


def _parameter(graph: DecoderGraph, node: Any) -> Tensor | None:
    """A parameter's tensor, if it is one of plain floating-point numbers."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = graph.parameters[str(node.target)]()
    plain = type(value) in (Tensor, torch.nn.Parameter)
    return value.detach() if plain and value.is_floating_point() and value.dtype.itemsize > 1 else None


class _Unknown(Exception):
    """A norm's subgraph reads something besides the stream and weights."""


@torch.no_grad()
def _rms_gain(graph: DecoderGraph, stream: fx.Node, normed: fx.Node, layer: int) -> Tensor | None:
    """g [C], float64, if `normed` is g * x / rms(x) of the stream x; None if it is something else.

    Asked of the graph itself: the nodes between run on random numbers, so large that the norm's epsilon does not
    matter, in float64. The candidates for g are the weights between, and 1 + weight (Gemma).
    """
    weights: dict[fx.Node, Tensor] = {}
    width = int(stream.meta["val"].shape[-1])
    device = stream.meta["val"].device
    # A mean of 1: what subtracts the mean shows.
    x = 1e4 * (1 + torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0)).double()).to(device)
    values: dict[fx.Node, Any] = {stream: x}

    def evaluate(node: fx.Node) -> Any:
        if node not in values:
            if node.op == "get_attr":
                values[node] = weights[node] = graph.parameters[str(node.target)]().detach().double()
            elif graph.layer_of.get(node) == layer and callable(node.target) and not _is_symbolic(node):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), evaluate)
                # Casts would round: everything runs in float64.
                values[node] = args[0] if node.target in _CASTS else node.target(*args, **kwargs)
            else:
                raise _Unknown
        return values[node]

    try:
        actual = evaluate(normed)
    except _Unknown:
        return None
    if actual.shape != x.shape:
        return None
    unit = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))
    for weight in weights.values():
        for gain in (weight, 1 + weight) if weight.shape == (width,) else ():
            if bool((actual - gain * unit).abs().max() <= _TOLERANCE * (gain * unit).abs().max()):
                return gain
    return None


def _is_symbolic(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)
