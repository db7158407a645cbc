"""attention_layout: what splits and merges heads around an op that takes them merged goes.

A model lays out heads as [B, heads, T, D]; ``vte::cached_attention`` and ``vte::rotary`` take [B, T, heads * D], as
linear layers give it. In graphs of the phase "chunk" only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from vte_compile.passes.manager import PassResult, PassSettings

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

aten = torch.ops.aten
_RESHAPES = (aten.reshape.default, aten.view.default, aten.flatten.using_ints)


def attention_layout(graph: DecoderGraph, settings: PassSettings) -> PassResult:
    """Read through reshapes and transpositions that cancel; ``applied`` counts the values that do no more."""
    result = PassResult("attention_layout")
    if graph.phase != "chunk":
        return result
    for node in list(graph.graph.nodes):
        if node.target in _RESHAPES and node.meta["val"].ndim == 3:
            same = _same(node)
            if same is not None:
                node.replace_all_uses_with(same)
                result.applied += 1
    return result


def _same(node: fx.Node) -> fx.Node | None:
    """The earliest value that a chain of reshapes and swaps of dims 1 and 2 leaves as it is."""
    same, swapped, value = None, False, node
    while value.target in _RESHAPES or (value.target is aten.transpose.int and set(value.args[1:]) == {1, 2}):
        if value.target is aten.transpose.int:
            swapped = not swapped
        elif swapped:
            break
        before: Any = value.args[0]
        value = before
        if not swapped and _shape(value) == _shape(node):
            same = value
    return same


def _shape(node: fx.Node) -> list[Any]:
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape]
