"""Which tokens of a Dynamo graph are visual, also where the embedding happened in another graph.

Embeddings that a graph without decoder returns remember the token ids that they were looked up by, and the mask by
which image features were scattered into them, so that the graph with the decoder knows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vte_compile.errors import InputError

_IDS, _VISUAL = "_vte_input_ids", "_vte_visual_mask"


def visual_mask_of(embeds: Tensor, ids: Tensor | None, visual: Tensor | None, token_ids: Sequence[int]) -> Tensor:
    """[B, T] bool.

    Args:
        embeds: [B, T, C]; may remember ids and mask.
        ids: [B, T], where the graph itself looks them up.
        visual: The mask of the graph's own scattering, [B, T] or [B, T, C or 1].
        token_ids: Ids that stand for visual features.

    Raises:
        InputError: Nothing tells which tokens are visual.
    """
    visual = getattr(embeds, _VISUAL, None) if visual is None else visual
    if visual is not None:
        return visual if visual.ndim == 2 else visual.any(-1)
    ids = getattr(embeds, _IDS, None) if ids is None else ids
    if ids is None:
        raise InputError(
            "The plan has exits, but which tokens are visual is not known: the decoder was given embeddings that were "
            "made outside of what torch.compile compiled. Compile the whole model, or use vte_compile.optimize(model, "
            "plan) and pass visual_mask."
        )
    # A language model alone embeds text only, so no id of it can be visual.
    return torch.isin(ids, torch.tensor(list(token_ids), device=ids.device, dtype=ids.dtype))


def scatter_mask(embeds: fx.Node) -> fx.Node | None:
    """The mask by which a graph writes image features into these embeddings; of several, all of them in one."""
    masks: list[fx.Node] = []
    node = embeds
    while isinstance(node, fx.Node) and node.op in ("call_method", "call_function"):
        if str(node.target).split(".")[-1].startswith("masked_scatter"):
            masks.append(node.args[1])  # type: ignore[arg-type]
        elif node.target in _LOOKUPS:
            break
        inputs = [n for n in node.all_input_nodes if _shape(n) == _shape(embeds)]
        if len(inputs) != 1 and node.args:
            inputs = [n for n in inputs if n is node.args[0]]
        if not inputs:
            break
        node = inputs[0]
    if not masks:
        return None
    first, *others = masks
    graph = embeds.graph
    with graph.inserting_before(embeds.next):
        for other in others:
            merged = graph.call_function(operator.or_, (first, other))
            merged.meta["example_value"] = first.meta["example_value"]
            first = merged
    return first


_LOOKUPS = (torch.nn.functional.embedding, torch.embedding)


def looked_up(embeds: fx.Node) -> fx.Node | None:
    """The token ids [B, T] by which a graph looked these embeddings up, if it did."""
    seen, queue = set(), [embeds]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _LOOKUPS:
            ids = node.args[0]
            return ids if isinstance(ids, fx.Node) and _shape(ids) == _shape(embeds)[:2] else None
        queue += [n for n in node.all_input_nodes if _shape(n) == _shape(embeds)]
    return None


def _shape(node: Any) -> tuple[str, ...]:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    # As text: to compare symbolic sizes themselves would specialize the graph to what they are.
    return tuple(str(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


@dataclass(frozen=True)
class _Marked:
    output: int
    ids: int | None
    visual: int | None
    source: int | None
    """Index of the graph's input that these embeddings are made from, which may remember something itself."""


def remember(gm: fx.GraphModule, compile_graph: Callable[[fx.GraphModule], Callable[..., Any]]) -> Callable[..., Any]:
    """Compile a graph without decoder, such that embeddings it returns remember what they were made from."""
    output = next(n for n in gm.graph.nodes if n.op == "output")
    results: list[Any] = list(output.args[0])
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    marked: list[_Marked] = []
    extra: list[fx.Node] = []

    def add(node: fx.Node | None) -> int | None:
        if node is None:
            return None
        extra.append(node)
        return len(results) + len(extra) - 1

    for i, result in enumerate(results):
        if len(_shape(result)) != 3:
            continue
        visual, ids = scatter_mask(result), looked_up(result)
        source = next((j for j, p in enumerate(placeholders) if _feeds(p, result)), None)
        if visual is not None or ids is not None or source is not None:
            marked.append(_Marked(i, add(ids), add(visual), source))
    if not marked:
        return compile_graph(gm)
    output.args = ((*results, *extra),)
    gm.recompile()
    compiled = compile_graph(gm)
    count = len(results)

    def run(*args: Any) -> Any:
        given = compiled(*args)
        for mark in marked:
            embeds = given[mark.output]
            before = args[mark.source] if mark.source is not None else None
            for name, index in ((_IDS, mark.ids), (_VISUAL, mark.visual)):
                value = given[index] if index is not None else getattr(before, name, None)
                if value is not None:
                    setattr(embeds, name, _merged(value, getattr(before, name, None)) if name == _VISUAL else value)
        return given[:count]

    return run


def _merged(mask: Tensor, before: Tensor | None) -> Tensor:
    mask = mask if mask.ndim == 2 else mask.any(-1)
    return mask if before is None or before is mask else mask | before


def _feeds(placeholder: fx.Node, result: fx.Node) -> bool:
    """Whether embeddings of this shape come from this input, changed or not."""
    node = result
    while isinstance(node, fx.Node) and node is not placeholder:
        inputs = [n for n in node.all_input_nodes if _shape(n) == _shape(result)]
        if not inputs:
            return False
        node = inputs[0]
    return node is placeholder and _shape(placeholder) == _shape(result)
