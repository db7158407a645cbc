"""Run an ONNX engine with numpy and ONNX Runtime: prompts, decode steps, generation and chats; no torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vte_compile.errors import EngineError, InputError
from vte_compile.export.generation import Stops, generate_tokens
from vte_compile.export.grid_positions import IMAGE, Media
from vte_compile.export.image_features import Pixels
from vte_compile.export.onnx_manifest import OnnxManifest
from vte_compile.export.ort_cache import OnnxCache
from vte_compile.export.ort_programs import Parts, load_parts
from vte_compile.export.ort_sessions import Array, Device
from vte_compile.export.processor import TOKENIZERS, Processor, Prompt
from vte_compile.export.sampling import Sampler
from vte_compile.export.text_stream import TextStream

PROCESSOR = "processor"
"""The folder of tokenizer and image processor."""


@dataclass(frozen=True)
class OnnxOutput:
    """What one chunk gives."""

    logits: Array
    """[B, vocabulary] float32, of each row's last token."""
    exit_layer: Array
    """[B] int64: the layer after which each row's visual tokens left in this chunk; -1 = never."""
    cache: OnnxCache
    """Keys and values so far: the cache that was passed, extended."""


@dataclass(frozen=True)
class OnnxGenerated:
    """What ``generate()`` gives."""

    tokens: Array
    """[B, new tokens] int64; behind a row's last token there is padding."""
    lengths: Array
    """[B] int64: how many tokens each row has, its end token included."""
    exit_layer: Array
    """[B] int64, of the prompt; -1 = never."""
    cache: OnnxCache
    """Of each row's prompt and its new tokens but the last one."""


@dataclass(frozen=True)
class Answer:
    """What ``chat()`` gives."""

    text: str
    """Without special tokens, and without the stop string that ended it."""
    tokens: list[int]
    exit_layer: int
    """-1 = never."""
    prompt_tokens: int
    messages: list[dict[str, Any]]
    """The chat with this answer, to go on with."""


