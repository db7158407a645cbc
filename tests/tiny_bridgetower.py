"""Tiny random BridgeTower models, their inputs, plans for their co-attention layers, and METER's golden data."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from test_adapters import adapter_of
from tiny_models import DATA, random_adapter
from torch import Tensor
from transformers import BridgeTowerConfig, BridgeTowerModel
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerBertCrossLayer

from vte_compile.adapters import PIA, PlainAdapter, StaticRouter
from vte_compile.capture.co_attention import CoAttentionGraph, capture_co_attention
from vte_compile.plan import CoAttention
from vte_compile.runtime.co_attention import RewrittenCoAttentionLayer

C, LEVELS, VOCAB = 32, 2, 50
IMAGE_TOKENS = 10
"""Of images of 12 x 12 pixels: 9 patches and the class token."""
STATIC = StaticRouter((1.0, 0.0))


def bridgetower(kind: Any = BridgeTowerModel, hidden_size: int = C) -> Any:
    """A random BridgeTower model in eval mode; the same for the same arguments."""
    text = {"vocab_size": VOCAB, "hidden_size": hidden_size, "num_hidden_layers": 3, "num_attention_heads": 4}
    text |= {"intermediate_size": 48, "max_position_embeddings": 40}
    vision = {"hidden_size": 64, "num_hidden_layers": 3, "patch_size": 4, "image_size": 12}
    config = BridgeTowerConfig(
        hidden_size=hidden_size, num_hidden_layers=LEVELS, num_attention_heads=4, text_config=text, vision_config=vision
    )
    config.contrastive_hidden_size, config.logit_scale_init_value = 16, 1.0
    torch.manual_seed(0)
    return randomized(kind(config).eval())


def randomized(module: Any) -> Any:
    """The module with larger weights, so that attention matters, and with biases and norms that show."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            elif "cross" in name and parameter.ndim == 2:
                parameter.copy_(0.25 * torch.randn_like(parameter))
    return module


@functools.cache
def shared(kind: Any = BridgeTowerModel, hidden_size: int = C) -> Any:
    """The same model for all tests that do not change it."""
    return bridgetower(kind, hidden_size)


def inputs(batch: int = 2, tokens: int = 7, seed: int = 0, padded: int = 0) -> dict[str, Tensor]:
    """What a model takes; ``padded`` tokens of the last row are padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[-1, tokens - padded :] = 0
    return {
        "input_ids": torch.randint(3, VOCAB, (batch, tokens), generator=generator),
        "attention_mask": mask,
        "pixel_values": torch.randn(batch, 3, 12, 12, generator=generator),
    }


def random_part(
    side: Any,
    level: int,
    skip_self: bool = False,
    skip_cross: bool = False,
    adapters: bool = True,
    dtype: torch.dtype = torch.float32,
    hidden_size: int = C,
) -> CoAttention:
    """A part of a plan, with random adapters wherever one can be, or with none."""

    def adapter(skipped: bool, place: int) -> Any:
        kind = PIA if skipped else PlainAdapter
        seed = 10 * level + place
        return random_adapter(kind, seed, hidden_size, dtype=dtype, router=STATIC) if adapters else None

    return CoAttention(
        side, level, skip_self, skip_cross, adapter(skip_self, 0), adapter(skip_cross, 1), adapter(False, 2)
    )


def cross_layer(seed: int = 0, **options: Any) -> BridgeTowerBertCrossLayer:
    """A random co-attention layer alone."""
    config = shared().config.text_config
    if options:
        config = type(config)(**{**config.to_dict(), **options})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    layer = BridgeTowerBertCrossLayer(config).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return layer


def layer_inputs(
    side: str, batch: int = 3, tokens: int = 7, other: int = 5, masked: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """What the model gives a layer of this side: h [B, T, C], e [B, S, C], and the mask of the text's tokens."""
    generator = torch.Generator().manual_seed(batch + 10 * tokens + 100 * other)
    given = {
        "hidden_states": torch.randn(batch, tokens, C, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, other, C, generator=generator).to(dtype),
    }
    if masked:
        length = tokens if side == "text" else other
        hidden = torch.rand(batch, 1, 1, length, generator=generator) < 0.3
        hidden[..., 0] = False
        name = "attention_mask" if side == "text" else "encoder_attention_mask"
        given[name] = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    return given


# Graphs


@functools.cache
def _captured(dtype: torch.dtype) -> tuple[Any, CoAttentionGraph]:
    layer = cross_layer().to(dtype)
    return layer, capture_co_attention(layer)


def captured(dtype: torch.dtype = torch.float64) -> tuple[Any, CoAttentionGraph]:
    """``cross_layer()``, which tests must not change, and its graph to rewrite; traced once per session."""
    layer, graph = _captured(dtype)
    return layer, graph.clone(layer)


def run_graph(graph: CoAttentionGraph, given: dict[str, Tensor]) -> Tensor:
    """The graph as it stands, uncompiled."""
    with torch.no_grad():
        return RewrittenCoAttentionLayer(graph, [], None)(**given)[0]


def run_layer(layer: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return layer(**given)[0]


# METER's golden data


@functools.cache
def golden() -> dict[str, Tensor]:
    """All arrays of eas_meter.npz that are numbers, floats in float64."""
    data = np.load(DATA / "eas_meter.npz")
    tensors = {key: torch.from_numpy(data[key]) for key in data.files if data[key].dtype.kind in "fi"}
    return {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}


def golden_layer(side: str) -> BridgeTowerBertCrossLayer:
    """The authors' layer, in float64, as one of transformers."""
    text = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "layer_norm_eps": 1e-12}
    config = BridgeTowerConfig(text_config=text).text_config
    config._attn_implementation = "eager"
    layer = BridgeTowerBertCrossLayer(config).double().eval()
    prefix = f"w.{side}0."
    weights = {key[len(prefix) :]: value for key, value in golden().items() if key.startswith(prefix)}
    layer.load_state_dict({key: value for key, value in weights.items() if "adapter" not in key})
    return layer


def golden_part(side: Any, skip_self: bool, skip_cross: bool) -> CoAttention:
    """The authors' adapters of that layer."""

    def adapter(skipped: bool, own: str, pia: str) -> Any:
        return adapter_of(golden(), f"w.{side}0.{pia}." if skipped else f"w.{side}0.{own}.adapter.")

    return CoAttention(
        side,
        0,
        skip_self,
        skip_cross,
        adapter(skip_self, "attention", "adapter_self_attn"),
        adapter(skip_cross, "crossattention", "adapter_cross_attn"),
        adapter(False, "intermediate", ""),
    )


def golden_inputs(side: str) -> dict[str, Tensor]:
    """What the authors' code gave that layer."""
    data = golden()
    mask = ((1 - data["text_mask"]) * -10000)[:, None, None]
    if side == "text":
        return {"hidden_states": data["x_text"], "encoder_hidden_states": data["y_image"], "attention_mask": mask}
    return {"hidden_states": data["y_image"], "encoder_hidden_states": data["x_text"], "encoder_attention_mask": mask}
