"""Read InternVL's published checkpoints (OpenGVLab/InternVL, model_type internvl_chat) into transformers' own class.

The authors' code computes rotary positions in every layer and keeps caches of its own kind where the language model is
InternLM2; its weights are those of a Llama, whose queries, keys and values lie in one matrix.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
)

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.local_folder import local_folder

logger = logging.getLogger(__name__)
IMAGE_TOKEN = "<IMG_CONTEXT>"
_END = "<|im_end|>"
"""Of a message, in all of its chat templates."""
_INTERNLM2 = "InternLM2ForCausalLM"
_TEXT_TYPES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"} | {
    _INTERNLM2: "llama"
}
_NOT_OURS = ("model_type", "architectures", "auto_map", "attn_implementation", "_attn_implementation", "use_cache")
"""Fields of a language model's config that say how the authors' code ran it."""
_TOWER, _TEXT = "model.vision_tower.", "model.language_model."
_VISION_NAMES = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
}
_BLOCK_NAMES = {
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}
_PROJECTOR_NAMES = {"mlp1.0": "layer_norm", "mlp1.1": "linear_1", "mlp1.3": "linear_2"}
_INTERNLM2_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_QK_NORM_EPS = 1e-6
"""Of transformers' InternVL, which has no setting for it."""


def load_internvl(folder: str | Path, **hub: Any) -> InternVLForConditionalGeneration:
    """A model from a folder with config.json, tokenizer files and safetensors, in eval mode and the files' dtype.

    Texts and pictures become inputs through vte_compile.families.internvl_processor.InternVLChatProcessor.

    None of the authors' code runs. What goes in is as in transformers' InternVL: ``input_ids`` [B, T] with
    ``config.image_token_id`` for each visual token, ``pixel_values`` [tiles of all rows, 3, height, width].
    ``save_pretrained`` writes transformers' layout.

    Dynamic scaling of rotary positions (InternLM2) is left out, with a warning: it changes nothing in rows of up to
    ``max_position_embeddings`` tokens.

    Args:
        folder: It, or a hub id.
        hub: Of huggingface_hub's snapshot_download (``revision``, ``token`` ...).

    Raises:
        InputError: No such folder, not of model_type internvl_chat, or weights that do not fit; the message says which.
        UnsupportedModelError: A language model, or a setting, that transformers' InternVL does not have.
    """
    folder = local_folder(folder, **hub)
    fields = read_config(folder)
    llm = (fields.get("llm_config", {}).get("architectures") or [""])[0]
    if llm not in _TEXT_TYPES:
        raise UnsupportedModelError(
            f"llm_config: {llm or 'no architecture'}: expected one of {', '.join(_TEXT_TYPES)}."
        )
    config = _config(folder, fields, llm)
    weights = dict(_weights(folder, config, llm))
    expected = _expected(config)
    for what, keys in (("lacks", expected.keys() - weights.keys()), ("has also", weights.keys() - expected.keys())):
        if keys:
            raise InputError(f"{folder}: {what} {', '.join(sorted(keys)[:3])}, unlike an InternVL of its config.json.")
    for key, tensor in weights.items():
        if tensor.shape != expected[key]:
            raise InputError(f"{folder}: {key}: expected shape {list(expected[key])}, got {list(tensor.shape)}.")
    dtype = weights["lm_head.weight"].dtype
    model: Any = InternVLForConditionalGeneration.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    _end_at(model.generation_config, _token_id(folder, _END))
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of config.json, in the authors' layout.

    Raises:
        InputError: There is none, or it is of another layout.
    """
    fields = _read_json(folder / "config.json")
    if fields.get("model_type") != "internvl_chat" or not isinstance(fields.get("llm_config"), dict):
        raise InputError(
            f"{folder / 'config.json'}: model_type is {fields.get('model_type')!r}, not 'internvl_chat', the authors' "
            "layout: checkpoints converted for transformers load with its from_pretrained()."
        )
    return fields


def tokens_per_tile(fields: dict[str, Any]) -> int:
    """Visual tokens of a tile, of a config.json."""
    vision = fields.get("vision_config", {})
    side = vision.get("image_size", 224) // vision.get("patch_size", 14)
    return int(side**2 * fields.get("downsample_ratio", 0.5) ** 2)


def _end_at(generation_config: Any, token: int | None) -> None:
    """Let answers end at a token, too: the authors' chat() asks for it, whatever the files say."""
    ends = generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if token is not None and token not in ends:
        generation_config.eos_token_id = [*ends, token]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot read it: {error}: pass the folder of a published InternVL.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected an object.")
    return content


