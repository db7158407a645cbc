"""Trace a decoder into FX graphs: prefill, extend (a chunk that continues a cache) and decode.

Each graph has flat tensors in and out, with lengths that stay symbolic:

    prefill  (inputs_embeds [1, S, C], position_ids [1, S], more ...)               -> logits, key_0, value_0, key_1 ...
    extend   (inputs_embeds [1, T, C], position_ids [1, T], more ..., past ...)     -> the same, keys and values grown
    decode   (inputs_embeds [B, 1, C], position_ids [B, 1], past ..., kv_start ...) -> the same

``more`` is what else a decoder is told of each token of a prompt (``DecoderSpec.token_inputs``); mostly nothing.
Where positions are multimodal, position_ids have a leading dim of 3 rows: [3, 1, S], [3, B, 1].
A layer's keys and values are [B, key/value heads, length of that layer, head size]; lengths differ from layer to layer.
Prefill and extend take one row at a time (rows leave at different layers); decode takes the batch, with rows aligned at
the end and ``kv_start_i`` [B] the first real column of each row in layer i (absent for B = 1).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from vte_compile.capture.attention import ATTENTION
from vte_compile.capture.decoder_graph import DecoderGraph
from vte_compile.capture.decoder_with_head import DecoderWithHead
from vte_compile.capture.tracing import trace
from vte_compile.families.decoder import DecoderSpec
from vte_compile.runtime.steps import Phase

# Example lengths: any numbers do that are neither 0 nor 1 and differ, so that no two dims are taken for one.
_EXAMPLE_TOKENS, _EXAMPLE_BATCH, _EXAMPLE_PAST = 11, 5, 17


def capture(spec: DecoderSpec, phase: Phase, *, batched: bool = False) -> DecoderGraph:
    """Trace one phase of a decoder.

    The model is not modified. Its weights are referred to, not copied.

    Args:
        spec: The decoder, from :func:`vte_compile.families.decoder.describe`.
        phase: ``prefill``, ``extend`` or ``decode``.
        batched: Keep the batch size symbolic (decode only).

    Raises:
        CaptureError: torch.export could not trace the decoder.
    """
    if batched and phase != "decode":
        raise ValueError("prefill and extend run one row at a time")
    # In prefill the model masks by itself, and plain_causal proves what the mask is. Blocks, and what a
    # window counts after an exit, are known here alone; and torch's own attention caps no scores.
    own = spec.has_blocks or spec.has_windows or spec.attention_softcap is not None
    masks_itself = phase == "prefill" and not own
    implementation = "sdpa" if masks_itself else ATTENTION
    names = ("inputs_embeds", "position_ids", *(() if phase == "decode" else spec.token_inputs))
    wrapper = DecoderWithHead(spec, phase)
    return trace(spec, wrapper, phase, batched, implementation, names, partial(_examples, spec, phase, batched))


def example_token_inputs(spec: DecoderSpec, embeds: Tensor) -> list[Tensor]:
    """What a decoder takes of each token beside embeddings [B, T, C], as ``DecoderSpec.token_inputs`` names it."""
    blocks = [torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)] if spec.has_blocks else []
    return [*(torch.zeros_like(embeds) for _ in range(spec.deepstack)), *blocks]


def _examples(spec: DecoderSpec, phase: Phase, batched: bool, layers: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    options: dict[str, Any] = {"device": spec.device, "dtype": spec.dtype}
    batch = _EXAMPLE_BATCH if batched else 1
    tokens = 1 if phase == "decode" else _EXAMPLE_TOKENS
    embeds = torch.zeros(batch, tokens, spec.hidden_size, **options)
    rows = (spec.position_rows,) if spec.position_rows > 1 else ()
    positions = torch.arange(tokens, device=spec.device).expand(*rows, batch, -1).contiguous()
    dims = ({0: Dim.AUTO} if batched else {}) | ({} if phase == "decode" else {1: Dim.AUTO})
    position_dims = {dim + len(rows): kind for dim, kind in dims.items()}
    past: list[Tensor] = []
    kv_start: list[Tensor] = []
    if phase != "prefill":
        for layer in range(layers):
            past += [
                torch.zeros(batch, spec.kv_heads, _EXAMPLE_PAST + layer, spec.head_size, **options) for _ in range(2)
            ]
            if batched:
                kv_start.append(torch.zeros(batch, dtype=torch.long, device=spec.device))
    past_dims = ({0: Dim.AUTO} if batched else {}) | {2: Dim.AUTO}
    more = [] if phase == "decode" else example_token_inputs(spec, embeds)
    shapes = (dims, position_dims, [dims] * len(more), [past_dims] * len(past), [{0: Dim.AUTO}] * len(kv_start))
    return (embeds, positions, more, past, kv_start), shapes
