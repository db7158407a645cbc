"""What goes into an ONNX engine's decoder: rows of token ids and image features, or of embeddings, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vte_compile.errors import InputError
from vte_compile.export.grid_positions import Media, token_kinds
from vte_compile.export.image_features import interleaved
from vte_compile.export.manifest import ModelFacts
from vte_compile.export.ort_sessions import Array, Graph, Value


@dataclass(frozen=True)
class Chunk:
    """New tokens of each row, without padding; embedded when they are needed, by row or all at once."""

    visual: list[Array]
    """[n] bool of each row: which tokens are visual."""
    placeholders: list[Array]
    """[n] bool of each row: which tokens are of images, and so are visual, but for those that the caller excepts."""
    places: list[Array] | None
    """[3, n] of each row: multimodal positions, counted from 0; None: tokens are numbered one by one."""
    hidden_size: int
    """C."""

    @property
    def lengths(self) -> Array:
        """[B] int64."""
        return np.array([len(row) for row in self.visual], np.int64)

    @property
    def reach(self) -> Array:
        """[B] int64: by how much each row's positions go on."""
        if self.places is None:
            return self.lengths
        return np.array([row.max(initial=-1) + 1 for row in self.places], np.int64)

    def positions(self, b: int, start: int) -> Array:
        """[n] or [3, n] of one row, of which ``start`` is the first that is free."""
        return start + (np.arange(len(self.visual[b])) if self.places is None else self.places[b])

    def padded_positions(self, behind: int = 0) -> Array:
        """[B, T] or [3, B, T] of all rows, counted from 0; as :meth:`padded`."""
        if self.places is None:
            return np.repeat(np.arange(int(self.lengths.max()) + behind)[None], len(self.visual), 0)
        return np.moveaxis(padded([row.T for row in self.places], 0, behind), 2, 0)

    def padded_mask(self, behind: int = 0) -> Array:
        """[B, T] bool: the visual tokens of all rows; as :meth:`padded`."""
        return padded(self.visual, False, behind)

    def row(self, b: int, behind: int = 0) -> Value:
        """Embeddings [1, n + ``behind``, C] of one row, with so many places of padding behind it."""
        raise NotImplementedError

    def added(self, b: int) -> Array:
        """[n, layers * C] of one row: what is added behind the first layers (DeepStack), zero at text."""
        raise NotImplementedError

    def padded(self, behind: int = 0) -> Value:
        """Embeddings [B, T, C] of all rows, padded at their end: so many places behind the longest, and others more."""
        raise NotImplementedError


@dataclass(frozen=True)
class TokenChunk(Chunk):
    """From token ids."""

    graph: Graph
    """embedding.onnx."""
    ids: list[Array]
    """[n] int64 of each row."""
    features: list[Array]
    """[placeholders of the row, C]; with DeepStack [.., (1 + layers) * C]."""
    filler: int
    """A token that is no placeholder."""

    def row(self, b: int, behind: int = 0) -> Value:
        return self._embed(padded(self.ids[b : b + 1], self.filler, behind), self.features[b])

    def added(self, b: int) -> Array:
        added = self.features[b][:, self.hidden_size :]
        spread = np.zeros((len(self.ids[b]), added.shape[1]), added.dtype)
        spread[self.placeholders[b]] = added
        return spread

    def padded(self, behind: int = 0) -> Value:
        return self._embed(padded(self.ids, self.filler, behind), np.concatenate(self.features))

    def _embed(self, ids: Array, features: Array) -> Value:
        features = features[:, : self.hidden_size]
        return self.graph.run({"input_ids": ids, "image_features": features}, ["inputs_embeds"])[0]


@dataclass(frozen=True)
class EmbeddedChunk(Chunk):
    """From embeddings."""

    embeds: list[Array]
    """[n, C] of each row; with DeepStack [n, (1 + layers) * C]."""

    def row(self, b: int, behind: int = 0) -> Value:
        return padded(self.embeds[b : b + 1], 0, behind)[..., : self.hidden_size]

    def added(self, b: int) -> Array:
        return self.embeds[b][:, self.hidden_size :]

    def padded(self, behind: int = 0) -> Value:
        return padded(self.embeds, 0, behind)[..., : self.hidden_size]


