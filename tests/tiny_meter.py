"""Random METER checkpoints in the authors' layout: names, shapes and what else Lightning puts into the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

C, LEVELS, VOCAB, PATCH, GRID = 128, 2, 50, 4, 3


def weights(head: str = "vqa_classifier", answers: int = 7) -> dict[str, Tensor]:
    """A state dict; heads of attentions are 64 wide, as in CLIP and RoBERTa."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, inner: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, inner), (out,)

    def norm(name: str, size: int = C) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (size,), (size,)

    def bert(name: str, attentions: tuple[str, ...]) -> None:
        for attention in attentions:
            for part in ("query", "key", "value"):
                linear(f"{name}.{attention}.self.{part}", C, C)
            linear(f"{name}.{attention}.output.dense", C, C)
            norm(f"{name}.{attention}.output.LayerNorm")
        linear(f"{name}.intermediate.dense", 2 * C, C)
        linear(f"{name}.output.dense", C, 2 * C)
        norm(f"{name}.output.LayerNorm")

    text, visual = "text_transformer.embeddings", "vit_model.visual"
    shapes[f"{text}.word_embeddings.weight"] = (VOCAB, C)
    shapes[f"{text}.position_embeddings.weight"] = (40, C)
    shapes[f"{text}.token_type_embeddings.weight"] = (1, C)
    norm(f"{text}.LayerNorm")
    for i in range(2):
        bert(f"text_transformer.encoder.layer.{i}", ("attention",))
    linear("text_transformer.pooler.dense", C, C)
    shapes[f"{visual}.class_embedding"] = (C,)
    shapes[f"{visual}.positional_embedding"] = (GRID**2 + 1, C)
    shapes[f"{visual}.conv1.weight"] = (C, 3, PATCH, PATCH)
    norm(f"{visual}.ln_pre")
    norm(f"{visual}.ln_post")
    for i in range(2):
        block = f"{visual}.transformer.resblocks.{i}"
        shapes[f"{block}.attn.in_proj_weight"], shapes[f"{block}.attn.in_proj_bias"] = (3 * C, C), (3 * C,)
        linear(f"{block}.attn.out_proj", C, C)
        linear(f"{block}.mlp.c_fc", 4 * C, C)
        linear(f"{block}.mlp.c_proj", C, 4 * C)
        norm(f"{block}.ln_1")
        norm(f"{block}.ln_2")
    shapes["vit_model.positional_embedding"] = (5, C)
    norm("vit_model.ln_final")
    for side in ("text", "image"):
        linear(f"cross_modal_{side}_transform", C, C)
        linear(f"cross_modal_{side}_pooler.dense", C, C)
        for i in range(LEVELS):
            bert(f"cross_modal_{side}_layers.{i}", ("attention", "crossattention"))
    images = 2 if head == "nlvr2_classifier" else 1
    shapes["token_type_embeddings.weight"] = (1 + images, C)
    if head == "rank_output":
        linear("rank_output", 1, 2 * C)
    elif head:
        linear(f"{head}.0", 2 * C, 2 * C * images)
        norm(f"{head}.1", 2 * C)
        linear(f"{head}.3", answers, 2 * C)
    generator = torch.Generator().manual_seed(0)
    return {
        name: (1.0 if "LayerNorm.weight" in name or ".ln_" in name else 0.0)
        + (0.1 if len(shape) > 1 else 0.2) * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


class ModelCheckpoint:
    """Stands for Lightning's class, which its files name."""


def save(path: Path, state_dict: dict[str, Tensor], **content: Any) -> Path:
    """Write a .ckpt file."""
    settings = {"num_heads": C // 64, "tokenizer": "roberta-base", "vit": "ViT-B/16"}
    whole = {"state_dict": state_dict, "hyper_parameters": {"config": settings}, "callbacks": {ModelCheckpoint: {}}}
    torch.save({**whole, **content}, path)
    return path


def inputs(batch: int = 2, tokens: int = 7, images: int = 1, padded: int = 2) -> dict[str, Tensor]:
    """What a model takes; ``padded`` tokens of the last row are padding."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[-1, tokens - padded :] = 0
    ids = torch.randint(3, VOCAB, (batch, tokens), generator=generator)
    pixels = torch.randn(batch, images, 3, GRID * PATCH, GRID * PATCH, generator=generator)
    return {
        "input_ids": torch.where(mask > 0, ids, 1),
        "attention_mask": mask,
        "pixel_values": pixels if images > 1 else pixels[:, 0],
    }
