"""The encoder of images of any size that stay whole (Mistral3), as a function of one image.

The model's own code reads sizes from tensors, which cannot be traced; so only its parts run here, and the result is
compared at several sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vte_compile.errors import CaptureError
from vte_compile.export.encoder_function import EncoderFunction, of_module
from vte_compile.export.manifest import VisionCall
from vte_compile.export.own_features import check_features, own_features
from vte_compile.export.patch_encoder import WHOLE

_SIZES = ((6, 4), (2, 5), (1, 2))
"""Of images, in units: the traced one, and those that are compared."""


class _Encoder(nn.Module):
    def __init__(self, merger: Any) -> None:
        super().__init__()
        self.vision_tower, self.multi_modal_projector = merger.vision_tower, merger.multi_modal_projector
        self._layers = merger.config.vision_feature_layer

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        layers = [self._layers] if isinstance(self._layers, int) else self._layers
        seen = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        features = torch.cat([seen[layer] for layer in layers], dim=-1).squeeze(0)
        height, width = pixel_values.shape[2:]
        return (self.multi_modal_projector(features, [(height, width)]),)


def unit_of(merger: Any) -> int | None:
    """In multiples of how many pixels a model's images are high and wide; None: they are of one size, or cut."""
    size = getattr(getattr(merger.config, "vision_config", None), "patch_size", None)
    merge = getattr(merger.config, "spatial_merge_size", None)
    sized = hasattr(merger, "vision_tower") and hasattr(getattr(merger, "multi_modal_projector", None), "patch_merger")
    return size * merge if sized and isinstance(size, int) and isinstance(merge, int) else None


@torch.no_grad()
def sized_encoder(fast: Any, merger: Any, unit: int) -> EncoderFunction:
    """The function that does for one image what the model's own code does.

    Args:
        fast: The optimized model.
        merger: What merges its images and text.
        unit: From :func:`unit_of`.

    Raises:
        UnsupportedModelError: It does something else.
        CaptureError: A part does not take what it is given.
    """
    name, spec = type(fast).__name__, fast._vte_spec
    function, weights = of_module(_Encoder(merger), 1, merger.vision_tower.config, WHOLE)
    channels, examples = int(merger.config.vision_config.num_channels), []
    generator = torch.Generator().manual_seed(0)
    for rows, columns in _SIZES:
        size = (rows * unit, columns * unit)
        pixels = torch.randn(1, channels, *size, generator=generator).to(spec.device, spec.dtype)
        try:
            [got] = function(pixels, *weights.values())
        except Exception as error:  # whatever code of the model's author raises on what it does not know
            raise CaptureError(f"{name}: its image encoder does not take one image: {error}") from error
        sizes = torch.tensor([size], device=spec.device)
        want = own_features(fast, len(got), "pixels and image_sizes alone", pixel_values=pixels, image_sizes=sizes)
        check_features(fast, got.to(want.dtype), want, "run vision_tower and multi_modal_projector")
        examples.append([pixels])
    dims = [{2: "height", 3: "width"}]
    return EncoderFunction(function, examples, dims, weights, VisionCall("", [], [channels], unit=unit))
