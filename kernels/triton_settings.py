"""Block sizes, warps and stages of the Triton kernels, per chip, head size and dtype.

They stand in ``triton_settings.json``, and nothing is searched at run time: a first call takes what stands there.
``benchmarks/kernels.py --check`` compiles all of it ahead of time, and tests do for a part: no spilled
registers, and shared memory that the chip has. ``benchmarks/tune_triton.py`` searches, on a GPU, and writes the file
anew.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from vte_compile.kernels.attention_support import unsupported

CHIPS = (80, 90, 100)
"""Compute capabilities that have settings of their own; others take those of the nearest below."""
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes one block may use (CUDA C++ Programming Guide, technical specifications per compute capability)."""
FILE = Path(__file__).with_name("triton_settings.json")
Table = dict[str, dict[str, dict[str, dict[str, list[int]]]]]
"""Kernel -> chip -> head size -> dtype -> the numbers of ``Settings``, in their order."""


@dataclass(frozen=True)
class Settings:
    """How one kernel is launched."""

    block_m: int
    """Queries of a program."""
    block_n: int
    """Keys of a step."""
    num_warps: int
    num_stages: int
    compute: Any
    """The dtype of products' inputs, as Triton names it."""


def settings_for(kernel: str, tensor: Tensor) -> Settings:
    """The settings for a tensor [..., head size] on the device it is on."""
    interpreted = tensor.device.type == "cpu"
    chip = 80 if interpreted else _chip(tensor.device)
    chosen = table(kernel, tensor.shape[-1], tensor.dtype, chip)
    if interpreted:
        # Triton's interpreter multiplies bfloat16 wrongly; and it is slow, so blocks are small.
        compute = tl.float32 if tensor.dtype == torch.bfloat16 else chosen.compute
        return Settings(16, 16, 1, 1, compute)
    return chosen


def table(kernel: str, size: int, dtype: torch.dtype, chip: int) -> Settings:
    """The shipped settings.

    Raises:
        ValueError: There are none for this head size or dtype.
    """
    if reason := unsupported(size, dtype):
        raise ValueError(f"{kernel}: {reason}")
    block_m, block_n, num_warps, num_stages = shipped()[kernel][str(chip)][str(size)][dtype_name(dtype)]
    return Settings(block_m, block_n, num_warps, num_stages, _COMPUTE[dtype])


@functools.cache
def shipped() -> Table:
    """What ``triton_settings.json`` says."""
    read: Table = json.loads(FILE.read_text(encoding="utf-8"))["settings"]
    return read


def dtype_name(dtype: torch.dtype) -> str:
    """As the file calls it."""
    return str(dtype).removeprefix("torch.")


_COMPUTE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@functools.cache
def _chip(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return max((chip for chip in CHIPS if chip <= 10 * major + minor), default=CHIPS[0])
