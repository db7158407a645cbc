"""Tiny random models of each multimodal family, and prompts for them through the model's real inputs.

Prompts are what a processor would give: ids with one placeholder per visual token, an attention mask, and the images.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import GEMMA2, TINY, VOCAB
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MixtralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

FAMILIES = ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FURTHER = ("vipllava", "mistral3", "idefics3", "smolvlm", "llava_mixtral", "paligemma", "paligemma2", "gemma3")
"""Families whose decoders are as those of FAMILIES, or nearly so: they take part in some tests of each kind."""
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families whose positions have three rows."""
PREFIX = ("paligemma", "paligemma2")
"""Families in which all tokens of type 0 attend to each other."""
BLOCKS = (*PREFIX, "gemma3")
"""Families in which tokens attend to later ones, by their token_type_ids."""
BY_ROW = ("idefics3", "smolvlm")
"""Families whose images are [rows, images of a row, ...], filled up with images of zeros."""
IMAGE_TOKEN, VIDEO_TOKEN, START_TOKEN, END_TOKEN, PAD_TOKEN = 60, 59, 58, 57, 0
_VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
"""Sizes of image encoders."""
_TILE = 8
_PINPOINTS = [[8, 16], [16, 8], [16, 16]]
_SIZES = [[6, 16], [16, 16], [14, 8]]
"""[height, width] of images in LLaVA-NeXT and OneVision: three, five and three tiles, one of them the whole image."""
_GRIDS = [[1, 4, 6], [1, 4, 4], [1, 6, 4]]
"""Patches [time, height, width] of images in Qwen2-VL; 2 x 2 patches are one token."""
_PATCH = 4


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        **_VISION,
        image_size=_TILE,
        patch_size=_PATCH,
    )


def _llava() -> Any:
    config = LlavaConfig(
        vision_config=_clip(), text_config=LlamaConfig(**TINY), vision_feature_layer=-1, image_token_id=IMAGE_TOKEN
    )
    return LlavaForConditionalGeneration(config)


def _llava_next() -> Any:
    config = LlavaNextConfig(
        vision_config=_clip(),
        text_config=LlamaConfig(**TINY),
        vision_feature_layer=-1,
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=_PINPOINTS,
    )
    return LlavaNextForConditionalGeneration(config)


def _llava_onevision() -> Any:
    vision = SiglipVisionConfig(
        **_VISION,
        image_size=_TILE,
        patch_size=_PATCH,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**TINY),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=_PINPOINTS,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _internvl() -> Any:
    vision = InternVLVisionConfig(
        **_VISION,
        image_size=_TILE,
        patch_size=2,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**TINY),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)


def _vipllava() -> Any:
    config = VipLlavaConfig(
        vision_config=_clip(),
        text_config=LlamaConfig(**TINY),
        vision_feature_layer=[-1, -2, 1],
        image_token_index=IMAGE_TOKEN,
    )
    return VipLlavaForConditionalGeneration(config)


def _llava_mixtral() -> Any:
    text = MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    config = LlavaConfig(vision_config=_clip(), text_config=text, vision_feature_layer=-1, image_token_id=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config)


def _mistral3() -> Any:
    vision = PixtralVisionConfig(
        **_VISION,
        image_size=4 * _PATCH,
        patch_size=_PATCH,
    )
    config = Mistral3Config(
        vision_config=vision,
        text_config=MistralConfig(**TINY, sliding_window=None),
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )
    return Mistral3ForConditionalGeneration(config)


def _pixel_shuffled(config: Any, model: Any, vision: Any) -> Any:
    """Idefics3 or SmolVLM: 4 x 4 patches of an image are 2 x 2 tokens."""
    options = dict(
        **_VISION,
        image_size=_TILE,
        patch_size=_TILE // 4,
    )
    return model(config(vision_config=vision(**options), text_config=LlamaConfig(**TINY), image_token_id=IMAGE_TOKEN))


def _idefics3() -> Any:
    return _pixel_shuffled(Idefics3Config, Idefics3ForConditionalGeneration, Idefics3VisionConfig)


def _smolvlm() -> Any:
    return _pixel_shuffled(SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMVisionConfig)


def _paligemma(text: Any, **options: Any) -> Any:
    """Image and prompt, all of type 0, attend to each other in both directions."""
    vision = SiglipVisionConfig(
        **_VISION,
        image_size=_TILE,
        patch_size=_PATCH,
        vision_use_head=False,
    )
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        projection_dim=TINY["hidden_size"],
        **options,
    )
    return PaliGemmaForConditionalGeneration(config)