class Inputs:
    """Makes chunks of what users pass.

    Args:
        facts: Of the model.
        embedding: embedding.onnx.
        dtype: Of embeddings.
        may_exit: Whether it matters which tokens are visual.
    """

    def __init__(self, facts: ModelFacts, embedding: Graph, dtype: Any, may_exit: bool) -> None:
        self._facts, self._embedding, self._dtype, self._may_exit = facts, embedding, dtype, may_exit
        known = facts.visual_token_ids
        self._filler = next(i for i in range(len(known) + 1) if i not in known)

    def tokens(self, ids: Array) -> TokenChunk:
        """One token of each row, [B]; without features, placeholders are tokens like others."""
        ids = np.asarray(ids)
        if ids.ndim != 1:
            raise InputError(f"tokens: expected shape [batch], got {list(ids.shape)}.")
        ids = self._checked_ids("tokens", ids)
        none = np.zeros((0, self._facts.feature_size), self._dtype)
        rows = [ids[b : b + 1] for b in range(len(ids))]
        text = [np.zeros(1, bool)] * len(ids)
        hidden = self._facts.hidden_size
        return TokenChunk(text, text, None, hidden, self._embedding, rows, [none] * len(ids), self._filler)

    def chunk(
        self,
        input_ids: Any,
        inputs_embeds: Any,
        image_features: Any,
        visual_mask: Any,
        attention_mask: Any,
        media: Media,
    ) -> Chunk:
        """See :meth:`OnnxEngine.prefill`.

        Args:
            image_features: In the order of the placeholders; or by kind (grid_positions.py), of each in their order.
            media: What else is said of images and videos.

        Raises:
            InputError: Contradicting or misshaped inputs.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is not None:
            if image_features is not None:
                raise InputError("inputs_embeds hold the visual features already: leave image_features out.")
            return self._embedded(np.asarray(inputs_embeds), visual_mask, attention_mask, media)
        if _is_ragged(input_ids):
            types = (media.mm_token_type_ids, media.token_type_ids)
            if any(mask is not None for mask in (attention_mask, visual_mask, *types)):
                raise InputError(
                    "input_ids is a list of rows without padding: leave attention_mask, visual_mask and types out."
                )
            rows = [self._checked_ids("input_ids", np.asarray(row)) for row in input_ids]
            visual = [np.isin(row, self._facts.visual_token_ids) for row in rows]
            return self._from_rows(rows, visual, image_features, media)
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or not ids.size:
            raise InputError(f"input_ids: expected shape [batch, tokens], got {list(ids.shape)}.")
        ids = self._checked_ids("input_ids", ids)
        real = _mask("attention_mask", attention_mask, ids.shape, True)
        placeholders = np.isin(ids, self._facts.visual_token_ids)
        media.check_blocks(self._facts, placeholders, real)
        given = placeholders if visual_mask is None else _visual_mask(visual_mask, ids.shape)
        if (given & ~placeholders & real).any():
            # Which rows of features belong to them would be open.
            raise InputError("visual_mask: marks tokens of input_ids that are no placeholders: pass inputs_embeds.")
        rows = [row[keep] for row, keep in zip(ids, real, strict=True)]
        visual = [row[keep] for row, keep in zip(given, real, strict=True)]
        if self._facts.grids is not None:
            media.check_types(token_kinds(self._facts.grids, ids))
        return self._from_rows(rows, visual, image_features, media)

    def _from_rows(self, rows: list[Array], visual: list[Array], image_features: Any, media: Media) -> TokenChunk:
        placeholders = [np.isin(row, self._facts.visual_token_ids) for row in rows]
        counts = [int(row.sum()) for row in placeholders]
        kinds = [token_kinds(self._facts.grids, row) for row in rows]
        places = media.places(self._facts, kinds)
        if isinstance(image_features, Mapping):
            image_features = interleaved(kinds, image_features)
        total, size = sum(counts), self._facts.feature_size
        if image_features is None:
            if total:
                raise InputError(f"input_ids hold {total} visual placeholders: pass image_features or pixel_values.")
            image_features = np.zeros((0, size), self._dtype)
        one = hasattr(image_features, "shape") or not isinstance(image_features, Sequence)
        parts = [np.asarray(part) for part in ([image_features] if one else image_features)]
        if any(p.ndim < 2 or p.shape[-1] != size for p in parts) or sum(p.size for p in parts) != total * size:
            raise InputError(
                f"image_features: expected [{total}, {size}], one for each visual placeholder of input_ids, got "
                f"{', '.join(str(list(part.shape)) for part in parts)}."
            )
        flat = np.concatenate([p.reshape(-1, size) for p in parts]).astype(self._dtype, copy=False)
        features = np.split(flat, np.cumsum(counts)[:-1])
        hidden = self._facts.hidden_size
        return TokenChunk(visual, placeholders, places, hidden, self._embedding, rows, features, self._filler)

    def _embedded(self, embeds: Array, visual_mask: Any, attention_mask: Any, media: Media) -> EmbeddedChunk:
        size = self._facts.feature_size
        if embeds.ndim != 3 or embeds.shape[-1] != size or not embeds.size:
            raise InputError(f"inputs_embeds: expected shape [batch, tokens, {size}], got {list(embeds.shape)}.")
        facts = self._facts
        reasons = {
            "exits": self._may_exit,
            "multimodal positions": facts.grids is not None,
            "tokens that attend to later ones": facts.blocks is not None,
        }
        if visual_mask is None and any(reasons.values()):
            why = next(reason for reason, there in reasons.items() if there)
            raise InputError(
                f"The engine has {why}, but which of inputs_embeds are visual is not known: pass visual_mask "
                "([batch, tokens] bool, all False for a text-only prompt)."
            )
        shape = embeds.shape[:2]
        visual = np.zeros(shape, bool) if visual_mask is None else _visual_mask(visual_mask, shape)
        real = _mask("attention_mask", attention_mask, shape, True)
        media.check_blocks(facts, visual, real)
        embeds = embeds.astype(self._dtype, copy=False)
        marked = [row[keep] for row, keep in zip(visual, real, strict=True)]
        kinds = [row[keep] for row, keep in zip(media.kinds(visual), real, strict=True)]
        places = media.places(self._facts, kinds)
        rows = [row[keep] for row, keep in zip(embeds, real, strict=True)]
        return EmbeddedChunk(marked, marked, places, facts.hidden_size, rows)

    def _checked_ids(self, name: str, ids: Array) -> Array:
        if not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"{name}: expected token ids (int64), got {ids.dtype}.")
        # Placeholders may lie outside the table: what stands there is replaced.
        outside = (ids < 0) | (ids >= self._facts.vocab_size)
        if (outside & ~np.isin(ids, self._facts.visual_token_ids)).any():
            raise InputError(f"{name}: an id lies outside the vocabulary of {self._facts.vocab_size}.")
        return ids.astype(np.int64, copy=False)


def _is_ragged(ids: Any) -> bool:
    """Whether these are rows of different lengths, none of them empty."""
    if not isinstance(ids, list | tuple) or not all(np.ndim(row) == 1 and len(row) for row in ids):
        return False
    return len({len(row) for row in ids}) > 1


def _mask(name: str, mask: Any, shape: tuple[int, ...], default: bool) -> Array:
    if mask is None:
        return np.full(shape, default)
    mask = np.asarray(mask)
    if mask.shape != shape:
        raise InputError(
            f"{name}: expected shape {list(shape)} ([batch, tokens of this chunk]), got {list(mask.shape)}."
        )
    return mask.astype(bool)


def _visual_mask(mask: Any, shape: tuple[int, ...]) -> Array:
    mask = np.asarray(mask)
    if mask.shape != shape or mask.dtype != bool:
        raise InputError(
            f"visual_mask: expected bools of shape {list(shape)}, got {mask.dtype} of shape {list(mask.shape)}."
        )
    return mask


def padded(rows: list[Array], value: Any, behind: int = 0) -> Array:
    """Rows [n, ...] of different lengths, filled up at their end: [B, T, ...], so many places behind the longest."""
    whole = np.full((len(rows), max(map(len, rows)) + behind, *rows[0].shape[1:]), value, rows[0].dtype)
    for target, row in zip(whole, rows, strict=True):
        target[: len(row)] = row
    return whole
