"""Run an engine: prompts, decode steps and greedy generation, with torch and without transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vte_compile.errors import InputError
from vte_compile.export.engine_programs import EngineRunner, Loaded, load
from vte_compile.export.grid_positions import IMAGE, Media, token_kinds
from vte_compile.export.image_features import Array, ImageEncoder, Pixels, interleaved, vision_inputs
from vte_compile.export.manifest import Manifest
from vte_compile.runtime.cache import RowsCache


@dataclass(frozen=True)
class EngineOutput:
    """What one chunk gives."""

    logits: Tensor
    """[B, vocabulary], of each row's last token."""
    exit_layer: Tensor
    """[B] int64: the layer after which each row's visual tokens left in this chunk; -1 = never."""
    cache: RowsCache
    """Keys and values so far: the cache that was passed, extended."""


@dataclass(frozen=True)
class Generated:
    """What ``generate()`` gives."""

    tokens: Tensor
    """[B, new tokens] int64; behind a row's end token there is padding."""
    exit_layer: Tensor
    """[B] int64, of the prompt; -1 = never."""
    cache: RowsCache
    """Of the prompt and all new tokens but the last."""


class Engine:
    """An exported model, from :func:`vte_compile.load_engine`. Nothing of a request is kept on it."""

    def __init__(self, loaded: Loaded, folder: Path) -> None:
        self._loaded = loaded
        self.folder = folder
        """Where it was loaded from."""
        self._runner = EngineRunner(loaded)

    @classmethod
    def load(cls, folder: Path, body: dict[str, Any], **options: object) -> Engine:
        """See :func:`vte_compile.load_engine`; ``body``: the manifest's fields.

        Raises:
            InputError: There are options: they are for ONNX engines.
        """
        if options:
            raise InputError(
                f"{', '.join(options)}: options of ONNX engines; this one is compiled for its device, and uses torch's "
                "threads (torch.set_num_threads): leave them out."
            )
        return cls(load(folder, Manifest.from_body(body)), folder)

    @property
    def manifest(self) -> Manifest:
        """What the engine is made of, and was made from."""
        return self._loaded.manifest

    @property
    def device(self) -> torch.device:
        """Where it runs; inputs are moved there."""
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and embeddings."""
        return self._embedding.dtype

    @property
    def _embedding(self) -> Tensor:
        return self._loaded.weights[self.manifest.embedding]

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        image_features: Tensor | Sequence[Tensor] | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        visual_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | Sequence[float] | None = None,
        image_sizes: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        cache: RowsCache | None = None,
    ) -> EngineOutput:
        """Run a prompt, or with a ``cache`` the next chunk of the same rows.

        Args:
            input_ids: [B, T] int64, with a placeholder for each visual token. Either these or ``inputs_embeds``.
            inputs_embeds: [B, T, C], visual features in place; then pass ``visual_mask`` too if there are any.
            image_features: Embeddings of the visual tokens, [n, C] or a list of such, in the order of the placeholders.
            pixel_values: [images, channels, height, width]; the engine's own encoder makes features of them. Of models
                that take images of any size as patches (Qwen2-VL): [patches, numbers of a patch]; as tiles
                (LLaVA-NeXT, LLaVA-OneVision): [images, tiles, channels, height, width].
            pixel_values_videos: Of videos: [patches, numbers of a patch], or LLaVA-OneVision's [videos, frames,
                channels, height, width].
            visual_mask: [B, T] bool; found from the placeholders if None.
            attention_mask: [B, T] bool or int, of this chunk: 0 at padding, on any side.
            image_grid_thw: [images, 3] int64: time, height and width of each image in patches, from which multimodal
                positions follow; of models that have them.
            video_grid_thw: [videos, 3] int64, of videos.
            second_per_grid_ts: [videos], how many seconds a step in time lasts, of models that number them by that.
            image_sizes: [images, 2]: height and width of each image before it was cut into tiles, or filled up to the
                largest (Mistral3).
            batch_num_images: [prompts with images]: how many images each has, of models that cut none where there are
                several (LLaVA-OneVision); None: one each.
            pixel_attention_mask: [prompts, images, height, width], where pixels are those of an image (Idefics3,
                SmolVLM, whose pixel_values are [prompts, images, channels, height, width]); None: everywhere.
            cache: From an earlier call.

        Raises:
            InputError: Contradicting or misshaped inputs; the message says which.
        """
        images = (pixel_values, pixel_values_videos, image_grid_thw, video_grid_thw)
        pixels = Pixels(*map(_numpy, (*images, image_sizes, batch_num_images, pixel_attention_mask)))
        if image_features is not None and pixels.given:
            raise InputError("Pass at most one of image_features and pixel_values (pixel_values_videos).")
        features = self._encode(pixels) if pixels.given else image_features
        embeds, visual = self._embed(input_ids, inputs_embeds, features, visual_mask)
        shape = embeds.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(shape, dtype=torch.bool)
        if attention_mask.shape != shape:
            raise InputError(
                f"attention_mask: expected shape {list(shape)} ([batch, tokens of this chunk]), got "
                f"{list(attention_mask.shape)}."
            )
        cache = RowsCache.empty() if cache is None else cache
        real = attention_mask.to(self.device, torch.bool)
        media = Media(*(_numpy(value) for value in (image_grid_thw, video_grid_thw, second_per_grid_ts)))
        positions = self._positions(input_ids, visual, real, media, cache)
        output = self._runner.run(embeds, visual, real, positions, cache, last=True)
        return EngineOutput(output.logits[:, -1], output.exit_layer, cache)

    def _positions(
        self, input_ids: Tensor | None, visual: Tensor, real: Tensor, media: Media, cache: RowsCache
    ) -> Tensor | None:
        """[3, B, T] of a chunk with images, where positions are multimodal; None: tokens are numbered one by one."""
        facts = self.manifest.model
        masks = _numpy(real)
        kinds = media.kinds(_numpy(visual)) if input_ids is None else token_kinds(facts.grids, _numpy(input_ids))
        rows = media.places(facts, [row[mask] for row, mask in zip(kinds, masks, strict=True)])
        if rows is None:
            return None
        positions = np.zeros((facts.position_rows, *masks.shape), np.int64)
        for b, row in enumerate(rows):
            positions[:, b, masks[b]] = row + (0 if cache.is_empty else int(cache.next_positions[b]))
        return torch.from_numpy(positions).to(self.device)

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: RowsCache) -> EngineOutput:
        """One more token of each row.

        Args:
            tokens: [B] int64.
            cache: Of the same rows, from :meth:`prefill`; extended in place.

        Raises:
            InputError: Misshaped tokens, or an empty cache.
        """
        if tokens.ndim != 1:
            raise InputError(f"tokens: expected shape [batch], got {list(tokens.shape)}.")
        if cache.is_empty:
            raise InputError("cache: is empty: run the prompt with prefill() first.")
        embeds = F.embedding(self._ids("tokens", tokens[:, None]), self._embedding)
        every = torch.ones(embeds.shape[:2], dtype=torch.bool, device=self.device)
        output = self._runner.run(embeds, ~every, every, None, cache, last=True)
        return EngineOutput(output.logits[:, -1], output.exit_layer, cache)

    def generate(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        image_features: Tensor | Sequence[Tensor] | None = None,
        pixel_values: Tensor | None = None,
        visual_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: RowsCache | None = None,
        max_new_tokens: int = 64,
        eos_token_ids: Sequence[int] | None = None,
        **media: Any,
    ) -> Generated:
        """Answer greedily. Takes what :meth:`prefill` takes, and:

        Args:
            max_new_tokens: At most so many, at least 1.
            eos_token_ids: A row ends with any of these; None: those of the model; empty: none.
            media: ``image_grid_thw``, ``image_sizes`` and what else :meth:`prefill` takes of images and videos.

        In a later turn, pass the cache, and as input_ids what it does not hold: the last token, and the new question.
        Rows that ended before others have padding in the cache: go on with such a batch row by row.

        Raises:
            InputError: As :meth:`prefill`.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens: expected at least 1, got {max_new_tokens}.")
        facts = self.manifest.model
        ends = torch.tensor(facts.eos_token_ids if eos_token_ids is None else list(eos_token_ids), device=self.device)
        output = self.prefill(
            input_ids,
            inputs_embeds,
            image_features=image_features,
            pixel_values=pixel_values,
            visual_mask=visual_mask,
            attention_mask=attention_mask,
            cache=cache,
            **media,
        )
        exit_layer, tokens = output.exit_layer, [output.logits.argmax(-1)]
        ended = torch.isin(tokens[0], ends)
        while len(tokens) < max_new_tokens and not bool(ended.all()):
            output = self.decode(tokens[-1], output.cache)
            tokens.append(output.logits.argmax(-1).masked_fill(ended, facts.pad_token_id))
            ended |= torch.isin(tokens[-1], ends)
        return Generated(torch.stack(tokens, dim=1), exit_layer, output.cache)

    def encode_images(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor | None = None,
        image_sizes: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Images as :meth:`prefill` takes them -> their visual tokens' embeddings [n, C], image after image.

        Raises:
            InputError: The engine has no image encoder (the message says why), or takes other images.
        """
        given = (pixel_values, None, image_grid_thw, None, image_sizes, batch_num_images, pixel_attention_mask)
        features = self._encode(Pixels(*map(_numpy, given)))[IMAGE]
        return torch.from_numpy(np.concatenate(features)).to(self.device, self.dtype)

    def _encode(self, pixels: Pixels) -> dict[int, list[Array]]:
        """[n, C] of each image and video, by kind."""
        manifest = self.manifest
        run = None if self._loaded.encoder is None else self._run_encoder
        dtype = np.float64 if self.dtype is torch.float64 else np.float32
        return ImageEncoder(manifest.model, manifest.vision, manifest.vision_missing, run, dtype)(pixels)

    @torch.no_grad()
    def _run_encoder(self, inputs: dict[str, Array]) -> Array:
        vision, encoder = self.manifest.vision, self._loaded.encoder
        assert vision is not None
        assert encoder is not None
        values = [torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in vision_inputs(vision)]
        given = [value.to(self.device, self.dtype if value.is_floating_point() else value.dtype) for value in values]
        features: Array = _numpy(encoder([*given, *(self._loaded.weights[name] for name in vision.weights)])[0])
        return features

    def _ids(self, name: str, ids: Tensor) -> Tensor:
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"{name}: expected token ids (int64), got {ids.dtype}.")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.manifest.model.vocab_size:
            raise InputError(f"{name}: an id lies outside the vocabulary of {self.manifest.model.vocab_size}.")
        return ids.to(self.device, torch.long)

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        image_features: Tensor | Sequence[Tensor] | Mapping[int, list[Array]] | None,
        visual_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, C] of a chunk, visual features in place, and where these are [B, T]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is not None:
            if image_features is not None:
                raise InputError("inputs_embeds hold the visual features already: leave image_features out.")
            return self._given_embeds(inputs_embeds, visual_mask)
        assert input_ids is not None
        if input_ids.ndim != 2 or not input_ids.numel():
            raise InputError(f"input_ids: expected shape [batch, tokens], got {list(input_ids.shape)}.")
        known = torch.tensor(self.manifest.model.visual_token_ids, dtype=torch.long, device=self.device)
        placeholders = torch.isin(input_ids.to(self.device), known)
        visual = placeholders if visual_mask is None else self._given_mask(visual_mask, input_ids.shape)
        # Placeholders may lie outside the table, and what stands there is replaced.
        ids = self._ids("input_ids", input_ids.to(self.device).masked_fill(placeholders, 0))
        embeds = F.embedding(ids, self._embedding)
        count = int(placeholders.sum())
        if image_features is None and not count:
            return embeds, visual
        if image_features is None:
            raise InputError(f"input_ids hold {count} visual placeholders: pass image_features or pixel_values.")
        if isinstance(image_features, Mapping):
            kinds = [token_kinds(self.manifest.model.grids, row) for row in _numpy(input_ids)]
            image_features = [torch.from_numpy(part) for part in interleaved(kinds, image_features)]
        parts = [image_features] if isinstance(image_features, Tensor) else list(image_features)
        hidden = self.manifest.model.hidden_size
        if any(part.shape[-1] != hidden for part in parts) or sum(p.numel() for p in parts) != count * hidden:
            raise InputError(
                f"image_features: expected [{count}, {hidden}], one for each visual placeholder of input_ids, got "
                f"{', '.join(str(list(part.shape)) for part in parts)}."
            )
        embeds[placeholders] = torch.cat([p.reshape(-1, hidden) for p in parts]).to(embeds.device, embeds.dtype)
        return embeds, visual

    def _given_embeds(self, embeds: Tensor, visual_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = self.manifest.model.hidden_size
        if embeds.ndim != 3 or embeds.shape[-1] != hidden or not embeds.numel():
            raise InputError(f"inputs_embeds: expected shape [batch, tokens, {hidden}], got {list(embeds.shape)}.")
        if visual_mask is None:
            if self._runner.may_exit or self.manifest.model.grids is not None:
                why = "exits" if self._runner.may_exit else "multimodal positions"
                raise InputError(
                    f"The engine has {why}, but which of inputs_embeds are visual is not known: pass visual_mask "
                    "([batch, tokens] bool, all False for a text-only prompt)."
                )
            visual_mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        return embeds.to(self.device, self.dtype), self._given_mask(visual_mask, embeds.shape[:2])

    def _given_mask(self, visual_mask: Tensor, shape: torch.Size) -> Tensor:
        if visual_mask.shape != shape or visual_mask.dtype != torch.bool:
            raise InputError(
                f"visual_mask: expected a bool tensor of shape {list(shape)}, got {visual_mask.dtype} of shape "
                f"{list(visual_mask.shape)}."
            )
        return visual_mask.to(self.device)


def _numpy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype is torch.bfloat16 else value).numpy()
