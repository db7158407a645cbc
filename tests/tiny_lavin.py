"""Random LaVIN checkpoints in the authors' layout: names and shapes of the file that their train.py writes; the LLaMA
and the CLIP under it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

C, LAYERS, VOCAB, FFN = 64, 3, 61, 192
VISION, VISION_LAYERS, PATCH, SIDE = 64, 8, 4, 12
PROJECTOR, WIDTH, REPLACED = 16, 8, 32
IMAGE_TOKEN = VOCAB
"""The first id behind the vocabulary."""
TOKENS = VISION_LAYERS // 4
"""Visual tokens of an image; six in LaVIN, whose CLIP has 24 layers."""


def weights(eas: bool = False) -> dict[str, Tensor]:
    """A file's state dict, by the authors' names."""
    shapes: dict[str, tuple[int, ...]] = {"adapter_modality_embedding.weight": (2, C)}

    def adapter(name: str, size: int, width: int, downs: str = "A") -> None:
        for letter in downs:
            shapes[f"{name}.conv_{letter}.weight"], shapes[f"{name}.conv_{letter}.bias"] = (width, size, 1), (width,)
        for letter in "BD":
            shapes[f"{name}.conv_{letter}.weight"] = (size, width // 2, 1)
            shapes[f"{name}.conv_{letter}.bias"] = (size,)
        shapes[f"{name}.expert_weights.weight"], shapes[f"{name}.expert_weights.bias"] = (2, size), (2,)

    for name, out, inner in (("conv_A", PROJECTOR, VISION), ("conv_B", C, PROJECTOR)):
        shapes[f"adapter_proj.{name}.weight"], shapes[f"adapter_proj.{name}.bias"] = (out, inner), (out,)
    for i in range(LAYERS):
        adapter(f"layers.{i}.adapter_attn", C, WIDTH)
        if eas:
            adapter(f"layers.{i}.replaced_adapter", C, REPLACED, "AC")
    for i in range(VISION_LAYERS):
        adapter(f"backbone.visual.transformer.resblocks.{i}.adapter_attn", VISION, WIDTH)
    return random(shapes, seed=0)


def random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Large enough for each part to matter: routers far from 1/2 at a temperature of 10."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (3.0 if "expert_weights" in name else 0.2) * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def save(path: Path, state_dict: dict[str, Tensor], **content: Any) -> Path:
    """Write a file as train.py does."""
    settings = Namespace(adapter_type="attn", adapter_dim=WIDTH, adapter_scale=1.0, temperature=10.0, n_prompt=6)
    torch.save({"model": state_dict, "epoch": 19, "scaler": None, "args": settings, **content}, path)
    return path


def llama() -> Any:
    """A random LLaMA in eval mode."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=C,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        pad_token_id=None,
        eos_token_id=None,
    )
    return _randomized(LlamaForCausalLM(config), seed=1)


def clip() -> Any:
    """A random image encoder of CLIP in eval mode."""
    config = CLIPVisionConfig(
        hidden_size=VISION,
        intermediate_size=4 * VISION,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=1,
        image_size=SIDE,
        patch_size=PATCH,
    )
    return _randomized(CLIPVisionModel(config), seed=2)


def _randomized(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensor.copy_(one + 0.15 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def inputs(*rows: str, seed: int = 3) -> dict[str, Tensor]:
    """Prompts of words "t" (a text token) and "i" (an image's placeholders), padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for row in rows:
        row_ids: list[int] = []
        for cell in row:
            text = int(torch.randint(1, VOCAB, (), generator=generator))
            row_ids += [text] if cell == "t" else [IMAGE_TOKEN] * TOKENS
        ids.append(row_ids)
    length, images = max(map(len, ids)), sum(row.count("i") for row in rows)
    given = {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids]),
    }
    if images:
        given["pixel_values"] = torch.randn(images, 3, SIDE, SIDE, generator=generator)
    return given
