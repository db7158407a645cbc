"""Remove what no output depends on, and keep writes in place to tensors that are read.

A write through a view (``keys[..., :n] = rotated``, as in DeepSeek's multi-head latent attention) is a node without
users. fx keeps every such node; here one goes when what it writes to goes.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

_MAY_ALIAS = (torch.ops.aten.reshape.default, torch.ops.aten.contiguous.default, torch.ops.aten.flatten.using_ints)
"""Views of their input at times, which their schemas do not say."""


def remove_dead_nodes(graph: fx.Graph) -> None:
    """Erase the nodes that no output depends on, but for placeholders."""
    writes = [node for node in graph.nodes if _writes(node)]
    alive: set[fx.Node] = set()
    _mark([node for node in graph.nodes if node.op in ("placeholder", "output")], alive)
    while awake := [node for node in writes if node not in alive and _written(node) in alive]:
        _mark(awake, alive)
    for node in reversed(list(graph.nodes)):
        if node not in alive:
            graph.erase_node(node)


def _mark(nodes: list[fx.Node], alive: set[fx.Node]) -> None:
    while nodes:
        node = nodes.pop()
        if node not in alive:
            alive.add(node)
            nodes.extend(node.all_input_nodes)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _written(node: fx.Node) -> fx.Node:
    """The tensor a write ends up in, behind all views."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    while source.op == "call_function" and _aliases(source) and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    return source


def _aliases(node: fx.Node) -> bool:
    """Whether its result may share memory with its first argument."""
    if node.target is operator.getitem or node.target in _MAY_ALIAS:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(result.alias_info is not None for result in node.target._schema.returns)
