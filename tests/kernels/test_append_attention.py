"""append_attention against a loop over rows and heads; in place it gives the same, and writes one column only."""

from __future__ import annotations

import pytest
import torch

from vte_compile.kernels.append_attention import append_and_attend, append_attention


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(batch=2, heads=6, kv_heads=2, columns=9, size=8, value_size=8, padded=True, dtype=torch.float32):
    """Query, key and value of a token, keys and values before it, and starts."""
    past = [random(batch, kv_heads, columns, s, dtype=dtype) for s in (size, value_size)]
    new = [random(batch, n, 1, s, dtype=dtype) for n, s in ((heads, size), (kv_heads, size), (kv_heads, value_size))]
    return [*new, *past, torch.arange(batch) % (columns + 1) if padded else None]


def naive(query, key, value, past_keys, past_values, starts, scale, softcap=0.0):
    """Row by row and head by head, in float64."""
    batch, heads, _, size = query.shape
    rows = []
    for b in range(batch):
        start = 0 if starts is None else int(starts[b])
        for head in range(heads):
            kv_head = head * key.shape[1] // heads
            keys = torch.cat([past_keys[b, kv_head, start:], key[b, kv_head]]).double()
            values = torch.cat([past_values[b, kv_head, start:], value[b, kv_head]]).double()
            scores = keys @ query[b, head, 0].double() * (scale or size**-0.5)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            rows.append(scores.softmax(0) @ values)
    return torch.stack(rows).reshape(batch, 1, heads, -1)


CASES = [
    {},
    {"padded": False},
    {"batch": 1, "padded": False, "columns": 1},
    {"batch": 5, "columns": 3},
    {"heads": 4, "kv_heads": 4, "value_size": 3},
    {"heads": 3, "kv_heads": 1, "size": 5, "columns": 67},
    {"dtype": torch.bfloat16, "columns": 33},
    {"dtype": torch.float64},
]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_naive(case, scale):
    given = inputs(**case)
    output, keys, values = append_attention(*given, scale)
    tolerance = 3e-2 if output.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output.double(), naive(*given, scale), rtol=tolerance, atol=tolerance)
    assert output.is_contiguous()
    assert torch.equal(keys, torch.cat([given[3], given[1]], 2))
    assert torch.equal(values, torch.cat([given[4], given[2]], 2))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_capped_scores(case):
    """(Windows: tests/test_windows.py.)"""
    given = inputs(**case)
    output, *_ = append_attention(*given, 0.8, 0, 1.5)
    tolerance = 3e-2 if output.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output.double(), naive(*given, 0.8, 1.5), rtol=tolerance, atol=tolerance)
    assert output.is_contiguous()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_place(case):
    """Views of buffers with room: what lies behind is not read, and of what is there the last column alone written."""
    query, key, value, past_keys, past_values, starts = inputs(**case)
    expected = append_attention(query, key, value, past_keys, past_values, starts, None)
    buffers = [
        torch.full((*p.shape[:2], p.shape[2] + 5, p.shape[3]), torch.nan, dtype=p.dtype)
        for p in (past_keys, past_values)
    ]
    for buffer, past in zip(buffers, (past_keys, past_values), strict=True):
        buffer[:, :, : past.shape[2]] = past
    views = [buffer[:, :, : past_keys.shape[2] + 1] for buffer in buffers]
    output = append_and_attend(query, key, value, *views, starts, None)
    tolerance = 3e-2 if output.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(output, expected[0], rtol=tolerance, atol=tolerance)
    assert output.is_contiguous()
    for buffer, grown in zip(buffers, expected[1:], strict=True):
        assert torch.equal(buffer[:, :, : grown.shape[2]], grown)
        assert buffer[:, :, grown.shape[2] :].isnan().all()


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_opcheck(case):
    torch.library.opcheck(append_attention, (*inputs(**case), None))
    torch.library.opcheck(append_attention, (*inputs(**case), None, 3, 1.5))
