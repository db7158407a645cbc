"""Masks: of a chunk's tokens, and of what they attend to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vte_compile.errors import InputError


def row_mask(blocks: Tensor, past_length: int, window: int | None, like: Tensor) -> Tensor:
    """Additive mask [1, 1, length, past_length + length], 0 = may attend, -inf = may not, causal by order in the row.

    Tokens of one block (blocks: int [length], -1 for none) attend to each other in both directions. A window limits
    how far back, but not in a block.
    Additive because eager attention adds it; sdpa takes it as well. No query is without a key: each sees itself.
    """
    length = len(blocks)
    query = torch.arange(past_length, past_length + length, device=like.device)[:, None]
    key = torch.arange(past_length + length, device=like.device)[None]
    allowed = key <= query
    if window is not None:
        allowed &= key > query - window
    allowed[:, past_length:] |= (blocks[:, None] == blocks) & (blocks[:, None] >= 0)
    return like.new_zeros(allowed.shape).masked_fill(~allowed, float("-inf"))[None, None]


def layer_window(config: Any, index: int) -> int | None:
    """Sliding window of layer `index`, None = full attention. Without layer types, all layers have the same one."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[index] == "full_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def checked_mask(mask: Tensor | None, name: str, inputs_embeds: Tensor, default: bool) -> Tensor:
    """`mask` as bool [B, T], checked against the chunk."""
    shape = inputs_embeds.shape[:2]
    if mask is None:
        return torch.full(shape, default, dtype=torch.bool, device=inputs_embeds.device)
    if mask.shape != shape:
        raise InputError(f"{name} must be {list(shape)} like the chunk (without the past), got {list(mask.shape)}")
    return mask.to(device=inputs_embeds.device, dtype=torch.bool)
