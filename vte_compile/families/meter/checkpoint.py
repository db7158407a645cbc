"""Read METER's published checkpoints (zdou0830/METER, METER-EAS of DoubtedSteam/EAS): PyTorch Lightning's .ckpt files.

Such a file is a pickle that names classes of Lightning and others beside its tensors; none of their code runs
(vte_compile/families/torch_file.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.meter.configuration import MeterConfig
from vte_compile.families.meter.modeling import (
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
    MeterModel,
    MeterPreTrainedModel,
)
from vte_compile.families.torch_file import read_torch_file

HEADS: dict[str, type[MeterPreTrainedModel]] = {
    "vqa_classifier": MeterForQuestionAnswering,
    "nlvr2_classifier": MeterForImagesAndTextClassification,
    "snli_classifier": MeterForVisualEntailment,
    "rank_output": MeterForImageAndTextRetrieval,
}
_HEAD_SIZE = 64
"""Of each attention of CLIP's image encoders and of RoBERTa; checkpoints do not say it."""

_UNUSED = re.compile(
    r"vit_model\.(positional_embedding|ln_final\.\w+)"  # of CLIP's text encoder
    r"|text_transformer\.(pooler\..*|embeddings\.(position_ids|token_type_ids))"
    r"|(mlm_score|itm_score)\..*"  # heads of the pre-training
    r"|nas_gate|skip_num"  # of METER-EAS's search
    r"|cross_modal_(text|image)_layers\.\d+\."  # METER-EAS's adapters, which become part of a plan
    r"((attention|crossattention|intermediate)\.adapter|adapter_self_attn|adapter_cross_attn)\..*"
)
_BLOCK = re.compile(r"vit_model\.visual\.transformer\.resblocks\.(\d+)\.(.+)")
_BLOCK_NAMES = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"} | {
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_VISUAL_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layernorm.weight",
    "ln_pre.bias": "pre_layernorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}


@dataclass(frozen=True)
class MeterCheckpoint:
    """What a .ckpt file holds of a model."""

    state_dict: dict[str, Tensor]
    """By the authors' names, METER-EAS's adapters among them."""
    settings: dict[str, Any]
    """The authors' settings of the training run, such as ``num_heads``; empty if the file has none."""


def read_meter_checkpoint(path: str | Path) -> MeterCheckpoint:
    """Read a .ckpt file; tensors are mapped from it, not copied.

    Raises:
        InputError: There is no such file, or it is no checkpoint of a METER.
    """
    path = Path(path)
    content = read_torch_file(path, "a checkpoint of METER, such as meter_clip16_288_roberta_vqa.ckpt")
    state_dict = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state_dict, dict) or not all(isinstance(tensor, Tensor) for tensor in state_dict.values()):
        raise InputError(f"{path}: holds no state_dict of tensors: expected a checkpoint that PyTorch Lightning wrote")
    hyper_parameters = content.get("hyper_parameters")
    settings = hyper_parameters.get("config") if isinstance(hyper_parameters, dict) else None
    return MeterCheckpoint(state_dict, settings if isinstance(settings, dict) else {})


