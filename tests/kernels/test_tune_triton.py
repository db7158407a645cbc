"""benchmarks/tune_triton.py: what it tries, what it keeps, and the file it writes; times are made up."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from vte_compile.kernels.triton_settings import FILE, shipped, table

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("tune_triton")


def test_the_search_is_capped_and_begins_with_what_is_shipped(tune):
    for kernel in tune.KERNELS:
        tried = tune.candidates(kernel, 128, torch.float16, 90, 9)
        assert len(set(tried)) == 9
        assert tried[0] == table(kernel, 128, torch.float16, 90)
        assert all(
            sum(a != b for a, b in zip(tune.numbers(t), tune.numbers(tried[0]), strict=True)) <= 1 for t in tried[:4]
        )
    assert {t.block_m for t in tune.candidates("decode_attention", 64, torch.float16, 80, 99)} == {16}


def test_what_is_kept(tune):
    tried = tune.candidates("varlen_attention", 64, torch.bfloat16, 80, 5)
    seconds = dict(zip(tried, (1.0, 0.9, 0.5, 0.6, 0.2), strict=True))

    def refused(settings):
        return "spills" if settings == tried[4] else None

    def measure(settings):
        if settings == tried[3]:
            raise RuntimeError("no such launch")
        return seconds[settings], 2.0 if settings == tried[2] else 0.1

    best, rows = tune.search(tried, refused, measure, 0.03)
    assert best == tried[1]  # the fastest that fits, runs and is right
    assert [row.get("left_out") for row in rows] == [
        None,
        None,
        "its numbers are off by 2.0 times what is allowed",
        "RuntimeError: no such launch",
        "spills",
    ]
    assert tune.search(tried, refused, measure, 0.2)[0] == tried[0]  # too little is gained
    assert tune.search(tried, lambda settings: "spills", measure, 0.03)[0] == tried[0]


def test_the_file_is_what_would_be_written(tune):
    text = FILE.read_text(encoding="utf-8")
    assert tune.written(shipped(), json.loads(text)["origins"]) == text
