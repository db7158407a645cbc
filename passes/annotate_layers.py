"""annotate_layers: which decoder layer each node belongs to, and where the residual stream leaves each layer.

Reads nn_module_stack. Nodes that belong to no module of a layer stay with the latest layer they depend on, and nodes
behind the last layer belong to the tail. Sorts the graph by layer, so that "after layer k" is one place in it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import fx

from vte_compile.errors import CaptureError
from vte_compile.passes.manager import PassResult, PassSettings

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

# Where modules are shared, torch.export names the layers as the decoder takes them: layers.slice(None, 3, None).0
LAYER_PATH = re.compile(r"(?:^|\.)layers\.(?:slice\([^)]*\)\.)?(\d+)(?:\.|$)")


def annotate_layers(graph: DecoderGraph, settings: PassSettings) -> PassResult:
    """Fill ``graph.layer_of`` and ``graph.streams``; ``applied`` counts the layers found.

    Raises:
        CaptureError: A layer left no trace, or more than one value could be its residual stream.
    """
    last = graph.spec.num_layers
    layer_of: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        depends = max((layer_of.get(n, -1) for n in node.all_input_nodes), default=-1)
        own = layer_in_stack(node)
        if own is None and depends == last - 1 and not _feeds_a_layer(node):
            own = last
        layer_of[node] = depends if own is None else max(own, depends)
    _move_constants(layer_of)
    graph.layer_of = layer_of
    _sort_by_layer(graph)
    graph.streams = [_stream(graph, layer) for layer in range(last)]
    return PassResult("annotate_layers", applied=len(graph.streams))


def _move_constants(layer_of: dict[fx.Node, int]) -> None:
    """What is computed from weights alone (Gemma's 1 + weight) belongs where it is first used, as a weight does."""
    constant: set[fx.Node] = set()
    for node in layer_of:
        if node.all_input_nodes and all(n.op == "get_attr" or n in constant for n in node.all_input_nodes):
            constant.add(node)
    for node in reversed([n for n in layer_of if n in constant]):
        layer_of[node] = min((layer_of[user] for user in node.users if user in layer_of), default=layer_of[node])


def layer_in_stack(node: fx.Node) -> int | None:
    """The decoder layer whose module a node was traced in; None outside of them."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        if found := LAYER_PATH.search(path):
            return int(found.group(1))
    return None


def _feeds_a_layer(node: fx.Node) -> bool:
    """Whether some later node of a layer depends on this one."""
    seen, queue = set(), list(node.users)
    while queue:
        user = queue.pop()
        if user in seen:
            continue
        seen.add(user)
        if layer_in_stack(user) is not None:
            return True
        queue += user.users
    return False


def _sort_by_layer(graph: DecoderGraph) -> None:
    """Move nodes so that layers follow each other. A node's layer is at least that of its inputs, so this is sound."""
    nodes = [n for n in graph.graph.nodes if n in graph.layer_of]
    output = next(n for n in graph.graph.nodes if n.op == "output")
    for node in sorted(nodes, key=lambda n: graph.layer_of[n]):  # sorted() is stable
        output.prepend(node)
    graph.graph.lint()


def _stream(graph: DecoderGraph, layer: int) -> fx.Node:
    """The one floating-point value that leaves a layer for a later one."""
    leaving = [
        node
        for node, own in graph.layer_of.items()
        if own == layer
        and isinstance(value := node.meta.get("val"), torch.Tensor)
        and value.is_floating_point()
        and any(graph.layer_of.get(user, -1) > layer for user in node.users)
    ]
    if len(leaving) != 1:
        names = ", ".join(n.name for n in leaving) or "nothing"
        raise CaptureError(f"layer {layer}: expected one residual stream to leave it, found {names}.")
    return leaving[0]