def load_meter(path: str | Path, image_size: int | None = None) -> MeterPreTrainedModel:
    """A model from a .ckpt file, in eval mode: a MeterModel, or one with the head that the file has.

    Checkpoints of METER-EAS give the model without its adapters: those are
    ``Plan.from_eas_checkpoint(read_meter_checkpoint(path).state_dict, skip=...)``.

    Args:
        path: The file.
        image_size: In pixels, if it shall not be that of the checkpoint: position embeddings are interpolated, as the
            authors do.

    Raises:
        InputError: No such file, no checkpoint of a METER, two heads, or an image size that patches do not divide.
        UnsupportedModelError: A METER of other encoders than CLIP's and RoBERTa's.
    """
    checkpoint = read_meter_checkpoint(path)
    state_dict = checkpoint.state_dict
    heads = [name for name in HEADS if any(key.startswith(f"{name}.") for key in state_dict)]
    if len(heads) > 1:
        raise InputError(f"{path}: has several heads ({', '.join(heads)}), expected one")
    try:
        config = _config(checkpoint, heads, image_size)
    except KeyError as error:
        raise InputError(f"{path}: no checkpoint of a METER, lacks {error.args[0]}") from error
    model = (HEADS[heads[0]] if heads else MeterModel)(config).eval()
    base = "meter." if heads else ""
    converted: dict[str, Tensor] = {}
    vision: Any = config.vision_config
    for key, tensor in state_dict.items():
        if _UNUSED.fullmatch(key) is None:
            converted.update(_convert(key, tensor, base, vision.image_size // vision.patch_size))
    model = model.to(state_dict["cross_modal_text_transform.weight"].dtype)
    there = model.state_dict()
    for what, keys in (("lacks", there.keys() - converted.keys()), ("has also", converted.keys() - there.keys())):
        if keys:
            raise InputError(f"{path}: {what} {_few(sorted(keys))}, unlike a {type(model).__name__} of its sizes")
    for key, tensor in there.items():
        if tensor.shape != converted[key].shape:
            raise InputError(f"{path}: {key}: expected shape {list(tensor.shape)}, got {list(converted[key].shape)}")
    model.load_state_dict(converted)
    return model


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _config(checkpoint: MeterCheckpoint, heads: list[str], image_size: int | None) -> MeterConfig:
    """From the shapes of the weights. Raises KeyError if one is missing."""
    weights, settings = checkpoint.state_dict, checkpoint.settings
    text, visual, layers = "text_transformer.embeddings.", "vit_model.visual.", "cross_modal_text_layers."
    if f"{visual}conv1.weight" not in weights:
        raise UnsupportedModelError("this METER's image encoder is not CLIP's (Swin's is not supported)")
    types = len(weights[f"{text}token_type_embeddings.weight"])
    if types != 1 or "roberta" not in settings.get("tokenizer", "roberta"):
        raise UnsupportedModelError("this METER's text encoder is not RoBERTa (BERT is not supported)")
    vocabulary, text_size = weights[f"{text}word_embeddings.weight"].shape
    vision_size, _, patch, _ = weights[f"{visual}conv1.weight"].shape
    grid = round((len(weights[f"{visual}positional_embedding"]) - 1) ** 0.5)
    size = len(weights["cross_modal_text_transform.weight"])
    if image_size is not None and (image_size < patch or image_size % patch):
        raise InputError(f"image_size: expected a multiple of the patch size {patch}, got {image_size}")
    labels = weights[f"{heads[0]}.3.weight"].shape[0] if heads and heads[0] != "rank_output" else 2
    return MeterConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": text_size,
            "num_hidden_layers": _count(weights, r"text_transformer\.encoder\.layer\.(\d+)\."),
            "num_attention_heads": _heads("RoBERTa", text_size),
            "intermediate_size": len(weights["text_transformer.encoder.layer.0.intermediate.dense.weight"]),
            "max_position_embeddings": len(weights[f"{text}position_embeddings.weight"]),
        },
        vision_config={
            "hidden_size": vision_size,
            "num_hidden_layers": _count(weights, r"vit_model\.visual\.transformer\.resblocks\.(\d+)\."),
            "num_attention_heads": _heads("CLIP", vision_size),
            "intermediate_size": len(weights[f"{visual}transformer.resblocks.0.mlp.c_fc.weight"]),
            "patch_size": patch,
            "image_size": grid * patch if image_size is None else image_size,
        },
        cross_modal_config={
            "hidden_size": size,
            "num_hidden_layers": _count(weights, r"cross_modal_text_layers\.(\d+)\."),
            "num_attention_heads": settings.get("num_heads") or _heads("the co-attention layers", size),
            "intermediate_size": len(weights[f"{layers}0.intermediate.dense.weight"]),
        },
        num_images=len(weights["token_type_embeddings.weight"]) - 1,
        classification_token="token4classifier" in weights,
        num_labels=labels,
    )


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for key in weights if (found := re.match(pattern, key))), default=-1)


def _heads(where: str, size: int) -> int:
    if size % _HEAD_SIZE:
        raise UnsupportedModelError(
            f"{where}: hidden size {size} is not a multiple of {_HEAD_SIZE}, the size of a head"
        )
    return size // _HEAD_SIZE


def _convert(key: str, tensor: Tensor, base: str, grid: int) -> Iterator[tuple[str, Tensor]]:
    """A weight under the names it has here."""
    head, _, rest = key.partition(".")
    if head in HEADS:
        yield (key if head == "rank_output" else f"classifier.{rest}"), tensor
    elif block := _BLOCK.fullmatch(key):
        prefix = f"{base}vit_model.encoder.layers.{block[1]}."
        module, _, kind = block[2].rpartition(".")
        if block[2] in ("attn.in_proj_weight", "attn.in_proj_bias"):
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{prefix}self_attn.{name}_proj.{block[2].rpartition('_')[2]}", part
        else:
            yield f"{prefix}{_BLOCK_NAMES.get(module, module)}.{kind}", tensor
    elif key.startswith("vit_model.visual."):
        name = key.removeprefix("vit_model.visual.")
        if name == "positional_embedding":
            tensor = _interpolated(tensor, grid)
        yield f"{base}vit_model.{_VISUAL_NAMES.get(name, name)}", tensor
    else:
        yield f"{base}{key}", tensor


def _interpolated(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings [1 + n * n, C] for another grid, as the authors make them: bicubic, the first kept."""
    old = round((len(positions) - 1) ** 0.5)
    if old == grid:
        return positions
    patches = positions[1:].float().unflatten(0, (old, old)).permute(2, 0, 1)[None]
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic")[0].flatten(1).T
    return torch.cat([positions[:1], patches.to(positions.dtype)])
