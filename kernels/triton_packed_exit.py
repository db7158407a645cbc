"""The Triton kernels of vte::exit_decisions and vte::compact_rows (see kernels/packed_exit.py), one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_C, BLOCK_Q = 32, 128, 16
BLOCK_T, SCAN = 16, 1024


@triton.jit
def decide_kernel(
    hidden, cu_seqlens, question_starts, w1, w2, parts, arrived, fires, threshold, width, middle, stride_h,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCKS_PADDED: tl.constexpr,
):  # fmt: skip
    """A part of the hidden units of one row's gate; whoever is the row's last sums the parts and decides."""
    block, row = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    start, end = tl.load(question_starts + row), tl.load(cu_seqlens + row + 1)
    unit = block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_unit = unit < middle
    summed = tl.zeros([BLOCK_M], tl.float32)
    if start < end:
        for c in range(0, width, BLOCK_C):
            channel = c + tl.arange(0, BLOCK_C)
            is_channel = channel < width
            of_question = tl.zeros([BLOCK_C], tl.float32)
            for q in range(start, end - 1, BLOCK_Q):
                token = q + tl.arange(0, BLOCK_Q)
                inside = (token < end - 1)[:, None] & is_channel[None, :]
                at = hidden + token.to(tl.int64)[:, None] * stride_h + channel[None, :]
                of_question += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32), 0)
            mean = of_question / (end - 1 - start)  # 0 / 0 of one token: NaN, which keeps
            last = tl.load(hidden + (end - 1).to(tl.int64) * stride_h + channel, mask=is_channel, other=0.0)
            mean = tl.where(is_channel, mean, 0.0)
            both = is_unit[:, None] & is_channel[None, :]
            w_at = w1 + unit.to(tl.int64)[:, None] * (2 * width) + channel[None, :]
            summed += tl.sum(tl.load(w_at, mask=both, other=0.0).to(tl.float32) * mean[None, :], 1)
            w_last = tl.load(w_at + width, mask=both, other=0.0).to(tl.float32)
            summed += tl.sum(w_last * last.to(tl.float32)[None, :], 1)
    active = 0.5 * summed * (1.0 + tl.erf(summed * 0.7071067811865476))
    keep = tl.sum(active * tl.load(w2 + unit, mask=is_unit, other=0.0).to(tl.float32), 0)
    leave = tl.sum(active * tl.load(w2 + middle + unit, mask=is_unit, other=0.0).to(tl.float32), 0)
    tl.store(parts + row * blocks + block, leave - keep)
    tl.debug_barrier()  # the part is written before this program counts as arrived
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == blocks - 1:
        # In the order of the units, whoever is last, so that equal inputs give equal decisions.
        part = tl.arange(0, BLOCKS_PADDED)
        margin = tl.sum(tl.load(parts + row * blocks + part, mask=part < blocks, other=0.0, cache_modifier=".cg"), 0)
        tl.store(fires + row, (start < end) & (margin > threshold))


@triton.jit
def compact_kernel(
    hidden, positions, cos, sin, cu_seqlens, keep, new_hidden, new_positions, new_cos, new_sin, new_cu_seqlens,
    tokens, width, half, bounds, stride_h, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, SCAN: tl.constexpr,
    HALF_PADDED: tl.constexpr,
):  # fmt: skip
    """A block of tokens; it counts by itself how many of those before it stay."""
    block = tl.program_id(0)
    first = block * BLOCK_T
    before = 0
    for t in range(0, first, SCAN):
        at = t + tl.arange(0, SCAN)
        before += tl.sum(tl.load(keep + at, mask=at < first, other=0).to(tl.int32), 0)
    token = first + tl.arange(0, BLOCK_T)
    stays = tl.load(keep + token, mask=token < tokens, other=0).to(tl.int32)
    behind = before + tl.cumsum(stays, 0)  # how many stay up to and with each
    target = (behind - 1).to(tl.int64)
    kept = stays != 0
    source = token.to(tl.int64)
    for c in range(0, width, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        mask = kept[:, None] & (channel < width)[None, :]
        value = tl.load(hidden + source[:, None] * stride_h + channel[None, :], mask=mask)
        tl.store(new_hidden + target[:, None] * width + channel[None, :], value, mask=mask)
    tl.store(new_positions + target, tl.load(positions + source, mask=kept), mask=kept)
    channel = tl.arange(0, HALF_PADDED)
    mask = kept[:, None] & (channel < half)[None, :]
    at, to = source[:, None] * half + channel[None, :], target[:, None] * half + channel[None, :]
    tl.store(new_cos + to, tl.load(cos + at, mask=mask), mask=mask)
    tl.store(new_sin + to, tl.load(sin + at, mask=mask), mask=mask)
    # A row ends where the token behind its last one would go.
    for i in range(0, bounds):
        bound = tl.load(cu_seqlens + i)
        here = (bound >= first) & ((bound < first + BLOCK_T) | (first + BLOCK_T >= tokens))
        count = before + tl.sum(tl.where(token < bound, stays, 0), 0)
        tl.store(new_cu_seqlens + i, count, mask=here)


def decide(
    hidden_states: Tensor, cu_seqlens: Tensor, question_starts: Tensor, w1: Tensor, w2: Tensor, threshold: float
) -> Tensor:
    """See :func:`vte_compile.kernels.packed_exit.exit_decisions`."""
    middle, width, batch = w1.shape[0], hidden_states.shape[1], len(question_starts)
    if hidden_states.stride(1) != 1 or not (w1.is_contiguous() and w2.is_contiguous()):
        raise ValueError("exit_decisions: hidden states must be contiguous in their last dim, w1 and w2 as a whole.")
    blocks = triton.cdiv(middle, BLOCK_M)
    parts = torch.empty(batch, blocks, dtype=torch.float32, device=hidden_states.device)
    arrived = torch.zeros(batch, dtype=torch.int32, device=hidden_states.device)
    fires = torch.empty(batch, dtype=torch.bool, device=hidden_states.device)
    decide_kernel[(blocks, batch)](
        hidden_states, cu_seqlens, question_starts, w1, w2, parts, arrived, fires, threshold, width, middle,
        hidden_states.stride(0), BLOCK_M=BLOCK_M, BLOCK_C=BLOCK_C, BLOCK_Q=BLOCK_Q,
        BLOCKS_PADDED=triton.next_power_of_2(blocks), num_warps=4,
    )  # fmt: skip
    return fires


def compact(
    hidden_states: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, keep: Tensor, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`vte_compile.kernels.packed_exit.compact_rows`."""
    if hidden_states.stride(1) != 1 or not all(x.is_contiguous() for x in (positions, cos, sin, keep)):
        raise ValueError("compact_rows: hidden states must be contiguous in their last dim, all else as a whole.")
    tokens, width = hidden_states.shape
    half = cos.shape[1]
    hidden, at, c, s = (x.new_empty(kept, *x.shape[1:]) for x in (hidden_states, positions, cos, sin))
    bounds = torch.empty_like(cu_seqlens)
    compact_kernel[(max(1, triton.cdiv(tokens, BLOCK_T)),)](
        hidden_states, positions, cos, sin, cu_seqlens, keep, hidden, at, c, s, bounds, tokens, width, half,
        len(cu_seqlens), hidden_states.stride(0), BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C, SCAN=SCAN,
        HALF_PADDED=triton.next_power_of_2(half), num_warps=4,
    )  # fmt: skip
    return hidden, at, c, s, bounds
