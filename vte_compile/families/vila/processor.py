"""VILA's processor: prompts with one placeholder per visual token, and the pixels of their images and frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import BatchFeature, CLIPImageProcessorPil, ProcessorMixin, SiglipImageProcessorPil
from transformers.image_utils import load_image

from vte_compile.errors import InputError
from vte_compile.families.media import collect, films, listed
from vte_compile.families.tiles import tiles
from vte_compile.families.vila.config import IMAGE_TOKEN, VIDEO_TOKEN, VilaConfig
from vte_compile.families.vila.folder import VISION_TOWER, checkpoint_folder, load_tokenizer

# As the authors have it, whatever the file says of its class: pixels through Pillow.
_IMAGE_PROCESSORS = {"clip_vision_model": CLIPImageProcessorPil, "siglip_vision_model": SiglipImageProcessorPil}


class VilaProcessor(ProcessorMixin):
    """Turns texts and pictures into the inputs of VilaForConditionalGeneration.

    Attributes:
        tokenizer: Of the folder llm, with ``<image>`` and ``<vila/video>``.
        image_processor: Of the folder vision_tower.
        config: The model's.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, config: VilaConfig) -> None:
        super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)
        self.config = config
        self.image_token, self.video_token = IMAGE_TOKEN, VIDEO_TOKEN
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.video_token_id: int = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that transformers looks after; the config is no such part."""
        return ["image_processor", "tokenizer"]

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the layout has its own options
        cls, pretrained_model_name_or_path: Any, **hub: Any
    ) -> VilaProcessor:
        """Read tokenizer and image processor of a checkpoint in its published layout.

        Raises:
            InputError: One of them is missing.
        """
        config = VilaConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        folder, tower = checkpoint_folder(config.name_or_path), config.vision.model_type
        try:
            image_processor = _IMAGE_PROCESSORS[tower].from_pretrained(folder / VISION_TOWER)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / VISION_TOWER}: no image processor: {error}") from error
        return cls(image_processor, load_tokenizer(folder, (IMAGE_TOKEN, VIDEO_TOKEN)), config)

    def save_pretrained(self, save_directory: Any) -> list[str]:  # type: ignore[override]
        """Write the configs, the tokenizer into the folder llm and the image processor into vision_tower."""
        self.config.save_pretrained(save_directory)
        written = self.tokenizer.save_pretrained(f"{save_directory}/llm")
        return [*written, *self.image_processor.save_pretrained(f"{save_directory}/{VISION_TOWER}")]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        padding_side: str = "left",
        return_tensors: str = "pt",
        padding: bool = True,
        add_special_tokens: bool = True,
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            images: PIL images, paths or addresses: one, or a list in the order of the placeholders ``<image>`` of all
                texts. With ``image_aspect_ratio`` "dynamic" the only image of a text is cut into tiles.
            text: One or several texts, as the chat template writes them.
            videos: Lists of frames, in the order of the placeholders ``<vila/video>``.
            padding_side: Where shorter rows are padded.
            return_tensors: "pt", or "np" for numpy's.
            padding: True; rows of one batch have one length.
            add_special_tokens: Whether the tokenizer adds its own, such as the beginning of a sequence.

        Returns:
            ``input_ids`` and ``attention_mask`` [B, T], ``pixel_values`` [images, tiles and frames, 3, height, width]
            (absent without any).

        Raises:
            InputError: Placeholders and pictures do not fit together, or another kind of tensors is asked for.
        """
        if return_tensors not in ("pt", "np") or not padding:
            raise InputError("VilaProcessor gives padded tensors only: return_tensors='pt' or 'np', padding=True.")
        texts = [text] if isinstance(text, str) else list(text or [])
        if not texts:
            raise InputError("Pass text.")
        pictures, clips = listed(images), [list(map(_rgb, video)) for video in films(videos)]
        for token, media in ((IMAGE_TOKEN, pictures), (VIDEO_TOKEN, clips)):
            if (found := sum(row.count(token) for row in texts)) != len(media):
                raise InputError(f"The texts hold {found} {token}, but {len(media)} were given.")
        pixels: list[Any] = []
        left, frames = iter(map(_rgb, pictures)), iter(clips)
        rows = [self._row(row, left, frames, pixels, add_special_tokens) for row in texts]
        inputs = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        data = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        if pixels:
            data["pixel_values"] = torch.stack(pixels)
        return BatchFeature({name: tensor.numpy() for name, tensor in data.items()} if return_tensors == "np" else data)

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
        """
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        images: list[Any] = []
        videos: list[Any] = []
        calling = {name: options.pop(name) for name in ("padding_side", "padding", "return_tensors") if name in options}
        options.pop("return_dict", None)  # as always
        texts = [
            self.tokenizer.apply_chat_template(
                [_as_text(message, images, videos) for message in one],
                chat_template=chat_template or self.chat_template,
                tokenize=False,
                **options,
            )
            for one in (conversation if batched else [conversation])
        ]
        if not tokenize:
            return texts if batched else texts[0]
        # The template writes the tokenizer's special tokens where they belong.
        bos = self.tokenizer.bos_token
        written = bool(bos) and texts[0].startswith(bos)
        return self(images or None, texts, videos or None, add_special_tokens=not written, **calling)

    def _row(
        self, text: str, images: Iterator[Any], videos: Iterator[list[Any]], pixels: list[Any], special: bool
    ) -> list[int]:
        """The ids of one text, a placeholder for each visual token; its pixels are added to `pixels`."""
        tiled = self.config.image_aspect_ratio == "dynamic" and text.count(IMAGE_TOKEN) == 1
        if tiled:
            size = self._size()[0]
            cut = tiles(next(images), size, self.config.min_tiles, self.config.max_tiles)
            images = iter(cut)
            text = text.replace(IMAGE_TOKEN, f"{IMAGE_TOKEN}\n" * len(cut))
        ids: list[int] = []
        for token in self.tokenizer(text, add_special_tokens=special).input_ids:
            if token == self.image_token_id:
                pixels.append(self._pixels(next(images)))
                ids += self._expanded("image")
            elif token == self.video_token_id:
                for frame in next(videos):
                    pixels.append(self._pixels(frame))
                    ids += self._expanded("video")
            else:
                ids.append(token)
        return ids

    def _expanded(self, medium: str) -> list[int]:
        """The ids of one image or frame: what stands around its features is text, read as the authors read it."""
        before, behind = (
            [] if text is None else self.tokenizer(text).input_ids for text in self.config.wrapping(medium)
        )
        return [*before, *[self.config.image_token_id] * self.config.tokens_per_image, *behind]

    def _pixels(self, image: Any) -> torch.Tensor:
        """[3, height, width] of one image, tile or frame."""
        ratio = self.config.image_aspect_ratio
        if ratio == "resize":
            height, width = self._size()
            image = image.resize((width, height))
        elif ratio == "pad":
            image = _padded(image, tuple(int(mean * 255) for mean in self.image_processor.image_mean))
        pixels: torch.Tensor = self.image_processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def _size(self) -> tuple[int, int]:
        """Height and width of what the vision tower takes."""
        size = getattr(self.image_processor, "crop_size", None) or self.image_processor.size
        return size["height"], size["width"]


def _rgb(image: Any) -> Any:
    return load_image(image).convert("RGB")


def _padded(image: Any, colour: tuple[int, ...]) -> Any:
    """A square with the image in its middle."""
    from PIL import Image

    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _as_text(message: dict[str, Any], images: list[Any], videos: list[Any]) -> dict[str, Any]:
    """A message whose content is a string; its pictures are added to `images` and `videos`."""
    content = message["content"]
    if isinstance(content, str):
        return message
    text = ""
    for part in content:
        kind = collect(part, images, videos)
        text += part["text"] if kind == "text" else IMAGE_TOKEN if kind == "image" else VIDEO_TOKEN
    return {**message, "content": text}
