"""What stands in a Dynamo graph in the place of the decoder: one call of its rewritten graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vte_compile.dynamo.handles import HandleShape, attach, cache_behind, cache_of, columns_of, make_handle
from vte_compile.dynamo.visual import visual_mask_of
from vte_compile.families.deepstack import spread
from vte_compile.families.token_blocks import blocks_of, unmasked_block
from vte_compile.runtime.decoder_runner import DecoderRunner
from vte_compile.runtime.exit_cache import ExitCache

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CallLayout:
    """Which inputs a call has, and what it gives, as the graph it stands in wants it."""

    masked: bool
    """Whether an attention mask [B, 1, T, columns] is given."""
    ids: bool
    """Whether the token ids [B, T] are given."""
    visual: bool
    """Whether the visual mask [B, T] is given."""
    past: bool
    """Whether keys and values of earlier calls are given, those of all layers in turn."""
    counted: bool
    """Whether how many tokens a StaticCache holds, these included, is given."""
    deepstack: int
    """Behind how many layers features are given; before them, where in [B, T] the visual tokens are."""
    kv: tuple[HandleShape | None, ...]
    """Of keys and values in turn, what of them is returned; None of buffers that are given and stay."""
    last: bool
    """Whether hidden states of the last token alone are wanted."""


class DecoderCall:
    """The decoder of one graph.

    Takes ``embeds`` [B, T, C] and ``position_ids`` ([B, T], [1, T], or [3, B, T]), then what the layout names; returns
    hidden states [B, T or 1, C] and handles of keys and values.
    """

    def __init__(self, runner: DecoderRunner, layout: CallLayout, check: Callable[[], None]) -> None:
        self._runner, self._layout, self._check = runner, layout, check

    @torch.no_grad()
    def __call__(self, embeds: Tensor, position_ids: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """One chunk."""
        self._check()
        layout, runner, given = self._layout, self._runner, iter(rest)
        mask = next(given) if layout.masked else None
        ids = next(given) if layout.ids else None
        visual = next(given) if layout.visual else None
        counted = next(given) if layout.counted else None
        added = [next(given) for _ in range(layout.deepstack + 1)] if layout.deepstack else []
        past = tuple(given) if layout.past else ()
        batch, tokens = embeds.shape[:2]
        seen = 0
        if past:
            seen = int(counted) - tokens if counted is not None else columns_of(past[0])
        if seen:
            cache = cache_of(past, seen)
        else:
            cache = ExitCache.adopt(DynamicCache())
            for buffer in past:  # of a StaticCache that is empty
                attach(buffer, cache)
        decoding = tokens == 1 and bool(seen)
        visual_mask = torch.zeros(batch, tokens, dtype=torch.bool, device=embeds.device)
        if runner.plan.exits and not decoding:
            visual_mask = visual_mask_of(embeds, ids, visual, runner.spec.visual_token_ids)
        # A window's mask has fewer columns than were seen, that of a StaticCache more.
        begin = seen if mask is None else min(seen, mask.shape[-1] - tokens)
        chunk = _chunk(mask, batch, tokens, begin, embeds)
        if added:
            token_inputs = spread(added[0], added[1:], embeds)
        else:
            token_inputs = [torch.zeros_like(embeds) for _ in range(runner.spec.deepstack)]
        if runner.spec.has_blocks:
            token_inputs.append(_blocks(mask, chunk, begin, -1 if seen else unmasked_block(runner.spec.decoder)))
        output = runner.run(
            embeds, visual_mask, chunk, position_ids, cache, last=layout.last, token_inputs=token_inputs
        )
        handles = [make_handle(shape, seen + tokens, embeds, cache) for shape in layout.kv if shape is not None]
        return output.logits, *handles


def _chunk(mask: Tensor | None, batch: int, tokens: int, begin: int, embeds: Tensor) -> Tensor:
    """[B, T] bool: the tokens of this chunk that are not padding. A causal mask lets each of them attend to itself."""
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=embeds.device)
    allowed = mask if mask.dtype == torch.bool else mask == 0
    return allowed[:, 0].diagonal(begin, dim1=-2, dim2=-1)[:, :tokens].expand(batch, -1)


def _blocks(mask: Tensor | None, chunk: Tensor, begin: int, unmasked: int) -> Tensor:
    """[B, T]: the blocks of a chunk's tokens, padding left aside."""
    tokens = chunk.shape[1]
    blocks = torch.full_like(chunk, -1, dtype=torch.long)
    for b, real in enumerate(chunk):
        own = None if mask is None else mask[b % len(mask), :, real, begin : begin + tokens][None, ..., real]
        blocks[b, real] = blocks_of(own, 1, int(real.sum()), unmasked, chunk.device)[0]
    return blocks


def exit_layers(past_key_values: Any) -> Tensor:
    """[B] int64: where each row's visual tokens left in the latest chunk that was no decode step; -1 = never.

    Args:
        past_key_values: The cache that a model compiled with backend="vte" filled.

    Raises:
        InputError: It was filled by something else.
    """
    cache = cache_behind([layer.keys for layer in past_key_values.layers])
    assert cache.exit_layer is not None
    return cache.exit_layer
