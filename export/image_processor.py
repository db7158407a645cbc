"""Pictures as pixel values, with numpy and Pillow: what transformers' processors of CLIP, SigLIP and LLaVA do.

Resizing is Pillow's, as in transformers where torchvision is not installed; torchvision's differs by a shade.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vte_compile.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

Array = np.ndarray[Any, Any]
_KNOWN = ("CLIP", "Siglip", "Llava")


class NotKnownError(Exception):
    """A processor does something that the ones here do not; the message says what."""


@dataclass(frozen=True)
class ImageProcessor:
    """The steps, in their order; None where one is left out."""

    pad_color: tuple[int, ...] | None
    """Fill up to a square with it."""
    shortest_edge: int | None
    """Resize to it, keeping proportions."""
    size: tuple[int, int] | None
    """Resize to this height and width."""
    resample: int
    """Pillow's number of the filter."""
    crop: tuple[int, int] | None
    """Height and width of the part around the center; what lies outside the picture is black."""
    scale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImageProcessor:
        """From preprocessor_config.json, or the part "image_processor" of processor_config.json.

        Raises:
            NotKnownError: It is for another kind of processor.
        """
        kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
        family = kind.removesuffix("Pil").removesuffix("Fast")
        if family not in [f"{name}{role}" for name in _KNOWN for role in ("ImageProcessor", "FeatureExtractor")]:
            raise NotKnownError(f"image_processor_type {kind!r}")
        if config.get("do_pad") and not family.startswith("Llava"):
            raise NotKnownError(f"do_pad of {kind}")
        mean = std = None
        if config.get("do_normalize", True):
            mean, std = (numbers(config, name) for name in ("image_mean", "image_std"))
        shortest = size = crop = None
        if config.get("do_resize", True):
            shortest, size = _size(config)
        if config.get("do_center_crop", not family.startswith("Siglip")):
            crop = _height_width("crop_size", config.get("crop_size"))
        pad = tuple(int(x * 255) for x in mean or (0.0, 0.0, 0.0)) if config.get("do_pad") else None
        scale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else None
        resample = config.get("resample", 3)
        if resample not in range(6) or not isinstance(scale, int | float | None):
            raise NotKnownError(f"resample {resample!r} with rescale_factor {scale!r}")
        return cls(pad, shortest, size, int(resample), crop, scale, mean, std)

    def batch(self, images: Sequence[Image.Image]) -> dict[str, Array]:
        """Pictures in RGB -> ``pixel_values`` [images, 3, height, width] float32."""
        return {"pixel_values": np.stack([self(image) for image in images])}

    def __call__(self, image: Image.Image) -> Array:
        """A picture in RGB -> pixel values [3, height, width] float32."""
        if self.pad_color is not None:
            image = _squared(image, self.pad_color)
        width, height = image.size
        if self.shortest_edge is not None:
            longest = int(self.shortest_edge * max(image.size) / min(image.size))
            resized = (self.shortest_edge, longest) if width <= height else (longest, self.shortest_edge)
            image = image.resize(resized, resample=self.resample)
        elif self.size is not None:
            image = image.resize(self.size[::-1], resample=self.resample)
        pixels = np.asarray(image).transpose(2, 0, 1)
        if self.crop is not None:
            pixels = _cropped(pixels, self.crop)
        values = pixels.astype(np.float32)
        if self.scale is not None:
            values = (pixels.astype(np.float64) * self.scale).astype(np.float32)
        if self.mean is not None:
            mean, std = (np.array(x, np.float32)[:, None, None] for x in (self.mean, self.std))
            values = (values - mean) / std
        return np.ascontiguousarray(values)


def open_picture(picture: Any, where: str) -> Image.Image:
    """A picture in RGB, transparent parts white, from a path, a Pillow image, or an array [height, width, 3] of uint8.

    Raises:
        InputError: It is none of these, or cannot be read.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise InputError(f"{where}: pictures need pillow: pip install 'vte-compile[onnx]'.") from error
    if isinstance(picture, str | Path):
        try:
            with Image.open(picture) as opened:
                picture = ImageOps.exif_transpose(opened)
                picture.load()
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{where} {picture}: {error}") from error
    elif isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise InputError(
                f"{where}: expected an array [height, width, 3] of uint8, got {picture.dtype} of shape "
                f"{list(picture.shape)}."
            )
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise InputError(f"{where}: expected a path, a Pillow image or a uint8 array, got a {type(picture).__name__}.")
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return picture.convert("RGB")


def _squared(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    from PIL import Image as images

    side = max(image.size)
    square = images.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _cropped(pixels: Array, size: tuple[int, int]) -> Array:
    height, width = pixels.shape[1:]
    # Where the picture lies on a canvas that holds both, and the part on it: each in the middle.
    canvas = np.zeros((len(pixels), max(size[0], height), max(size[1], width)), pixels.dtype)
    top, left = (math.ceil((c - p) / 2) for c, p in zip(canvas.shape[1:], (height, width), strict=True))
    canvas[:, top : top + height, left : left + width] = pixels
    top += (height - size[0]) // 2
    left += (width - size[1]) // 2
    return canvas[:, top : top + size[0], left : left + size[1]]


def _size(config: Mapping[str, Any]) -> tuple[int | None, tuple[int, int] | None]:
    size = config.get("size")
    if isinstance(size, Mapping) and set(_given(size)) == {"shortest_edge"}:
        return positive("size", size["shortest_edge"]), None
    return None, _height_width("size", size)


def _height_width(name: str, size: Any) -> tuple[int, int]:
    if not isinstance(size, Mapping) or set(_given(size)) != {"height", "width"}:
        raise NotKnownError(f"{name} {size!r}")
    return positive(name, size["height"]), positive(name, size["width"])


def _given(size: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in size.items() if value is not None}


def positive(name: str, number: Any) -> int:
    """A length in pixels.

    Raises:
        NotKnownError: It is none.
    """
    if not isinstance(number, int) or not 0 < number < 1 << 16:
        raise NotKnownError(f"{name} {number!r}")
    return number


def numbers(config: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """A number for each channel.

    Raises:
        NotKnownError: They are none.
    """
    given = config.get(name)
    if not isinstance(given, list) or len(given) != 3 or not all(isinstance(n, int | float) for n in given):
        raise NotKnownError(f"{name} {given!r}")
    return tuple(map(float, given))
