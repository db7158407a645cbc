"""causal_attention against scores written out in float64: windows, caps and what is seen beside, alone and together."""

from __future__ import annotations

import sys

import pytest
import torch

from vte_compile.kernels.causal_attention import attend, attend_causally, causal_attention


def inputs(tokens=5, columns=9, heads=6, kv_heads=2, size=8, value_size=8, dtype=torch.float32):
    """Query, key and value as models lay them out (heads brought forward)."""
    generator = torch.Generator().manual_seed(tokens + columns)
    shapes = ((tokens, heads, size), (columns, kv_heads, size), (columns, kv_heads, value_size))
    return [torch.randn(1, *shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def naive(query, key, value, beside, scale, window, softcap):
    group, tokens, columns = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = query.double() @ key.mT * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    for i in range(tokens):
        own = columns - tokens + i
        for j in range(columns):
            near = j <= own and (window == 0 or j > own - window)
            if not near and (beside is None or not beside[0, 0, i, j]):
                scores[:, :, i, j] = -torch.inf
    return scores.softmax(-1) @ value


CASES = [
    {},
    {"columns": 5},
    {"tokens": 1},
    {"tokens": 1, "columns": 1},
    {"heads": 4, "kv_heads": 4, "value_size": 3},
    {"heads": 3, "kv_heads": 1, "columns": 5},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float64},
]


@pytest.mark.parametrize(
    ("window", "softcap", "scale"), [(0, 0.0, None), (3, 0.0, 0.3), (0, 0.7, 0.3), (4, 1.5, None), (9, 0.0, None)]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_naive(case, window, softcap, scale):
    given = inputs(**case)
    tokens, columns = given[0].shape[2], given[1].shape[2]
    beside = torch.rand(1, 1, tokens, columns, generator=torch.Generator().manual_seed(1)) < 0.4
    tolerance = {torch.bfloat16: 3e-2, torch.float64: 1e-6}.get(given[0].dtype, 1e-5)
    for seen in (None, beside):
        output = causal_attention(*given, seen, scale, window, softcap)
        assert output.dtype == given[0].dtype
        assert output.transpose(1, 2).is_contiguous()
        want = naive(*given, seen, scale, window, softcap)
        torch.testing.assert_close(output.double(), want, rtol=tolerance, atol=tolerance)


def test_capped_scores_of_some_queries_at_a_time(monkeypatch):
    given = inputs(columns=9)
    beside = torch.rand(1, 1, 5, 9, generator=torch.Generator().manual_seed(1)) < 0.4
    for seen in (None, beside):
        whole = causal_attention(*given, seen, None, 4, 0.7)
        monkeypatch.setattr(sys.modules[attend.__module__], "_QUERIES", 2)
        torch.testing.assert_close(causal_attention(*given, seen, None, 4, 0.7), whole)
        monkeypatch.undo()
    one = torch.ones(1, 1, 1, 9, dtype=torch.bool)  # for all queries
    whole = attend(*given, one, None, 0.7)
    monkeypatch.setattr(sys.modules[attend.__module__], "_QUERIES", 2)
    torch.testing.assert_close(attend(*given, one, None, 0.7), whole)


def test_inputs_stay_as_they_are():
    given = inputs()
    before = [x.clone() for x in given]
    attend_causally(*given, None, 3, 0.5)
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_opcheck(case):
    given = inputs(**case)
    torch.library.opcheck(causal_attention, (*given, None, None, 3, 0.0))
    beside = torch.ones(1, 1, given[0].shape[2], given[1].shape[2], dtype=torch.bool)
    torch.library.opcheck(causal_attention, (*given, beside, 0.3, 0, 2.0))
