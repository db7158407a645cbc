"""An exit inside an ONNX graph: rows without the tokens that left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from vte_compile.export.onnx_graph import OnnxGraph


def compact(
    graph: OnnxGraph, prefix: str, values: Sequence[ir.Value], lengths: ir.Value, leaving: ir.Value, behind: int = 0
) -> tuple[list[ir.Value], ir.Value, ir.Value]:
    """Move each row's staying tokens to its start, in their order, and cut to the longest row.

    Args:
        graph: Under construction.
        prefix: Of the nodes' names.
        values: [B, T, ...] each.
        lengths: [B].
        leaving: [B, T] bool.
        behind: So many places behind a row's last token go along with it, as far as there are any; no lengths count
            them.

    Returns:
        The values of the tokens that stay; the new lengths; and [B, new T] bool: what is a token of the row. Behind
        the last of these there are tokens that left.
    """

    def op(kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return graph.op(kind, inputs, prefix, **attributes)

    length = op("Shape", leaving, start=1, end=2)
    tokens = op("Squeeze", length, graph.constant([0]))
    index = op("Range", graph.constant(0), tokens, graph.constant(1))

    def staying(ends: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Which of the places in front of ends [B] stay, and how many of each row."""
        padding = op("GreaterOrEqual", index, op("Unsqueeze", ends, graph.constant([1])))
        stays = op("Not", op("Or", leaving, padding))
        return stays, op("ReduceSum", op("Cast", stays, to=int(ir.DataType.INT64)), graph.constant([1]), keepdims=0)

    stays, kept = staying(lengths)
    moving = kept
    if behind:
        stays, moving = staying(op("Add", lengths, graph.constant(behind)))
    longest = op("Reshape", op("ReduceMax", moving, keepdims=0), graph.constant([1]))
    # Staying tokens first: each token has a place of its own, so that the order is stable.
    place = op("Where", stays, index, op("Add", index, tokens))
    order = graph.smallest(place, longest, prefix)
    at = op("Unsqueeze", order, graph.constant([2]))
    moved = [op("GatherND", value, at, batch_dims=1) for value in values]
    count = op("Squeeze", longest, graph.constant([0]))
    real = op("Less", op("Range", graph.constant(0), count, graph.constant(1)),
              op("Unsqueeze", kept, graph.constant([1])))  # fmt: skip
    return moved, kept, real
