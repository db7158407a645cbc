"""The last token of a graph's row, or those of the rows of a packed graph or a chunk: how passes keep nothing else."""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from vte_compile.kernels.packed_exit import packed_exit
from vte_compile.kernels.token_exit import unpack_dims

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

aten = torch.ops.aten


@dataclass(frozen=True)
class LastTokens:
    """How to keep them, in one layer of a graph."""

    graph: DecoderGraph
    layer: int
    index: fx.Node | None
    """[B] int32, of packed rows; [B, 1, 1] int64, of rows with padding behind; None of one row: a slice will do."""
    count: fx.Node | int
    """How many they are, along the dim of the tokens."""

    def of(self, source: fx.Node, dim: int, before: fx.Node) -> fx.Node:
        """What is left of a value, computed in front of a node of the layer; in chunks, of a value [B, T, C]."""
        graph = self.graph
        with graph.graph.inserting_before(before):
            if self.index is None:
                last = graph.graph.call_function(aten.slice.Tensor, (source, dim, -1, sys.maxsize))
            elif graph.phase == "chunk":
                width = source.meta["val"].shape[2]
                index = graph.graph.call_function(aten.expand.default, (self.index, [-1, -1, width]))
                with torch.no_grad():
                    index.meta["val"] = self.index.meta["val"].expand(-1, -1, width)
                index.meta[_OF_LAST], graph.layer_of[index] = True, self.layer
                last = graph.graph.call_function(aten.gather.default, (source, dim, index))
            else:
                last = graph.graph.call_function(aten.index_select.default, (source, dim, self.index))
        last.meta["val"] = self.example(source.meta["val"], dim)
        graph.layer_of[last] = self.layer
        return last

    def example(self, value: Tensor, dim: int) -> Tensor:
        """The fake tensor of what is left of another one."""
        if self.index is None or self.graph.phase == "chunk":
            return value.narrow(dim, 0, 1)
        with torch.no_grad():
            return value.index_select(dim, self.index.meta["val"])

    def cu_seqlens(self) -> fx.Node:
        """Of packed rows, each now one token: 0, 1 .. B, [B + 1] int32."""
        assert self.index is not None
        bounds = bounds_in(self.graph, self.layer)
        with self.graph.graph.inserting_after(self.index):
            ones = self.graph.graph.call_function(aten.ones_like.default, (bounds,))
        with self.graph.graph.inserting_after(ones):
            counted = self.graph.graph.call_function(aten.cumsum.default, (ones, 0), {"dtype": torch.int32})
        with self.graph.graph.inserting_after(counted):
            from_0 = self.graph.graph.call_function(aten.sub.Tensor, (counted, 1))
        for node in (ones, counted, from_0):
            node.meta["val"] = bounds.meta["val"]
            self.graph.layer_of[node] = self.layer
        return from_0

    @staticmethod
    def is_cut(node: fx.Node) -> bool:
        """Whether :meth:`of` made a node, of the residual stream."""
        if node.target is aten.slice.Tensor:
            return node.args[1:] == (1, -1, sys.maxsize)
        index = node.args[2] if node.target in (aten.index_select.default, aten.gather.default) else None
        return isinstance(index, fx.Node) and bool(index.meta.get(_OF_LAST))


_OF_LAST = "vte_last_tokens"


def last_tokens(graph: DecoderGraph, layer: int, before: fx.Node) -> LastTokens:
    """Those of a layer, of which ``before`` is a node that reads none of them."""
    if graph.phase not in ("packed", "chunk"):
        return LastTokens(graph, layer, None, 1)

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.graph.call_function(target, args)
        with torch.no_grad():
            node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
        graph.layer_of[node] = layer
        return node

    if graph.phase == "chunk":
        with graph.graph.inserting_before(before):
            index = call(aten.sub.Tensor, graph.placeholder("new_lengths"), 1)
            for _ in range(2):
                index = call(aten.unsqueeze.default, index, -1)
        return LastTokens(graph, layer, index, 1)
    with graph.graph.inserting_before(before):
        bounds = bounds_in(graph, layer)
        index = call(aten.sub.Tensor, call(aten.slice.Tensor, bounds, 0, 1, sys.maxsize), 1)
        # Of the length of an input, since pieces read sizes from theirs.
        size = graph.graph.call_function(aten.sym_size.int, (bounds, 0))
        size.meta["val"] = bounds.meta["val"].shape[0]
        count = call(operator.sub, size, 1)
    graph.layer_of[size] = layer
    index.meta[_OF_LAST] = True
    return LastTokens(graph, layer, index, count)


def bounds_in(graph: DecoderGraph, layer: int) -> fx.Node:
    """Where rows end in a layer of a packed graph: its ``cu_seqlens``, or what the last exit before made of it."""
    bounds = graph.placeholder("cu_seqlens")
    for node in graph.graph.nodes:
        if node.target is packed_exit._opoverload and graph.layer_of[node] < layer:
            counts, dims = node.args[4:6]
            [place] = [i for i, own in enumerate(unpack_dims(counts, dims)) if not own]
            bounds = next(user for user in node.users if user.args[1] == place)
    return bounds
