"""Find the decoder in a Dynamo graph.

What enters the decoder and what leaves it is read off the graph: nodes carry the path of the module they were traced
in. What is inside is not used: Dynamo has made the batch, and often the lengths, constants there.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from vte_compile.dynamo.attention import Attention, find_attention
from vte_compile.dynamo.stored import Stored, find_stored
from vte_compile.errors import UnsupportedModelError

_LAYER = re.compile(r"\.layers\.(\d+)(?:\.|$)")


@dataclass
class Region:
    """Where the decoder is in a graph."""

    path: str
    """Of the decoder, as nodes name it."""
    embeds: fx.Node
    positions: fx.Node
    mask: fx.Node | None
    """Of layers that see all tokens, if there is such a one."""
    hidden: fx.Node
    """What leaves the decoder: hidden states of all tokens, or what slices the last one's from them."""
    last: bool
    kv: list[Stored]
    """Keys and values of all layers in turn."""
    counted: fx.Node | None
    """How many tokens a StaticCache holds."""
    deepstack: list[fx.Node]
    """Where visual tokens are, and what is added to them behind layers 0, 1 ..; empty where nothing is."""
    nodes: list[fx.Node] = field(repr=False)

    @property
    def past(self) -> list[fx.Node]:
        """Keys and values of all layers in turn, inputs of the graph; empty in prefill."""
        return [stored.past for stored in self.kv if stored.past is not None]


def find_region(
    graph: fx.Graph, weights: Sequence[fx.Node], windowed: Sequence[bool], softcap: float | None = None
) -> Region:
    """The decoder in a graph.

    Args:
        graph: Dynamo's.
        weights: Its inputs that are weights of the decoder's first layer.
        windowed: Of each layer, whether it has a sliding window.
        softcap: By how much attention caps its scores; None: it does not.

    Raises:
        UnsupportedModelError: The graph does not hold the decoder as a whole, or not as transformers writes it.
    """
    path = _decoder_path(weights)
    nodes = [n for n in graph.nodes if n.op != "placeholder" and _inside(n, path)]
    by_layer: dict[int, list[fx.Node]] = {}
    for node in nodes:
        if (layer := _layer(node, path)) is not None:
            by_layer.setdefault(layer, []).append(node)
    num_layers = len(windowed)
    if sorted(by_layer) != list(range(num_layers)):
        raise UnsupportedModelError(
            f"the graph holds {len(by_layer)} of the decoder's {num_layers} layers: a graph break splits the decoder."
        )
    attentions = [find_attention(by_layer[layer], layer, softcap) for layer in range(num_layers)]
    returned = set(next(n for n in graph.nodes if n.op == "output").all_input_nodes)
    kv = [find_stored(read, layer, returned) for layer, own in enumerate(attentions) for read in (own.key, own.value)]
    if len({stored.past is None for stored in kv}) > 1:
        raise UnsupportedModelError("some layers have earlier keys and values, others have none.")
    if any(windowed) and any(stored.is_buffer for stored in kv):
        raise UnsupportedModelError(
            "a StaticCache of layers with sliding windows overwrites what left the window: use a DynamicCache, as "
            "generate() does unless it is told otherwise."
        )
    held = {node for stored in kv for node in (stored.read, stored.kept) if node is not None}
    hidden, last = _hidden(by_layer[num_layers - 1], nodes, held)
    region = Region(
        path,
        _embeds(by_layer[0], path),
        _positions(nodes, path),
        _mask(attentions, windowed),
        hidden,
        last,
        kv,
        _counted(graph, nodes),
        _deepstack(nodes, path),
        nodes,
    )
    _refuse_other_outputs(region, set(nodes) | {hidden}, held)
    return region


def _stack(node: fx.Node) -> list[str]:
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def _decoder_path(weights: Sequence[fx.Node]) -> str:
    for weight in weights:
        for user in weight.users:
            for path in _stack(user):
                if found := _LAYER.search(path):
                    return path[: found.start()]
    raise UnsupportedModelError("no node of the graph says that it belongs to a layer of the decoder.")


def _inside(node: fx.Node, path: str) -> bool:
    return any(p == path or p.startswith(path + ".") for p in _stack(node))


def _layer(node: fx.Node, path: str) -> int | None:
    for p in _stack(node):
        if p.startswith(path + ".layers."):
            found = _LAYER.match(p, len(path))
            if found is not None:
                return int(found.group(1))
    return None


def _mask(attentions: Sequence[Attention], windowed: Sequence[bool]) -> fx.Node | None:
    """The mask of the layers without windows, or of all if each has one; layers of a kind share theirs."""
    masks: dict[bool, set[fx.Node | None]] = {}
    for attention, window in zip(attentions, windowed, strict=True):
        masks.setdefault(window, set()).add(attention.mask)
    if any(len(of_kind) > 1 for of_kind in masks.values()):
        raise UnsupportedModelError("layers of one kind attend through different masks.")
    return masks[min(masks)].pop()


