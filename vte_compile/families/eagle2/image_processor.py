"""Eagle 2's pictures: cut into square tiles, as many as their size asks for, and normalized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.eagle2.configuration import IMAGE_PROCESSOR_TYPE, PROCESSOR_CLASS

_ENOUGH = 0.6  # of a picture's pixels: tiles beyond that count for nothing


def grid_of_tiles(width: int, height: int, size: int, least: int, most: int) -> tuple[int, int]:
    """The grid of tiles a picture is cut into: one of much the same shape that keeps most of its pixels.

    The largest min(pixels of the tiles / pixels of the picture, 0.6) * likeness of shape; of equally good ones the
    first ("Eagle 2.5", section 3.2: image area preservation).

    Args:
        width, height: Of the picture, in pixels.
        size: Of a tile's side, in pixels.
        least, most: Number of tiles.

    Returns:
        Columns, rows.
    """
    sides = range(1, most + 1)
    # Among grids of as many tiles the order is that of a set filled this way, as in the authors' code: it decides ties.
    grids = {(i, j) for n in range(least, most + 1) for i in sides[:n] for j in sides[:n] if least <= i * j <= most}
    shape = width / height

    def worth(grid: tuple[int, int]) -> float:
        columns, rows = grid
        likeness = min(columns / rows / shape, shape / (columns / rows))
        return min(columns * rows * size * size / (width * height), _ENOUGH) * likeness

    return max(sorted(grids, key=lambda grid: grid[0] * grid[1]), key=worth)


class Eagle2ImageProcessor(BaseImageProcessor):
    """Pictures -> tiles [tiles, 3, size, size].

    Files are those of the authors' image processor, preprocessor_config.json.

    Args:
        size: ``height`` and ``width`` of a tile in pixels, both the same.
        image_mean, image_std: Of each colour channel, of values from 0 to 1.
        rescale_factor: Of values from 0 to 255.
        min_dynamic_tiles, max_dynamic_tiles: How many tiles a picture is cut into.
        use_thumbnail: Whether the whole picture follows as one more tile, if there are several.
        pad_during_tiling: Whether proportions are kept; not supported.
        kwargs: As of all image processors.

    Raises:
        UnsupportedModelError: `pad_during_tiling`, or a `size` that is no square.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - as its base class has it

    def __init__(
        self,
        size: dict[str, int] | None = None,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        rescale_factor: float = 1 / 255,
        min_dynamic_tiles: int = 1,
        max_dynamic_tiles: int = 12,
        use_thumbnail: bool = True,
        pad_during_tiling: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = dict(size or {"height": 448, "width": 448})
        self.image_mean, self.image_std, self.rescale_factor = list(image_mean), list(image_std), rescale_factor
        self.min_dynamic_tiles, self.max_dynamic_tiles = min_dynamic_tiles, max_dynamic_tiles
        self.use_thumbnail, self.pad_during_tiling = use_thumbnail, pad_during_tiling
        if pad_during_tiling or self.size.get("height") is None or self.size["height"] != self.size.get("width"):
            raise UnsupportedModelError(
                f"pad_during_tiling {pad_during_tiling}, size {self.size}: only squares, and without padding, are "
                "supported so far."
            )

    def to_dict(self) -> dict[str, Any]:
        """What is written to preprocessor_config.json."""
        names = {"image_processor_type": IMAGE_PROCESSOR_TYPE, "processor_class": PROCESSOR_CLASS}
        return {**super().to_dict(), **names, "do_resize": False}

    def preprocess(
        self, images: Any, *, max_dynamic_tiles: int | None = None, return_tensors: str = "pt", **unused: Any
    ) -> BatchFeature:
        """Cut and normalize pictures.

        Args:
            images: A picture, or a list of them: PIL images, arrays [height, width, 3] of bytes, paths or addresses.
            max_dynamic_tiles: Instead of the checkpoint's, such as 1 for frames of a video.
            return_tensors: "pt".

        Returns:
            ``pixel_values`` [tiles of all pictures, 3, size, size], and ``tiles``, a list: how many each picture has.

        Raises:
            InputError: Another kind of tensors, or numbers of tiles that fit no picture.
        """
        if return_tensors != "pt":
            raise InputError(f"return_tensors: expected 'pt', got {return_tensors!r}.")
        most = max_dynamic_tiles if max_dynamic_tiles is not None else self.max_dynamic_tiles
        if not 1 <= self.min_dynamic_tiles <= most:
            raise InputError(f"max_dynamic_tiles: expected at least {self.min_dynamic_tiles}, got {most}.")
        pictures = images if isinstance(images, list | tuple) else [images]
        cut = [self._tiles(_pixels(picture), most) for picture in pictures]
        mean, std = (torch.tensor(x)[:, None, None] / self.rescale_factor for x in (self.image_mean, self.image_std))
        pixels = (torch.cat(cut).float() - mean) / std
        return BatchFeature({"pixel_values": pixels, "tiles": [len(tiles) for tiles in cut]})

    def _tiles(self, picture: Tensor, most: int) -> Tensor:
        """[3, height, width] -> [tiles, 3, size, size], row by row, bytes."""
        size = self.size["height"]
        columns, rows = grid_of_tiles(picture.shape[2], picture.shape[1], size, self.min_dynamic_tiles, most)
        whole = _resized(picture, rows * size, columns * size)
        tiles = whole.unflatten(2, (columns, size)).unflatten(1, (rows, size)).permute(1, 3, 0, 2, 4).flatten(0, 1)
        if self.use_thumbnail and len(tiles) > 1:
            tiles = torch.cat([tiles, _resized(picture, size, size)[None]])
        return tiles


def _pixels(picture: Any) -> Tensor:
    """[3, height, width] bytes; what is transparent is white."""
    from PIL import Image

    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    if not isinstance(image, Image.Image):
        image = load_image(image)
    if image.mode == "RGBA":
        behind = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(behind, image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _resized(picture: Tensor, height: int, width: int) -> Tensor:
    return functional.interpolate(picture[None], (height, width), mode="bicubic", antialias=True)[0]
