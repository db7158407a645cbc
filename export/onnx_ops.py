"""Which ONNX operators stand for the ops of a chunk's graph: a table for each target.

The one here is for ONNX Runtime: com.microsoft.GroupQueryAttention is the one operator whose CPU and CUDA kernels
append to a cache in place and take rows of unequal lengths. It is causal: where tokens of a block attend to later ones,
Attention stands behind two ScatterND that append, and a mask says what GroupQueryAttention knows by itself. Capped
scores are written out there: Attention capped them behind its mask, which lets hidden columns in again, until an
erratum (onnx/onnx#7865) that earlier releases of ONNX Runtime do not have. That for TensorRT: tensorrt_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from vte_compile.families.logits import capped
from vte_compile.kernels.cached_attention import attended, cached_attention, rotary

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
    block_ids: Tensor | None = None,
    softcap: float = 0.0,
    longest: Tensor | None = None,
) -> Any:
    assert block_ids is None
    totals = (past_lengths + new_lengths).to(torch.int32)
    batch, tokens = query.shape[:2]
    columns = past_key.shape[2] + tokens
    return torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (query, key, value, past_key, past_value, totals - 1, totals.max() if longest is None else longest),
        {
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": scale,
            "local_window_size": window or -1,
            "softcap": softcap,
        },
        dtypes=(query.dtype,) * 3,
        shapes=(
            (batch, tokens, heads * past_value.shape[3]),
            (batch, kv_heads, columns, past_key.shape[3]),
            (batch, kv_heads, columns, past_value.shape[3]),
        ),
        version=1,
    )


def _with_places_behind(
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
    block_ids: Tensor | None = None,
    softcap: float = 0.0,
) -> Any:
    """Where all rows may end before the last place of a chunk: the operator takes rows to have no past if the longest
    of them, with its past, is as long as the chunk."""
    places = torch.scalar_tensor(query.shape[1], dtype=torch.int64)
    longest = torch.maximum((past_lengths + new_lengths).max(), places).to(torch.int32)
    tensors = (query, key, value, past_key, past_value, past_lengths, new_lengths)
    return _group_query_attention(*tensors, heads, kv_heads, scale, window, block_ids, softcap, longest)


def _attention_with_mask(
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
    block_ids: Tensor | None = None,
    softcap: float = 0.0,
) -> Any:
    batch, tokens = query.shape[:2]
    columns = past_lengths[:, None] + torch.arange(tokens)
    mask = attended(columns, past_key.shape[2], window, block_ids)[:, None]
    axes = torch.arange(batch)[:, None, None], torch.arange(kv_heads)[:, None], columns[:, None]
    places = torch.stack([axis.expand(batch, kv_heads, tokens) for axis in axes], dim=-1)
    keys, values = (
        _op("ScatterND", past, places, new.unflatten(-1, (kv_heads, -1)).transpose(1, 2), like=past)
        for past, new in ((past_key, key), (past_value, value))
    )
    queries = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    if softcap:
        output = _capped_attention(queries, keys, values, mask, scale, softcap)
    else:
        shape = (batch, heads, tokens, past_value.shape[3])
        output = _op("Attention", queries, keys, values, mask, like=query.new_empty(shape), scale=scale)
    return output.transpose(1, 2).flatten(2), keys, values


def _capped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """[B, heads, T, D]; heads of a group are rows of their key/value head, so that keys are not repeated."""
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    grouped = (query * scale).unflatten(1, (kv_heads, group)).flatten(2, 3)
    scores = capped(grouped @ key.transpose(2, 3), softcap).unflatten(2, (group, -1))
    weights = torch.where(mask[:, None], scores, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights.flatten(2, 3) @ value).unflatten(2, (group, -1)).flatten(1, 2)


def _op(kind: str, *inputs: Tensor, like: Tensor, **attributes: Any) -> Tensor:
    """A standard operator whose result is of the dtype and shape of a tensor."""
    result: Tensor = torch.onnx.ops.symbolic(
        kind, inputs, attributes, dtype=like.dtype, shape=like.shape, version=OPSET
    )
    return result


def _with_room(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    *lengths_and_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the reference gives, its caches as long as they were."""
    given = cached_attention._opoverload(query, key, value, past_key, past_value, *lengths_and_options)
    columns = past_key.shape[2]
    return given[0], given[1][:, :, :columns], given[2][:, :, :columns]


def _rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return torch.onnx.ops.rotary_embedding(x, cos, sin, num_heads=heads)


@dataclass(frozen=True)
class Operators:
    """What a target's graphs are made of."""

    opsets: Mapping[str, int]
    lowered: dict[Any, Callable[..., Any]]
    """For our ops: functions that torch.onnx exports as the operators that stand for them."""
    expected: Mapping[Any, Callable[..., Any]]
    """For ops whose operators give something else than they do: what those give, from the ops' naive reference."""
    fuses_norms: bool
    """Whether RMSNormalization stands for what it is made of."""
    new_columns: bool
    """Graphs give the keys and values of the new tokens alone; else the cache with these behind each row's past."""
    needs_room: bool = False
    """Caches have to have columns for the new tokens."""


ORT = Operators(
    OPSETS,
    {cached_attention._opoverload: _group_query_attention, rotary._opoverload: _rotary_embedding},
    {},
    fuses_norms=True,
    new_columns=False,
)


ORT_COMPANION = replace(ORT, lowered=ORT.lowered | {cached_attention._opoverload: _with_places_behind})
"""Of decoders where a companion token takes the place behind each prompt."""


ORT_BLOCKS = replace(
    ORT,
    lowered=ORT.lowered | {cached_attention._opoverload: _attention_with_mask},
    expected={cached_attention._opoverload: _with_room},
    needs_room=True,
)
"""Of decoders whose tokens attend to later ones of their block."""


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
