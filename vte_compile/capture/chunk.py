"""Trace a decoder into one FX graph for all phases, as engines want it: prefill, continuation and decode.

    chunk    (inputs_embeds [B, T, C], position_ids [B, T], new_lengths [B], past_lengths [B], more ...,
              past_key_0 [B, key/value heads, P, head size], past_value_0 ...)     -> logits, key_0, value_0, key_1 ...

``more`` is what else a decoder is told of each token (``DecoderSpec.token_inputs``); mostly nothing.
One set of weights then serves all phases. Rows and caches are aligned at the start (kernels/cached_attention.py).
Attention is one op, vte::cached_attention. All layers are traced with one ``past_lengths``; after an exit those above
it get another: the graph is cut there.
"""

from __future__ import annotations

import contextvars
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer

from vte_compile.capture.attention import refuse_extras
from vte_compile.capture.decoder_graph import DecoderGraph
from vte_compile.capture.decoder_with_head import decoder_module
from vte_compile.capture.phases import example_token_inputs
from vte_compile.capture.tracing import trace
from vte_compile.families.cache_name import cache_name
from vte_compile.families.decoder import DecoderSpec
from vte_compile.families.deepstack import adding, given
from vte_compile.families.logits import capped
from vte_compile.kernels.cached_attention import cached_attention

_ATTENTION = "vte_chunk"
# Any numbers that are neither 0 nor 1 and differ, so that no two dims are taken for one.
_EXAMPLE_BATCH, _EXAMPLE_TOKENS, _EXAMPLE_PAST = 5, 11, 17


@dataclass
class _Chunk:
    """What the layers' attentions need beside their own queries, keys and values, and what they leave."""

    past: list[Tensor]
    past_lengths: Tensor
    new_lengths: Tensor
    block_ids: Tensor | None
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


_chunk: contextvars.ContextVar[_Chunk] = contextvars.ContextVar("vte_chunk")


def _chunk_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    refuse_extras(module, kwargs, ("sliding_window", "softcap"))
    chunk, layer = _chunk.get(), int(module.layer_idx)  # type: ignore[arg-type]
    batch, heads, tokens, size = query.shape
    kv_heads = key.shape[1]
    merged = [x.transpose(1, 2).reshape(batch, tokens, x.shape[1] * x.shape[3]) for x in (query, key, value)]
    scale = size**-0.5 if scaling is None else scaling
    lengths = (chunk.past_lengths, chunk.new_lengths)
    past = chunk.past[2 * layer : 2 * layer + 2]
    window, softcap = int(kwargs.get("sliding_window") or 0), float(kwargs.get("softcap") or 0)
    options = (heads, kv_heads, scale, window, chunk.block_ids, softcap)
    output, *present = cached_attention._opoverload(*merged, *past, *lengths, *options)
    chunk.present[layer] = (present[0], present[1])
    return output.reshape(batch, tokens, heads, value.shape[-1]), None


AttentionInterface.register(_ATTENTION, _chunk_attention)


class _PassingLayer(DynamicLayer):
    """A cache layer that hands the new keys and values on: the attention knows the past."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0


class _ChunkDecoder(nn.Module):
    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.decoder, self.lm_head = decoder_module(spec), spec.lm_head
        if spec.deepstack:
            self.decoder = adding(self.decoder, spec.deepstack)
        self.cache_name, self.has_blocks = cache_name(spec.decoder.forward), spec.has_blocks
        self.logit_softcap = spec.logit_softcap

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        new_lengths: Tensor,
        past_lengths: Tensor,
        token_inputs: list[Tensor],
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        cache: Any = DynamicCache()
        cache.layer_class_to_replicate = _PassingLayer
        chunk = _Chunk(past, past_lengths, new_lengths, token_inputs[-1] if self.has_blocks else None)
        token = _chunk.set(chunk)
        try:
            with given(token_inputs):
                hidden = self.decoder(
                    inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=True, **{self.cache_name: cache}
                ).last_hidden_state
        finally:
            _chunk.reset(token)
        logits = capped(self.lm_head(hidden), self.logit_softcap)
        return logits, *[t for layer in sorted(chunk.present) for t in chunk.present[layer]]


def capture_chunk(spec: DecoderSpec) -> DecoderGraph:
    """Trace a decoder for all phases. The model is not modified; its weights are referred to, not copied.

    Raises:
        CaptureError: torch.export could not trace the decoder.
    """
    names = ("inputs_embeds", "position_ids", "new_lengths", "past_lengths", *spec.token_inputs)
    return trace(spec, _ChunkDecoder(spec), "chunk", True, _ATTENTION, names, partial(_examples, spec))


def _examples(spec: DecoderSpec, layers: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    options: dict[str, Any] = {"device": spec.device, "dtype": spec.dtype}
    embeds = torch.zeros(_EXAMPLE_BATCH, _EXAMPLE_TOKENS, spec.hidden_size, **options)
    rows = (spec.position_rows,) if spec.position_rows > 1 else ()
    positions = torch.arange(_EXAMPLE_TOKENS, device=spec.device).expand(*rows, _EXAMPLE_BATCH, -1).contiguous()
    new_lengths = torch.full((_EXAMPLE_BATCH,), _EXAMPLE_TOKENS, device=spec.device)
    past_lengths = torch.zeros_like(new_lengths)
    past = [
        torch.zeros(_EXAMPLE_BATCH, spec.kv_heads, _EXAMPLE_PAST + layer, spec.head_size, **options)
        for layer in range(layers)
        for _ in range(2)
    ]
    auto: dict[int, Any] = {0: Dim.AUTO, 1: Dim.AUTO}
    batch = {0: Dim.AUTO}
    position_dims = {dim + len(rows): kind for dim, kind in auto.items()}
    more = example_token_inputs(spec, embeds)
    return (embeds, positions, new_lengths, past_lengths, more, past), (
        auto,
        position_dims,
        batch,
        batch,
        [auto] * len(more),
        [{0: Dim.AUTO, 2: Dim.AUTO}] * len(past),
    )
