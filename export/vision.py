"""The image encoder of an MLLM, with its projector, as a function of one image, tile, or frame of patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vte_compile.capture.model_state import evaluating
from vte_compile.errors import CaptureError, UnsupportedModelError, VTEError
from vte_compile.export.encoder_function import EncoderFunction, lifted
from vte_compile.export.grid_facts import grid_facts
from vte_compile.export.manifest import VisionCall
from vte_compile.export.masked_encoder import is_masked, masked_encoder
from vte_compile.export.own_features import check_features, own_features
from vte_compile.export.patch_encoder import patch_encoder
from vte_compile.export.sized_encoder import sized_encoder, unit_of
from vte_compile.export.tile_encoder import check_tiles, of_one_tile, tile_facts


class _Encoder(nn.Module):
    def __init__(self, merger: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.merger, self._options = merger, options

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        features: Any = self.merger.get_image_features(pixel_values, **self._options)  # type: ignore[operator]
        features = getattr(features, "pooler_output", features)
        whole = features if isinstance(features, Tensor) else torch.cat(tuple(features))
        return (whole.flatten(0, -2),)


@torch.no_grad()
def image_encoder(fast: Any) -> EncoderFunction:
    """The function that does for one image, or part of one, what the model's own merging code does.

    Raises:
        UnsupportedModelError: Its images come in a way that none of the encoders here know, or it computes otherwise.
        CaptureError: torch.export could not trace the encoder.
    """
    if (grids := grid_facts(fast)) is not None:
        return patch_encoder(fast, grids)
    merger = fast.get_submodule(fast._vte_spec.path.rpartition(".")[0])
    if (unit := unit_of(merger)) is not None:
        return sized_encoder(fast, merger, unit)
    if is_masked(merger):
        return masked_encoder(fast, merger, example_image(fast))
    tiles = tile_facts(fast, merger)
    # Of a tile, the size of the image is not read.
    encoder = _Encoder(merger, {}) if tiles is None else _Encoder(of_one_tile(merger), {"image_sizes": [(1, 1)]})
    with evaluating(encoder):
        pixels = example_image(fast)
        if tiles is None:
            _check(fast, encoder, pixels)
        else:
            check_tiles(fast, encoder, tiles, pixels)
        try:
            exported = torch.export.export(encoder, (pixels,), strict=False).module(check_guards=False)
        except Exception as error:  # whatever code of the model's author torch.export cannot trace
            raise CaptureError(f"torch.export could not trace the image encoder: {error}") from error
    module, weights = lifted(exported)
    named = {name.removeprefix("merger."): weight for name, weight in weights.items()}
    return EncoderFunction(module, [[pixels]], [{}], named, VisionCall("", [], list(pixels.shape[1:]), tiles=tiles))


def tokens_of_image(fast: Any, pixels: Tensor) -> int:
    """How many visual tokens an image [1, channels, height, width] is."""
    encoder = _Encoder(fast.get_submodule(fast._vte_spec.path.rpartition(".")[0]), {})
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
    given = "its pixels alone"
    try:
        features = encoder(pixels)[0]
    except VTEError:
        raise
    except Exception as error:  # whatever the model's own code raises when it is given pixels alone
        raise UnsupportedModelError(f"{type(fast).__name__} cannot encode an image from {given}: {error}") from error
    want = own_features(fast, len(features), given, pixel_values=pixels)
    check_features(fast, features.to(want.dtype), want, "put an image's features among the tokens")
