"""packed_attention against a loop over rows and heads in float64."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from vte_compile.kernels.packed_attention import packed_attention

# Rows of different lengths, neighbours of equal ones, and one token.
LENGTHS = [[5], [3, 3, 3], [1, 7, 7, 2, 1, 1], [9, 1]]


def bounds(lengths) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def inputs(lengths, last=False, heads=6, kv_heads=2, size=8, value_size=8, dtype=torch.float32):
    """Query, key, value as models lay them out (heads brought forward), and where rows begin and end."""
    generator = torch.Generator().manual_seed(sum(lengths))
    queries = [1] * len(lengths) if last else lengths
    shapes = ((queries, heads, size), (lengths, kv_heads, size), (lengths, kv_heads, value_size))
    tensors = [torch.randn(1, sum(n), h, s, generator=generator).to(dtype).transpose(1, 2) for n, h, s in shapes]
    return [*tensors, bounds(queries), bounds(lengths)]


def naive(query, key, value, cu_queries, cu_keys, scale, window=0, softcap=0.0):
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    output = torch.empty(1, heads, query.shape[2], value.shape[3], dtype=torch.float64)
    for b in range(len(cu_keys) - 1):
        q, k = slice(*cu_queries[b : b + 2].tolist()), slice(*cu_keys[b : b + 2].tolist())
        count, seen = q.stop - q.start, k.stop - k.start
        for h in range(heads):
            keys, values = (x[0, h // group, k].double() for x in (key, value))
            scores = query[0, h, q].double() @ keys.T * (query.shape[3] ** -0.5 if scale is None else scale)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            ahead = torch.arange(seen) - torch.arange(seen - count, seen)[:, None]
            hidden = (ahead > 0) | (ahead <= -(window or seen))
            output[0, h, q] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
    return output


CASES = [
    {},
    {"last": True},
    {"heads": 4, "kv_heads": 4, "value_size": 3},
    {"heads": 4, "kv_heads": 1, "last": True},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float64},
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_naive(case, scale, lengths):
    given = inputs(lengths, **case)
    output = packed_attention(*given, scale)
    tolerance = 3e-2 if output.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output.double(), naive(*given, scale), rtol=tolerance, atol=tolerance)
    assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("window", "softcap"), [(3, 0.0), (0, 0.7), (2, 1.5)])
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_windows_and_caps(case, window, softcap):
    given = inputs([1, 7, 7, 2, 1], **case)
    output = packed_attention(*given, None, window, softcap)
    tolerance = 3e-2 if output.dtype == torch.bfloat16 else 1e-5
    want = naive(*given, None, window, softcap)
    torch.testing.assert_close(output.double(), want, rtol=tolerance, atol=tolerance)
    assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_rows_do_not_see_each_other(case):
    """What stands in other rows, NaN even, changes nothing."""
    given = inputs([4, 3, 3], **case)
    expected = packed_attention(*given, None)
    alone = [x[:, :, int(at[1]) : int(at[2])] for x, at in zip(given[:3], (given[3], given[4], given[4]), strict=True)]
    for x, at in zip(given[:3], (given[3], given[4], given[4]), strict=True):
        x[:, :, : at[1]] = torch.nan
        x[:, :, at[2] :] = torch.nan
    got = packed_attention(*given, None)
    row = slice(int(given[3][1]), int(given[3][2]))
    assert torch.equal(got[:, :, row], expected[:, :, row])
    one = [torch.tensor([0, x.shape[2]], dtype=torch.int32) for x in alone[:2]]
    torch.testing.assert_close(packed_attention(*alone, *one, None), expected[:, :, row])


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_opcheck(case):
    torch.library.opcheck(packed_attention, (*inputs([2, 5, 5], **case), None))
    torch.library.opcheck(packed_attention, (*inputs([2, 5, 5], **case), None, 2, 1.5))