def _gemma3() -> Any:
    """Images see themselves in both directions; every other layer has a window, and rotary positions of its own."""
    vision = SiglipVisionConfig(
        **_VISION,
        image_size=_TILE,
        patch_size=_PATCH // 2,
        vision_use_head=False,
    )
    text = TINY | {"pad_token_id": PAD_TOKEN}
    types = ["sliding_attention", "full_attention"] * 2
    config = Gemma3Config(
        vision_config=vision,
        text_config=Gemma3TextConfig(**text, head_dim=8, sliding_window=7, layer_types=types),
        image_token_index=IMAGE_TOKEN,
        mm_tokens_per_image=4,
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros by itself
    return model


def _qwen_options(text: Any, vision: Any) -> dict[str, Any]:
    return dict(
        text_config=text(
            **TINY,
            bos_token_id=None,
            eos_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        ),
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=START_TOKEN,
        vision_end_token_id=END_TOKEN,
    )


def _qwen2_vl() -> Any:
    vision = Qwen2VLVisionConfig(
        depth=2, embed_dim=16, hidden_size=TINY["hidden_size"], num_heads=2, mlp_ratio=2, patch_size=_PATCH
    )
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(**_qwen_options(Qwen2VLTextConfig, vision)))


def _qwen2_5_vl() -> Any:
    vision = Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        patch_size=_PATCH,
        window_size=4 * _PATCH,
        fullatt_block_indexes=[1],
        out_hidden_size=TINY["hidden_size"],
    )
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**_qwen_options(Qwen2_5_VLTextConfig, vision)))


def _qwen3_vl() -> Any:
    """Its image encoder has features for the stream behind the decoder's first two layers."""
    vision = Qwen3VLVisionConfig(
        depth=3,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        patch_size=_PATCH,
        out_hidden_size=TINY["hidden_size"],
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    )
    options = _qwen_options(functools.partial(Qwen3VLTextConfig, head_dim=8), vision)
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**options))


_BUILDERS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "vipllava": _vipllava,
    "mistral3": _mistral3,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "llava_mixtral": _llava_mixtral,
    "paligemma": lambda: _paligemma(GemmaConfig(**TINY, head_dim=8)),
    "paligemma2": lambda: _paligemma(
        Gemma2Config(**TINY | GEMMA2 | {"sliding_window": 7}), attn_implementation=GEMMA2["attn_implementation"]
    ),
    "gemma3": _gemma3,
}


def tiny_family(name: str) -> Any:
    """A random model of a family, of four layers, in eval mode; the same at every call. It never stops by itself."""
    torch.manual_seed(0)
    model = _BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros, which would hide that they are used
                parameter += 0.3 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD_TOKEN
    return model


@functools.cache
def shared_family(name: str) -> Any:
    """The same model object for all tests that do not change it."""
    return tiny_family(name)


def family_inputs(
    name: str,
    images: int | Sequence[int] = 1,
    batch: int = 1,
    *,
    seed: int = 0,
    side: str = "left",
    before: int = 3,
    behind: int = 4,
) -> dict[str, Tensor]:
    """A batch of prompts for ``tiny_family(name)``, as its processor would give it to forward() or generate().

    Args:
        name: The family.
        images: How many each row has, or how many which row has.
        batch: Number of rows, where `images` is a number. Row b has b tokens of text more before its images, and 2 b
            more behind them.
        seed: Of texts and pixels.
        side: Where shorter rows are padded.
        before: Tokens of text before the first image.
        behind: Tokens of text behind the last one.
    """
    counts = [images] * batch if isinstance(images, int) else list(images)
    generator = torch.Generator().manual_seed(seed)
    pixels, lengths = _pixels(name, counts, generator)
    rows = []
    for b, count in enumerate(counts):
        row = _text(before + b, generator)
        for i in range(count):
            row += [START_TOKEN, *[IMAGE_TOKEN] * lengths.pop(0), END_TOKEN, *(_text(1, generator) if i else [])]
        rows.append(row + _text(behind + 2 * b, generator))
    return _padded(name, rows, side) | pixels


