"""LaVIN's processor: prompts with a placeholder for each visual token, and the pixels of their images.

    <s> Image: (visual tokens) Instruction: What is this?        <s> Image: N/A Instruction: What is this?
    Response:                                                     Response:

What stands before the visual tokens and what stands behind them is tokenized each by itself, as the authors do.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, BatchFeature, CLIPImageProcessorPil, ProcessorMixin
from transformers.image_utils import load_image
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vte_compile.errors import InputError
from vte_compile.families.lavin.configuration import LavinConfig
from vte_compile.families.media import collect, listed

IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (
    "{% set found = namespace(image=false) %}{% for message in messages %}{% if message['content'] is not string %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{% set found.image = true %}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{{ 'Image: <image>' if found.image else 'Image: N/A ' }}"
    "{% for message in messages %}{{ 'Response: ' if message['role'] == 'assistant' else 'Instruction: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Response:{% endif %}"
)
"""As the authors' instruction data; ScienceQA's prompts are texts of their own, behind "Image: <image>"."""


class LavinProcessor(ProcessorMixin):
    """Turns texts and pictures into the inputs of LavinForConditionalGeneration.

    Args:
        tokenizer: LLaMA's; it is copied, and the copy has LaVIN's chat template.
        config: The model's.
    """

    def __init__(self, tokenizer: Any, config: LavinConfig) -> None:
        side = config.vision_config.image_size
        image_processor = CLIPImageProcessorPil(
            size={"height": side, "width": side},
            do_center_crop=False,
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        )
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = CHAT_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)
        self.config = config
        self.image_token, self.image_token_id = IMAGE_TOKEN, int(config.image_token_id)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that transformers looks after; the config is no such part."""
        return ["image_processor", "tokenizer"]

    @classmethod
    def from_pretrained(  # type: ignore[override]  # what a folder holds is fixed
        cls, pretrained_model_name_or_path: Any, **hub: Any
    ) -> LavinProcessor:
        """Read config.json and LLaMA's tokenizer from a folder.

        Raises:
            InputError: One of them is missing.
        """
        try:
            config = LavinConfig.from_pretrained(pretrained_model_name_or_path, **hub)
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, config=config.text_config, **hub)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{pretrained_model_name_or_path}: no processor of a LaVIN: {error}: save LavinProcessor(tokenizer, "
                "model.config) in the model's folder."
            ) from error
        return cls(tokenizer, config)

    def save_pretrained(self, save_directory: Any) -> list[str]:  # type: ignore[override]
        """Write config.json, the tokenizer, and the image processor's settings."""
        self.config.save_pretrained(save_directory)
        written = self.tokenizer.save_pretrained(save_directory)
        return [*written, *self.image_processor.save_pretrained(save_directory)]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prepare a batch, padded on the left.

        Args:
            images: PIL images, paths or addresses: one, or a list in the order of the placeholders of all texts.
            text: One or several texts, as the chat template writes them, with ``<image>`` where an image's tokens go.
            return_tensors: "pt", or "np" for numpy's.

        Returns:
            ``input_ids`` and ``attention_mask`` [B, T], ``pixel_values`` [images, 3, height, width] (if there are any).

        Raises:
            InputError: Placeholders and pictures do not fit together, or another kind of tensors is asked for.
        """
        if return_tensors not in ("pt", "np"):
            raise InputError("LavinProcessor gives tensors only: return_tensors='pt' or 'np'.")
        texts = [text] if isinstance(text, str) else list(text or [])
        if not texts:
            raise InputError("Pass text.")
        pictures = [load_image(image).convert("RGB") for image in listed(images)]
        if (found := sum(row.count(IMAGE_TOKEN) for row in texts)) != len(pictures):
            raise InputError(f"The texts hold {found} {IMAGE_TOKEN}, but {len(pictures)} images were given.")
        rows = [self._ids(row) for row in texts]
        longest = max(map(len, rows))
        padding = [longest - len(row) for row in rows]
        data = {
            "input_ids": torch.tensor([[0] * n + row for n, row in zip(padding, rows, strict=True)]),
            "attention_mask": torch.tensor([[0] * n + [1] * len(row) for n, row in zip(padding, rows, strict=True)]),
        }
        if pictures:
            data["pixel_values"] = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return BatchFeature({name: tensor.numpy() for name, tensor in data.items()} if return_tensors == "np" else data)

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, chat_template: str | None = None, *, tokenize: bool = False, **options: Any
    ) -> Any:
        """Write one conversation as LaVIN was trained.

        Args:
            conversation: Messages. Contents are strings, or lists of parts {"type": "text", "text": ...} and {"type":
                "image", "image" or "url" or "path": ...}, of which there may be one.
            chat_template: Instead of LaVIN's.
            tokenize: Whether to go on and give the model's inputs, with the pictures of the parts.
            options: Of the tokenizer's apply_chat_template, such as ``add_generation_prompt``.

        Returns:
            A string; with `tokenize` what calling the processor gives.
        """
        images: list[Any] = []
        for message in conversation:
            for part in [] if isinstance(message["content"], str) else message["content"]:
                collect(part, images, [])
        template = chat_template or self.chat_template
        options.pop("return_dict", None)  # as always
        calling = {name: options.pop(name) for name in ("return_tensors",) if name in options}
        text = self.tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False, **options)
        return self(images or None, text, **calling) if tokenize else text

    def _ids(self, text: str) -> list[int]:
        before, *behind = text.split(IMAGE_TOKEN)
        ids: list[int] = self.tokenizer(before).input_ids
        for piece in behind:
            ids += [self.image_token_id] * len(self.config.feature_layers)
            ids += self.tokenizer(piece, add_special_tokens=False).input_ids
        return ids
