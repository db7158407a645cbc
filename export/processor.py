"""Text and pictures as an engine takes them, from the files that transformers' ``processor.save_pretrained`` wrote.

The processors of LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL to Qwen3-VL and language models' tokenizers are done
here, with tokenizers, jinja2, Pillow and numpy. Others are left to transformers, where it is installed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vte_compile.errors import EngineError, InputError
from vte_compile.export.chat_template import ChatTemplate
from vte_compile.export.image_processor import Array, ImageProcessor, NotKnownError, open_picture
from vte_compile.export.patch_processor import PatchProcessor
from vte_compile.export.tile_processor import TileProcessor

_LOGGER = logging.getLogger(__name__)
_OF_PATCHES, _PATCH_TOKEN = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"), "<|image_pad|>"
_KNOWN: dict[str, type[ImageProcessor | PatchProcessor | TileProcessor]] = {
    "LlavaProcessor": ImageProcessor,
    **dict.fromkeys(_OF_PATCHES, PatchProcessor),
    **dict.fromkeys(("LlavaNextProcessor", "LlavaOnevisionProcessor"), TileProcessor),
}
_OF_IMAGES = ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images", "pixel_attention_mask")
"""What a processor of transformers gives of images, and an engine takes."""
TOKENIZERS = ("tokenizer.json", "llm/tokenizer.json")
"""Where a processor's tokenizer may be; the second is that of VILA's layout."""
Encode = Callable[[Mapping[str, Any]], list[Array]]
"""What a processor made of images, by name (``pixel_values``, and what else image_features.py takes) -> features [n, C]
of each image."""


@dataclass(frozen=True)
class Prompt:
    """One row, as ``generate()`` takes it."""

    ids: list[int]
    features: Array | None
    """[visual tokens, C]; None without pictures."""
    image_grid_thw: Array | None = None
    """[pictures, 3], of models that take patches."""


class Processor:
    """What turns messages into prompts, and tokens into text.

    Args:
        folder: With tokenizer.json, tokenizer_config.json, and what else the processor saved.
        multimodal: Whether the model's prompts may have pictures.

    Raises:
        EngineError: A file is missing or makes no sense, or a package is missing.
    """

    def __init__(self, folder: Path, multimodal: bool) -> None:
        self._folder, self._multimodal = folder, multimodal
        file = next((folder / name for name in TOKENIZERS if (folder / name).is_file()), folder / TOKENIZERS[0])
        tokenizer_config = _read(file.parent / "tokenizer_config.json")
        config = _read(folder / "processor_config.json")
        self._tokenizer = _load_tokenizer(file)
        self._of_tokenizer = file.parent != folder
        self._special = _special_tokens(tokenizer_config)
        kind, _ = _image_config(folder)
        default = _PATCH_TOKEN if kind in _OF_PATCHES else "<image>"
        self._image_token = self._special.get("image_token") or config.get("image_token") or default
        self._images: ImageProcessor | PatchProcessor | TileProcessor | _FromTransformers | None = None
        source = _template_source(file.parent, tokenizer_config)
        self._template = None if source is None else ChatTemplate(source, self._special)

    def encode(self, text: str) -> list[int]:
        """Text -> tokens, with the tokens that begin every prompt, unless the text already begins with them."""
        first = self._special.get("bos_token")
        special = not (first and text.startswith(first))
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens -> text, without special tokens."""
        text: str = self._tokenizer.decode(list(map(int, tokens)), skip_special_tokens=True)
        return text

    def messages(self, text: str, images: Sequence[Any]) -> list[dict[str, Any]]:
        """A question, behind its pictures if there are any, as a chat of one message."""
        if not self._multimodal:
            if images:
                raise InputError("images: the engine is of a language model alone: leave them out.")
            return [{"role": "user", "content": text}]
        parts = [{"type": "image", "image": image} for image in images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

    def prompt(self, messages: Sequence[Mapping[str, Any]], encode_images: Encode) -> Prompt:
        """A chat, and the pictures in it, as one row.

        Args:
            messages: Of transformers' kind: role, and content as text or as parts; a picture is a part of type "image"
                whose "image" (or "path") is a path, a Pillow image or a uint8 array.
            encode_images: The engine's encoder.

        Raises:
            InputError: They are not of that kind, or a picture cannot be read, or placeholders and pictures differ in
                number.
        """
        pictures = [open_picture(picture, where) for picture, where in _pictures(messages)]
        text = self._render(messages, len(pictures))
        pieces = text.split(self._image_token) if self._multimodal else [text]
        if len(pieces) - 1 != len(pictures):
            raise InputError(
                f"messages: {len(pictures)} pictures, but {len(pieces) - 1} placeholders {self._image_token} in the "
                "text they become: pass each picture as a part of type 'image', and leave the placeholder out of texts."
            )
        if not pictures:
            return Prompt(self.encode(text), None)
        images = self._images = self._images or _image_side(self._folder)
        if isinstance(images, _FromTransformers):
            return images.prompt(text, pictures, encode_images)
        made = images.batch(pictures)
        features = encode_images(made)
        expanded = pieces[0]
        for feature, piece in zip(features, pieces[1:], strict=True):
            expanded += self._image_token * len(feature) + piece
        return Prompt(self.encode(expanded), np.concatenate(features), made.get("image_grid_thw"))

    def _render(self, messages: Sequence[Mapping[str, Any]], images: int) -> str:
        if self._template is not None:
            # A tokenizer's template takes strings.
            return self._template.render([self._flat(one) for one in messages] if self._of_tokenizer else messages)
        if len(messages) != 1:
            raise InputError("messages: the engine has no chat template, so a prompt is one message: pass a text.")
        content = messages[0]["content"]
        text = content if isinstance(content, str) else "".join(p["text"] for p in content if p.get("type") == "text")
        return text if self._image_token in text else f"{self._image_token}\n" * images + text

    def _flat(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A message with its parts as one string."""
        content = message["content"]
        if isinstance(content, str):
            return message
        return {**message, "content": "".join(part.get("text", self._image_token) for part in content)}


class _FromTransformers:
    """The model's own processor, where ours does not know it: transformers', or that of a family of this package."""

    def __init__(self, folder: Path, reason: str) -> None:
        try:
            from transformers import AutoProcessor

            from vte_compile.families.own import own_processor
        except ImportError as error:
            raise EngineError(
                f"{folder}: {reason} is not known to vte_compile's own processor, and transformers, which knows it, is "
                "not installed: install it, or pass input_ids and pixel_values to generate() instead of text and "
                "pictures to chat()."
            ) from error
        load: Any = own_processor(folder) or AutoProcessor.from_pretrained
        try:
            self._processor: Any = load(folder, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise EngineError(f"{folder}: {reason}: transformers cannot load this processor either: {error}") from error
        _LOGGER.info("%s: %s is left to transformers", folder, reason)

    def prompt(self, text: str, pictures: list[Any], encode_images: Encode) -> Prompt:
        try:
            made = self._processor(text=[text], images=pictures, return_tensors="np")
        except (ValueError, TypeError) as error:
            raise InputError(f"messages: the model's processor does not take them: {error}") from error
        images = {name: np.asarray(made[name]) for name in _OF_IMAGES if name in made}
        features = np.concatenate(encode_images(images))
        return Prompt(made["input_ids"][0].tolist(), features, images.get("image_grid_thw"))


def _image_side(folder: Path) -> ImageProcessor | PatchProcessor | TileProcessor | _FromTransformers:
    kind, images = _image_config(folder)
    try:
        if kind not in _KNOWN:
            raise NotKnownError(f"processor_class {kind!r}")
        return _KNOWN[kind].from_config(images)
    except NotKnownError as error:
        return _FromTransformers(folder, str(error))


def _image_config(folder: Path) -> tuple[Any, Mapping[str, Any]]:
    """The processor's class, and what it is told of images."""
    config = _read(folder / "processor_config.json")
    images = config.get("image_processor") or _read(folder / "preprocessor_config.json")
    return config.get("processor_class") or images.get("processor_class"), images


def _pictures(messages: Sequence[Mapping[str, Any]]) -> list[tuple[Any, str]]:
    """All pictures of a chat, and where they are in it."""
    found = []
    if not isinstance(messages, Sequence) or not messages:
        raise InputError("messages: expected a text, or a list of messages with role and content.")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise InputError(f"messages[{i}]: expected a role and a content.")
        content = message["content"]
        if isinstance(content, str):
            continue
        if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
            raise InputError(f"messages[{i}].content: expected a text, or a list of parts with a type.")
        for j, part in enumerate(content):
            where = f"messages[{i}].content[{j}]"
            kind = part.get("type")
            if kind == "image":
                picture = part.get("image", part.get("path"))
                if picture is None:
                    raise InputError(
                        f"{where}: has no picture: pass a path, a Pillow image or an array as its 'image'."
                    )
                found.append((picture, where))
            elif kind != "text" or not isinstance(part.get("text"), str):
                raise InputError(f"{where}: expected a part of type 'image' or 'text', got {kind!r}.")
    return found


def _load_tokenizer(file: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise EngineError("Text needs tokenizers: pip install 'vte-compile[onnx]'.") from error
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises plain exceptions
        raise EngineError(
            f"{file}: cannot be read ({error}): export the model again, with a fast tokenizer."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """By name, such as "bos_token"."""
    extra = config.get("extra_special_tokens")
    entries = {**config, **(extra if isinstance(extra, Mapping) else {})}
    found = {}
    for name, token in entries.items():
        content = token.get("content") if isinstance(token, Mapping) else token
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def _template_source(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The chat template; older versions of transformers put it elsewhere."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = _read(folder / "chat_template.json").get("chat_template") or tokenizer_config.get("chat_template")
    return source if isinstance(source, str) else None


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is no such file.

    Raises:
        EngineError: The file holds something else.
    """
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise EngineError(f"{file}: cannot be read ({error}): export the model again.") from error
    if not isinstance(content, dict):
        raise EngineError(f"{file}: is no JSON object: export the model again.")
    return content
