"""The encoder of images that come with a mask of pixels (Idefics3, SmolVLM), as a function of one image and its mask.

The model's own code finds out which images are there from their numbers, which cannot be traced; so only its parts run
here, and the result is compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vte_compile.errors import CaptureError
from vte_compile.export.encoder_function import EncoderFunction, of_module
from vte_compile.export.manifest import VisionCall
from vte_compile.export.own_features import check_features, own_features


class _Counting(TorchFunctionMode):
    """Buckets counted, since ONNX has no operator for them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.bucketize and kwargs == {"right": True}:
            values, boundaries = args
            return (values[..., None] >= boundaries).sum(-1)
        return func(*args, **(kwargs or {}))


class _Encoder(nn.Module):
    def __init__(self, merger: Any) -> None:
        super().__init__()
        self.vision_model, self.connector = merger.vision_model, merger.connector

    def forward(self, pixel_values: Tensor, patch_attention_mask: Tensor) -> tuple[Tensor]:
        with _Counting():  # and eager attention, since torch's own asks for NaN under a mask, which TensorRT does not
            seen = self.vision_model(pixel_values=pixel_values, patch_attention_mask=patch_attention_mask)
            return (self.connector(seen.last_hidden_state).flatten(0, -2),)


def is_masked(merger: nn.Module) -> bool:
    """Whether a model's images come with a mask of pixels, and go through these parts."""
    return isinstance(getattr(merger, "vision_model", None), nn.Module) and hasattr(merger, "connector")


@torch.no_grad()
def masked_encoder(fast: Any, merger: Any, pixels: Tensor) -> EncoderFunction:
    """The function that does for one image what the model's own code does.

    Args:
        fast: The optimized model.
        merger: What merges its images and text.
        pixels: An example, [1, channels, height, width].

    Raises:
        UnsupportedModelError: It does something else.
        CaptureError: A part does not take what it is given.
    """
    name, patch = type(fast).__name__, int(merger.config.vision_config.patch_size)
    function, weights = of_module(_Encoder(merger), 2, merger.vision_model.config, "eager")
    *_, height, width = pixels.shape
    examples = []
    for filled in (width, width // 2):
        mask = torch.zeros(1, height, width, dtype=torch.bool, device=pixels.device)
        mask[..., :filled] = True
        patches = mask.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).any(4).any(2)
        try:
            [got] = function(pixels, patches, *weights.values())
        except Exception as error:  # whatever code of the model's author raises on what it does not know
            raise CaptureError(f"{name}: its image encoder does not take an image and a mask: {error}") from error
        given: dict[str, Any] = {"pixel_values": pixels[None], "pixel_attention_mask": mask[None].long()}
        want = own_features(fast, len(got), "pixels and their mask alone", **given)
        check_features(fast, got.to(want.dtype), want, "run vision_model and connector")
        examples.append([pixels, patches])
    facts = VisionCall("", [], list(pixels.shape[1:]), mask_patch=patch)
    return EncoderFunction(function, examples, [{}, {}], weights, facts)
