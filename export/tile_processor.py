"""Pictures as tiles, with numpy and Pillow: what transformers' image processors of LLaVA-NeXT and LLaVA-OneVision do.

A picture is fitted into the resolution that suits it best, filled up with black, and cut; the whole of it, resized to a
tile, stands before its parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vte_compile.errors import InputError
from vte_compile.export.image_processor import Array, ImageProcessor, NotKnownError
from vte_compile.export.tiles import best_resolution

if TYPE_CHECKING:
    from PIL import Image

_OF_TILES = {"LlavaNextImageProcessor": "CLIPImageProcessor", "LlavaOnevisionImageProcessor": "SiglipImageProcessor"}
"""What is done to each tile is what these do."""


@dataclass(frozen=True)
class TileProcessor:
    """The steps."""

    tile: ImageProcessor
    """Of each tile."""
    size: int
    """Height and width of a tile before these steps."""
    resolutions: tuple[tuple[int, int], ...]
    """[height, width] that pictures are fitted into."""
    alone: bool
    """Whether pictures of a prompt with several stay whole, filled up to a square."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TileProcessor:
        """From preprocessor_config.json, or the part "image_processor" of processor_config.json.

        Raises:
            NotKnownError: It is for another kind of processor.
        """
        kind = str(config.get("image_processor_type")).removesuffix("Pil").removesuffix("Fast")
        if kind not in _OF_TILES:
            raise NotKnownError(f"image_processor_type {kind!r}")
        resolutions = config.get("image_grid_pinpoints")
        if not isinstance(resolutions, list) or not resolutions:
            raise NotKnownError(f"image_grid_pinpoints {resolutions!r}")
        tile = ImageProcessor.from_config({**config, "image_processor_type": _OF_TILES[kind], "do_pad": False})
        sizes = {tile.shortest_edge} if tile.size is None else set(tile.size)
        if tile.crop is not None:
            sizes |= set(tile.crop)
        if len(sizes) != 1 or None in sizes or config.get("do_pad") is False:
            raise NotKnownError(f"size {config.get('size')!r}, crop_size {config.get('crop_size')!r} of {kind}")
        pairs = tuple((int(height), int(width)) for height, width in resolutions)
        return cls(tile, int(sizes.pop() or 0), pairs, kind == "LlavaOnevisionImageProcessor")

    def batch(self, images: Sequence[Image.Image]) -> dict[str, Array]:
        """The pictures of one prompt, in RGB.

        Returns:
            ``pixel_values`` [images, tiles, 3, size, size] float32, filled up to the most tiles; ``image_sizes``
            [images, 2]; and of a model that cuts none of several, ``batch_num_images`` [1].
        """
        whole = self.alone and len(images) > 1
        tiles = [self._whole(image) if whole else self._cut(image) for image in images]
        most = max(map(len, tiles))
        filled = [np.pad(tile, ((0, most - len(tile)), *[(0, 0)] * 3)) for tile in tiles]
        sizes = np.array([[image.height, image.width] for image in images])
        made = {"pixel_values": np.stack(filled), "image_sizes": sizes}
        return made | ({"batch_num_images": np.array([len(images)])} if self.alone else {})

    def _whole(self, image: Image.Image) -> Array:
        color = tuple(int(x * 255) for x in self.tile.mean or (0.0, 0.0, 0.0))
        return replace(self.tile, pad_color=color)(image)[None]

    def _cut(self, image: Image.Image) -> Array:
        from PIL import Image as images

        height, width = best_resolution((image.height, image.width), self.resolutions)
        if width / image.width < height / image.height:
            fitted = (width, min(math.ceil(image.height * (width / image.width)), height))
        else:
            fitted = (min(math.ceil(image.width * (height / image.height)), width), height)
        if min(fitted) < 1:
            raise InputError(f"a picture of {image.width} x {image.height} pixels fits into no resolution.")
        canvas = images.new("RGB", (width, height))
        canvas.paste(
            image.resize(fitted, resample=self.tile.resample), ((width - fitted[0]) // 2, (height - fitted[1]) // 2)
        )
        parts = [
            canvas.crop((left, top, left + self.size, top + self.size))
            for top in range(0, height, self.size)
            for left in range(0, width, self.size)
        ]
        first = image.resize((self.size, self.size), resample=self.tile.resample)
        return np.stack([self.tile(part) for part in (first, *parts)])
