"""What decoder layers are given besides hidden states, where they run one by one over tokens without a past.

Masks, positions and rotary tables may differ by layer, and some decoders add features behind layers: all that a
``DecoderSpec`` says of a decoder is in here, so that what runs layers need not know of it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vte_compile.families.decoder import DecoderSpec
from vte_compile.families.token_blocks import same_block
from vte_compile.oracle.blocks import Block


class LayerRun:
    """Tokens of B rows, padded on the right, or of one row (B = 1) that any number of branches share.

    Args:
        spec: The decoder.
        like: Hidden states, for their dtype and device.
        positions: [B, T], or [3, B, T] of a decoder with multimodal positions.
        token_inputs: What else it takes of each token, as ``spec.token_inputs`` names it, each [B, T, ...].
    """

    def __init__(self, spec: DecoderSpec, like: Tensor, positions: Tensor, token_inputs: Sequence[Tensor] = ()) -> None:
        self._spec, self._like, self._positions = spec, like, positions
        self._token_inputs = list(token_inputs)
        self._features = self._token_inputs[: spec.deepstack]
        self._rotary: dict[str | None, Any] = {}
        self._masks: dict[bool, Tensor] = {}
        decoder: Any = spec.decoder
        self._rotary_emb = decoder.rotary_emb
        self._by_type = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters

    def where(self, kept: Tensor) -> LayerRun:
        """Those tokens of one row that a mask [T] keeps: positions keep their numbers, windows count what is left."""
        inputs = [value[:, kept] for value in self._token_inputs]
        return LayerRun(self._spec, self._like, self._positions[..., kept], inputs)

    @functools.cached_property
    def alone(self) -> LayerRun:
        """One token of each row, which attends to itself alone, so that its position does not matter."""
        inputs = [value[:, :1] for value in self._token_inputs]
        return LayerRun(self._spec, self._like, self._positions[..., :1], inputs)

    def arguments(self, index: int) -> dict[str, Any]:
        """Of layer `index`, by name."""
        kind = self._spec.config.layer_types[index] if self._by_type else None
        if kind not in self._rotary:
            given = {} if kind is None else {"layer_type": kind}
            self._rotary[kind] = self._rotary_emb(self._like, position_ids=self._positions, **given)
        window = self._spec.windowed[index]
        if window not in self._masks:
            seen = self._seen(window)
            mask = torch.zeros(seen.shape, dtype=self._like.dtype, device=seen.device)
            self._masks[window] = mask.masked_fill_(~seen, -torch.inf)
        return {
            "attention_mask": self._masks[window],
            "position_ids": self._positions,
            "position_embeddings": self._rotary[kind],
            "use_cache": False,
        }

    def behind(self, index: int, hidden: Tensor) -> Tensor:
        """Hidden states behind layer `index`, with what the decoder adds to them there."""
        return hidden + self._features[index].to(hidden) if index < len(self._features) else hidden

    def seen(self, index: int) -> Tensor | None:
        """Which tokens those of one row attend to in layer `index`, [T, T] bool; None: all up to themselves."""
        window = self._spec.windowed[index]
        return self._seen(window)[0, 0] if window or self._spec.has_blocks else None

    def _seen(self, window: bool) -> Tensor:
        """[B or 1, 1, T, T]; a window does not limit a token's own block."""
        tokens, device = self._positions.shape[-1], self._positions.device
        order = torch.arange(tokens, device=device)
        seen = (order <= order[:, None])[None, None]
        if window:
            seen = seen & (order > order[:, None] - self._spec.config.sliding_window)
        return seen | same_block(self._token_inputs[-1], tokens) if self._spec.has_blocks else seen


def run_block(
    block: Block, index: int, hidden: Tensor, prompt_mask: Tensor, run: LayerRun, beside: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Run rows through a block, in which adapters know of the rows' prompts.

    Args:
        block: Of layer `index`.
        index: Of the layer.
        hidden: [B, T, C].
        prompt_mask: [B, T] bool: where the prompts are.
        run: Of these rows.
        beside: [B, 1, C], of companion tokens that go along with the prompts (vte_compile/oracle).

    Returns:
        What comes behind the layer, of both.
    """
    # The blocks themselves would take all tokens for the prompt, padding too.
    known = block.statistics(hidden, prompt_mask, beside)
    if beside is not None:
        beside = block(beside, known, **run.alone.arguments(index))[0]
    return run.behind(index, block(hidden, known, **run.arguments(index))[0]), beside