class OnnxEngine:
    """An ONNX engine, from :func:`vte_compile.load_engine`. Nothing of a request is kept on it.

    Arrays are numpy's; what has ``__array__`` (such as a torch tensor on the CPU) is taken as well.
    """

    def __init__(self, parts: Parts, folder: Path) -> None:
        self._parts = parts
        self.folder = folder
        """Where it was loaded from."""

    @classmethod
    def load(
        cls,
        folder: Path,
        body: dict[str, Any],
        *,
        provider: str | None = None,
        threads: int | None = None,
        form: str | None = None,
    ) -> OnnxEngine:
        """See :func:`vte_compile.load_engine`; ``body``: the manifest's fields."""
        return cls(load_parts(folder, OnnxManifest.from_body(body), provider, threads, form), folder)

    @property
    def manifest(self) -> OnnxManifest:
        """What the engine is made of, and was made from."""
        return self._parts.manifest

    @property
    def device(self) -> Device:
        """Where it runs."""
        return self._parts.device

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of embeddings, keys and values."""
        return self._parts.dtype

    @functools.cached_property
    def processor(self) -> Processor:
        """The model's tokenizer and image processor, loaded on first use.

        Raises:
            EngineError: The engine has none, or a package it needs is missing.
        """
        if not any(f"{PROCESSOR}/{name}" in self.manifest.files for name in TOKENIZERS):
            raise EngineError(
                f"{self.folder}: the engine has no tokenizer: export the model with processor=, or pass input_ids to "
                "generate()."
            )
        return Processor(self.folder / PROCESSOR, bool(self.manifest.model.visual_token_ids))

    def prefill(
        self,
        input_ids: Any = None,
        inputs_embeds: Any = None,
        *,
        image_features: Any = None,
        pixel_values: Any = None,
        pixel_values_videos: Any = None,
        visual_mask: Any = None,
        attention_mask: Any = None,
        image_grid_thw: Any = None,
        video_grid_thw: Any = None,
        second_per_grid_ts: Any = None,
        image_sizes: Any = None,
        batch_num_images: Any = None,
        pixel_attention_mask: Any = None,
        mm_token_type_ids: Any = None,
        token_type_ids: Any = None,
        cache: OnnxCache | None = None,
        room: int = 0,
    ) -> OnnxOutput:
        """Run a prompt, or with a ``cache`` the next chunk of the same rows.

        Args:
            input_ids: [B, T] integers, with a placeholder for each visual token; or a list of rows of different
                lengths, without padding. Either these or ``inputs_embeds``.
            inputs_embeds: [B, T, C], visual features in place; then pass ``visual_mask`` too if there are any. With
                DeepStack (Qwen3-VL) [B, T, (1 + layers) * C]: behind an embedding what is added to it, zeros at text.
            image_features: Embeddings of the visual tokens, [n, C] or a list of such, in the order of the placeholders;
                with DeepStack [n, (1 + layers) * C], as :meth:`encode_images` gives them.
            pixel_values: [images, channels, height, width]; the engine's own encoder makes features of them. Of models
                that take images of any size as patches (Qwen2-VL): [patches, numbers of a patch]; as tiles
                (LLaVA-NeXT, LLaVA-OneVision): [images, tiles, channels, height, width].
            pixel_values_videos: Of videos: [patches, numbers of a patch], or LLaVA-OneVision's [videos, frames,
                channels, height, width].
            visual_mask: [B, T] bool; found from the placeholders if None.
            attention_mask: [B, T] bool or int, of this chunk: 0 at padding, on any side.
            image_grid_thw: [images, 3]: time, height and width of each image in patches, from which multimodal
                positions follow; of models that have them.
            video_grid_thw: [videos, 3], of videos.
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
            room: How many tokens will follow in each row: their keys and values get memory now. More than that may
                follow, but the cache has to move then.

        Raises:
            InputError: Contradicting or misshaped inputs; the message says which.
        """
        pixels = Pixels(
            pixel_values,
            pixel_values_videos,
            image_grid_thw,
            video_grid_thw,
            image_sizes,
            batch_num_images,
            pixel_attention_mask,
        )
        if image_features is not None and pixels.given:
            raise InputError("Pass at most one of image_features and pixel_values (pixel_values_videos).")
        if pixels.given:
            image_features = self._parts.encoder(pixels)
        media = Media(image_grid_thw, video_grid_thw, second_per_grid_ts, mm_token_type_ids, token_type_ids)
        chunk = self._parts.inputs.chunk(input_ids, inputs_embeds, image_features, visual_mask, attention_mask, media)
        cache = self._parts.decoder.new_cache(len(chunk.visual)) if cache is None else cache
        logits, exit_layer = self._parts.decoder.run(chunk, cache, room)
        return OnnxOutput(logits, exit_layer, cache)

    def decode(self, tokens: Any, cache: OnnxCache, *, active: Any = None) -> OnnxOutput:
        """One more token of each row.

        Args:
            tokens: [B] integers.
            cache: Of the same rows, from :meth:`prefill`; extended in place.
            active: [B] bool: rows that are not are as they were afterwards, and their logits mean nothing. None: all.

        Raises:
            InputError: Misshaped tokens, or an empty cache.
        """
        if cache.is_empty:
            raise InputError("cache: is empty: run the prompt with prefill() first.")
        chunk = self._parts.inputs.tokens(tokens)
        running = np.ones(cache.batch, bool) if active is None else np.asarray(active, bool)
        for name, size in (("tokens", len(chunk.ids)), ("active", len(running))):
            if size != cache.batch:
                raise InputError(f"{name}: expected {cache.batch}, one for each row of the cache, got {size}.")
        logits = self._parts.decoder.step(chunk.padded(), cache, running)
        return OnnxOutput(logits, np.full(cache.batch, -1, np.int64), cache)

    def generate(
        self,
        input_ids: Any = None,
        inputs_embeds: Any = None,
        *,
        image_features: Any = None,
        pixel_values: Any = None,
        visual_mask: Any = None,
        attention_mask: Any = None,
        cache: OnnxCache | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_token_ids: Sequence[int] | None = None,
        stop_strings: str | Sequence[str] = (),
        on_tokens: Callable[[Array], None] | None = None,
        **media: Any,
    ) -> OnnxGenerated:
        """Answer, for any number of rows. Takes what :meth:`prefill` takes, and:

        Args:
            max_new_tokens: At most so many, at least 1; None: as generation_config.json says, or 64.
            do_sample: Draw tokens, instead of taking the likeliest. None: if one of the next three is given, else as
                generation_config.json says.
            temperature: Logits are divided by it before drawing; 0 takes the likeliest token.
            top_k: Draw from so many of the likeliest tokens.
            top_p: Draw from the fewest likeliest tokens that have this probability together. Of these three, what is
                None is as generation_config.json says, or has no effect.
            seed: Of drawing; None: other tokens each time.
            eos_token_ids: A row ends with any of these; None: those of the model; empty: none.
            stop_strings: A row ends when its text has one of these; needs the engine's tokenizer.
            on_tokens: Called with each step's tokens [B] as they come, padding in rows that have ended. What it raises
                ends the generation.
            media: ``image_grid_thw``, ``image_sizes``, ``pixel_values_videos`` and what else :meth:`prefill` takes of
                images and videos.

        In a later turn, pass the cache, and as input_ids what it does not hold: each row's last token, and the new
        question.

        Raises:
            InputError: As :meth:`prefill`, or an option that cannot be.
            EngineError: Stop strings, but no tokenizer.
        """
        limit = self._parts.defaults.max_new_tokens if max_new_tokens is None else max_new_tokens
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise InputError(f"max_new_tokens: expected at least 1, got {limit!r}.")
        sampling = self._parts.defaults.sampling(do_sample, temperature, top_k, top_p, seed)
        facts = self.manifest.model
        ends = facts.eos_token_ids if eos_token_ids is None else list(eos_token_ids)
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        decode = self.processor.decode if strings else None
        output = self.prefill(
            input_ids,
            inputs_embeds,
            image_features=image_features,
            pixel_values=pixel_values,
            visual_mask=visual_mask,
            attention_mask=attention_mask,
            cache=cache,
            room=limit - 1,
            **media,
        )
        batch = output.cache.batch
        tokens, lengths = generate_tokens(
            output.logits,
            lambda tokens, active: self.decode(tokens, output.cache, active=active).logits,
            Sampler(sampling, batch),
            Stops(ends, [TextStream(decode, strings) for _ in range(batch)] if decode else []),
            limit,
            facts.pad_token_id,
            on_tokens,
        )
        return OnnxGenerated(tokens, lengths, output.exit_layer, output.cache)

    def prompt(self, messages: str | Sequence[Mapping[str, Any]], images: Any = None) -> Prompt:
        """A question or chat as a row of tokens and the features of its pictures; takes what :meth:`chat` takes.

        Several of them make a batch: ``generate([p.ids for p in prompts], image_features=[p.features for p in prompts
        if p.features is not None])``; with multimodal positions, also their ``image_grid_thw``, concatenated.

        Raises:
            InputError: Messages of another kind.
            EngineError: The engine has no tokenizer, or a package it needs is missing.
        """
        return self.processor.prompt(self._messages(messages, images), self._encode)

    def _encode(self, made: Mapping[str, Any]) -> list[Array]:
        """[n, C] of each image, of what a processor made of them."""
        return self._parts.encoder(Pixels(**made))[IMAGE]

    def _messages(self, messages: str | Sequence[Mapping[str, Any]], images: Any) -> Sequence[Mapping[str, Any]]:
        pictures = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
        if isinstance(messages, str):
            return self.processor.messages(messages, pictures)
        if pictures:
            raise InputError("images: put the pictures of a chat into its messages, as parts of type 'image'.")
        return messages

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        images: Any = None,
        *,
        on_text: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Answer:
        """Answer a question, or the last message of a chat, in the model's own format.

        Args:
            messages: A question; or a chat of messages with "role" and "content", which is a text or a list of parts
                {"type": "text", "text": ...} and {"type": "image", "image": ...}.
            images: The question's picture, or a list of them: paths, Pillow images, or arrays [height, width, 3] of
                uint8. Those of a chat are in its parts.
            on_text: Called with each piece of the answer as it comes.
            options: Of :meth:`generate`: ``max_new_tokens``, ``temperature``, ``seed``, ``stop_strings`` ...

        Returns:
            The answer. To go on, pass its ``messages`` with a new one behind them; the chat is read anew then.

        Raises:
            InputError: Messages of another kind, or options that cannot be.
            EngineError: The engine has no tokenizer, or a package it needs is missing.
        """
        messages = self._messages(messages, images)
        prompt = self.prompt(messages)
        stops = options.get("stop_strings", ())
        stream = TextStream(self.processor.decode, [stops] if isinstance(stops, str) else list(stops))
        on_tokens = options.pop("on_tokens", None)

        def show(piece: str) -> None:
            if piece and on_text is not None:
                on_text(piece)

        def follow(tokens: Array) -> None:
            if on_tokens is not None:
                on_tokens(tokens)
            show(stream.push(int(tokens[0])))

        grids: dict[str, Any] = {} if prompt.image_grid_thw is None else {"image_grid_thw": prompt.image_grid_thw}
        result = self.generate([prompt.ids], image_features=prompt.features, on_tokens=follow, **grids, **options)
        show(stream.finish())
        answer = {"role": "assistant", "content": stream.text}
        given = result.tokens[0, : result.lengths[0]].tolist()
        chat = [*(dict(message) for message in messages), answer]
        return Answer(stream.text, given, int(result.exit_layer[0]), len(prompt.ids), chat)

    def encode_images(
        self,
        pixel_values: Any,
        image_grid_thw: Any = None,
        image_sizes: Any = None,
        batch_num_images: Any = None,
        pixel_attention_mask: Any = None,
    ) -> Array:
        """Images as :meth:`prefill` takes them -> their visual tokens' embeddings [n, C], image after image.

        With DeepStack [n, (1 + layers) * C] come out: behind a token's embedding what is added to it behind each layer.

        Raises:
            InputError: The engine has no image encoder (the message says why), or takes other images.
        """
        pixels = Pixels(
            pixel_values,
            image_grid_thw=image_grid_thw,
            image_sizes=image_sizes,
            batch_num_images=batch_num_images,
            pixel_attention_mask=pixel_attention_mask,
        )
        return np.concatenate(self._parts.encoder(pixels)[IMAGE])