def _config(folder: Path, fields: dict[str, Any], llm: str) -> InternVLConfig:
    vision, text = fields.get("vision_config", {}), dict(fields["llm_config"])
    normed = vision.get("qk_normalization", True)
    eps = vision.get("layer_norm_eps", 1e-6)
    if fields.get("ps_version", "v1") != "v2":
        raise UnsupportedModelError("ps_version is 'v1': InternVL 1.1 turns its images over; only 'v2' is supported.")
    if normed and eps != _QK_NORM_EPS:
        raise UnsupportedModelError(f"vision_config: layer_norm_eps is {eps}: expected 1e-6 where queries are normed.")
    if lora := [name for name in ("use_backbone_lora", "use_llm_lora") if fields.get(name)]:
        raise UnsupportedModelError(f"{', '.join(lora)}: adapters beside the weights are not supported: merge them.")
    if llm == _INTERNLM2:
        text |= {"attention_bias": text.get("bias", True), "mlp_bias": False}
    if (text.get("rope_scaling") or {}).get("type") == "dynamic":
        text["rope_scaling"] = None
        logger.warning(
            "%s: dynamic scaling of rotary positions is left out: rows of more than %s tokens would differ.",
            folder,
            text.get("max_position_embeddings", 2048),
        )
    text = {name: value for name, value in text.items() if name not in _NOT_OURS}
    image_size, patch = vision.get("image_size", 224), vision.get("patch_size", 14)
    ratio = fields.get("downsample_ratio", 0.5)
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision.get("hidden_size", 3200),
            num_hidden_layers=vision.get("num_hidden_layers", 48),
            num_attention_heads=vision.get("num_attention_heads", 25),
            intermediate_size=vision.get("intermediate_size", 12800),
            hidden_act=vision.get("hidden_act", "gelu"),
            attention_bias=vision.get("qkv_bias", False),
            use_qk_norm=normed,
            norm_type=vision.get("norm_type", "rms_norm"),
            layer_norm_eps=eps,
            image_size=[image_size, image_size],
            patch_size=[patch, patch],
            hidden_dropout_prob=0.0,
            projection_dropout=0.0,
        ),
        text_config=AutoConfig.for_model(_TEXT_TYPES[llm], **text, use_cache=True),
        image_token_id=_image_token_id(folder),
        image_seq_length=tokens_per_tile(fields),
        downsample_ratio=ratio,
        projector_hidden_act="gelu",
        vision_feature_layer=fields.get("select_layer", -1),
        tie_word_embeddings=False,
    )


def _image_token_id(folder: Path) -> int:
    found = _token_id(folder, IMAGE_TOKEN)
    if found is None:
        raise InputError(f"{folder}: no tokenizer file says which id {IMAGE_TOKEN} has: copy the whole checkpoint.")
    return found


def _token_id(folder: Path, wanted: str) -> int | None:
    """The id of an added token, which stands in one of the tokenizer's files; None if it does not."""
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            continue
        content = _read_json(folder / name)
        if isinstance(token := content.get(wanted), int):
            return token
        decoder = content.get("added_tokens_decoder", {})
        known = [(int(token), added) for token, added in decoder.items()]
        known += [(added["id"], added) for added in content.get("added_tokens", [])]
        for token, added in known:
            if added["content"] == wanted:
                return token
    return None


def _expected(config: InternVLConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in InternVLForConditionalGeneration(config).state_dict().items()}


def _weights(folder: Path, config: InternVLConfig, llm: str) -> Iterator[tuple[str, Tensor]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: holds no safetensors files.")
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield from _convert(name, opened.get_tensor(name), config, llm)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: cannot read it: {error}: copy it again.") from error


def _convert(name: str, tensor: Tensor, config: InternVLConfig, llm: str) -> Iterator[tuple[str, Tensor]]:
    """A weight under the names it has in transformers' class; names that are unknown stay."""
    module, _, kind = name.rpartition(".")
    if block := re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.(.+)", name):
        layer, rest = f"{_TOWER}encoder.layer.{block[1]}.", block[2]
        if rest.startswith("attn.qkv."):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{layer}attention.{letter}_proj.{kind}", part.contiguous()
        elif rest in _BLOCK_NAMES:  # a weight of the block itself
            yield layer + _BLOCK_NAMES[rest], tensor
        else:
            inner = rest.rpartition(".")[0]
            yield f"{layer}{_BLOCK_NAMES.get(inner, inner)}.{kind}", tensor
    elif name.startswith("vision_model."):
        rest = name.removeprefix("vision_model.")
        if rest in _VISION_NAMES:
            yield _TOWER + _VISION_NAMES[rest], tensor
        else:
            inner = rest.rpartition(".")[0]
            yield f"{_TOWER}{_VISION_NAMES.get(inner, inner)}.{kind}", tensor
    elif module in _PROJECTOR_NAMES:
        yield f"model.multi_modal_projector.{_PROJECTOR_NAMES[module]}.{kind}", tensor
    elif llm == _INTERNLM2:
        yield from _convert_internlm2(name, tensor, config.text_config)
    elif name.startswith("language_model.model."):
        yield _TEXT + name.removeprefix("language_model.model."), tensor
    else:
        yield name.removeprefix("language_model."), tensor


def _convert_internlm2(name: str, tensor: Tensor, config: Any) -> Iterator[tuple[str, Tensor]]:
    """InternLM2 to Llama: in ``wqkv`` each group of queries comes with its key and its value behind it."""
    kind = name.rpartition(".")[2]
    if block := re.fullmatch(r"language_model\.model\.(layers\.\d+\.)(.+)\.\w+", name):
        layer, inner = _TEXT + block[1], block[2]
        if inner != "attention.wqkv":
            yield f"{layer}{_INTERNLM2_NAMES.get(inner, inner)}.{kind}", tensor
            return
        heads = config.hidden_size // config.num_attention_heads
        queries = config.num_attention_heads // config.num_key_value_heads
        groups = tensor.unflatten(0, (config.num_key_value_heads, queries + 2, heads))
        for letter, part in (("q", groups[:, :queries]), ("k", groups[:, -2]), ("v", groups[:, -1])):
            yield f"{layer}self_attn.{letter}_proj.{kind}", part.reshape(-1, *tensor.shape[1:]).contiguous()
    else:
        names = {"model.tok_embeddings": f"{_TEXT}embed_tokens", "model.norm": f"{_TEXT}norm", "output": "lm_head"}
        inner = name.removeprefix("language_model.").rpartition(".")[0]
        yield f"{names.get(inner, inner)}.{kind}", tensor
