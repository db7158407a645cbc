"""The Triton kernels of vte::varlen_attention (see kernels/varlen_attention.py): keys into the cache, then attention.

Keys are rotated once, on their way into the cache; attention reads them there, and rotates its queries when it loads
them. A head is two halves, which the rotation mixes, so scores are the sum of two products; sizes that are no powers of
two are padded in registers. Scores, the softmax (online, FlashAttention, arXiv 2205.14135) and sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vte_compile.kernels.triton_settings import Settings, settings_for

APPEND_BLOCK = 32
"""Tokens of a program that writes into the cache."""


@triton.jit
def append_kernel(
    key, value, cos, sin, cu_seqlens, past_lengths, starts, key_cache, value_cache, stride_kt, stride_kh, stride_vt,
    stride_vh, stride_ct, stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn, PAST: tl.constexpr,
    SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate a block of one row's keys, and write them and their values behind what the row has cached."""
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = tl.load(cu_seqlens + row)
    length = tl.load(cu_seqlens + row + 1) - begin
    if block * BLOCK >= length:
        return
    index = block * BLOCK + tl.arange(0, BLOCK)
    half = tl.arange(0, HALF)
    inside = index < length
    both = inside[:, None] & (half < SIZE // 2)[None, :]
    token = (begin + index).to(tl.int64)
    first_column = tl.load(starts + row)
    if PAST:
        first_column += tl.load(past_lengths + row)
    column = (first_column + index).to(tl.int64)
    table = token[:, None] * stride_ct + half[None, :]
    c = tl.load(cos + table, mask=both, other=0.0).to(tl.float32)
    s = tl.load(sin + table, mask=both, other=0.0).to(tl.float32)
    source = key + token[:, None] * stride_kt + head * stride_kh + half[None, :]
    first = tl.load(source, mask=both, other=0.0).to(tl.float32)
    second = tl.load(source + SIZE // 2, mask=both, other=0.0).to(tl.float32)
    target = key_cache + row * stride_kb + head * stride_kg + column[:, None] * stride_kn + half[None, :]
    tl.store(target, first * c - second * s, mask=both)
    tl.store(target + SIZE // 2, second * c + first * s, mask=both)
    source = value + token[:, None] * stride_vt + head * stride_vh + half[None, :]
    target = value_cache + row * stride_vb + head * stride_vg + column[:, None] * stride_vn + half[None, :]
    tl.store(target, tl.load(source, mask=both, other=0.0), mask=both)
    tl.store(target + SIZE // 2, tl.load(source + SIZE // 2, mask=both, other=0.0), mask=both)


@triton.jit
def attention_kernel(
    query, cos, sin, cu_queries, cu_seqlens, past_lengths, starts, key_cache, value_cache, output, scale, window,
    softcap, stride_qt, stride_qh, stride_ct, stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn,
    stride_ot, stride_oh, PAST: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
    PADDED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """A block of one row's queries, of one head."""
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_query = tl.load(cu_queries + row)
    length = tl.load(cu_queries + row + 1) - first_query
    if block * BLOCK_M >= length:
        return
    begin, start = tl.load(cu_seqlens + row), tl.load(starts + row)
    # Queries are the row's last tokens.
    without = tl.load(cu_seqlens + row + 1) - begin - length
    past = without
    if PAST:
        past += tl.load(past_lengths + row)
    index = block * BLOCK_M + tl.arange(0, BLOCK_M)
    half, whole = tl.arange(0, HALF), tl.arange(0, PADDED)
    inside = index < length
    both = inside[:, None] & (half < SIZE // 2)[None, :]
    token = (begin + without + index).to(tl.int64)
    place = (first_query + index).to(tl.int64)
    table = token[:, None] * stride_ct + half[None, :]
    c = tl.load(cos + table, mask=both, other=0.0).to(tl.float32)
    s = tl.load(sin + table, mask=both, other=0.0).to(tl.float32)
    source = query + place[:, None] * stride_qt + head * stride_qh + half[None, :]
    first = tl.load(source, mask=both, other=0.0).to(tl.float32)
    second = tl.load(source + SIZE // 2, mask=both, other=0.0).to(tl.float32)
    # Rounded as a rotation of its own would round it.
    q1 = (first * c - second * s).to(COMPUTE)
    q2 = (second * c + first * s).to(COMPUTE)

    keys = key_cache + row * stride_kb + (head // GROUP) * stride_kg + start.to(tl.int64) * stride_kn
    values = value_cache + row * stride_vb + (head // GROUP) * stride_vg + start.to(tl.int64) * stride_vn
    # Base 2: exp2 is what the hardware has.
    to_base_2 = 1.4426950408889634
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    summed = tl.zeros([BLOCK_M, PADDED], tl.float32)
    low = 0
    if WINDOW:
        low = tl.maximum(0, past + block * BLOCK_M - window + 1) // BLOCK_N * BLOCK_N
    high = tl.minimum(past + (block + 1) * BLOCK_M, past + length)
    for n in range(low, high, BLOCK_N):
        column = n + tl.arange(0, BLOCK_N)
        there = column < high
        cached = column.to(tl.int64)
        k_mask = there[None, :] & (half < SIZE // 2)[:, None]
        k_at = keys + cached[None, :] * stride_kn + half[:, None]
        k1 = tl.load(k_at, mask=k_mask, other=0.0).to(COMPUTE)
        k2 = tl.load(k_at + SIZE // 2, mask=k_mask, other=0.0).to(COMPUTE)
        scores = tl.dot(q1, k1, input_precision="ieee")
        scores = tl.dot(q2, k2, scores, input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        own = past + index[:, None]
        visible = there[None, :] & (column[None, :] <= own)
        if WINDOW:
            visible = visible & (column[None, :] > own - window)
        scores = tl.where(visible, scores * to_base_2, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        # A block may hold nothing that a row sees, in front of a window.
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(highest - finite)
        v_mask = there[:, None] & (whole < SIZE)[None, :]
        v = tl.load(values + cached[:, None] * stride_vn + whole[None, :], mask=v_mask, other=0.0).to(COMPUTE)
        total = total * shrink + tl.sum(weights, 1)
        summed = tl.dot(weights.to(COMPUTE), v, summed * shrink[:, None], input_precision="ieee")
        highest = higher
    target = output + place[:, None] * stride_ot + head * stride_oh + whole[None, :]
    tl.store(target, summed / total[:, None], mask=inside[:, None] & (whole < SIZE)[None, :])


def launch(
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
    settings: Settings | None = None,
) -> Tensor:
    """See :func:`vte_compile.kernels.varlen_attention.varlen_attention`.

    ``settings``: other than the shipped ones.
    """
    heads, size = query.shape[1:]
    kv_heads, batch = key.shape[1], len(starts)
    last = (query, key, value, cos, sin, key_cache, value_cache)
    if any(x.stride(-1) != 1 for x in last) or cos.stride() != sin.stride():
        raise ValueError("varlen_attention: the last dim must be contiguous, and cos laid out as sin.")
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if longest == 0:
        return output
    chosen = settings or settings_for("varlen_attention", query)
    half, padded = triton.next_power_of_2(size // 2), triton.next_power_of_2(size)
    past = starts if past_lengths is None else past_lengths
    append_kernel[(triton.cdiv(longest, APPEND_BLOCK), kv_heads, batch)](
        key, value, cos, sin, cu_seqlens, past, starts, key_cache, value_cache, *key.stride()[:2], *value.stride()[:2],
        cos.stride(0), *key_cache.stride()[:3], *value_cache.stride()[:3], PAST=past_lengths is not None, SIZE=size,
        HALF=half, BLOCK=APPEND_BLOCK, num_warps=4,
    )  # fmt: skip
    queries = longest if cu_queries is None else 1
    attention_kernel[(triton.cdiv(queries, chosen.block_m), heads, batch)](
        query, cos, sin, cu_seqlens if cu_queries is None else cu_queries, cu_seqlens, past, starts, key_cache,
        value_cache, output, scale, window, softcap, *query.stride()[:2], cos.stride(0), *key_cache.stride()[:3],
        *value_cache.stride()[:3], *output.stride()[:2],
        PAST=past_lengths is not None, GROUP=heads // kv_heads, SIZE=size, HALF=half, PADDED=padded,
        WINDOW=window > 0, SOFTCAP=softcap > 0, BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n,
        COMPUTE=chosen.compute, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    return output
