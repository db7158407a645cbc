"""InternVL's processor, from a checkpoint in the authors' layout: transformers' own, without videos.

What config.json says of pictures and prompts is what the authors' code does: pictures in up to ``max_dynamic_patch``
tiles and the whole behind them, and the chat of the ``template`` that it names. Numbers are those of Pillow's bicubic
filter, as theirs are; torchvision's would differ by a shade.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.eagle2.tokenizer import image_token_id, load_tokenizer
from vte_compile.families.internlm2_tokenizer import is_internlm2, load_internlm2_tokenizer
from vte_compile.families.internvl import IMAGE_TOKEN, read_config, tokens_per_tile
from vte_compile.families.local_folder import local_folder

_TOKENS = {
    "image_token": IMAGE_TOKEN,
    "context_image_token": IMAGE_TOKEN,
    "start_image_token": "<img>",
    "end_image_token": "</img>",
}
"""By the names under which transformers' class and engines look for them."""
_NO_VIDEO = "<video>"
"""What transformers' class calls the placeholder of a video; the authors' tokenizers have none."""
_FIRST = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
_LATER = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
_CHATS = {
    "Hermes-2": (_FIRST, "<|im_end|>"),
    "internlm2-chat": (_FIRST, "<|im_end|>"),
    "internvl2_5": (_LATER, "<|im_end|>\n"),
}
"""Of the authors' conversation.py, by name: the system's message, and what stands behind each message."""
_CHAT_TEMPLATE = """\
{%- set end = END -%}
{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\n' + SYSTEM + end }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{ '<IMG_CONTEXT>\\n' }}
{%- elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- else -%}
{{ raise_exception('content: expected parts of type text or image') }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ end }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


class InternVLChatProcessor(InternVLProcessor):
    """Turns texts and pictures into the inputs of what load_internvl() gives.

    In a text ``<IMG_CONTEXT>`` stands for a picture, as the chat template writes it.

    Args:
        image_processor: That cuts pictures into tiles.
        tokenizer: With ``<IMG_CONTEXT>``, ``<img>`` and ``</img>``.
        image_seq_length: Visual tokens of a tile.
        chat_template: Of the checkpoint.
    """

    def __init__(
        self, image_processor: Any, tokenizer: Any, image_seq_length: int = 256, chat_template: str | None = None
    ) -> None:
        tokenizer.video_token = _NO_VIDEO  # by attribute alone, which adds no token
        super().__init__(
            image_processor, tokenizer, None, image_seq_length=image_seq_length, chat_template=chat_template
        )

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that transformers looks after: its processor of videos needs torchvision."""
        return ["image_processor", "tokenizer"]

    @classmethod
    def from_pretrained(  # type: ignore[override]  # what a folder holds is fixed
        cls, pretrained_model_name_or_path: Any, **hub: Any
    ) -> InternVLChatProcessor:
        """Read a checkpoint in the authors' layout, or what save_pretrained() wrote.

        Args:
            pretrained_model_name_or_path: Folder, or hub id.
            hub: Of huggingface_hub's snapshot_download (``revision``, ``token`` ...).

        Raises:
            InputError: A file is missing or makes no sense; or reading InternLM2's tokenizer.model needs protobuf.
            UnsupportedModelError: A chat template, or a way to cut pictures, that is not known.
        """
        folder = local_folder(pretrained_model_name_or_path, **hub)
        if (folder / "processor_config.json").is_file():  # the authors' layout has none
            settings = cls.get_processor_dict(folder)[0]
            images = GotOcr2ImageProcessorPil(**settings["image_processor"])
            length, template = settings["image_seq_length"], settings.get("chat_template")
        else:
            config = read_config(folder)
            images, length, template = _image_processor(config), tokens_per_tile(config), _chat_template(config)
        return cls(images, _tokenizer(folder), length, template)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **options: Any) -> BatchFeature:
        """As transformers' class.

        Raises:
            InputError: There are videos.
        """
        if videos is not None:
            raise InputError("videos: pass their frames as images.")
        batch: BatchFeature = super().__call__(images=images, text=text, **options)
        return batch


def _image_processor(config: dict[str, Any]) -> GotOcr2ImageProcessorPil:
    thumbnail, tiled = config.get("use_thumbnail", False), config.get("dynamic_image_size", False)
    if config.get("pad2square") or (tiled and not thumbnail):
        raise UnsupportedModelError(
            f"pad2square {config.get('pad2square')}, use_thumbnail {thumbnail}: only pictures that are stretched into "
            "tiles, with the whole behind them, are supported."
        )
    side = config.get("force_image_size") or config["vision_config"].get("image_size", 224)
    return GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        crop_to_patches=True,
        min_patches=config.get("min_dynamic_patch", 1) if tiled else 1,
        max_patches=config.get("max_dynamic_patch", 6) if tiled else 1,
    )


def _chat_template(config: dict[str, Any]) -> str:
    name = config.get("template")
    if name not in _CHATS:
        raise UnsupportedModelError(f"template: {name!r}: expected one of {', '.join(_CHATS)}.")
    system, end = (json.dumps(text, ensure_ascii=False) for text in _CHATS[name])
    return _CHAT_TEMPLATE.replace("SYSTEM", system).replace("END", end)


def _tokenizer(folder: Path) -> Any:
    """The tokenizer, with the tokens of pictures by name."""
    extra: dict[str, Any] = {"extra_special_tokens": _TOKENS}
    if is_internlm2(folder):
        tokenizer: Any = load_internlm2_tokenizer(folder, **extra)
    else:
        try:
            tokenizer = load_tokenizer(folder, **extra)
        except InputError:
            if not (folder / "tokenizer.json").is_file():
                raise
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **extra)
    image_token_id(tokenizer, folder)
    if tokenizer.pad_token is None:  # any will do: attention masks say what is padding
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
