"""Trace each kind of decoder layer once: export the first layers of a decoder, and repeat their nodes for the others.

Tracing costs as much for the thirtieth equal layer as for the first. Two layers are of one kind if their modules are
built alike, attribute by attribute. The first layers are traced, up to where all kinds occurred with a neighbour on
either side; of the others, nodes are copied. Where that is not proven, all layers are traced, so nothing depends on it;
and optimize() compares the result with the model (runtime/verify.py).

A copied layer shares the ``val`` metadata of the one it is a copy of, and so the symbol of its past length.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, fx, nn

from vte_compile.module_tree import shallow_copy
from vte_compile.passes.annotate_layers import LAYER_PATH, layer_in_stack

_LAYER_INPUT = re.compile(r"(past_key|past_value|kv_start)_(\d+)")
# Attributes that say which layer it is, and nothing of what it does.
_INDEX = "layer_idx"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_VALUES = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class NotRepeatable(Exception):
    """What was traced of the first layers cannot be continued; the message says why."""


def layer_kinds(decoder: Any) -> list[int]:
    """A number per layer, the same for layers that are built alike: that of the first of them."""
    layers = list(decoder.layers)
    owned = [id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())]
    if len(set(owned)) < len(owned) or len(set(map(id, layers))) < len(layers):
        return list(range(len(layers)))  # weights that layers share are traced under one name
    kinds: list[int] = []
    for index, layer in enumerate(layers):
        said = _said_of(decoder.config, index, len(layers))
        alike = (
            first
            for first in dict.fromkeys(kinds)
            if said == _said_of(decoder.config, first, len(layers)) and _built_alike(layers[first], layer)
        )
        kinds.append(next(alike, index))
    return kinds


def _said_of(config: Any, index: int, count: int) -> list[tuple[str, Any]]:
    """What a config says of one layer: its entry in each list that has one per layer (``layer_types``)."""
    lists = ((name, value) for name, value in vars(config).items() if isinstance(value, (list, tuple)))
    return [(name, value[index]) for name, value in lists if len(value) == count]


def _built_alike(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = dict(first.named_modules()), dict(second.named_modules())
    return ours.keys() == theirs.keys() and all(_same(ours[path], theirs[path]) for path in ours)


def _same(first: nn.Module, second: nn.Module) -> bool:
    if type(first) is not type(second):
        return False
    if any(vars(m)[name] for m in (first, second) for name in _HOOKS):
        return False
    for table in ("_parameters", "_buffers"):
        if _shapes(vars(first)[table]) != _shapes(vars(second)[table]):
            return False
    ours, theirs = _attributes(first), _attributes(second)
    return ours.keys() == theirs.keys() and all(_equal(ours[name], theirs[name]) for name in ours)


def _shapes(tensors: dict[str, Tensor | None]) -> dict[str, Hashable]:
    return {name: None if t is None else (type(t), t.shape, t.dtype, t.device) for name, t in tensors.items()}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a class set on its module, besides weights and submodules."""
    own = vars(nn.Module()).keys() | {_INDEX}
    return {name: value for name, value in vars(module).items() if name not in own}


def _equal(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_equal, first, second))
    return isinstance(first, _VALUES) and bool(first == second)


def layers_to_trace(kinds: list[int]) -> int:
    """How many of the first layers to trace, so that each other one has its like among them, but for first and last."""
    for count in range(3, len(kinds)):
        if set(kinds[count:]) <= set(kinds[1 : count - 1]):
            return count
    return len(kinds)


def with_first_layers(module: Any, count: int) -> Any:
    """A copy of a module with ``.decoder`` that has only its decoder's first layers. The module is not changed."""
    short = shallow_copy(module)
    short.decoder = shallow_copy(module.decoder)
    short.decoder.layers = nn.ModuleList(list(module.decoder.layers)[:count])
    return short


def repeat_layers(module: fx.GraphModule, whole: nn.Module, kinds: list[int], traced: int) -> None:
    """Continue a graph of the first layers: the others are copies of them.

    Args:
        module: What was traced; it is changed. Its inputs have the names of vte_compile/capture/phases.py.
        whole: Owns the weights of all layers, at ``decoder.layers``.
        kinds: As :func:`layer_kinds` gives them.
        traced: How many layers the graph has.

    Raises:
        NotRepeatable: More than the residual stream goes from layer to layer, or it is not found.
    """
    graph = module.graph
    layer_of = _layers(graph)
    output = next(n for n in graph.nodes if n.op == "output")
    results: list[fx.Node] = list(output.args[0])
    if len(results) != 1 + 2 * traced:
        raise NotRepeatable(f"{len(results)} outputs of {traced} layers")
    stream = top = _leaving(graph, layer_of, traced - 1)
    sources = {kind: index for index, kind in enumerate(kinds[: traced - 1]) if index > 0}
    at = top.next
    for layer in range(traced, len(kinds)):
        source = sources[kinds[layer]]
        env: dict[fx.Node, fx.Node] = {_entering(layer_of, source): stream}
        _add_inputs(graph, source, layer, env)
        with graph.inserting_before(at):
            for node in [n for n, own in layer_of.items() if own == source]:
                _copy(module, whole, node, source, layer, env)
        stream = env[_leaving(graph, layer_of, source)]
        results += [env[n] for n in results[1 + 2 * source : 3 + 2 * source]]
    copied = set(graph.nodes) - set(layer_of)
    for user in list(top.users):
        if user not in copied and user is not output and layer_in_stack(user) != traced - 1:
            user.replace_input_with(top, stream)
    output.args = (tuple(results),)
    graph.lint()


