"""Which ONNX operators stand for the ops of a chunk's graph where TensorRT builds engines of it.

Opset 18 (19 where there is float8), and standard operators only: TensorRT 10.0 takes opsets up to 20, and later
versions take these still. The operators Attention, RotaryEmbedding and RMSNormalization (opset 23) came with 10.13 to
10.15, and Attention there takes neither a cache nor its lengths; so all three are made of what they consist of, which
TensorRT fuses by itself. Queries are scaled before they meet the keys, as its documentation asks for ("Fused
Attention").

A graph gives the keys and values of its new tokens alone. TensorRT promises nothing for an output that shares memory
with an input (but for its own cache layer, since 10.15), and a cache as an output would be copied at each step. So who
runs the graph owns one cache per layer, which all engines read and none writes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vte_compile.export import fp8_numbers
from vte_compile.export.onnx_ops import Operators
from vte_compile.families.logits import capped
from vte_compile.kernels.cached_attention import cached_attention, rotary, rotate


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    new_lengths: Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int = 0,
    block_ids: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's new tokens stand behind all columns of the cache here; the mask says which of these it has filled.

    Query heads that share keys stand one below the other, so that keys are not repeated: [B, kv_heads, group * T, D].
    """
    batch, tokens = query.shape[:2]
    group = heads // kv_heads
    new_key, new_value = (x.unflatten(-1, (kv_heads, -1)).transpose(1, 2) for x in (key, value))
    keys, values = torch.cat([past_key, new_key], dim=2), torch.cat([past_value, new_value], dim=2)
    queries = (query * scale).unflatten(-1, (kv_heads, group, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    columns, index = torch.arange(past_key.shape[2]), torch.arange(tokens)
    seen = (columns < past_lengths[:, None])[:, None].expand(-1, tokens, -1)  # [B, T, P]
    causal = index <= index[:, None]  # [T, T]: what is padding stands behind all that is not
    if window:
        own = past_lengths[:, None, None] + index[:, None]
        seen, causal = seen & (columns > own - window), causal & (index > index[:, None] - window)
    near = causal.expand(batch, -1, -1)
    if block_ids is not None:  # a window does not limit a token's own block
        near = near | ((block_ids[:, :, None] == block_ids[:, None]) & (block_ids >= 0)[:, :, None])
    mask = torch.cat([seen, near], dim=2)
    mask = mask[:, None].expand(-1, group, -1, -1).flatten(1, 2)[:, None]
    scores = capped(queries @ keys.transpose(2, 3), softcap or None)
    scores = torch.where(mask, scores, torch.finfo(query.dtype).min)
    output = torch.softmax(scores, dim=-1) @ values
    return output.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4).flatten(2), new_key, new_value


def _expected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    new_lengths: Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int = 0,
    block_ids: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the reference gives, with the new tokens' columns of its caches."""
    tensors = (query, key, value, past_key, past_value, past_lengths, new_lengths)
    output, *caches = cached_attention._opoverload(*tensors, heads, kv_heads, scale, window, block_ids, softcap)
    columns = past_lengths[:, None] + torch.arange(query.shape[1], device=query.device)
    new = [c.gather(2, columns[:, None, :, None].expand(-1, kv_heads, -1, c.shape[3])) for c in caches]
    return output, new[0], new[1]


TENSORRT = Operators(
    {"": 18},
    {cached_attention._opoverload: _attention, rotary._opoverload: rotate},
    {cached_attention._opoverload: _expected_attention},
    fuses_norms=False,
    new_columns=True,
)

TENSORRT_FP8 = replace(TENSORRT, opsets={"": fp8_numbers.OPSET})