def video_inputs(name: str, *, frames: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """A prompt of one row with one video."""
    generator = torch.Generator().manual_seed(seed)
    if name in MROPE:
        grid = torch.tensor([[frames // 2, 4, 4]])
        pixels = {
            "pixel_values_videos": torch.randn(int(grid.prod()), 3 * 2 * _PATCH**2, generator=generator),
            "video_grid_thw": grid,
        }
        length = int(grid.prod()) // 4
        if name == "qwen3_vl":  # frames stand apart, each behind its time
            row = _text(3, generator)
            for _ in range(frames // 2):
                row += [*_text(1, generator), START_TOKEN, *[VIDEO_TOKEN] * 4, END_TOKEN]
            return _padded(name, [row + _text(4, generator)], "left") | pixels
    else:
        pixels = {"pixel_values_videos": torch.randn(1, frames, 3, _TILE, _TILE, generator=generator)}
        length = frames + 1  # each frame pooled to one token, and the newline's embedding behind them
    row = [*_text(3, generator), *[VIDEO_TOKEN] * length, *_text(4, generator)]
    return _padded(name, [row], "left") | pixels


def _text(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, END_TOKEN, (length,), generator=generator).tolist()


def _padded(name: str, rows: list[list[int]], side: str) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD_TOKEN), torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[b, columns], mask[b, columns] = torch.tensor(row), 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name in MROPE:
        inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long() + 2 * (ids == VIDEO_TOKEN)
    if name in BLOCKS:
        inputs["token_type_ids"] = torch.zeros_like(ids) if name in PREFIX else (ids == IMAGE_TOKEN).long()
    return inputs


def _pixels(name: str, counts: list[int], generator: torch.Generator) -> tuple[dict[str, Tensor], list[int]]:
    """The images of all rows, as the family takes them, and how many tokens each of them has."""
    total = sum(counts)
    if not total:
        return {}, []
    pixels: dict[str, Tensor] = {}
    if name in MROPE:
        pixels["image_grid_thw"] = torch.tensor([_GRIDS[i % len(_GRIDS)] for i in range(total)])
        patches = int(pixels["image_grid_thw"].prod(-1).sum())
        pixels["pixel_values"] = torch.randn(patches, 3 * 2 * _PATCH**2, generator=generator)
    elif name in ("llava_next", "llava_onevision"):
        pixels["image_sizes"] = torch.tensor([_SIZES[i % len(_SIZES)] for i in range(total)])
        pixels["pixel_values"] = torch.randn(total, 5, 3, _TILE, _TILE, generator=generator)
        if name == "llava_onevision":  # images of a row with several of them are not cut into tiles
            pixels["batch_num_images"] = torch.tensor([count for count in counts if count])
    elif name == "mistral3":  # images of their own sizes, in one tensor of the largest
        sizes = [[4 * _PATCH, 4 * _PATCH], [2 * _PATCH, 4 * _PATCH], [4 * _PATCH, 2 * _PATCH]]
        pixels["image_sizes"] = torch.tensor([sizes[i % len(sizes)] for i in range(total)])
        pixels["pixel_values"] = torch.randn(total, 3, 4 * _PATCH, 4 * _PATCH, generator=generator)
    elif name in BY_ROW:
        pixels["pixel_values"] = torch.randn(len(counts), max(counts), 3, _TILE, _TILE, generator=generator)
        pixels["pixel_attention_mask"] = torch.ones(len(counts), max(counts), _TILE, _TILE, dtype=torch.long)
        for row, count in enumerate(counts):
            pixels["pixel_values"][row, count:] = 0
            pixels["pixel_attention_mask"][row, count:] = 0
            pixels["pixel_attention_mask"][row, 1:count, _TILE // 2 :] = 0  # these are wider than high
    else:
        # InternVL's tiles are images to the model: two of them make one image here.
        tiles = 2 * total if name == "internvl" else total
        pixels["pixel_values"] = torch.randn(tiles, 3, _TILE, _TILE, generator=generator)
    with torch.no_grad():
        features = shared_family(name).get_image_features(**pixels).pooler_output
    lengths = [feature.reshape(-1, TINY["hidden_size"]).shape[0] for feature in features]
    if name in BY_ROW:
        lengths = [sum(lengths) // total] * total
    if name == "internvl":
        lengths = [sum(lengths[i : i + 2]) for i in range(0, len(lengths), 2)]
    return pixels, lengths


assert VOCAB > IMAGE_TOKEN
