"""The image encoder of an MLLM, with its projector, as a graph for one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from vte_compile.capture import evaluating
from vte_compile.errors import CaptureError, UnsupportedModelError, VTEError
from vte_compile.families.inputs import decoder_inputs


@dataclass
class ImageEncoder:
    """A graph: one image and weights in, its visual tokens' embeddings [n, C] out."""

    module: fx.GraphModule
    pixels: Tensor
    """An example image [1, channels, height, width]."""
    weights: dict[str, Tensor]
    """By name, in the order of the graph's other inputs."""


class _Encoder(nn.Module):
    def __init__(self, merger: nn.Module) -> None:
        super().__init__()
        self.merger = merger

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        features: Any = self.merger.get_image_features(pixel_values)  # type: ignore[operator]
        features = getattr(features, "pooler_output", features)
        whole = features if isinstance(features, Tensor) else torch.cat(tuple(features))
        return (whole.flatten(0, -2),)


@torch.no_grad()
def image_encoder(fast: Any) -> ImageEncoder:
    """The graph that does for one image what the model's own merging code does.

    Raises:
        UnsupportedModelError: The model's images are not of one size, or it wants more than pixels.
        CaptureError: torch.export could not trace the encoder.
    """
    encoder = _Encoder(fast.get_submodule(fast._vte_spec.path.rpartition(".")[0]))
    with evaluating(encoder):
        pixels = example_image(fast)
        _check(fast, encoder, pixels)
        try:
            exported = torch.export.export(encoder, (pixels,), strict=False).module(check_guards=False)
        except Exception as error:  # whatever code of the model's author torch.export cannot trace
            raise CaptureError(f"torch.export could not trace the image encoder: {error}") from error
    return _lift_weights(exported, pixels)


def tokens_of_image(fast: Any, pixels: Tensor) -> int:
    """How many visual tokens an image [1, channels, height, width] is."""
    encoder = _Encoder(fast.get_submodule(fast._vte_spec.path.rpartition(".")[0]))
    with evaluating(encoder), torch.no_grad():
        return len(encoder(pixels)[0])


def example_image(fast: Any) -> Tensor:
    """Random pixels [1, channels, height, width].

    Raises:
        UnsupportedModelError: The model's images are not of one size.
    """
    vision: Any = getattr(fast.config, "vision_config", None)
    size, channels = (getattr(vision, name, None) for name in ("image_size", "num_channels"))
    if isinstance(size, (list, tuple)) and len(size) == 2:
        height, width = size
    else:
        height = width = size
    if not isinstance(height, int) or not isinstance(width, int) or not isinstance(channels, int):
        raise UnsupportedModelError(f"the vision config of {type(fast).__name__} names no image size and channels.")
    generator = torch.Generator().manual_seed(0)
    spec = fast._vte_spec
    return torch.randn(1, channels, height, width, generator=generator).to(spec.device, spec.dtype)


def _check(fast: Any, encoder: nn.Module, pixels: Tensor) -> None:
    """Compare with what the model's own code puts where the placeholders are."""
    name, spec = type(fast).__name__, fast._vte_spec
    token = getattr(fast.config, "image_token_id", getattr(fast.config, "image_token_index", None))
    if token is None:
        raise UnsupportedModelError(f"the config of {name} names no image token.")
    try:
        features = encoder(pixels)[0]
        ids = torch.full((1, len(features)), token, device=spec.device)
        options: dict[str, Any] = {"inputs_embeds": None, "visual_mask": None, "may_exit": False}
        merged = decoder_inputs(fast, spec, input_ids=ids, multimodal={"pixel_values": pixels}, **options).embeds[0]
    except VTEError:
        raise
    except Exception as error:  # whatever the model's own code raises when it is given pixels alone
        raise UnsupportedModelError(f"{name} cannot encode an image from its pixels alone: {error}") from error
    if merged.shape != features.shape or not torch.allclose(merged, features.to(merged.dtype), rtol=1e-3, atol=1e-3):
        raise UnsupportedModelError(f"{name} does more with its image features than to put them among the tokens.")


def _lift_weights(module: fx.GraphModule, pixels: Tensor) -> ImageEncoder:
    """The graph with its weights as inputs behind the image."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    weights: dict[str, Tensor] = {}
    nodes = list(module.graph.nodes)
    for node in [n for n in nodes if n.op == "placeholder"]:
        env[node] = graph.placeholder("value_0")
    by_target: dict[str, fx.Node] = {}
    for node in [n for n in nodes if n.op == "get_attr"]:
        target = str(node.target)
        if target not in by_target:
            by_target[target] = graph.placeholder(f"weight_{len(weights)}")
            path, _, name = target.rpartition(".")
            weights[target.removeprefix("merger.")] = getattr(module.get_submodule(path), name)
        env[node] = by_target[target]
    for node in nodes:
        if node.op == "output":
            graph.output(fx.node.map_arg(tuple(torch.utils._pytree.tree_leaves(node.args)), lambda n: env[n]))
        elif node.op not in ("placeholder", "get_attr"):
            env[node] = graph.node_copy(node, lambda n: env[n])
    graph.eliminate_dead_code()
    return ImageEncoder(fx.GraphModule({}, graph), pixels, weights)
