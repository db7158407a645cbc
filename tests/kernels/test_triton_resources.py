"""The Triton kernels compile ahead of time for each chip with the shipped settings, without spilling registers.

One head size and dtype here; ``benchmarks/kernels.py --check`` does all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be compiled")

from vte_compile.kernels.attention_support import HEAD_SIZES
from vte_compile.kernels.triton_settings import CHIPS, SHARED_MEMORY, table

ROOT = Path(__file__).parents[2]
KERNELS = {"append_kernel", "attention_kernel", "split_kernel", "combine_kernel", "decide_kernel", "compact_kernel"}


def run(*options):
    """The benchmark, in a process in which kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_no_spills_and_shared_memory_of_the_chip(chip, tmp_path):
    file = tmp_path / "check.json"
    done = run("--check", "--chip", str(chip), "--size", "128", "--dtype", "bfloat16", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["cases"]
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["chip"] == chip
        assert 0 < row["registers"] <= 255
        assert row["spills"] == 0
        assert row["shared"] <= SHARED_MEMORY[chip]
    [plain, extra] = [row for row in rows if row["kernel"] == "attention_kernel"]
    assert (plain["variant"], extra["variant"]) == ("", "window, softcap")
    assert plain["shared"] > 16 * 1024  # blocks of keys and values are staged there


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which they are timed")
def test_without_a_gpu_nothing_is_timed():
    done = run()
    assert done.returncode != 0
    assert "--check" in done.stderr
    assert "CUDA GPU" in done.stderr


def test_settings_for_all_that_is_supported():
    for chip in CHIPS:
        for size in HEAD_SIZES:
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                for kernel in ("varlen_attention", "decode_attention"):
                    chosen = table(kernel, size, dtype, chip)
                    assert chosen.block_m >= 16  # what a product on tensor cores takes
                    assert chosen.block_n >= 16
