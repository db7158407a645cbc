"""Pictures as patches, with numpy and Pillow: what transformers' image processor of Qwen2-VL to Qwen3-VL does.

A picture keeps its proportions: it is resized to whole tokens, within a smallest and a largest number of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vte_compile.errors import InputError
from vte_compile.export.image_processor import Array, NotKnownError, numbers, positive

if TYPE_CHECKING:
    from PIL import Image

_LONGEST = 200
"""Times as long as wide, at most, as in transformers."""


@dataclass(frozen=True)
class PatchProcessor:
    """The steps, in their order; None where one is left out."""

    pixels: tuple[int, int]
    """Fewest and most, after resizing."""
    resample: int
    """Pillow's number of the filter."""
    scale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    patch_size: int
    frames: int
    """Of a patch: a picture is so many times the same."""
    merge_size: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PatchProcessor:
        """From preprocessor_config.json, or the part "image_processor" of processor_config.json.

        Raises:
            NotKnownError: It is for another kind of processor.
        """
        kind = str(config.get("image_processor_type"))
        if kind.removesuffix("Pil").removesuffix("Fast") != "Qwen2VLImageProcessor":
            raise NotKnownError(f"image_processor_type {kind!r}")
        if not config.get("do_resize", True):
            raise NotKnownError(f"do_resize of {kind}")
        size = config.get("size")
        size = size if isinstance(size, Mapping) else {}
        # The second names are those of older versions; where both stand, these count.
        fewest, most = (config.get(old) or size.get(new) or default for old, new, default in (
            ("min_pixels", "shortest_edge", 56 * 56), ("max_pixels", "longest_edge", 28 * 28 * 1280)))  # fmt: skip
        if not isinstance(fewest, int) or not isinstance(most, int) or not 0 < fewest <= most:
            raise NotKnownError(f"size {size!r}")
        mean = std = None
        if config.get("do_normalize", True):
            mean, std = (numbers(config, name) for name in ("image_mean", "image_std"))
        scale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else None
        resample = config.get("resample", 3)
        if resample not in range(6) or not isinstance(scale, int | float | None):
            raise NotKnownError(f"resample {resample!r} with rescale_factor {scale!r}")
        sizes = [positive(name, config.get(name, default)) for name, default in
                 (("patch_size", 14), ("temporal_patch_size", 2), ("merge_size", 2))]  # fmt: skip
        return cls((fewest, most), int(resample), scale, mean, std, *sizes)

    def batch(self, images: Sequence[Image.Image]) -> dict[str, Array]:
        """Pictures in RGB -> ``pixel_values`` [n, numbers of a patch] float32, ``image_grid_thw`` [images, 3] int64.

        Raises:
            InputError: One is too narrow.
        """
        patches, grids = zip(*(self._patches(image) for image in images), strict=True)
        return {"pixel_values": np.concatenate(patches), "image_grid_thw": np.array(grids, np.int64)}

    def _patches(self, image: Image.Image) -> tuple[Array, list[int]]:
        height, width = self.fitted(image.height, image.width)
        pixels = np.asarray(image.resize((width, height), resample=self.resample)).transpose(2, 0, 1)
        values = pixels.astype(np.float32)
        if self.scale is not None:
            values = (pixels.astype(np.float64) * self.scale).astype(np.float32)
        if self.mean is not None:
            mean, std = (np.array(x, np.float32)[:, None, None] for x in (self.mean, self.std))
            values = (values - mean) / std
        patch, merge = self.patch_size, self.merge_size
        rows, columns = height // patch, width // patch
        blocks = values.reshape(-1, rows // merge, merge, patch, columns // merge, merge, patch)
        # [row and column of a token, of a patch in it, channel, row and column of a pixel]
        ordered = blocks.transpose(1, 4, 2, 5, 0, 3, 6)
        repeated = np.repeat(ordered[:, :, :, :, :, None], self.frames, axis=5)
        return repeated.reshape(rows * columns, -1), [1, rows, columns]

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to resize a picture to.

        Raises:
            InputError: It is too narrow.
        """
        if max(height, width) / min(height, width) > _LONGEST:
            raise InputError(f"a picture of {width} x {height} pixels is more than {_LONGEST} times as long as wide.")
        unit, (fewest, most) = self.patch_size * self.merge_size, self.pixels
        fitted = [round(side / unit) * unit for side in (height, width)]
        if fitted[0] * fitted[1] > most:
            shrink = math.sqrt(height * width / most)
            fitted = [max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width)]
        elif fitted[0] * fitted[1] < fewest:
            grow = math.sqrt(fewest / (height * width))
            fitted = [math.ceil(side * grow / unit) * unit for side in (height, width)]
        return fitted[0], fitted[1]
