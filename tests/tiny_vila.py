"""Tiny VILA checkpoints in the published layout: folders, files, names and shapes of weights are the authors'.

What is written here is not made with the classes under test, and not with transformers' modules either, so that both
they and the authors' own code can load it. Numbers come from numpy's RandomState, whose streams never change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_checkpoint import random_weights, write_json, write_weights
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

C, LAYERS, TEXTS = 32, 4, 57
"""Of the decoder: channels, layers, and ids that are words; two more are <s> and </s>, so there are 59 embeddings."""
TOWER = 16
PATCH = 2
CHAT = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)
WORDS = ["<s>", "</s>", "\n", "user", "assistant", "what", "is", "this"]
VARIANTS: dict[str, dict[str, Any]] = {
    "siglip, mlp_downsample, llama": dict(projector="mlp_downsample", side=4),
    "siglip, 2x2_fix, qwen2": dict(projector="mlp_downsample_2x2_fix", side=5, llm="qwen2", ratio="dynamic"),
    "siglip, 3x3_fix, qwen2": dict(projector="mlp_downsample_3x3_fix", side=5, llm="qwen2", ratio="pad", tied=True),
    "clip, mlp2x_gelu, llama, bin": dict(tower="clip", projector="mlp2x_gelu", side=3, select="patch", files="bin"),
    "clip with class, linear, llama, shards": dict(
        tower="clip", projector="linear", side=3, layer=-1, ratio=None, files="shards"
    ),
}


def write_vila(
    folder: Path,
    *,
    tower: str = "siglip",
    projector: str = "mlp_downsample",
    side: int = 4,
    llm: str = "llama",
    select: str = "cls_patch",
    layer: int = -2,
    ratio: str | None = "resize",
    files: str = "safetensors",
    tied: bool = False,
) -> Path:
    """Write a checkpoint: config.json, llm/, vision_tower/, mm_projector/.

    Args:
        folder: Created.
        tower: "siglip" or "clip".
        projector: Its type.
        side: Patches along a side of an image.
        llm: "llama" or "qwen2".
        select: mm_vision_select_feature.
        layer: mm_vision_select_layer.
        ratio: image_aspect_ratio.
        files: Of weights: "safetensors", "bin", or "shards" for a decoder in two files with an index.
        tied: Whether embeddings are the decoder's last layer too.
    """
    configs = {
        "llm": _llm_config(llm) | {"tie_word_embeddings": tied},
        "vision_tower": _tower_config(tower, side),
        "mm_projector": {
            "architectures": ["MultimodalProjector"],
            "mm_projector_type": projector,
            "model_type": "v2l_projector",
            "torch_dtype": "float32",
        },
    }
    weights = {
        "llm": _llm_weights(llm),
        "vision_tower": _tower_weights(tower, side),
        "mm_projector": _projector_weights(projector),
    }
    if tied:
        del weights["llm"]["lm_head.weight"]
    for number, (part, config) in enumerate(configs.items()):
        (folder / part).mkdir(parents=True)
        write_json(folder / part / "config.json", config)
        write_weights(
            folder / part, random_weights(weights[part], number), files if part == "llm" or files == "bin" else ""
        )
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlavaLlamaModel"],
            "model_type": "llava_llama",
            "llm_cfg": configs["llm"],
            "vision_tower_cfg": configs["vision_tower"],
            "mm_projector_cfg": configs["mm_projector"],
            "hidden_size": C,
            "mm_hidden_size": TOWER,
            "image_aspect_ratio": ratio,
            "max_tiles": 4,
            "min_tiles": 1,
            "mm_vision_select_feature": select,
            "mm_vision_select_layer": layer,
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "model_dtype": "torch.float32",
            "num_video_frames": 8,
            "ps3": False,
            "s2": False,
            "vision_resolution": -1,
        },
    )
    _write_tokenizer(folder / "llm", llm)
    size = {"height": side * PATCH, "width": side * PATCH}
    image: dict[str, Any] = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255}
    image |= {"image_mean": [0.5, 0.4, 0.6], "image_std": [0.5, 0.5, 0.25], "resample": 3}
    if tower == "siglip":
        image |= {"image_processor_type": "SiglipImageProcessor", "size": size}
    else:
        image |= {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side * PATCH}}
        image |= {"crop_size": size, "do_center_crop": True, "do_convert_rgb": True}
    write_json(folder / "vision_tower" / "preprocessor_config.json", image)
    return folder


def _write_tokenizer(folder: Path, llm: str) -> None:
    """Words and line breaks for Llama; bytes, as Qwen2's tokenizer has them, for Qwen2."""
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if llm == "llama":
        words = {word: i for i, word in enumerate(WORDS)} | {f"w{i}": i for i in range(len(WORDS), TEXTS + 2)}
        backend = Tokenizer(WordLevel(words, unk_token="w8"))
        spaces = Split(pattern=" ", behavior="removed")
        backend.pre_tokenizer = Sequence([Split(pattern="\n", behavior="isolated"), spaces])
        kind = "PreTrainedTokenizerFast"
    else:
        backend = Tokenizer(BPE({character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}, []))
        backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        kind = "Qwen2Tokenizer"
        special["bos_token"] = "</s>"
    backend.add_special_tokens(sorted({*special.values()}))
    backend.save(str(folder / "tokenizer.json"))
    if llm == "qwen2":
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        write_json(folder / "vocab.json", model["vocab"])
        (folder / "merges.txt").write_text("#version: 0.2\n")
    write_json(folder / "tokenizer_config.json", {**special, "tokenizer_class": kind, "chat_template": CHAT})


