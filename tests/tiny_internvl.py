"""Tiny InternVL checkpoints in the authors' layout (internvl_chat): files, fields, names and shapes of weights.

What is written here is not made with the classes under test, so that both transformers' class and the authors' own code
can load it. Numbers come from numpy's RandomState, whose streams never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_checkpoint import random_weights, write_json, write_weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

C, LAYERS, VOCAB, FFN = 32, 3, 64, 48
"""Of the language model."""
TOWER, TOWER_LAYERS, PATCH, SIDE = 16, 3, 2, 4
"""Of InternViT; a tile has SIDE x SIDE patches, which make four visual tokens."""
IMAGE, TOKENS = 60, 4
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2": dict(llm="Qwen2ForCausalLM"),
    "internlm2, InternViT-6B, layer -2": dict(llm="InternLM2ForCausalLM", large=True, layer=-2, files="shards"),
}


def write_internvl(
    folder: Path, *, llm: str, large: bool = False, layer: int = -1, files: str = "safetensors", **changed: Any
) -> Path:
    """Write a checkpoint.

    Args:
        folder: Created.
        llm: The class of the language model: Qwen2ForCausalLM, LlamaForCausalLM or InternLM2ForCausalLM.
        large: The form of InternViT-6B: RMSNorms, normed queries and keys, no biases of them; else that of 300M.
        layer: select_layer.
        files: Of weights: "safetensors", or "shards" for two of them with an index.
        changed: Fields of config.json that are different, those of sub-configs as ``llm_config=...``.
    """
    folder.mkdir(parents=True)
    write_weights(folder, weights(llm, large), files)
    fields = config(llm, large, layer)
    for name, value in changed.items():
        fields[name] = fields[name] | value if isinstance(value, dict) else value
    write_json(folder / "config.json", fields)
    write_json(folder / "generation_config.json", {"_from_model_config": True, "eos_token_id": [VOCAB - 1]})
    write_json(folder / "added_tokens.json", {"<img>": IMAGE - 2, "</img>": IMAGE - 1, "<IMG_CONTEXT>": IMAGE})
    return folder


def write_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """A tokenizer of words, with the added tokens of a checkpoint; what it does not know is word 0."""
    every = ["<unk>", *words]
    every += [f"w{i}" for i in range(len(every), IMAGE - 4)] + ["<|endoftext|>", "<|im_start|>"]
    every += ["<img>", "</img>", "<IMG_CONTEXT>", "w61", "w62", "<|im_end|>"]
    assert len(every) == VOCAB
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(every)}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    made.add_special_tokens([word for word in every if word.startswith("<") and word != "<unk>"])
    names = {"unk_token": "<unk>", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)


def config(llm: str, large: bool, layer: int) -> dict[str, Any]:
    """What stands in config.json."""
    text = {
        "architectures": [llm],
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "model_type": llm.removesuffix("ForCausalLM").lower(),
        "attn_implementation": "eager",
        "hidden_act": "silu",
        "hidden_size": C,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "vocab_size": VOCAB,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": False,
        "torch_dtype": "float32",
        "top_k": 50,
    }
    if llm == "InternLM2ForCausalLM":
        text["bias"] = False
    vision = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": TOWER,
        "image_size": SIDE * PATCH,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 24,
        "layer_norm_eps": 1e-6,
        "norm_type": "rms_norm" if large else "layer_norm",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": TOWER_LAYERS,
        "patch_size": PATCH,
        "qk_normalization": large,
        "qkv_bias": not large,
        "use_flash_attn": True,
        "torch_dtype": "float32",
    }
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": SIDE * PATCH,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "llm_config": text,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": layer,
        "template": "internlm2-chat",
        "torch_dtype": "float32",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": vision,
    }


def weights(llm: str, large: bool) -> dict[str, Tensor]:
    """By the authors' names."""
    shapes = {f"vision_model.{name}": shape for name, shape in _tower(large).items()}
    shapes |= _norm("mlp1.0", 4 * TOWER) | _linear("mlp1.1", C, 4 * TOWER) | _linear("mlp1.3", C, C)
    shapes |= {f"language_model.{name}": shape for name, shape in _llm(llm).items()}
    return random_weights(shapes)


def _linear(name: str, outputs: int, inputs: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _norm(name: str, size: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,)} | ({f"{name}.bias": (size,)} if bias else {})


def _tower(large: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, TOWER),
        "embeddings.position_embedding": (1, SIDE * SIDE + 1, TOWER),
        "embeddings.patch_embedding.weight": (TOWER, 3, PATCH, PATCH),
        "embeddings.patch_embedding.bias": (TOWER,),
    }
    for i in range(TOWER_LAYERS):
        layer = f"encoder.layers.{i}"
        shapes |= {f"{layer}.ls1": (TOWER,), f"{layer}.ls2": (TOWER,)}
        shapes |= _linear(f"{layer}.attn.qkv", 3 * TOWER, TOWER, bias=not large)
        shapes |= _linear(f"{layer}.attn.proj", TOWER, TOWER)
        if large:
            shapes |= _norm(f"{layer}.attn.q_norm", TOWER, bias=False) | _norm(
                f"{layer}.attn.k_norm", TOWER, bias=False
            )
        shapes |= _norm(f"{layer}.norm1", TOWER, bias=not large) | _norm(f"{layer}.norm2", TOWER, bias=not large)
        shapes |= _linear(f"{layer}.mlp.fc1", 24, TOWER) | _linear(f"{layer}.mlp.fc2", TOWER, 24)
    return shapes


def _llm(llm: str) -> dict[str, tuple[int, ...]]:
    if llm == "InternLM2ForCausalLM":
        shapes: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (VOCAB, C), "model.norm.weight": (C,)}
        for i in range(LAYERS):
            layer = f"model.layers.{i}"
            shapes |= {f"{layer}.attention.wqkv.weight": (2 * C, C), f"{layer}.attention.wo.weight": (C, C)}
            shapes |= {f"{layer}.feed_forward.{name}.weight": (FFN, C) for name in ("w1", "w3")}
            shapes |= {f"{layer}.feed_forward.w2.weight": (C, FFN)}
            shapes |= {f"{layer}.{name}_norm.weight": (C,) for name in ("attention", "ffn")}
        return shapes | {"output.weight": (VOCAB, C)}
    shapes = {"model.embed_tokens.weight": (VOCAB, C), "model.norm.weight": (C,), "lm_head.weight": (VOCAB, C)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, size in (("q", C), ("k", C // 2), ("v", C // 2)):
            shapes |= _linear(f"{layer}.self_attn.{name}_proj", size, C, bias=llm == "Qwen2ForCausalLM")
        shapes[f"{layer}.self_attn.o_proj.weight"] = (C, C)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (FFN, C) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (C, FFN)
        shapes |= {f"{layer}.{name}_layernorm.weight": (C,) for name in ("input", "post_attention")}
    return shapes


def inputs() -> dict[str, Tensor]:
    """Two tiles, one, and none, padded on the left."""
    random = np.random.RandomState(3)
    rows = [_text(random, 2) + [IMAGE] * 2 * TOKENS + _text(random, 3)]
    rows += [_text(random, 4) + [IMAGE] * TOKENS + _text(random, 2), _text(random, 9)]
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.from_numpy(random.standard_normal((3, 3, 8, 8)).astype(np.float32)),
    }


def _text(random: np.random.RandomState, length: int) -> list[int]:
    return [int(token) for token in random.randint(3, 50, length)]
