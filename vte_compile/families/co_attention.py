"""The co-attention layers of a model, found by structure: those of transformers' BridgeTower, and their parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vte_compile.errors import UnsupportedModelError
from vte_compile.module_tree import own_submodule, shallow_copy

ModelT = TypeVar("ModelT", bound=nn.Module)

LAYER_LISTS = {"text": "cross_modal_text_layers", "image": "cross_modal_image_layers"}
"""Where BridgeTowerModel keeps the layers of each side."""
_PARTS = ("attention", "crossattention", "intermediate", "output")


@dataclass(frozen=True)
class CoAttentionSpec:
    """Where a model's co-attention layers are."""

    path: str
    """Dotted name of the module that holds them, such as ``bridgetower``; empty if the model does itself."""
    text: nn.ModuleList
    image: nn.ModuleList

    @property
    def levels(self) -> int:
        return len(self.text)

    @property
    def hidden_size(self) -> int:
        first: Any = self.text[0]
        return len(first.output.dense.weight)

    def layer(self, side: str, level: int) -> nn.Module:
        """The layer of one side ("text" or "image") at one level."""
        layers: nn.ModuleList = getattr(self, side)
        return layers[level]


def find_co_attention(model: nn.Module) -> CoAttentionSpec | None:
    """Where `model` has co-attention layers; None if it has none.

    Raises:
        UnsupportedModelError: The layers are not those of BridgeTower.
    """
    for path, module in model.named_modules():
        text, image = (getattr(module, name, None) for name in LAYER_LISTS.values())
        if isinstance(text, nn.ModuleList) and isinstance(image, nn.ModuleList) and len(text) == len(image) > 0:
            for side, layers in (("text", text), ("image", image)):
                for level, layer in enumerate(layers):
                    _check_parts(f"{side} level {level}", layer)
            return CoAttentionSpec(path, text, image)
    return None


def _check_parts(where: str, layer: nn.Module) -> None:
    children = {name for name, _ in layer.named_children()}
    kind = type(layer).__name__
    weights = {name.split(".")[0] for name, _ in (*layer.named_parameters(), *layer.named_buffers())}
    if missing := [name for name in _PARTS if name not in children]:
        raise UnsupportedModelError(
            f"{where}: {kind} has no {', '.join(missing)}: not a co-attention layer of BridgeTower's form"
        )
    if extra := sorted(weights - set(_PARTS)):
        raise UnsupportedModelError(
            f"{where}: {kind} has {', '.join(extra)} besides {', '.join(_PARTS)}: not a co-attention layer of "
            "BridgeTower's form"
        )


def example_inputs(model: nn.Module, batch: int, tokens: int) -> dict[str, Tensor]:
    """Inputs of the sizes that the model's config says; the last text has padding if there is room for it.

    Returns:
        ``input_ids`` and ``attention_mask`` [batch, tokens], and ``pixel_values``: [batch, channels, height, width], or
        [batch, images, channels, height, width] if a text goes with several images (METER for NLVR2).
    """
    config: Any = model.config
    text, vision, parameter = config.text_config, config.vision_config, next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[-1, tokens - tokens // 3 :] = 0
    ids = torch.randint(text.pad_token_id + 1, text.vocab_size, (batch, tokens), generator=generator)
    images = getattr(config, "num_images", 1)
    shape = (batch, *([images] if images > 1 else []), vision.num_channels, vision.image_size, vision.image_size)
    pixels = torch.randn(shape, generator=generator)
    return {
        "input_ids": ids.masked_fill(mask == 0, text.pad_token_id).to(parameter.device),
        "attention_mask": mask.to(parameter.device),
        "pixel_values": pixels.to(parameter.device, parameter.dtype),
    }


def with_layers(model: ModelT, spec: CoAttentionSpec, layers: Mapping[str, list[nn.Module]]) -> ModelT:
    """A shallow copy of `model` with other co-attention layers: what it has else, modules and weights, it shares.

    Args:
        model: Not modified. Its own tables of submodules, weights and hooks are copied, so that what is set or hooked
            on the copy stays there; likewise those of the module that holds the layers.
        spec: Of `model`.
        layers: The layers of each side, "text" and "image".
    """
    copied = shallow_copy(model)
    holder = own_submodule(copied, spec.path) if spec.path else copied
    for side, name in LAYER_LISTS.items():
        holder._modules[name] = nn.ModuleList(layers[side])
    return copied
