"""Images and videos as a processor gives them -> embeddings of their visual tokens, whatever runs the encoder; numpy.

The encoder takes one image, one tile of an image, or one frame of patches: what a manifest's ``VisionCall`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from vte_compile.errors import InputError
from vte_compile.export.grid_positions import IMAGE, TEXT, VIDEO
from vte_compile.export.manifest import ModelFacts, VisionCall
from vte_compile.export.patches import encoder_inputs, frame_inputs, split_frames
from vte_compile.export.tiles import pack_image, pack_video, split_images

Array = np.ndarray[Any, Any]
Run = Callable[[dict[str, Array]], Array]
"""The encoder: its inputs by name -> [visual tokens, C]."""


@dataclass(frozen=True)
class Pixels:
    """The images and videos of a call; see ``prefill()`` of engines."""

    pixel_values: Any = None
    pixel_values_videos: Any = None
    image_grid_thw: Any = None
    video_grid_thw: Any = None
    image_sizes: Any = None
    batch_num_images: Any = None
    pixel_attention_mask: Any = None

    @property
    def given(self) -> bool:
        """Whether there are some."""
        return self.pixel_values is not None or self.pixel_values_videos is not None

    def check_known(self, *known: str) -> None:
        """Refuse what an encoder does not look at.

        Raises:
            InputError: Something else is given.
        """
        for field in fields(self):
            if field.name not in known and getattr(self, field.name) is not None:
                raise InputError(f"{field.name}: the engine's image encoder takes none: leave it out.")


def vision_inputs(vision: VisionCall) -> list[str]:
    """Names of the encoder's inputs."""
    if vision.patches is not None:
        return encoder_inputs(vision.patches)
    return ["pixel_values", *(["patch_attention_mask"] if vision.mask_patch else [])]


