"""The attention and the cache that a decoder is traced with."""

from __future__ import annotations

import contextvars
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer

from vte_compile.errors import CaptureError
from vte_compile.families.token_blocks import allowed, same_block
from vte_compile.kernels.append_attention import append_attention
from vte_compile.kernels.causal_attention import causal_attention

ATTENTION = "vte_capture"
"""Its name in AttentionInterface."""


class TraceLayer(DynamicLayer):
    """A cache layer that leaves one plain concatenation in the graph (or none, in prefill)."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            key_states = torch.cat([self.keys, key_states], dim=2)
            value_states = torch.cat([self.values, value_states], dim=2)
        # Contiguous, since compiled graphs are specialized to the strides of their inputs and this is one later.
        self.keys, self.values, self.is_initialized = key_states.contiguous(), value_states.contiguous(), True
        self.dtype, self.device = key_states.dtype, key_states.device
        return self.keys, self.values


class DecodeLayer(TraceLayer):
    """A cache layer that leaves appending to the attention behind it (``vte::append_attention``)."""

    new: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.new = key_states, value_states
        return self.new


def trace_cache(past: list[Tensor], layer_class: type[TraceLayer]) -> Any:
    cache: Any = DynamicCache()
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer = layer_class()
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        cache.layers.append(layer)
    cache.layer_class_to_replicate = layer_class
    return cache


@dataclass
class DecodeStep:
    """What the attentions of a decode step take besides their arguments: of each layer, its cache and its rows."""

    layers: list[DecodeLayer]
    starts: list[Tensor]
    """kv_start; none of one row alone."""


decode_step: contextvars.ContextVar[DecodeStep | None] = contextvars.ContextVar("vte_decode_step", default=None)


prompt_blocks: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("vte_blocks", default=None)
"""What the attentions of a prompt take besides, where tokens are in blocks: [1, S]."""


def refuse_extras(module: nn.Module, arguments: Mapping[str, Any], taken: Sequence[str] = ()) -> None:
    """Refuse attention that is more than a softmax of scaled products.

    Args:
        module: The attention.
        arguments: Those beyond queries, keys, values, mask and scale.
        taken: Names of what is taken nevertheless.

    Raises:
        CaptureError: It has a window, soft-capping, a bias or sinks.
    """
    for name in ("sliding_window", "softcap", "position_bias", "s_aux"):
        if name not in taken and arguments.get(name) is not None:
            raise CaptureError(f"layer {module.layer_idx}: attention with {name} is not supported yet.")


def _capture_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with a mask of its own in each layer: the model makes one for all, and lengths differ."""
    refuse_extras(module, kwargs, ("sliding_window", "softcap"))
    window, softcap = int(kwargs.get("sliding_window") or 0), float(kwargs.get("softcap") or 0)
    if (step := decode_step.get()) is not None:
        settings = scaling, window, softcap
        return _append_attention(step, int(module.layer_idx), query, key, value, settings), None  # type: ignore[arg-type]
    heads, tokens = query.shape[1:3]
    kv_heads, kv_length = key.shape[1], key.shape[2]
    if (blocks := prompt_blocks.get()) is not None:
        torch._check(blocks.shape[1] == tokens)  # one symbol from here on, by which exits know what to shorten
    if window or softcap:  # a window counts what this layer holds: after an exit it reaches further back
        beside = None if blocks is None else same_block(blocks, kv_length)
        output = causal_attention(query, key, value, beside, scaling, window, softcap)
        return output.transpose(1, 2), None
    if heads != kv_heads:
        key, value = (_repeated(x, heads // kv_heads) for x in (key, value))
    if blocks is not None:
        mask = allowed(blocks, kv_length)
    else:
        rows = torch.arange(tokens, device=query.device)[:, None] + (kv_length - tokens)
        columns = torch.arange(kv_length, device=query.device)[None, :]
        mask = (columns <= rows)[None, None]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def _repeated(x: Tensor, times: int) -> Tensor:
    """Key/value heads, each for the query heads of its group; as transformers writes it, which fuse_attention knows."""
    batch, heads, tokens, size = x.shape
    return x.unsqueeze(2).expand(batch, heads, times, tokens, size).reshape(batch, heads * times, tokens, size)


def _append_attention(
    step: DecodeStep,
    index: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: tuple[float | None, int, float],
) -> Tensor:
    layer = step.layers[index]
    if key is not layer.new[0] or value is not layer.new[1]:
        raise CaptureError(f"layer {index}: keys or values change between cache and attention.")
    starts = step.starts[index] if step.starts else None
    past = layer.keys, layer.values
    output, layer.keys, layer.values = append_attention(query, key, value, *past, starts, *settings)
    return output


AttentionInterface.register(ATTENTION, _capture_attention)
