"""What goes into an AOTInductor engine's programs: rows of token ids and image features, or of embeddings, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vte_compile.errors import InputError
from vte_compile.export.grid_positions import Media, token_kinds
from vte_compile.export.image_features import Array, interleaved
from vte_compile.export.manifest import ModelFacts
from vte_compile.export.token_inputs import block_ids, check_block_rule
from vte_compile.runtime.cache import RowsCache

Features = Tensor | Sequence[Tensor] | Mapping[int, list[Array]]
"""In the order of the placeholders; or by kind (grid_positions.py), of each in their order."""


@dataclass(frozen=True)
class Chunk:
    """New tokens of each row, as ``RowRunner.run()`` takes them."""

    embeds: Tensor
    """[B, T, C]."""
    visual: Tensor
    """[B, T] bool: which tokens are visual."""
    real: Tensor
    """[B, T] bool: False at padding."""
    positions: Tensor | None
    """[3, B, T] of a chunk with images, where positions are multimodal; None: tokens are numbered one by one."""
    token_inputs: list[Tensor]
    """What else graphs of prompts take of each token, each [B, T, ...] (export/token_inputs.py)."""


@dataclass(frozen=True)
class _Embedded:
    embeds: Tensor
    """[B, T, C]; with DeepStack [B, T, (1 + layers) * C]."""
    visual: Tensor
    placeholders: Tensor
    """[B, T] bool: which tokens are of images, and so are visual, but for those that the caller excepts."""


class EngineInputs:
    """Makes chunks of what users pass.

    Args:
        facts: Of the model.
        table: [vocabulary, C], which embeds tokens.
        may_exit: Whether it matters which tokens are visual.

    Raises:
        EngineError: The manifest has a rule of blocks that is unknown here.
    """

    def __init__(self, facts: ModelFacts, table: Tensor, may_exit: bool) -> None:
        check_block_rule(facts)
        self._facts, self._table, self._may_exit = facts, table, may_exit

    def chunk(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        image_features: Features | None,
        visual_mask: Tensor | None,
        attention_mask: Tensor | None,
        media: Media,
        cache: RowsCache,
    ) -> Chunk:
        """See :meth:`Engine.prefill`.

        Raises:
            InputError: Contradicting or misshaped inputs.
        """
        embedded = self._embed(input_ids, inputs_embeds, image_features, visual_mask)
        shape, hidden = embedded.embeds.shape[:2], self._facts.hidden_size
        if attention_mask is None:
            attention_mask = torch.ones(shape, dtype=torch.bool)
        if attention_mask.shape != shape:
            raise InputError(
                f"attention_mask: expected shape {list(shape)} ([batch, tokens of this chunk]), got "
                f"{list(attention_mask.shape)}."
            )
        real = attention_mask.to(self._table.device, torch.bool)
        masks, placeholders = as_numpy(real), as_numpy(embedded.placeholders)
        media.check_blocks(self._facts, placeholders, masks)
        if input_ids is None:
            kinds = media.kinds(as_numpy(embedded.visual))
        else:
            kinds = token_kinds(self._facts.grids, as_numpy(input_ids))
            if self._facts.grids is not None:
                media.check_types(kinds)
        embeds, *more = embedded.embeds.split(hidden, dim=-1)
        if self._facts.blocks is not None:
            more.append(self._block_ids(self._facts.blocks, placeholders, masks, cache.is_empty))
        return Chunk(embeds, embedded.visual, real, self._positions(kinds, masks, media, cache), more)

    def tokens(self, tokens: Tensor) -> Tensor:
        """One token of each row, [B] -> [B, 1, C].

        Raises:
            InputError: Misshaped, or no token ids.
        """
        if tokens.ndim != 1:
            raise InputError(f"tokens: expected shape [batch], got {list(tokens.shape)}.")
        return F.embedding(self._ids("tokens", tokens[:, None]), self._table)

    def _block_ids(self, rule: str, placeholders: Array, real: Array, first: bool) -> Tensor:
        """[B, T], -1 at padding."""
        made = np.full(real.shape, -1)
        for row, marked, there in zip(made, placeholders, real, strict=True):
            row[there] = block_ids(rule, marked[there], first)
        return torch.from_numpy(made).to(self._table.device)

    def _positions(self, kinds: Array, masks: Array, media: Media, cache: RowsCache) -> Tensor | None:
        rows = media.places(self._facts, [row[mask] for row, mask in zip(kinds, masks, strict=True)])
        if rows is None:
            return None
        positions = np.zeros((self._facts.position_rows, *masks.shape), np.int64)
        for b, row in enumerate(rows):
            positions[:, b, masks[b]] = row + (0 if cache.is_empty else int(cache.next_positions[b]))
        return torch.from_numpy(positions).to(self._table.device)

    def _ids(self, name: str, ids: Tensor) -> Tensor:
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"{name}: expected token ids (int64), got {ids.dtype}.")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self._facts.vocab_size:
            raise InputError(f"{name}: an id lies outside the vocabulary of {self._facts.vocab_size}.")
        return ids.to(self._table.device, torch.long)

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        image_features: Features | None,
        visual_mask: Tensor | None,
    ) -> _Embedded:
        """A chunk, visual features in place."""
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is not None:
            if image_features is not None:
                raise InputError("inputs_embeds hold the visual features already: leave image_features out.")
            return self._given_embeds(inputs_embeds, visual_mask)
        assert input_ids is not None
        if input_ids.ndim != 2 or not input_ids.numel():
            raise InputError(f"input_ids: expected shape [batch, tokens], got {list(input_ids.shape)}.")
        device = self._table.device
        known = torch.tensor(self._facts.visual_token_ids, dtype=torch.long, device=device)
        placeholders = torch.isin(input_ids.to(device), known)
        visual = placeholders if visual_mask is None else self._given_mask(visual_mask, input_ids.shape)
        # Placeholders may lie outside the table, and what stands there is replaced.
        ids = self._ids("input_ids", input_ids.to(device).masked_fill(placeholders, 0))
        size = self._facts.feature_size
        embeds = F.pad(F.embedding(ids, self._table), (0, size - self._facts.hidden_size))
        count = int(placeholders.sum())
        if image_features is None and not count:
            return _Embedded(embeds, visual, placeholders)
        if image_features is None:
            raise InputError(f"input_ids hold {count} visual placeholders: pass image_features or pixel_values.")
        if isinstance(image_features, Mapping):
            kinds = [token_kinds(self._facts.grids, row) for row in as_numpy(input_ids)]
            image_features = [torch.from_numpy(part) for part in interleaved(kinds, image_features)]
        parts = [image_features] if isinstance(image_features, Tensor) else list(image_features)
        if any(part.shape[-1] != size for part in parts) or sum(p.numel() for p in parts) != count * size:
            raise InputError(
                f"image_features: expected [{count}, {size}], one for each visual placeholder of input_ids, got "
                f"{', '.join(str(list(part.shape)) for part in parts)}."
            )
        embeds[placeholders] = torch.cat([p.reshape(-1, size) for p in parts]).to(device, embeds.dtype)
        return _Embedded(embeds, visual, placeholders)

    def _given_embeds(self, embeds: Tensor, visual_mask: Tensor | None) -> _Embedded:
        size = self._facts.feature_size
        if embeds.ndim != 3 or embeds.shape[-1] != size or not embeds.numel():
            raise InputError(f"inputs_embeds: expected shape [batch, tokens, {size}], got {list(embeds.shape)}.")
        if visual_mask is None:
            reasons = {
                "exits": self._may_exit,
                "multimodal positions": self._facts.grids is not None,
                "tokens that attend to later ones": self._facts.blocks is not None,
            }
            if any(reasons.values()):
                why = next(reason for reason, there in reasons.items() if there)
                raise InputError(
                    f"The engine has {why}, but which of inputs_embeds are visual is not known: pass visual_mask "
                    "([batch, tokens] bool, all False for a text-only prompt)."
                )
            visual_mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        visual = self._given_mask(visual_mask, embeds.shape[:2])
        return _Embedded(embeds.to(self._table.device, self._table.dtype), visual, visual)

    def _given_mask(self, visual_mask: Tensor, shape: torch.Size) -> Tensor:
        if visual_mask.shape != shape or visual_mask.dtype != torch.bool:
            raise InputError(
                f"visual_mask: expected a bool tensor of shape {list(shape)}, got {visual_mask.dtype} of shape "
                f"{list(visual_mask.shape)}."
            )
        return visual_mask.to(self._table.device)


def as_numpy(value: Any) -> Any:
    """Of tensors, arrays on the host (bfloat16 becomes float32); other values are left as they are."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype is torch.bfloat16 else value).numpy()
