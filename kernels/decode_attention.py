"""Attention of one token per row to what its row has cached in this layer: a decode step.

Rows differ in length, and layers do (an exit leaves shorter caches above it), so each row has its own first column and
its own end. A cache is contiguous, or in pages that a block table puts in order (PagedAttention, arXiv 2309.06180). The
token's own key and value are there, or come along: then they are rotated and written first, in the same launch.

``vte::decode_attention`` is the op: on CPUs the naive reference, on CUDA kernels/triton_decode_attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vte_compile.kernels.cached_attention import rotate


def reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    block_table: Tensor | None,
    longest: int,
    scale: float,
    window: int,
    softcap: float,
    key: Tensor | None = None,
    value: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """The naive reference; see :func:`decode_attention`."""
    output = torch.empty_like(query)
    batch = len(query)
    group = query.shape[1] // key_cache.shape[1]
    if cos is not None and sin is not None:
        query, key = _turned(query, cos, sin), None if key is None else _turned(key, cos, sin)
    firsts = [0] * batch if starts is None else starts.tolist()
    for b, (start, end) in enumerate(zip(firsts, [longest] * batch if ends is None else ends.tolist(), strict=True)):
        if window > 0:
            start = max(start, end - window)
        if key is not None and value is not None:
            for cache, new in ((key_cache, key), (value_cache, value)):
                _column(cache, b, end - 1, block_table).copy_(new[b])
        keys, values = (_row(cache, b, block_table)[:, start:end] for cache in (key_cache, value_cache))
        scores = query[b, :, None] @ keys.repeat_interleave(group, 0).mT * scale  # [heads, 1, columns]
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        output[b] = (scores.softmax(-1) @ values.repeat_interleave(group, 0))[:, 0]
    return output


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (table[:, None, : x.shape[2] // 2] for table in (cos, sin))
    return rotate(x.flatten(1)[:, None], cos, sin, x.shape[1]).view_as(x)


def _column(cache: Tensor, row: int, column: int, block_table: Tensor | None) -> Tensor:
    """[heads, size] of one column of a row, to write to."""
    if block_table is None:
        return cache[row, :, column]
    return cache[int(block_table[row, column // cache.shape[2]]), :, column % cache.shape[2]]


def _row(cache: Tensor, row: int, block_table: Tensor | None) -> Tensor:
    """[heads, columns, size] of one row; of pages, in order."""
    return cache[row] if block_table is None else cache[block_table[row].long()].transpose(0, 1).flatten(1, 2)


@torch.library.custom_op("vte::decode_attention", mutates_args=("key_cache", "value_cache"), device_types="cpu")
def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    block_table: Tensor | None,
    longest: int,
    scale: float,
    window: int,
    softcap: float,
    key: Tensor | None = None,
    value: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Attend to the columns ``starts[b] .. ends[b] - 1`` of each row; the token's own key and value are the last.

    Args:
        query: [B, heads, D], rotated, or with ``cos`` and ``sin`` not; D is 64, 80, 96, 128 or 256 on CUDA.
        key_cache: [B, kv_heads, columns, D], keys rotated, and ``value_cache``; or, with ``block_table``, pages
            [pages, kv_heads, columns of a page, D]. ``heads`` is a multiple of ``kv_heads``. With ``key``, each row's
            last column is written.
        starts: [B] int32 or int64; None: all rows begin at column 0.
        ends: [B] int32 or int64, behind ``starts``; None: all rows end at ``longest``.
        block_table: [B, pages of a row] int32: the pages of each row, in order.
        longest: Columns of the longest row, or more.
        scale: Of the scores.
        window: How many columns the token sees, the last ones, its own included; 0: all.
        softcap: Scores s become ``softcap * tanh(s / softcap)``; 0: as they are.
        key: [B, kv_heads, D], of the token, rotated if ``query`` is; ``value`` likewise. None: they are in the cache.
        cos: [B, D / 2], of the token's position, or [B, D] of two equal halves; ``sin`` likewise.

    Returns:
        [B, heads, D].
    """
    return reference(
        query, key_cache, value_cache, starts, ends, block_table, longest, scale, window, softcap, key, value, cos, sin,
    )  # fmt: skip


@decode_attention.register_kernel("cuda")
def _(first: Tensor, *args: object) -> Tensor:
    from vte_compile.kernels.triton_decode_attention import launch

    with torch.cuda.device(first.device):  # Triton launches on the current one
        return launch(first, *args)  # type: ignore[arg-type]


@decode_attention.register_fake
def _(query: Tensor, *args: object) -> Tensor:
    return torch.empty_like(query)
