"""What the Triton attention kernels take; without Triton, so that passes can ask where it is not installed."""

from __future__ import annotations

import torch

HEAD_SIZES = (64, 80, 96, 128, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported(size: int, dtype: torch.dtype) -> str | None:
    """Why there is no kernel for heads of a size and dtype; None if there is."""
    if size not in HEAD_SIZES:
        return f"head size {size}: expected one of {', '.join(map(str, HEAD_SIZES))}."
    if dtype not in DTYPES:
        return f"{dtype}: expected float16, bfloat16 or float32."
    return None