def _layers(graph: fx.Graph) -> dict[fx.Node, int | None]:
    """Of all nodes but weights and shared inputs; None where a node belongs to no layer."""
    layer_of: dict[fx.Node, int | None] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            if found := _LAYER_INPUT.fullmatch(node.name):
                layer_of[node] = int(found.group(2))
        elif node.op not in ("get_attr", "output"):
            own = layer_in_stack(node)
            if own is None:  # a size, say: it belongs where what it is the size of does
                of_inputs = [layer_of.get(n) for n in node.all_input_nodes]
                own = max((i for i in of_inputs if i is not None), default=None)
            layer_of[node] = own
    return {node: own for node, own in layer_of.items() if node.op != "placeholder"}


def _is_stream(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _entering(layer_of: dict[fx.Node, int | None], layer: int) -> fx.Node:
    """The one value of other layers that a layer reads."""
    read = dict.fromkeys(n for node, own in layer_of.items() if own == layer for n in node.all_input_nodes)
    found = [n for n in read if layer_of.get(n) is not None and layer_of[n] != layer]
    return _only(found, f"enter layer {layer}")


def _leaving(graph: fx.Graph, layer_of: dict[fx.Node, int | None], layer: int) -> fx.Node:
    """The one value of a layer that is read behind it; of the last one traced, by what is in no layer."""

    def behind(user: fx.Node) -> bool:
        return user.op != "output" and layer_in_stack(user) != layer and _is_stream(user)

    of_layer = [n for n, own in layer_of.items() if own == layer and layer_in_stack(n) == layer]
    return _only([n for n in of_layer if _is_stream(n) and any(map(behind, n.users))], f"leave layer {layer}")


def _only(found: list[fx.Node], does: str) -> fx.Node:
    if len(found) != 1 or not _is_stream(found[0]):
        raise NotRepeatable(f"{', '.join(n.name for n in found) or 'nothing'}: expected one residual stream to {does}")
    return found[0]


def _add_inputs(graph: fx.Graph, source: int, layer: int, env: dict[fx.Node, fx.Node]) -> None:
    """A layer's own keys, values and starts, behind those of the layer before."""
    inputs = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    for name, of_source in list(inputs.items()):
        found = _LAYER_INPUT.fullmatch(name)
        if found is None or int(found.group(2)) != source:
            continue
        stem = found.group(1)
        before = {"past_key": f"past_value_{layer - 1}", "past_value": f"past_key_{layer}"}
        with graph.inserting_after(inputs[before.get(stem, f"{stem}_{layer - 1}")]):
            own = graph.placeholder(f"{stem}_{layer}")
        own.meta = dict(of_source.meta)
        env[of_source] = inputs[own.name] = own


def _copy(
    module: fx.GraphModule, whole: nn.Module, node: fx.Node, source: int, layer: int, env: dict[fx.Node, fx.Node]
) -> None:
    def mapped(read: fx.Node) -> fx.Node:
        if read.op == "get_attr" and read not in env:
            env[read] = _weight(module, whole, read, source, layer)
        return env.get(read, read)

    copy = env[node] = module.graph.node_copy(node, mapped)
    stack = node.meta.get("nn_module_stack") or {}
    copy.meta["nn_module_stack"] = {k: (_moved(path, layer), kind) for k, (path, kind) in stack.items()}


def _moved(path: str, layer: int) -> str:
    found = LAYER_PATH.search(path)
    return path if found is None else f"{path[: found.start(1)]}{layer}{path[found.end(1) :]}"


def _weight(module: fx.GraphModule, whole: nn.Module, node: fx.Node, source: int, layer: int) -> fx.Node:
    """The same weight of another layer; what is no layer's own is shared."""
    target = str(node.target)
    prefix = f"decoder.layers.{source}."
    if not target.startswith(prefix):
        return node
    moved = f"decoder.layers.{layer}.{target.removeprefix(prefix)}"
    path, _, name = moved.rpartition(".")
    owner: nn.Module = module
    for part in path.split("."):
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    value: Any = getattr(whole.get_submodule(path), name)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    else:
        owner.register_buffer(name, value)
    copy = module.graph.get_attr(moved)
    copy.meta = dict(node.meta)
    return copy
