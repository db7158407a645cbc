"""Attention of a chunk of tokens to a cache and to itself, and the rotation of its queries and keys.

``vte::rotary`` and ``vte::cached_attention`` are what graphs of the phase "chunk" hold (vte_compile/capture/chunk.py):
one op for what exporters have one op for. Their implementations here are the naive reference.

A cache is aligned at the start: row b holds its tokens in columns 0 .. past_lengths[b] - 1, what lies behind is free.
Rows of a chunk are aligned at the start, too: row b has new_lengths[b] tokens, what lies behind is padding, whose
output means nothing.

A token attends to all tokens before it, or to the last ones if there is a window; and to those of the chunk that are of
its block, also behind it, where tokens are in blocks (vte_compile/families/token_blocks.py). Scores may be capped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vte_compile.kernels.causal_attention import attend


def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotate the first half of each head against its second half (RoFormer, arXiv 2104.09864, as Llama lays it out).

    Args:
        x: [B, T, heads * D].
        cos: [B, T, D / 2] (or with B = 1, for all rows), and ``sin`` likewise.
        heads: How many.
    """
    half = cos.shape[-1]  # a number, where the width of x may be a symbol
    x = x.unflatten(-1, (heads, 2 * half))
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


@torch.library.custom_op("vte::rotary", mutates_args=())
def rotary(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """See :func:`rotate`."""
    return rotate(x, cos, sin, heads)


@rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("vte::cached_attention", mutates_args=())
def cached_attention(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a chunk to what its rows have cached, and to itself.

    Args:
        query: [B, T, heads * D].
        key: [B, T, kv_heads * D]; ``value`` likewise, with a head size of its own.
        past_key: [B, kv_heads, P, D], and ``past_value``.
        past_lengths: [B] int64: columns of the cache that are filled.
        new_lengths: [B] int64: tokens of the chunk.
        heads: Of the queries, a multiple of ``kv_heads``.
        kv_heads: Of keys and values.
        scale: Of the scores.
        window: How many columns a token sees at most, of those up to its own; 0: all.
        block_ids: [B, T] int64: tokens with the same number attend to each other, also to later ones; but for -1, which
            padding has. None: causal.
        softcap: Scores s become ``softcap * tanh(s / softcap)``; 0: as they are.

    Returns:
        [B, T, heads * D]; and the cache with the chunk's keys and values behind each row's past, [B, kv_heads, P + T,
        D]. (Elsewhere a cache with room for them keeps its size.)
    """
    tokens = query.shape[1]
    columns = past_lengths[:, None] + torch.arange(tokens, device=query.device)  # [B, T]
    grown = []
    for past, new in ((past_key, key), (past_value, value)):
        heads_second = new.unflatten(-1, (kv_heads, -1)).transpose(1, 2)
        cache = F.pad(past, (0, 0, 0, tokens))
        index = columns[:, None, :, None].expand_as(heads_second)
        grown.append(cache.scatter(2, index, heads_second))
    mask = attended(columns, grown[0].shape[2], window, block_ids)  # [B, T, P + T]
    # What is free may hold anything, and 0 times NaN is NaN.
    free = torch.arange(grown[0].shape[2], device=query.device) >= (past_lengths + new_lengths)[:, None]
    keys, values = (x.masked_fill(free[:, None, :, None], 0) for x in grown)
    queries = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    output = attend(queries, keys, values, mask[:, None], scale, softcap)
    return output.transpose(1, 2).flatten(-2).contiguous(), grown[0], grown[1]


def attended(columns: Tensor, count: int, window: int, block_ids: Tensor | None) -> Tensor:
    """Which columns of a cache tokens attend to: [B, T, count] bool.

    Args:
        columns: [B, T] int64: the tokens' own.
        count: Of the cache's columns.
        window: As `cached_attention` takes it, and ``block_ids``.
    """
    index, own = torch.arange(count, device=columns.device), columns[..., None]
    mask = index <= own
    if window:
        mask = mask & (index > own - window)
    if block_ids is not None:  # a window does not limit a token's own block
        of_columns = block_ids.new_full((columns.shape[0], count), -1).scatter(1, columns, block_ids)
        mask = mask | ((block_ids[..., None] == of_columns[:, None]) & (block_ids[..., None] >= 0))
    return mask


@cached_attention.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens = query.shape[:2]
    for other in (past_key, past_value, past_lengths, new_lengths):
        torch._check(other.shape[0] == batch)
    length = past_key.shape[2] + tokens
    output = query.new_empty(batch, tokens, heads * past_value.shape[-1])
    keys, values = (past.new_empty(batch, kv_heads, length, past.shape[-1]) for past in (past_key, past_value))
    return output, keys, values
