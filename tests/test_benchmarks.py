"""The cases of the benchmarks: which attentions they skip. Their times are not tested."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def skip(monkeypatch):
    """benchmarks/skip.py, importable for the length of a test."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield __import__("skip")
    for name in ("skip", "common"):
        sys.modules.pop(name)


def test_spread(skip):
    assert skip.spread(16, 6) == [5, 7, 9, 10, 12, 14]
    for layers in range(1, 41):
        for count in range(layers // 2 + 1):
            spread = skip.spread(layers, count)
            assert len(set(spread)) == count
            assert all(layers // 3 <= layer < layers - 1 for layer in spread)


def test_cases(skip):
    cases = [*skip.training_free(16), *skip.with_adapters(16, 32, torch.bfloat16)]
    by_name = {case.name: case for case in cases}
    assert len(by_name) == len(cases) == 12
    assert [len(case.plan.skips) for case in cases] == 2 * [0, 4, 6, 8] + 4 * [6]
    assert [len(case.plan.exits) for case in cases] == 4 * [0] + 4 * [1] + 4 * [0]
    assert [case.fold for case in cases] == 8 * [True] + 2 * [True, False]
    for case in cases[8:]:
        plain = by_name[case.without_adapters]
        assert [skip.layer for skip in case.plan.skips] == [skip.layer for skip in plain.plan.skips]
        assert all(skip.adapter.width == 128 for skip in case.plan.skips)


def test_compare(skip):
    """Ratios are of the same round; the medians of the times alone would give others."""
    rows = [
        {"case": case, "prefill": {"runs_s": s}, "decode": {"runs_s": [1.0]}, "prefill_flops": n, "moved_bytes": 1}
        for case, s, n in (("base", [8, 8, 16], 100), ("plain", [2, 4, 2], 50), ("adapted", [3, 6, 1], 50))
    ]
    skip.compare(rows, {"plain": None, "adapted": "plain"})
    assert rows[1]["prefill"] == {"runs_s": [2, 4, 2], "time_ratio": 0.25, "cost_ratio": 0.5, "quotient": 0.5}
    assert rows[2]["prefill"]["to_no_adapter"] == 1.5
    assert rows[2]["decode"]["to_no_adapter"] == 1.0
