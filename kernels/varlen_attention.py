"""Causal attention of packed rows to what they have cached, and to themselves, with the rotation of queries and keys.

Rows of a chunk stand one behind the other in one tensor of T tokens, without padding: row b is
``cu_seqlens[b] .. cu_seqlens[b + 1] - 1``. Its keys and values in the cache begin at column ``starts[b]``; behind the
``past_lengths[b]`` that are there, this op writes those of the chunk, keys rotated. Positions only enter through the
tables of cosines and sines: they need not be contiguous, since an exit leaves gaps. A window counts columns of the row.

``vte::varlen_attention`` is the op: on CPUs the naive reference, on CUDA kernels/triton_varlen_attention.py.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from vte_compile.kernels.cached_attention import rotate


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    past_lengths: Tensor | None,
    starts: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
    window: int,
    softcap: float,
    cu_queries: Tensor | None = None,
) -> Tensor:
    """The naive reference; see :func:`varlen_attention`."""
    output = torch.empty_like(query)
    first = starts.tolist()
    past = [0] * len(first) if past_lengths is None else past_lengths.tolist()
    rows = zip(
        pairwise(cu_seqlens.tolist()),
        pairwise((cu_seqlens if cu_queries is None else cu_queries).tolist()),
        strict=True,
    )
    group = query.shape[1] // key.shape[1]
    cos, sin = (table[:, : query.shape[2] // 2] for table in (cos, sin))
    turned_key = _turned(key, cos, sin)
    for b, ((begin, end), (first_query, last_query)) in enumerate(rows):
        new = slice(first[b] + past[b], first[b] + past[b] + end - begin)
        key_cache[b, :, new] = turned_key[begin:end].transpose(0, 1)
        value_cache[b, :, new] = value[begin:end].transpose(0, 1)
        seen = slice(first[b], new.stop)
        keys, values = (c[b, :, seen].repeat_interleave(group, 0) for c in (key_cache, value_cache))
        asking = slice(end - (last_query - first_query), end)  # which tokens the queries are
        queries = _turned(query[first_query:last_query], cos[asking], sin[asking])
        scores = queries.transpose(0, 1) @ keys.mT * scale  # [heads, queries, past and new]
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        index = torch.arange(seen.stop - seen.start, device=query.device)
        own = index[len(index) - len(queries) :, None]
        visible = index <= own
        if window > 0:
            visible &= index > own - window
        output[first_query:last_query] = (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values).transpose(0, 1)
    return output


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(x.flatten(1)[None], cos[None], sin[None], x.shape[1])[0].view_as(x)


@torch.library.custom_op("vte::varlen_attention", mutates_args=("key_cache", "value_cache"), device_types="cpu")
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    past_lengths: Tensor | None,
    starts: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    longest: int,
    scale: float,
    window: int,
    softcap: float,
    cu_queries: Tensor | None = None,
) -> Tensor:
    """Append a packed chunk to the cache, and attend causally to all of it.

    Args:
        query: [N, heads, D], not rotated; D is 64, 80, 96, 128 or 256 on CUDA. N is T without ``cu_queries``.
        key: [T, kv_heads, D], not rotated; ``value`` likewise. ``heads`` is a multiple of ``kv_heads``.
        cos: [T, D / 2], of each token's position, or [T, D] of two equal halves; ``sin`` likewise.
        cu_seqlens: [B + 1] int32: where rows begin and end in the chunk.
        past_lengths: [B] int32: how many tokens of each row are cached; None: none.
        starts: [B] int32: the column where each row begins in the cache.
        key_cache: [B, kv_heads, columns, D], and ``value_cache``: room for the chunk is there; written in place.
        longest: Tokens of the longest row of the chunk, or more.
        scale: Of the scores.
        window: How many columns of its row a token sees, the last ones (Mistral, arXiv 2310.06825); 0: all.
        softcap: Scores s become ``softcap * tanh(s / softcap)`` (Gemma 2, arXiv 2408.00118); 0: as they are.
        cu_queries: [B + 1] int32: of each row only the last token has a query, N is B; None: all have.

    Returns:
        [N, heads, D].
    """
    return reference(
        query, key, value, cos, sin, cu_seqlens, past_lengths, starts, key_cache, value_cache, scale, window, softcap,
        cu_queries,
    )  # fmt: skip


@varlen_attention.register_kernel("cuda")
def _(first: Tensor, *args: object) -> Tensor:
    from vte_compile.kernels.triton_varlen_attention import launch

    with torch.cuda.device(first.device):  # Triton launches on the current one
        return launch(first, *args)  # type: ignore[arg-type]


@varlen_attention.register_fake
def _(query: Tensor, *args: object) -> Tensor:
    return torch.empty_like(query)
