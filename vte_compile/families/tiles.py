"""Cut a picture into square tiles, as many as fit its shape: what InternVL, NVILA and Eagle 2 do to large pictures."""

from __future__ import annotations

from typing import Any


def grid_of_tiles(width: int, height: int, size: int, least: int, most: int) -> tuple[int, int]:
    """The grid (columns, rows) of `least` to `most` tiles whose shape is closest to the picture's.

    Of grids equally close the first, by number of tiles, counts, unless the picture has more than half the pixels of a
    later one (of the InternVL 1.5 report, section 3.3).

    Args:
        width, height: Of the picture, in pixels.
        size: Of a tile's side, in pixels.
        least, most: Number of tiles.
    """
    counts = range(1, most + 1)
    grids = [(i, j) for i in counts for j in counts if least <= i * j <= most]
    best, closest = (1, 1), float("inf")
    for grid in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - grid[0] / grid[1])
        larger = distance == closest and width * height > 0.5 * size * size * grid[0] * grid[1]
        if distance < closest or larger:
            best, closest = grid, distance
    return best


def tiles(image: Any, size: int, least: int, most: int, *, thumbnail: bool = True) -> list[Any]:
    """The tiles of a picture, row by row, and the whole picture as one more behind them if there are several.

    Args:
        image: A PIL image.
        size: Of a tile's side, in pixels.
        least, most: Number of tiles, without the whole picture.
        thumbnail: Whether the whole picture is added.
    """
    columns, rows = grid_of_tiles(image.width, image.height, size, least, most)
    resized = image.resize((columns * size, rows * size))
    cut = [
        resized.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
        for row in range(rows)
        for column in range(columns)
    ]
    return [*cut, image.resize((size, size))] if thumbnail and len(cut) > 1 else cut