def _embeds(first: list[fx.Node], path: str) -> fx.Node:
    """The stream that enters the first layer: the floating-point [B, T, C] that it reads and does not compute."""
    inside = set(first)
    found = dict.fromkeys(n for node in first for n in node.all_input_nodes if n not in inside and _is_stream(n))
    entering = [n for n in found if not _is_rotary(n, path)]
    if len(entering) != 1:
        names = ", ".join(n.name for n in entering) or "nothing"
        raise UnsupportedModelError(f"layer 0: expected one stream of embeddings to enter it, found {names}.")
    return entering[0]


def _is_stream(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    if isinstance(value, torch.nn.Parameter):  # experts' weights have three dims, too
        return False
    return isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point()


def _is_rotary(node: fx.Node, path: str) -> bool:
    return any(p.startswith(path + ".rotary_emb") for p in _stack(node))


def _positions(nodes: list[fx.Node], path: str) -> fx.Node:
    for node in nodes:
        if _is_rotary(node, path):
            for source in node.all_input_nodes:
                value = source.meta.get("example_value")
                if isinstance(value, torch.Tensor) and value.dtype == torch.long and not _is_rotary(source, path):
                    return source
    raise UnsupportedModelError("no positions enter the decoder's rotary_emb.")


def _hidden(top: list[fx.Node], nodes: list[fx.Node], held: set[fx.Node]) -> tuple[fx.Node, bool]:
    """What leaves the decoder besides keys and values, and whether that is the last token's only."""
    inside = set(nodes)
    first = nodes.index(top[0])
    leaving = [n for n in nodes[first:] if n not in held and _is_stream(n) and any(u not in inside for u in n.users)]
    if len(leaving) != 1:
        names = ", ".join(n.name for n in leaving) or "nothing"
        raise UnsupportedModelError(f"expected hidden states alone to leave the decoder's top, found {names}.")
    hidden = leaving[0]
    users = [u for u in hidden.users if u not in inside]
    if len(users) == 1 and users[0].args[1:] == ((slice(None), slice(-1, None), slice(None)),):
        return users[0], True
    return hidden, False


def _counted(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node | None:
    """The first layer's count of a StaticCache that existed before."""
    inside = set(nodes)
    for node in graph.nodes:
        # (A window of a DynamicCache counts in a number.)
        counts = "cumulative_length" in node.name and isinstance(node.meta.get("example_value"), torch.Tensor)
        if node.op == "placeholder" and counts and any(user in inside for user in node.users):
            return node
    return None


def _deepstack(nodes: list[fx.Node], path: str) -> list[fx.Node]:
    """The mask and features of what is written between layers: ``stream[mask, :] = stream[mask, :] + features``."""
    inside = set(nodes)
    masks: dict[fx.Node, None] = {}
    features: list[fx.Node] = []
    for node in nodes:
        if node.target is not operator.setitem or _layer(node, path) is not None or _is_rotary(node, path):
            continue
        stream, index, value = node.args
        added: Any = value.args if isinstance(value, fx.Node) and value.target is operator.add else (None, None)
        read = getattr(added[0], "args", None)
        if not isinstance(index, tuple) or read != (stream, index) or index[1:] != (slice(None),):
            raise UnsupportedModelError(f"{node.name} writes into the stream between layers in an unknown way.")
        masks[_given(index[0], inside)] = None
        features.append(_given(added[1], inside))
    if len(masks) > 1:
        raise UnsupportedModelError("features are added behind layers to different tokens.")
    return [*masks, *features]


def _given(node: Any, inside: set[fx.Node]) -> fx.Node:
    """What enters the decoder as this value, which at most another dtype or device was asked of."""
    while node in inside and node.op == "call_method" and node.target == "to":
        node = node.args[0]
    if not isinstance(node, fx.Node) or node in inside:
        raise UnsupportedModelError(f"{node} is computed between layers, where features were expected.")
    return node


def _refuse_other_outputs(region: Region, inside: set[fx.Node], held: set[fx.Node]) -> None:
    for node in region.nodes:
        value = node.meta.get("example_value")
        # Whole numbers are what a StaticCache counts.
        if node in held or node is region.hidden:
            continue
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        if any(user not in inside for user in node.users) and _layer(node, region.path) is not None:
            raise UnsupportedModelError(
                f"{node.name}, of {_stack(node)[-1]}, is used outside of the decoder (output_hidden_states or "
                "output_attentions?)."
            )
