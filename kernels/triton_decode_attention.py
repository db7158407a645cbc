"""The Triton kernels of vte::decode_attention (see kernels/decode_attention.py): parts of the columns, then their sum.

One token per row leaves most of a GPU idle, so the columns of a row are split over programs (Flash-Decoding), each of
which takes all query heads of one key/value head, since they read the same keys. A new token's key and value are
rotated, written and attended to by the program that has their column, which takes them from its registers: no program
reads what another one writes.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vte_compile.kernels.triton_settings import Settings, settings_for

_SPLIT_LEAST = 128
"""Columns of a split, at least: below, writing parts costs more than it gains."""
_PROGRAMS_PER_PROCESSOR = 4


@triton.jit(do_not_specialize=["longest"])  # it grows with each step
def split_kernel(
    query, key, value, cos, sin, key_cache, value_cache, starts, ends, block_table, parts, logs, longest, per_split,
    scale, window, softcap, stride_qb, stride_qh, stride_nb, stride_nh, stride_ub, stride_uh,
    stride_cb, stride_kb, stride_kg, stride_kn, stride_vb, stride_vg, stride_vn, stride_tb,
    STARTS: tl.constexpr, ENDS: tl.constexpr, ROTATE: tl.constexpr, APPEND: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One split of one row's columns, for the query heads of one key/value head."""
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, kv_heads = tl.num_programs(0), tl.num_programs(1)
    wide_row = row.to(tl.int64)
    end = longest
    if ENDS:
        end = tl.load(ends + row).to(tl.int32)
    low = split * per_split
    if WINDOW:
        first = 0
        if STARTS:
            first = tl.load(starts + row).to(tl.int32)
        low += tl.maximum(first, end - window)
    elif STARTS:
        low += tl.load(starts + row).to(tl.int32)
    last = end - 1
    high = tl.minimum(low + per_split, end)
    member, whole = tl.arange(0, GROUP_PADDED), tl.arange(0, PADDED)
    head = kv_head * GROUP + member
    is_head, in_size = member < GROUP, whole < SIZE
    q_mask = is_head[:, None] & in_size[None, :]
    q_at = query + wide_row * stride_qb + head[:, None] * stride_qh
    q = tl.load(q_at + whole[None, :], mask=q_mask, other=0.0)
    # Of the other half, with which a rotation mixes, and where in the tables (of half a head).
    is_first = whole < SIZE // 2
    other = tl.where(is_first, whole + SIZE // 2, whole - SIZE // 2)
    if ROTATE:
        table = wide_row * stride_cb + tl.where(is_first, whole, whole - SIZE // 2)
        c = tl.load(cos + table, mask=in_size, other=0.0).to(tl.float32)
        s = tl.load(sin + table, mask=in_size, other=0.0).to(tl.float32)
        s = tl.where(is_first, -s, s)
        mixed = tl.load(q_at + other[None, :], mask=q_mask, other=0.0).to(tl.float32)
        # Rounded as a rotation of its own would round it.
        q = (q.to(tl.float32) * c[None, :] + mixed * s[None, :]).to(query.dtype.element_ty)
    q = q.to(COMPUTE)
    last_block, last_place = wide_row, last.to(tl.int64)
    if PAGE > 0:
        last_block = tl.load(block_table + row * stride_tb + last // PAGE).to(tl.int64)
        last_place = (last % PAGE).to(tl.int64)
    to_base_2 = 1.4426950408889634
    highest = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    summed = tl.zeros([GROUP_PADDED, PADDED], tl.float32)
    if APPEND:
        high = tl.minimum(high, last)
        here = (low <= last) & (last < low + per_split)
        mask = in_size & here
        new_at = key + wide_row * stride_nb + kv_head * stride_nh
        k_new = tl.load(new_at + whole, mask=mask, other=0.0)
        if ROTATE:
            mixed_key = tl.load(new_at + other, mask=mask, other=0.0).to(tl.float32)
            k_new = (k_new.to(tl.float32) * c + mixed_key * s).to(key.dtype.element_ty)
        v_new = tl.load(value + wide_row * stride_ub + kv_head * stride_uh + whole, mask=mask, other=0.0)
        tl.store(key_cache + last_block * stride_kb + last_place * stride_kn + kv_head * stride_kg + whole, k_new, mask)
        v_to = value_cache + last_block * stride_vb + last_place * stride_vn + kv_head * stride_vg + whole
        tl.store(v_to, v_new, mask)
    for n in range(low, high, BLOCK_N):
        column = n + tl.arange(0, BLOCK_N)
        there = column < high
        if PAGE > 0:
            block = tl.load(block_table + row * stride_tb + column // PAGE, mask=there, other=0).to(tl.int64)
            place = (column % PAGE).to(tl.int64)
        else:
            block = tl.zeros([BLOCK_N], tl.int64) + wide_row
            place = column.to(tl.int64)
        k_at = key_cache + (block * stride_kb + place * stride_kn)[None, :] + kv_head * stride_kg + whole[:, None]
        k = tl.load(k_at, mask=there[None, :] & in_size[:, None], other=0.0).to(COMPUTE)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        scores = tl.where(there[None, :], scores * to_base_2, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(highest - finite)
        v_at = value_cache + (block * stride_vb + place * stride_vn)[:, None] + kv_head * stride_vg + whole[None, :]
        v = tl.load(v_at, mask=there[:, None] & in_size[None, :], other=0.0).to(COMPUTE)
        total = total * shrink + tl.sum(weights, 1)
        summed = tl.dot(weights.to(COMPUTE), v, summed * shrink[:, None], input_precision="ieee")
        highest = higher
    if APPEND:
        # Behind the loop: before it, the queries would stay in registers, which then spill (float32, heads of 256).
        score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
        if SOFTCAP:
            score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
        score = tl.where(here, score * to_base_2, float("-inf"))
        higher = tl.maximum(highest, score)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weight = tl.exp2(highest - finite), tl.exp2(score - finite)
        total = total * shrink + weight
        summed = summed * shrink[:, None] + weight[:, None] * v_new.to(tl.float32)[None, :]
        highest = higher
    # A split without columns weighs nothing.
    weighs = total > 0
    divisor = tl.where(weighs, total, 1.0)
    part = ((row * kv_heads + kv_head) * GROUP + member).to(tl.int64) * splits + split
    tl.store(logs + part, tl.where(weighs, highest + tl.log2(divisor), float("-inf")), mask=is_head)
    p_at = parts + part[:, None] * SIZE + whole[None, :]
    tl.store(p_at, summed / divisor[:, None], mask=is_head[:, None] & in_size[None, :])


@triton.jit
def combine_kernel(
    parts, logs, output, splits, stride_ob, stride_oh, SIZE: tl.constexpr, PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):  # fmt: skip
    """The weighted sum of the parts of one head of one row."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    split, whole = tl.arange(0, SPLITS_PADDED), tl.arange(0, PADDED)
    first = (row * tl.num_programs(0) + head) * splits
    log = tl.load(logs + first + split, mask=split < splits, other=float("-inf"))
    weights = tl.exp2(log - tl.max(log, 0))
    p_at = parts + (first + split)[:, None] * SIZE + whole[None, :]
    part = tl.load(p_at, mask=(split < splits)[:, None] & (whole < SIZE)[None, :], other=0.0)
    summed = tl.sum(part * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(output + row * stride_ob + head * stride_oh + whole, summed, mask=whole < SIZE)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def split_columns(longest: int, programs: int, processors: int, block: int) -> tuple[int, int]:
    """How many splits, and columns in each (whole blocks): enough programs for the chip, and no tiny splits.

    Args:
        longest: Columns of the longest row, of those that are seen.
        programs: Without splits.
        processors: Of the chip.
        block: Columns of a step.
    """
    wanted = max(1, processors * _PROGRAMS_PER_PROCESSOR // programs)
    splits = max(1, min(wanted, longest // max(_SPLIT_LEAST, block)))
    per_split = triton.cdiv(triton.cdiv(longest, splits), block) * block
    return triton.cdiv(longest, per_split), per_split


def launch(
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
    processors: int | None = None,
    settings: Settings | None = None,
) -> Tensor:
    """See :func:`vte_compile.kernels.decode_attention.decode_attention`.

    ``processors``: how many to keep busy; None: those of the device. ``settings``: other than the shipped ones.
    """
    batch, heads, size = query.shape
    kv_heads = key_cache.shape[1]
    given = (query, key_cache, value_cache, block_table, key, value, cos, sin)
    if any(x.stride(-1) != 1 for x in given if x is not None):
        raise ValueError("decode_attention: the last dim of query, caches and tables must be contiguous.")
    if (key is None) != (value is None) or (cos is None) != (sin is None):
        raise ValueError("decode_attention: pass key and value together, and cos and sin.")
    if cos is not None and sin is not None and cos.stride() != sin.stride():
        raise ValueError("decode_attention: cos and sin must be laid out alike.")
    chosen = settings or settings_for("decode_attention", query)
    processors = _processors(query.device) if processors is None else processors
    seen = min(longest, window) if window > 0 else longest
    splits, per_split = split_columns(seen, batch * kv_heads, processors, chosen.block_n)
    parts = torch.empty(batch, heads, splits, size, dtype=torch.float32, device=query.device)
    logs = torch.empty(batch, heads, splits, dtype=torch.float32, device=query.device)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    group, padded = heads // kv_heads, triton.next_power_of_2(size)

    def or_query(*tensors: Tensor | None) -> list[Tensor]:  # what is not there is not read
        return [query if x is None else x for x in tensors]

    split_kernel[(splits, kv_heads, batch)](
        query, *or_query(key, value, cos, sin), key_cache, value_cache,
        *or_query(starts, ends, block_table), parts, logs, longest, per_split, scale, window, softcap,
        *query.stride()[:2], *_strides(key, 2), *_strides(value, 2), *_strides(cos, 1), *key_cache.stride()[:3],
        *value_cache.stride()[:3], *_strides(block_table, 1),
        STARTS=starts is not None, ENDS=ends is not None, ROTATE=cos is not None, APPEND=key is not None, GROUP=group,
        GROUP_PADDED=max(chosen.block_m, triton.next_power_of_2(group)), SIZE=size, PADDED=padded,
        PAGE=0 if block_table is None else key_cache.shape[2], WINDOW=window > 0, SOFTCAP=softcap > 0,
        BLOCK_N=chosen.block_n, COMPUTE=chosen.compute, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    combine_kernel[(heads, batch)](
        parts, logs, output, splits, *output.stride()[:2], SIZE=size, PADDED=padded,
        SPLITS_PADDED=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip
    return output


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()[:count]
