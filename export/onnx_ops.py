"""Which ONNX operators stand for the ops of a chunk's graph.

Graphs are for ONNX Runtime: com.microsoft.GroupQueryAttention is the one operator whose CPU and CUDA kernels append to
a cache in place and take rows of unequal lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from vte_compile.kernels.cached_attention import cached_attention, rotary

OPSET = 23
"""The first with RotaryEmbedding and RMSNormalization."""
OPSETS = {"": OPSET, "com.microsoft": 1}


def _group_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    new_lengths: Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
) -> Any:
    totals = (past_lengths + new_lengths).to(torch.int32)
    batch, tokens = query.shape[:2]
    columns = past_key.shape[2] + tokens
    return torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (query, key, value, past_key, past_value, totals - 1, totals.max()),
        {"num_heads": heads, "kv_num_heads": kv_heads, "scale": scale},
        dtypes=(query.dtype,) * 3,
        shapes=(
            (batch, tokens, heads * past_value.shape[3]),
            (batch, kv_heads, columns, past_key.shape[3]),
            (batch, kv_heads, columns, past_value.shape[3]),
        ),
        version=1,
    )


def _rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return torch.onnx.ops.rotary_embedding(x, cos, sin, num_heads=heads)


_LOWERED: dict[Any, Callable[..., Any]] = {
    cached_attention._opoverload: _group_query_attention,
    rotary._opoverload: _rotary_embedding,
}


def lower_ops(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a piece in which our ops are functions that torch.onnx exports as operators."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, val_map={}, return_output_node=False))
    for node in graph.nodes:
        node.target = _LOWERED.get(node.target, node.target)
    return fx.GraphModule(module, graph)
