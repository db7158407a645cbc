"""Tiny Eagle 2 checkpoints in the published layout: files, fields, names and shapes of weights are the authors'.

What is written here is not made with the classes under test, nor with transformers' modules, so that both they and the
authors' own code can load it. Numbers come from numpy's RandomState, whose streams never change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_checkpoint import random_weights, write_json, write_weights
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

C, LAYERS, VOCAB = 32, 4, 280
"""Of the decoder: channels, layers, and embeddings: 256 bytes, special tokens, and some that no token has."""
TOWER, TOWER_LAYERS, PATCH, SIDE = 16, 3, 2, 4
"""Of SigLIP; a tile has SIDE x SIDE patches, which make four visual tokens."""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
IMAGE = 256 + SPECIAL.index("<IMG_CONTEXT>")
END = 256 + SPECIAL.index("<|im_end|>")
CHAT = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{% set image_count.value = image_count.value + 1 %}<image-{{ image_count.value }}>"
    "{% elif content['type'] == 'video' %}{% set video_count.value = video_count.value + 1 %}"
    "<video-{{ video_count.value }}>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2": dict(head=True),
    "qwen2, tied, layer -2, shards": dict(tied=True, layer=-2, files="shards"),
    "llama, eagle_chat": dict(llm="llama", old=True),
    "qwen3, one layer, no shuffle": dict(llm="qwen3", connector=1, shuffle=False),
}


def write_eagle2(
    folder: Path,
    *,
    llm: str = "qwen2",
    old: bool = False,
    head: bool = False,
    tied: bool = False,
    layer: int = -1,
    connector: int = 2,
    shuffle: bool = True,
    files: str = "safetensors",
) -> Path:
    """Write a checkpoint.

    Args:
        folder: Created.
        llm: "qwen2", "llama" or "qwen3".
        old: The layout of January 2025 (model_type eagle_chat).
        head: Whether SigLIP's pooling head is in the file.
        tied: Whether embeddings are the decoder's last layer too.
        layer: select_layer.
        connector: mlp_connector_layers.
        shuffle: use_pixel_shuffle.
        files: Of weights: "safetensors", or "shards" for two of them with an index.
    """
    folder.mkdir(parents=True)
    shapes = {f"vision_model.vision_model.{name}": shape for name, shape in _tower_weights(head).items()}
    shapes |= {f"mlp1.{name}": shape for name, shape in _connector_weights(connector, shuffle).items()}
    shapes |= {f"language_model.{name}": shape for name, shape in _llm_weights(llm, tied).items()}
    write_weights(folder, random_weights(shapes), files)
    write_json(folder / "config.json", _config(llm, old, tied, layer, connector, shuffle))
    write_json(folder / "generation_config.json", {"_from_model_config": True, "transformers_version": "4.37.2"})
    _write_tokenizer(folder)
    size, mean = {"height": SIDE * PATCH, "width": SIDE * PATCH}, [0.5, 0.5, 0.5]
    kind = {"image_processor_type": "Eagle2_5_VLImageProcessorFast", "processor_class": "Eagle2_5_VLProcessor"}
    auto = {"AutoImageProcessor": "image_processing_eagle2_5_vl_fast.Eagle2_5_VLImageProcessorFast"}
    tiles = {"max_dynamic_tiles": 4, "min_dynamic_tiles": 1, "tokens_per_tile": _tokens(shuffle), "use_thumbnail": True}
    does = {"do_resize": False, "do_rescale": True, "do_normalize": True, "do_pad": False, "do_convert_rgb": True}
    images = {"auto_map": auto, **kind, "image_mean": mean, "image_std": mean, "size": size, **tiles, **does}
    texts = {
        "image_end_token": "</img>",
        "image_placeholder": "image",
        "image_start_token": "<img>",
        "image_token": "<IMG_CONTEXT>",
        "processor_class": "Eagle2_5_VLProcessor",
        "tokens_per_tile": _tokens(shuffle),
        "video_placeholder": "video",
        "video_token": "<IMG_CONTEXT>",
        "vision_feature_select_strategy": None,
    }
    if not old:
        write_json(folder / "preprocessor_config.json", images)
        write_json(folder / "processor_config.json", texts)
        write_json(folder / "chat_template.json", {"chat_template": CHAT})
    return folder


def _tokens(shuffle: bool) -> int:
    return (SIDE // 2) ** 2 if shuffle else SIDE**2


def _config(llm: str, old: bool, tied: bool, layer: int, connector: int, shuffle: bool) -> dict[str, Any]:
    text = {
        "_attn_implementation_autoset": True,
        "architectures": [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[llm]],
        "model_type": llm,
        "attention_dropout": 0.0,
        "bos_token_id": 256,
        "eos_token_id": END,
        "vocab_size": VOCAB,
        "hidden_size": C,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "use_cache": False,
    } | ({"head_dim": 8, "attention_bias": False} if llm == "qwen3" else {})
    vision = {
        "model_type": "siglip_vision_model",
        "_attn_implementation": "flash_attention_2",
        "attention_dropout": 0.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": TOWER,
        "image_size": SIDE * PATCH,
        "intermediate_size": 24,
        "layer_norm_eps": 1e-6,
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": TOWER_LAYERS,
        "patch_size": PATCH,
        "torch_dtype": "float32",
    }
    config: dict[str, Any] = {
        "_commit_hash": None,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": SIDE * PATCH,
        "loss_version": "efficient_v2_cp_head",
        "mlp_checkpoint": False,
        "pad2square": False,
        "select_layer": layer,
        "template": "qwen2-chat",
        "torch_dtype": "float32",
        "transformers_version": None,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": vision,
    }
    if old:  # with all that transformers 4.37 wrote into a config
        text |= {"attn_implementation": "flash_attention_2", "max_length": 20, "do_sample": False, "num_beams": 1}
        text |= {"auto_map": {"AutoConfig": "configuration_llama.LlamaConfig"}, "pruned_heads": {}, "top_k": 50}
        auto = {"AutoConfig": "configuration_eagle_chat.Eagle2ChatConfig"}
        own = {"architectures": ["Eagle2ChatModel"], "model_type": "eagle_chat", "auto_map": auto, "llm_config": text}
        return config | own | {"max_dynamic_patch": 3, "min_dynamic_patch": 1, "ps_version": "v2"}
    auto = {"AutoConfig": "configuration_eagle2_5_vl.Eagle2_5_VLConfig"}
    return config | {
        "_attn_implementation": "flash_attention_2",
        "architectures": ["Eagle2_5_VLForConditionalGeneration"],
        "auto_map": auto,
        "image_token_index": IMAGE,
        "max_dynamic_tiles": 12,
        "min_dynamic_tiles": 1,
        "mlp_connector_layers": connector,
        "model_type": "eagle_2_5_vl",
        "text_config": text,
        "tie_word_embeddings": tied,
        "use_pixel_shuffle": shuffle,
    }


def _llm_weights(llm: str, tied: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, C), "model.norm.weight": (C,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, C)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, size in (("q", C), ("k", C // 2), ("v", C // 2)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, C)
            if llm == "qwen2":
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
            elif llm == "qwen3" and name != "v":
                shapes[f"{layer}.self_attn.{name}_norm.weight"] = (8,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (C, C)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (48, C) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (C, 48)
        shapes |= {f"{layer}.{name}_layernorm.weight": (C,) for name in ("input", "post_attention")}
    return shapes


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _tower_weights(head: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embeddings.patch_embedding.weight": (TOWER, 3, PATCH, PATCH)}
    shapes |= {"embeddings.patch_embedding.bias": (TOWER,)}
    shapes |= {"embeddings.position_embedding.weight": (SIDE * SIDE, TOWER)}
    for i in range(TOWER_LAYERS):
        layer = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", TOWER, TOWER)
        shapes |= _norm(f"{layer}.layer_norm1", TOWER) | _norm(f"{layer}.layer_norm2", TOWER)
        shapes |= _linear(f"{layer}.mlp.fc1", 24, TOWER) | _linear(f"{layer}.mlp.fc2", TOWER, 24)
    shapes |= _norm("post_layernorm", TOWER)
    if head:
        shapes |= {"head.probe": (1, 1, TOWER), "head.attention.in_proj_weight": (3 * TOWER, TOWER)}
        shapes |= {"head.attention.in_proj_bias": (3 * TOWER,)} | _linear("head.attention.out_proj", TOWER, TOWER)
        shapes |= _norm("head.layernorm", TOWER)
        shapes |= _linear("head.mlp.fc1", 24, TOWER) | _linear("head.mlp.fc2", TOWER, 24)
    return shapes


def _connector_weights(layers: int, shuffle: bool) -> dict[str, tuple[int, ...]]:
    """Numbers are places in the authors' nn.Sequential: norm, linear, GELU, linear."""
    inputs = TOWER * (4 if shuffle else 1)
    if layers == 1:
        return _linear("0", C, inputs)
    return _norm("0", inputs) | _linear("1", C, inputs) | _linear("3", C, C)


def _write_tokenizer(folder: Path) -> None:
    """Bytes, as Qwen2's tokenizer has them, and no merges."""
    backend = Tokenizer(BPE({character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "vocab.json", json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": SPECIAL[1:]}
    kind = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 512, "clean_up_tokenization_spaces": False}
    decoder = {
        str(256 + i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, token in enumerate(SPECIAL)
    }
    write_json(folder / "tokenizer_config.json", {**special, **kind, "added_tokens_decoder": decoder})
