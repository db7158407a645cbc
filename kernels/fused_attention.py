"""Attention with the rotation of its queries and keys in it: what passes/fuse_attention.py puts into graphs for GPUs.

``vte::rotary_packed_attention`` stands in graphs of the phase "packed", ``vte::rotary_append_attention`` in those of
"decode". They are naive references: like all ops of a graph they change nothing in place. When the graph runs, they do
not: lower_piecewise cuts the graph there, and ``vte::varlen_attention`` and ``vte::decode_attention`` write keys and
values into the cache (runtime/fused_steps.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vte_compile.kernels.append_attention import append_attention
from vte_compile.kernels.cached_attention import rotate
from vte_compile.kernels.packed_attention import packed_attention


def _heads_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, T, heads, D], rotated -> [B, heads, T, D]."""
    half = x.shape[3] // 2
    return rotate(x.flatten(2), cos[..., :half], sin[..., :half], x.shape[2]).view_as(x).transpose(1, 2)


@torch.library.custom_op("vte::rotary_packed_attention", mutates_args=())
def rotary_packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    scale: float | None,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate queries and keys of packed rows, and attend causally as ``vte::packed_attention`` does.

    Args:
        query: [1, N, heads, D].
        key: [1, T, kv_heads, D], and ``value``. ``heads`` is a multiple of ``kv_heads``.
        cos: [1, T, D] of two equal halves, of each token's position; ``sin`` likewise.
        cu_queries: [B + 1] int32: ``cu_keys``, or 0, 1 .. B where a row has one query, its last.
        cu_keys: [B + 1] int32.
        scale: Of the scores; None for 1 / sqrt(D).
        window: How many columns of its row a token sees, the last ones; 0: all.
        softcap: Scores s become ``softcap * tanh(s / softcap)``; 0: as they are.

    Returns:
        The attention's output [1, heads, N, D], laid out as [1, N, heads, D] is; and what the cache takes: keys [1,
        kv_heads, T, D], rotated, and values.
    """
    keys = _heads_first(key, cos, sin).contiguous()
    values = value.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # never the input itself
    if query.shape[1] != key.shape[1]:
        last = cu_keys[1:].long() - 1
        cos, sin = cos[:, last], sin[:, last]
    rotated = _heads_first(query, cos, sin)
    output = packed_attention(rotated, keys, values, cu_queries, cu_keys, scale, window, softcap)
    return output, keys, values


@rotary_packed_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]) for x in (key, value))
    return query.new_empty(query.shape).transpose(1, 2), keys, values


@torch.library.custom_op("vte::rotary_append_attention", mutates_args=())
def rotary_append_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    starts: Tensor | None,
    scale: float | None,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate a token's query and key, append, and attend as ``vte::append_attention`` does.

    Args:
        query: [B, 1, heads, D].
        key: [B, 1, kv_heads, D], and ``value``. ``heads`` is a multiple of ``kv_heads``.
        cos: [B, 1, D] of two equal halves, of the token's position; ``sin`` likewise.
        past_keys: [B, kv_heads, columns, D], and ``past_values``: without the new token.
        starts: [B] int64: the first real column of each row; None where all rows begin at 0.
        scale: Of the scores; None for 1 / sqrt(D).
        window: How many columns of its row a token sees, the last ones; 0: all.
        softcap: Scores s become ``softcap * tanh(s / softcap)``; 0: as they are.

    Returns:
        The attention's output [B, 1, heads, D], and keys and values with one column more.
    """
    turned = (_heads_first(x, cos, sin) for x in (query, key))
    past = past_keys, past_values
    output, keys, values = append_attention(*turned, value.transpose(1, 2), *past, starts, scale, window, softcap)
    return output.contiguous(), keys, values


@rotary_append_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    *args: object,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (
        past.new_empty(*past.shape[:2], past.shape[2] + 1, past.shape[3]) for past in (past_keys, past_values)
    )
    return query.new_empty(query.shape), keys, values
