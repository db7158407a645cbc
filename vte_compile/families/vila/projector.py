"""VILA's projectors from vision features to visual tokens."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from vte_compile.errors import UnsupportedModelError

_DOWNSAMPLING = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}


def downsampling(kind: str) -> int:
    """How many tokens along each side of an image a projector of VILA makes one; 1 if it keeps them all."""
    return _DOWNSAMPLING.get(kind, 1)


class VilaProjectorConfig(PreTrainedConfig):
    """The config of the folder mm_projector. Published ones have the type only; the sizes are those of the rest.

    Attributes:
        mm_projector_type: See VilaConfig.
        input_size: Channels of vision features.
        output_size: Channels of the decoder.
    """

    model_type = "v2l_projector"

    mm_projector_type: str = "mlp_downsample"
    input_size: int = 1152
    output_size: int = 4096


class MergeNeighbours(nn.Module):
    """Make each square of neighbouring tokens one, with their channels behind each other, row by row.

    Rows and columns of zeros are added at the bottom and right of grids whose side is no multiple of `factor`.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        """[n, side * side, c] -> [n, ceil(side / factor)^2, c * factor^2]."""
        images, tokens, channels = features.shape
        side, factor = int(tokens**0.5), self.factor
        grid = features.reshape(images, side, side, channels)
        missing = -side % factor
        grid = functional.pad(grid, (0, 0, 0, missing, 0, missing))
        blocks = (side + missing) // factor
        squares = grid.reshape(images, blocks, factor, blocks, factor, channels).transpose(2, 3)
        return squares.reshape(images, blocks * blocks, factor * factor * channels)


class VilaProjector(PreTrainedModel):
    """The folder mm_projector of a VILA checkpoint; names of weights are those in its file."""

    config_class = VilaProjectorConfig
    base_model_prefix = "mm_projector"
    main_input_name = "features"
    config: VilaProjectorConfig

    def __init__(self, config: VilaProjectorConfig) -> None:
        super().__init__(config)
        self.layers = _layers(config.mm_projector_type, config.input_size, config.output_size)
        self.post_init()

    def forward(self, features: Tensor) -> Tensor:
        """[n, tokens, input_size] -> [n, fewer tokens, output_size]."""
        projected: Tensor = self.layers(features)
        return projected


def _layers(kind: str, inputs: int, outputs: int) -> nn.Module:
    parts: list[Any]
    if kind == "linear":
        return nn.Linear(inputs, outputs)
    if match := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        parts = [nn.Linear(inputs, outputs)]
        for _ in range(1, int(match[1])):
            parts += [nn.GELU(), nn.Linear(outputs, outputs)]
        return nn.Sequential(*parts)
    if kind not in _DOWNSAMPLING:
        known = ", ".join(("linear", "mlp2x_gelu", *_DOWNSAMPLING))
        raise UnsupportedModelError(f"mm_projector_type is {kind!r}: only {known} are supported so far.")
    factor = _DOWNSAMPLING[kind]
    size = inputs * factor * factor
    parts = [MergeNeighbours(factor), nn.LayerNorm(size)]
    if factor == 3:  # narrows in two steps
        parts += [nn.Linear(size, 3 * inputs), nn.GELU(), nn.LayerNorm(3 * inputs)]
        size = 3 * inputs
    return nn.Sequential(*parts, nn.Linear(size, outputs), nn.GELU(), nn.Linear(outputs, outputs))
