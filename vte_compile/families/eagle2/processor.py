"""Eagle 2's processor: prompts with a placeholder for each visual token, and the tiles of their pictures and frames."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from vte_compile.errors import InputError
from vte_compile.families.eagle2.configuration import PROCESSOR_CLASS, Eagle2Config
from vte_compile.families.eagle2.image_processor import Eagle2ImageProcessor
from vte_compile.families.eagle2.tokenizer import IMAGE_TOKEN, image_token_id, load_tokenizer
from vte_compile.families.media import collect, films, listed

_PLACEHOLDER = re.compile(r"<(image|video)-(\d+)>")
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
# For checkpoints that have none, which are older than their template.
_TEMPLATE = """\
{%- set count = namespace(image=0, video=0) -%}
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set count.image = count.image + 1 -%}
{{ '<image-' ~ count.image ~ '>' }}
{%- elif part['type'] == 'video' -%}
{%- set count.video = count.video + 1 -%}
{{ '<video-' ~ count.video ~ '>' }}
{%- else -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


class Eagle2Processor(ProcessorMixin):
    """Turns texts and pictures into the inputs of Eagle2ForConditionalGeneration.

    In a text, ``<image-1>`` stands for its first picture, ``<video-1>`` for its first video, as the chat template
    writes them. Each picture becomes tiles; each frame of a video is one tile.

    Args:
        image_processor: That cuts pictures.
        tokenizer: With ``<IMG_CONTEXT>``.
        chat_template: Of the checkpoint.
        tokens_per_tile: Visual tokens of a tile.
        image_token, image_start_token, image_end_token: For each visual token, and around those of a picture.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        tokens_per_tile: int = 256,
        image_token: str = IMAGE_TOKEN,
        image_start_token: str = "<img>",
        image_end_token: str = "</img>",
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or _TEMPLATE)
        self.tokens_per_tile = tokens_per_tile
        self.image_token, self.image_start_token, self.image_end_token = image_token, image_start_token, image_end_token
        self.image_token_id = image_token_id(tokenizer, tokenizer.name_or_path, image_token)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that transformers looks after."""
        return ["image_processor", "tokenizer"]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, **hub: Any
    ) -> Eagle2Processor:
        """Read the processor of a checkpoint in its published layout.

        The checkpoints of model_type eagle_chat have a tokenizer only; the rest is then as their config.json says, and
        prompts are written as for Eagle 2.5.

        Args:
            pretrained_model_name_or_path: Folder, or hub id.
            hub: Of transformers' from_pretrained (``revision``, ``token`` ...).

        Raises:
            InputError: There is no tokenizer, or it has no ``<IMG_CONTEXT>``.
        """
        name = pretrained_model_name_or_path
        tokenizer = load_tokenizer(name, **hub)
        settings = cls.get_processor_dict(name, **hub)[0]
        names = ("chat_template", "tokens_per_tile", "image_token", "image_start_token", "image_end_token")
        fields = {field: settings[field] for field in names if settings.get(field) is not None}
        try:
            images = Eagle2ImageProcessor.from_pretrained(name, **hub)
        except OSError:
            config: Any = Eagle2Config.from_pretrained(name, **hub)
            side = config.vision_config.image_size
            images = Eagle2ImageProcessor(
                size={"height": side, "width": side},
                min_dynamic_tiles=config.min_dynamic_tiles if config.dynamic_image_size else 1,
                max_dynamic_tiles=config.max_dynamic_tiles if config.dynamic_image_size else 1,
                use_thumbnail=config.use_thumbnail,
            )
            fields.setdefault("tokens_per_tile", config.tokens_per_tile)
        return cls(images, tokenizer, **fields)

    def save_pretrained(self, save_directory: Any, **unused: Any) -> list[str]:  # type: ignore[override]
        """Write the published layout: the tokenizer, {preprocessor,processor}_config.json, chat_template.json."""
        folder = Path(save_directory)
        written = [*self.tokenizer.save_pretrained(folder), *self.image_processor.save_pretrained(folder)]
        settings = {
            "image_end_token": self.image_end_token,
            "image_placeholder": "image",
            "image_start_token": self.image_start_token,
            "image_token": self.image_token,
            "processor_class": PROCESSOR_CLASS,
            "tokens_per_tile": self.tokens_per_tile,
            "video_placeholder": "video",
            "video_token": self.image_token,
        }
        files = {"processor_config.json": settings, "chat_template.json": {"chat_template": self.chat_template}}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return [*map(str, written), *(str(folder / name) for name in files)]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        fps: Sequence[float] | None = None,
        timestamps: Sequence[Sequence[float]] | None = None,
        max_dynamic_tiles: int | None = None,
        padding_side: str = "left",
        padding: bool = True,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            images: Pictures (PIL images, paths, addresses): one, or a list of those of all texts, text by text.
            text: One or several, as the chat template writes them; ``<image-1>`` is each text's own first picture.
            videos: Lists of frames, text by text.
            fps: Of each video, frames per second; the prompt says it.
            timestamps: Of each video's frames, in seconds; the prompt says them.
            max_dynamic_tiles: Of a picture, instead of the checkpoint's number.
            padding_side: Where shorter rows are padded.
            padding: True; rows of one batch have one length.
            return_tensors: "pt".

        Returns:
            ``input_ids`` and ``attention_mask`` [B, T], ``pixel_values`` [tiles, 3, size, size] (absent without any).

        Raises:
            InputError: Placeholders and pictures do not fit together, or another kind of tensors is asked for.
        """
        if return_tensors != "pt" or not padding:
            raise InputError("Eagle2Processor gives padded PyTorch tensors only: return_tensors='pt', padding=True.")
        texts = [text] if isinstance(text, str) else list(text or [])
        if not texts:
            raise InputError("Pass text.")
        pictures, clips = listed(images), films(videos)
        found = [_PLACEHOLDER.findall(one) for one in texts]
        for kind, media in (("image", pictures), ("video", clips)):
            count = 0
            for row, places in enumerate(found):
                numbers = sorted(int(number) for what, number in places if what == kind)
                if numbers != list(range(1, len(numbers) + 1)):
                    wanted = f"<{kind}-1> to <{kind}-{len(numbers)}>, each once"
                    raise InputError(f"text {row}: numbers of its {kind}s are {numbers}: expected {wanted}.")
                count += len(numbers)
            if count != len(media):
                raise InputError(f"The texts hold {count} <{kind}-...>, but {len(media)} {kind}s were given.")
        unknown: list[Any] = [None] * len(clips)
        if any(given is not None and len(given) != len(clips) for given in (fps, timestamps)):
            raise InputError(f"fps, timestamps: expected one for each of the {len(clips)} videos.")
        labels = list(zip(clips, fps or unknown, timestamps or unknown, strict=True))
        pixels: list[Tensor] = []
        rows = []
        for one, places in zip(texts, found, strict=True):
            kinds = [kind for kind, _ in places]
            own, pictures = pictures[: kinds.count("image")], pictures[kinds.count("image") :]
            shown, labels = labels[: kinds.count("video")], labels[kinds.count("video") :]
            rows.append(self._written(one, own, shown, max_dynamic_tiles, pixels))
        data = self.tokenizer(rows, padding=True, padding_side=padding_side, return_tensors="pt")
        inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
        return BatchFeature(inputs | ({"pixel_values": torch.cat(pixels)} if pixels else {}))

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, chat_template: str | None = None, *, tokenize: bool = False, **options: Any
    ) -> Any:
        """Write one or several conversations as the checkpoint's template has them.

        Args:
            conversation: Messages, or a list of such lists. Contents are strings, or lists of parts {"type": "text",
                "text": ...}, {"type": "image", "image" or "url" or "path": ...}, {"type": "video", "video": frames}.
            chat_template: Instead of the checkpoint's.
            tokenize: Whether to go on and give the model's inputs, with the pictures of the parts.
            options: Of the tokenizer's apply_chat_template (``add_generation_prompt`` ...), or of calling this.

        Returns:
            A string, or a list of them; with `tokenize` what calling the processor gives.

        Raises:
            InputError: A part is of another type, or without a picture where one is needed.
        """
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        conversations = conversation if batched else [conversation]
        names = ("padding_side", "padding", "return_tensors", "max_dynamic_tiles")
        calling = {name: options.pop(name) for name in names if name in options}
        options.pop("return_dict", None)  # as always
        template = chat_template or self.chat_template
        texts = [
            self.tokenizer.apply_chat_template(one, chat_template=template, tokenize=False, **options)
            for one in conversations
        ]
        images: list[Any] = []
        videos: list[Any] = []
        for message in (message for one in conversations for message in one):
            for part in () if isinstance(message["content"], str) else message["content"]:
                collect(part, images, videos)
        if not tokenize:
            return texts if batched else texts[0]
        return self(images or None, texts, videos or None, **calling)

    def _written(self, text: str, images: list[Any], videos: list[Any], most: int | None, pixels: list[Tensor]) -> str:
        """A text with a token for each visual token; the tiles are added to `pixels` in their order in the text."""

        def image(number: int) -> str:
            tiles = self.image_processor(images[number], max_dynamic_tiles=most)["pixel_values"]
            pixels.append(tiles)
            return f"<image {number + 1}>{self._tokens(len(tiles))}"

        def video(number: int) -> str:
            frames, rate, times = videos[number]
            pixels.append(self.image_processor(frames, max_dynamic_tiles=1)["pixel_values"])
            which = _ORDINALS[number] if number < len(_ORDINALS) else f"{number + 1}th"
            sampled = "" if rate is None else f" sampled with {rate:.2f} fps"
            at = [""] * len(frames) if times is None else [f" sample at {time:.2f}s" for time in times]
            if len(at) != len(frames):
                raise InputError(f"timestamps: {len(at)} of a video with {len(frames)} frames.")
            shown = (f"Frame {i + 1}{when}: {self._tokens(1)}" for i, when in enumerate(at))
            return f"The {which} video{sampled}: {''.join(shown)}"

        write = {"image": image, "video": video}
        return _PLACEHOLDER.sub(lambda found: write[found[1]](int(found[2]) - 1), text)

    def _tokens(self, tiles: int) -> str:
        return f"{self.image_start_token}{self.image_token * (tiles * self.tokens_per_tile)}{self.image_end_token}"