def _llm_config(llm: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM" if llm == "llama" else "Qwen2ForCausalLM"],
        "model_type": llm,
        "vocab_size": TEXTS + 2 if llm == "llama" else 270,  # without, and with room for media tokens
        "hidden_size": C,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1 if llm == "llama" else 256,
        "torch_dtype": "float32",
        "tokenizer_model_max_length": 512,
    }


def _llm_weights(llm: str) -> dict[str, tuple[int, ...]]:
    vocab = _llm_config(llm)["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, C), "lm_head.weight": (vocab, C)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, size in (("q", C), ("k", C // 2), ("v", C // 2)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, C)
            if llm == "qwen2":
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (C, C)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (48, C) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (C, 48)
        shapes |= {f"{layer}.{name}_layernorm.weight": (C,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (C,)}


def _tower_config(tower: str, side: int) -> dict[str, Any]:
    return {
        "architectures": ["SiglipVisionModel" if tower == "siglip" else "CLIPVisionModel"],
        "model_type": f"{tower}_vision_model",
        "hidden_size": TOWER,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": side * PATCH,
        "patch_size": PATCH,
        "hidden_act": "gelu_pytorch_tanh" if tower == "siglip" else "quick_gelu",
        "layer_norm_eps": 1e-6,
        "torch_dtype": "float32",
    }


def _tower_weights(tower: str, side: int) -> dict[str, tuple[int, ...]]:
    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (TOWER,), f"{name}.bias": (TOWER,)}

    def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    shapes: dict[str, tuple[int, ...]] = {"embeddings.patch_embedding.weight": (TOWER, 3, PATCH, PATCH)}
    if tower == "siglip":
        shapes |= {"embeddings.patch_embedding.bias": (TOWER,)}
        shapes |= {"embeddings.position_embedding.weight": (side * side, TOWER)}
        shapes |= {"head.probe": (1, 1, TOWER), "head.attention.in_proj_weight": (3 * TOWER, TOWER)}
        shapes |= {"head.attention.in_proj_bias": (3 * TOWER,)} | linear("head.attention.out_proj", TOWER, TOWER)
        shapes |= norm("head.layernorm") | linear("head.mlp.fc1", 24, TOWER) | linear("head.mlp.fc2", TOWER, 24)
    else:
        shapes |= {"embeddings.class_embedding": (TOWER,)} | norm("pre_layrnorm")
        shapes |= {"embeddings.position_embedding.weight": (side * side + 1, TOWER)}
    for i in range(3):
        layer = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{name}", TOWER, TOWER)
        shapes |= norm(f"{layer}.layer_norm1") | norm(f"{layer}.layer_norm2")
        shapes |= linear(f"{layer}.mlp.fc1", 24, TOWER) | linear(f"{layer}.mlp.fc2", TOWER, 24)
    return {f"vision_model.{name}": shape for name, shape in (shapes | norm("post_layernorm")).items()}


def _projector_weights(kind: str) -> dict[str, tuple[int, ...]]:
    """Numbers are places in the authors' nn.Sequential: a downsampling block, a norm, and so on."""
    layers: dict[str, tuple[int, int]] = {
        "linear": {"": (C, TOWER)},
        "mlp2x_gelu": {"0": (C, TOWER), "2": (C, C)},
        "mlp_downsample": {"1": (4 * TOWER, 0), "2": (C, 4 * TOWER), "4": (C, C)},
        "mlp_downsample_2x2_fix": {"1": (4 * TOWER, 0), "2": (C, 4 * TOWER), "4": (C, C)},
        "mlp_downsample_3x3_fix": {
            "1": (9 * TOWER, 0),
            "2": (3 * TOWER, 9 * TOWER),
            "4": (3 * TOWER, 0),
            "5": (C, 3 * TOWER),
            "7": (C, C),
        },
    }[kind]
    shapes: dict[str, tuple[int, ...]] = {}
    for place, (outputs, inputs) in layers.items():
        name = f"layers.{place}".rstrip(".")
        shapes[f"{name}.weight"] = (outputs, inputs) if inputs else (outputs,)
        shapes[f"{name}.bias"] = (outputs,)
    return shapes
