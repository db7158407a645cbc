"""Put a call of the decoder's rewritten graphs in its place in a Dynamo graph, and cut the graph there."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from vte_compile.dynamo.decoder_call import CallLayout
from vte_compile.dynamo.region import Region
from vte_compile.dynamo.visual import looked_up, scatter_mask


def decoder_call(*values: Any) -> Any:
    """The mark in a graph where :class:`DecoderCall` runs; it is never called itself."""
    raise NotImplementedError


def replace_region(gm: fx.GraphModule, region: Region) -> CallLayout:
    """Put a call in the place of the decoder, in the graph.

    Args:
        gm: The graph; it is changed.
        region: What :func:`find_region` found in it.
    """
    graph = gm.graph
    visual = scatter_mask(region.embeds)
    ids = None if visual is not None else looked_up(region.embeds)
    named = [region.embeds, region.positions]
    named += [n for n in (region.mask, ids, visual, region.counted) if n is not None]
    named += region.deepstack
    after = region.hidden if region.last else region.nodes[-1]
    with graph.inserting_after(after):
        node = graph.call_function(decoder_call, tuple(named + region.past))
    results = [region.hidden, *[stored.kept for stored in region.kv if stored.kept is not None]]
    at = node
    for i, old in enumerate(results):
        with graph.inserting_after(at):
            at = graph.call_function(operator.getitem, (node, i))
        value = old.meta["example_value"]
        # Laid out anew: the strides of the last token's, a slice, would name the length, which its shape does not.
        at.meta["example_value"] = value.new_empty(value.shape) if old is region.hidden else value
        old.replace_all_uses_with(at)
    _remove(graph, region)
    graph.lint()
    return CallLayout(
        masked=region.mask is not None,
        ids=ids is not None,
        visual=visual is not None,
        past=bool(region.past),
        counted=region.counted is not None,
        deepstack=max(len(region.deepstack) - 1, 0),
        kv=tuple(stored.shape for stored in region.kv),
        last=region.last,
    )


def _remove(graph: fx.Graph, region: Region) -> None:
    """Delete what nothing uses any more; that a StaticCache counts its tokens stays."""
    doomed = set(region.nodes) | {region.hidden}
    for node in reversed(list(graph.nodes)):
        counts = node.op == "call_method" and node.target == "add_"
        if node in doomed and not node.users and not counts:
            graph.erase_node(node)


@dataclass
class Part:
    """A part of a graph as a module of its own: names of the values that it takes and gives."""

    module: fx.GraphModule
    inputs: list[str]
    outputs: list[str]


def split(gm: fx.GraphModule) -> tuple[Part, Part, Part]:
    """What comes before the call, the call (with an empty module), and what follows it."""
    call = next(n for n in gm.graph.nodes if n.target is decoder_call)
    results = [n for n in gm.graph.nodes if call in n.all_input_nodes]
    before: list[fx.Node] = []
    behind: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        if node is call or node in results or node.op == "placeholder":
            continue
        if any(n in results or n in behind for n in node.all_input_nodes):
            behind[node] = None
        else:
            before.append(node)
    replaced = Part(fx.GraphModule({}, fx.Graph()), [n.name for n in call.args], [n.name for n in results])
    return _part(gm, before), replaced, _part(gm, [n for n in behind if n.op != "output"])


def _part(gm: fx.GraphModule, nodes: list[fx.Node]) -> Part:
    own = set(nodes)
    inputs = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in own))
    outputs = [n for n in nodes if any(user not in own for user in n.users)]
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[n] for n in outputs))
    return Part(fx.GraphModule(gm, graph), [n.name for n in inputs], [n.name for n in outputs])
