"""The ops of fused graphs are what they stand for: rotations, and then attention."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from torch.library import opcheck

from vte_compile.kernels.append_attention import append_attention
from vte_compile.kernels.fused_attention import rotary_append_attention, rotary_packed_attention
from vte_compile.kernels.packed_attention import packed_attention


def inputs(batch, tokens, heads=4, kv_heads=2, size=8):
    """Query, key and value [B, T, heads, D], and tables [B, T, D] of equal halves."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(batch, tokens, n, size, generator=generator) for n in (heads, kv_heads, kv_heads)]
    angles = (torch.rand(batch, tokens, size // 2, generator=generator) * 6).repeat(1, 1, 2)
    return [*tensors, angles.cos(), angles.sin()]


def turned(x, cos, sin):
    """As models write it: [B, heads, T, D]."""
    x = x.transpose(1, 2)
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


@pytest.mark.parametrize(("kv_heads", "settings"), [(1, ()), (2, ()), (2, (3, 0.9))])
def test_packed(kv_heads, settings):
    query, key, value, *tables = inputs(1, 9, kv_heads=kv_heads)
    bounds = torch.tensor([0, 2, 7, 9], dtype=torch.int32)
    rotated = turned(query, *tables), turned(key, *tables), value.transpose(1, 2)
    want = packed_attention(*rotated, bounds, bounds, 0.3, *settings)
    output, keys, values = rotary_packed_attention(query, key, value, *tables, bounds, bounds, 0.3, *settings)
    assert_close(output, want)
    assert output.transpose(1, 2).is_contiguous()
    assert_close(keys, turned(key, *tables))
    assert torch.equal(values, value.transpose(1, 2))
    last = bounds[1:].long() - 1
    ones = torch.arange(4, dtype=torch.int32)
    output, *_ = rotary_packed_attention(query[:, last], key, value, *tables, ones, bounds, 0.3, *settings)
    assert_close(output, want[:, :, last])


@pytest.mark.parametrize(("starts", "settings"), [(None, ()), ([0, 3], ()), ([0, 3], (4, 0.9))])
def test_append(starts, settings):
    query, key, value, *tables = inputs(2, 1)
    past = [torch.randn(2, 2, 5, 8) for _ in range(2)]
    begin = None if starts is None else torch.tensor(starts)
    rotated = turned(query, *tables), turned(key, *tables), value.transpose(1, 2)
    want = append_attention(*rotated, *past, begin, None, *settings)
    got = rotary_append_attention(query, key, value, *tables, *past, begin, None, *settings)
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs)


def test_ops():
    bounds = torch.tensor([0, 2, 7], dtype=torch.int32)
    utilities = ("test_schema", "test_faketensor")
    opcheck(rotary_packed_attention, (*inputs(1, 7), bounds, bounds, None), test_utils=utilities)
    past = [torch.randn(2, 2, 5, 8) for _ in range(2)]
    opcheck(rotary_append_attention, (*inputs(2, 1), *past, torch.tensor([0, 3]), None), test_utils=utilities)