class ImageEncoder:
    """Images and videos to the embeddings of their visual tokens.

    Args:
        model: Whose they are.
        vision: What the encoder is; None: there is none.
        missing: Why not.
        run: The encoder.
        dtype: Of pixels.
    """

    def __init__(
        self, model: ModelFacts, vision: VisionCall | None, missing: str | None, run: Run | None, dtype: Any
    ) -> None:
        self._model, self._vision, self._missing, self._run, self._dtype = model, vision, missing, run, dtype

    def __call__(self, pixels: Pixels) -> dict[int, list[Array]]:
        """Encode all that is there.

        Returns:
            By kind (``IMAGE``, ``VIDEO``), [n, C] of each image or video.

        Raises:
            InputError: The engine has no image encoder (the message says why), or it takes other images.
        """
        vision = self._vision
        if vision is None or self._run is None:
            why = self._missing or f"{self._model.name} is a language model alone"
            raise InputError(f"pixel_values: the engine has no image encoder ({why}): pass image_features.")
        given = ((IMAGE, pixels.pixel_values), (VIDEO, pixels.pixel_values_videos))
        arrays = {kind: np.asarray(x).astype(self._dtype, copy=False) for kind, x in given if x is not None}
        if len(arrays) > 1 and self._model.grids is None:
            raise InputError(
                "pixel_values_videos: which placeholders are of videos, and which of images, is not known: pass one of "
                "both, or image_features in the order of the placeholders."
            )
        kinds = ((vision.patches, self._patches), (vision.tiles, self._tiles), (vision.mask_patch, self._masked),
                 (vision.unit, self._sized), (True, self._images))  # fmt: skip
        return next(encode for there, encode in kinds if there)(vision, self._run, arrays, pixels)

    def _images(self, vision: VisionCall, run: Run, arrays: dict[int, Array], pixels: Pixels) -> dict[int, list[Array]]:
        pixels.check_known("pixel_values")
        images = arrays[IMAGE]
        if images.ndim != 4 or list(images.shape[1:]) != vision.image or not len(images):
            raise InputError(
                f"pixel_values: expected [images, {', '.join(map(str, vision.image))}], got {list(images.shape)}."
            )
        return {IMAGE: [run({"pixel_values": image[None]}) for image in images]}

    def _masked(self, vision: VisionCall, run: Run, arrays: dict[int, Array], pixels: Pixels) -> dict[int, list[Array]]:
        pixels.check_known("pixel_values", "pixel_attention_mask")
        images, side = arrays[IMAGE], vision.mask_patch
        assert side is not None
        if images.ndim != 5 or list(images.shape[2:]) != vision.image:
            wanted = ", ".join(map(str, vision.image))
            raise InputError(f"pixel_values: expected [prompts, images, {wanted}], got {list(images.shape)}.")
        shape = (*images.shape[:2], *images.shape[3:])
        mask = np.ones(shape, bool) if pixels.pixel_attention_mask is None else np.asarray(pixels.pixel_attention_mask)
        if mask.shape != shape:
            raise InputError(f"pixel_attention_mask: expected {list(shape)}, got {list(mask.shape)}.")
        height, width = (size // side for size in shape[2:])
        squares = mask[..., : height * side, : width * side].reshape(*shape[:2], height, side, width, side)
        filled: Array = np.any(squares != 0, axis=(3, 5))
        there = images.any((2, 3, 4))  # the others fill up prompts with fewer images
        return {
            IMAGE: [
                run({"pixel_values": image[None], "patch_attention_mask": known[None]})
                for image, known in zip(images[there], filled[there], strict=True)
            ]
        }

    def _sized(self, vision: VisionCall, run: Run, arrays: dict[int, Array], pixels: Pixels) -> dict[int, list[Array]]:
        pixels.check_known("pixel_values", "image_sizes")
        images, unit = arrays[IMAGE], vision.unit
        assert unit is not None
        if images.ndim != 4 or images.shape[1] != vision.image[0] or not images.size:
            raise InputError(
                f"pixel_values: expected [images, {vision.image[0]}, height, width], got {list(images.shape)}."
            )
        sizes = np.asarray([images.shape[2:]] * len(images) if pixels.image_sizes is None else pixels.image_sizes)
        largest = np.array(images.shape[2:])
        if sizes.shape != (len(images), 2) or (sizes < 1).any() or (sizes > largest).any() or (sizes % unit).any():
            raise InputError(
                f"image_sizes: expected height and width of {len(images)} images, in multiples of {unit} and at most "
                f"{largest.tolist()}, got {sizes.tolist()}."
            )
        cut = (image[None, :, :height, :width] for image, (height, width) in zip(images, sizes.tolist(), strict=True))
        return {IMAGE: [run({"pixel_values": image}) for image in cut]}

    def _tiles(self, vision: VisionCall, run: Run, arrays: dict[int, Array], pixels: Pixels) -> dict[int, list[Array]]:
        facts = vision.tiles
        assert facts is not None
        pixels.check_known(
            "pixel_values", "image_sizes", "batch_num_images", *(["pixel_values_videos"] if facts.videos else [])
        )
        for name, array in zip(("pixel_values", "pixel_values_videos"), map(arrays.get, (IMAGE, VIDEO)), strict=True):
            if array is not None and (array.ndim != 5 or list(array.shape[2:]) != vision.image or not array.size):
                wanted = ", ".join(map(str, vision.image))
                raise InputError(f"{name}: expected [number, tiles or frames, {wanted}], got {list(array.shape)}.")

        def encoded(tiles: Array) -> list[Array]:
            return [run({"pixel_values": tile[None]}) for tile in tiles]

        features: dict[int, list[Array]] = {}
        if IMAGE in arrays:
            found = split_images(facts, arrays[IMAGE], pixels.image_sizes, pixels.batch_num_images)
            features[IMAGE] = [pack_image(facts, encoded(tiles), size) for tiles, size in found]
        if VIDEO in arrays:
            features[VIDEO] = [pack_video(facts, encoded(frames)) for frames in arrays[VIDEO]]
        return features

    def _patches(
        self, vision: VisionCall, run: Run, arrays: dict[int, Array], pixels: Pixels
    ) -> dict[int, list[Array]]:
        facts = vision.patches
        assert facts is not None
        pixels.check_known("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")
        grids = {IMAGE: pixels.image_grid_thw, VIDEO: pixels.video_grid_thw}
        inputs: dict[tuple[int, int], dict[str, Array]] = {}
        features: dict[int, list[Array]] = {}
        for kind, patches in arrays.items():
            features[kind] = []
            for frames, size in split_frames(facts, patches, grids[kind]):
                known = inputs.setdefault(size, frame_inputs(facts, *size))
                features[kind].append(np.concatenate([run({"pixel_values": frame} | known) for frame in frames]))
        return features


def interleaved(kinds: list[Array], features: Mapping[int, list[Array]]) -> list[Array]:
    """Features of images and of videos, in the order of the placeholders; as they are where their number is wrong.

    Args:
        kinds: Of the tokens of each row (grid_positions.py).
        features: [n, C] of each image or video, by kind.
    """
    there = {kind: parts for kind, parts in features.items() if parts}
    flat = np.concatenate(kinds)
    whole = {kind: np.concatenate(parts) for kind, parts in there.items()}
    if len(there) < 2 or any(len(part) != int((flat == kind).sum()) for kind, part in whole.items()):
        return [part for parts in there.values() for part in parts]
    first = next(iter(whole.values()))
    merged = np.zeros((int((flat != TEXT).sum()), first.shape[1]), first.dtype)
    for kind, part in whole.items():
        merged[flat[flat != TEXT] == kind] = part
    return [merged]
