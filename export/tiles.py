"""Images of any size as tiles of one size (LLaVA-NeXT, LLaVA-OneVision), and the tiles' tokens as a sequence; numpy.

Each tile is one run of the encoder: the whole image, resized, and the parts of it. The sequence has the tokens of the
whole image, then those of the parts as they lie in the image, without what was filled up around it, each row ended by
an embedding that the encoder gives behind a tile's tokens. So each token is a sum of a few rows of what the encoder
gives: of one, or of four where tokens are shrunk. At export, this is compared with the model's own code
(tile_encoder.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vte_compile.errors import InputError
from vte_compile.export.manifest import TileFacts

Array = np.ndarray[Any, Any]
Size = tuple[int, int]
"""Height and width."""


def best_resolution(size: Size, resolutions: Sequence[Sequence[int]]) -> Size:
    """What an image of a size is fitted into: what leaves it largest, and of equal ones what wastes least."""

    def score(resolution: Sequence[int]) -> tuple[int, int]:
        height, width = resolution
        scale = min(width / size[1], height / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - height * width

    height, width = max(resolutions, key=score)
    return height, width


def parts(facts: TileFacts, size: Size) -> Size:
    """Rows and columns of tiles of an image."""
    height, width = best_resolution(size, facts.resolutions)
    return height // facts.size, width // facts.size


def split_images(
    facts: TileFacts, pixel_values: Array, image_sizes: Any, batch_num_images: Any
) -> list[tuple[Array, Size | None]]:
    """The tiles of each image, of what a processor gives.

    Args:
        facts: Of the encoder.
        pixel_values: [images, tiles, channels, height, width], filled up to the most tiles.
        image_sizes: [images, 2]: height and width of each before it was cut.
        batch_num_images: [prompts with images]: how many each has; None: one.

    Returns:
        For each, its tiles, and its size; None: it is whole, one tile.

    Raises:
        InputError: They do not fit together.
    """
    sizes = None if image_sizes is None else np.asarray(image_sizes)
    if sizes is None or sizes.shape != (len(pixel_values), 2) or (sizes < 1).any() or not len(sizes):
        got = "none" if sizes is None else sizes.tolist()
        raise InputError(f"image_sizes: expected height and width of {len(pixel_values)} images, got {got}.")
    whole = np.zeros(len(sizes), bool)
    if batch_num_images is not None:
        counts = np.asarray(batch_num_images)
        if not facts.alone or counts.ndim != 1 or int(counts.sum()) != len(sizes):
            what = f"{len(sizes)} images in all" if facts.alone else "none: this model cuts every image"
            raise InputError(f"batch_num_images: expected {what}, got {counts.tolist()}.")
        whole = np.repeat(counts > 1, counts)
    found: list[tuple[Array, Size | None]] = []
    for tiles, (height, width), alone in zip(pixel_values, sizes.tolist(), ~whole, strict=True):
        size = (height, width) if alone else None
        count = 1 + math.prod(parts(facts, size)) if size else 1
        if len(tiles) < count:
            raise InputError(f"pixel_values: an image of {height} x {width} has {count} tiles, got {len(tiles)}.")
        found.append((tiles[:count], size))
    return found


def pack_image(facts: TileFacts, tiles: Sequence[Array], size: Size | None) -> Array:
    """The sequence of an image.

    Args:
        facts: Of the encoder.
        tiles: [tokens + 1, C] of each: its tokens, and what ends a row.
        size: Of the image; None: it is whole, one tile.

    Returns:
        [n, C].
    """
    rows = np.concatenate([*(tile[:-1] for tile in tiles), tiles[0][-1:]])
    whole, newline = np.arange(facts.side**2), len(rows) - 1
    if size is None:
        return rows
    down, across = parts(facts, size)
    tokens = np.arange(facts.side**2, newline).reshape(down, across, facts.side, facts.side)
    grid = _unpadded(tokens.swapaxes(1, 2).reshape(down * facts.side, across * facts.side), size)
    height, width = grid.shape
    ratio = 0.0 if facts.most is None else math.sqrt(height * width / (facts.most * facts.side**2))
    if ratio <= 1.1:
        ends = np.full((height, 1), newline)
        image: Array = rows[np.concatenate([whole, np.concatenate([grid, ends], 1).ravel()])]
        return image
    height, width = int(height // ratio), int(width // ratio)
    shrunk = _resized(rows, grid, height, width).reshape(height, width, -1)
    ended = np.concatenate([shrunk, np.broadcast_to(rows[newline], (height, 1, rows.shape[1]))], 1)
    return np.concatenate([rows[whole], ended.reshape(-1, rows.shape[1])])


def pack_video(facts: TileFacts, frames: Sequence[Array]) -> Array:
    """The sequence [n, C] of a video, of [tokens + 1, C] of each frame: theirs, pooled, and one end."""
    grid, side = np.arange(facts.side**2).reshape(facts.side, facts.side), math.ceil(facts.side / 2)
    return np.concatenate([*(_resized(frame, grid, side, side) for frame in frames), frames[0][-1:]])


def _unpadded(grid: Array, size: Size) -> Array:
    """Without the rows or columns of tokens that were filled up."""
    height, width = grid.shape
    if size[1] / size[0] > width / height:
        edge = (height - int(round(size[0] * (width / size[1]), 7))) // 2
        return grid[edge : height - edge]
    edge = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    return grid[:, edge : width - edge]


def _resized(rows: Array, grid: Array, height: int, width: int) -> Array:
    """Rows [n, C] as ``grid`` [H, W] says where they lie, interpolated bilinearly: [height * width, C]."""
    (top, bottom, down), (left, right, across) = (
        _neighbours(*lengths) for lengths in zip(grid.shape, (height, width), strict=True)
    )
    result = np.zeros((height * width, rows.shape[1]), np.float32)
    for above, weight in ((top, 1 - down), (bottom, down)):
        for beside, other in ((left, 1 - across), (right, across)):
            result += np.outer(weight, other).reshape(-1, 1) * rows[grid[np.ix_(above, beside)].ravel()]
    return result.astype(rows.dtype)


def _neighbours(length: int, new: int) -> tuple[Array, Array, Array]:
    """For each of the new places the ones before and behind it, and how near it is to the latter."""
    at = np.maximum((np.arange(new) + 0.5) * (length / new) - 0.5, 0)
    before = at.astype(np.int64)
    return before, np.minimum(before + 1, length - 1), (at - before).astype(np.float32)
