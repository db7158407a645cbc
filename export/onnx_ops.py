"""Which ONNX operators stand for the ops of a chunk's graph: a table for each target.

The one here is for ONNX Runtime: com.microsoft.GroupQueryAttention is the one operator whose CPU and CUDA kernels
append to a cache in place and take rows of unequal lengths. That for TensorRT: tensorrt_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vte_compile.kernels.cached_attention import cached_attention, rotary

OPSET = 23
"""The first with RotaryEmbedding and RMSNormalization."""
OPSETS = {"": OPSET, "com.microsoft": 1}
WINDOWS_SINCE = "1.24"
"""The first ONNX Runtime in which GroupQueryAttention counts a token into its own window."""


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
    window: int = 0,
) -> Any:
    totals = (past_lengths + new_lengths).to(torch.int32)
    batch, tokens = query.shape[:2]
    columns = past_key.shape[2] + tokens
    return torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (query, key, value, past_key, past_value, totals - 1, totals.max()),
        {"num_heads": heads, "kv_num_heads": kv_heads, "scale": scale, "local_window_size": window or -1},
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


@dataclass(frozen=True)
class Operators:
    """What a target's graphs are made of."""

    opsets: Mapping[str, int]
    lowered: Mapping[Any, Callable[..., Any]]
    """For our ops: functions that torch.onnx exports as the operators that stand for them."""
    expected: Mapping[Any, Callable[..., Any]]
    """For ops whose operators give something else than they do: what those give, from the ops' naive reference."""
    fuses_norms: bool
    """Whether RMSNormalization stands for what it is made of."""
    new_columns: bool
    """Graphs give the keys and values of the new tokens alone; else the cache with these behind each row's past."""


ORT = Operators(
    OPSETS,
    {cached_attention._opoverload: _group_query_attention, rotary._opoverload: _rotary_embedding},
    {},
    fuses_norms=True,
    new_columns=False,
)


def windows_of(module: fx.GraphModule) -> set[int]:
    """The sliding windows of a piece's attentions."""
    attentions = [n for n in module.graph.nodes if n.target is cached_attention._opoverload]
    return {int(window) for n in attentions for window in n.args[10:11] if window}


def replace_ops(module: fx.GraphModule, functions: Mapping[Any, Callable[..., Any]]) -> fx.GraphModule:
    """A copy of a piece in which our ops are other functions, such as those of :class:`Operators`."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, val_map={}, return_output_node=False))
    for node in graph.nodes:
        node.target = functions.get(node.target, node.target)
    return fx.GraphModule(module, graph)
