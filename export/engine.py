"""Run an engine: prompts, decode steps and greedy generation, with torch and without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vte_compile.errors import InputError
from vte_compile.export.engine_inputs import EngineInputs, as_numpy
from vte_compile.export.engine_programs import EngineRunner, Loaded, load
from vte_compile.export.grid_positions import IMAGE, Media
from vte_compile.export.image_features import Array, ImageEncoder, Pixels, vision_inputs
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
        facts = loaded.manifest.model
        self._inputs = EngineInputs(facts, loaded.weights[loaded.manifest.embedding], self._runner.may_exit)

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
        mm_token_type_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cache: RowsCache | None = None,
    ) -> EngineOutput:
        """Run a prompt, or with a ``cache`` the next chunk of the same rows.

        Args:
            input_ids: [B, T] int64, with a placeholder for each visual token. Either these or ``inputs_embeds``.
            inputs_embeds: [B, T, C], visual features in place; then pass ``visual_mask`` too if there are any. Of
                models with DeepStack (Qwen3-VL) [B, T, (1 + layers) C]: behind each embedding what is added behind the
                first layers, zero at text; so are ``image_features``.
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
            mm_token_type_ids: [B, T], as processors give them: 1 at tokens of images, 2 of videos. The engine sees them
                in ``input_ids``, and compares; with ``inputs_embeds`` it needs them if there are images and videos.
            token_type_ids: [B, T], as processors of PaliGemma and Gemma3 give them. The engine sees in ``input_ids``
                which tokens attend to later ones, and compares.
            cache: From an earlier call.

        Raises:
            InputError: Contradicting or misshaped inputs; the message says which.
        """
        images = (pixel_values, pixel_values_videos, image_grid_thw, video_grid_thw)
        pixels = Pixels(*map(as_numpy, (*images, image_sizes, batch_num_images, pixel_attention_mask)))
        if image_features is not None and pixels.given:
            raise InputError("Pass at most one of image_features and pixel_values (pixel_values_videos).")
        features = self._encode(pixels) if pixels.given else image_features
        types = (mm_token_type_ids, token_type_ids)
        media = Media(*map(as_numpy, (image_grid_thw, video_grid_thw, second_per_grid_ts, *types)))
        cache = RowsCache.empty() if cache is None else cache
        chunk = self._inputs.chunk(input_ids, inputs_embeds, features, visual_mask, attention_mask, media, cache)
        rows = (chunk.embeds, chunk.visual, chunk.real, chunk.positions)
        output = self._runner.run(*rows, cache, last=True, token_inputs=chunk.token_inputs)
        return EngineOutput(output.logits[:, -1], output.exit_layer, cache)

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: RowsCache) -> EngineOutput:
        """One more token of each row.

        Args:
            tokens: [B] int64.
            cache: Of the same rows, from :meth:`prefill`; extended in place.

        Raises:
            InputError: Misshaped tokens, or an empty cache.
        """
        embeds = self._inputs.tokens(tokens)
        if cache.is_empty:
            raise InputError("cache: is empty: run the prompt with prefill() first.")
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
        features = self._encode(Pixels(*map(as_numpy, given)))[IMAGE]
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
        features: Array = as_numpy(encoder([*given, *(self._loaded.weights[name] for name in vision.weights)])[0])
        return features
