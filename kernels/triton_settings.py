"""Block sizes, warps and stages of the Triton kernels, per chip, head size and dtype.

Nothing is searched at run time: a first call takes what stands here. ``benchmarks/triton_kernels.py --check`` compiles
all of it ahead of time, and tests do for a part: no spilled registers, and shared memory that the chip has.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from vte_compile.kernels.attention_support import unsupported

CHIPS = (80, 90, 100)
"""Compute capabilities that have settings of their own; others take those of the nearest below."""
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes one block may use (CUDA C++ Programming Guide, technical specifications per compute capability)."""


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
    wide = dtype == torch.float32
    compute = _COMPUTE[dtype]
    if kernel == "decode_attention":
        if wide:  # products in float32 take registers, and no tensor cores
            return Settings(16, 32 if size <= 64 else 16, 4 if size <= 64 else 8, 1, compute)
        return Settings(16, 32 if size == 256 else 64, 4, 2, compute)
    if wide:
        if size == 256:
            return Settings(16, 16, 8, 1, compute)
        return Settings(32, 32, 4 if chip < 100 else 8, 2, compute)
    if size == 256:
        return Settings(64, 32, 8, 2, compute)
    if chip >= 90:
        return Settings(128, 64, 8, 3 if size == 64 else 2, compute)
    return Settings(64, 64, 4, 3 if size == 64 else 2, compute)


_COMPUTE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@functools.cache
def _chip(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return max((chip for chip in CHIPS if chip <= 10 * major + minor), default=CHIPS[0])
