"""Images of any size as an encoder of patches takes them (Qwen2-VL, Qwen3-VL), frame by frame; with numpy alone.

Processors cut each image into patches, ``merge_size`` x ``merge_size`` of which stand next to each other: one token.
Frames do not attend to each other, so each is one run of the encoder. What it wants to know of a frame: rows,
columns, windows and learned positions, follows from its height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vte_compile.errors import InputError
from vte_compile.export.manifest import PatchFacts

Array = np.ndarray[Any, Any]
_WINDOWS = ("window_index", "windows", "window_places")
_LEARNED = ("learned_index", "learned_weights")


def encoder_inputs(facts: PatchFacts) -> list[str]:
    """Names of the inputs of vision.onnx."""
    windows, learned = facts.window is not None, facts.learned is not None
    return ["pixel_values", "position_ids", *(_WINDOWS if windows else ()), *(_LEARNED if learned else ())]


def split_frames(
    facts: PatchFacts, pixel_values: Array, grid_thw: Any
) -> list[tuple[Sequence[Array], tuple[int, int]]]:
    """The patches of each image or video, as frames.

    Args:
        facts: Of the encoder.
        pixel_values: [patches, numbers].
        grid_thw: [n, 3]: time, height and width of each, in patches.

    Returns:
        For each, its frames [height * width, numbers], and their height and width.

    Raises:
        InputError: Patches and grids do not fit together.
    """
    grid = None if grid_thw is None else np.asarray(grid_thw)
    if grid is None or grid.ndim != 2 or grid.shape[1] != 3 or not len(grid):
        got = "none" if grid is None else list(grid.shape)
        raise InputError(f"pixel_values: expected a grid [n, 3] for them (image_grid_thw), got {got}.")
    if (grid < 1).any() or (grid[:, 1:] % facts.merge_size).any():
        raise InputError(
            f"image_grid_thw: expected heights and widths in multiples of {facts.merge_size}, got {grid.tolist()}."
        )
    expected = [int(grid.prod(1).sum()), facts.numbers]
    if list(pixel_values.shape) != expected:
        raise InputError(f"pixel_values: expected {expected}, as the grids say, got {list(pixel_values.shape)}.")
    parts = np.split(pixel_values, np.cumsum(grid.prod(1))[:-1])
    return [
        (np.split(part, time), (height, width))
        for part, (time, height, width) in zip(parts, grid.tolist(), strict=True)
    ]


def frame_inputs(facts: PatchFacts, height: int, width: int) -> dict[str, Array]:
    """What the encoder takes beside the n patches of a frame.

    Args:
        facts: Of the encoder.
        height: Of the frame, in patches.
        width: Of the frame, in patches.

    Returns:
        ``position_ids`` [n, 2], row and column of each patch; and if it has windows, ``window_index`` [tokens], the
        order in which windows are contiguous; ``windows`` [W, L], the patches of each window in that order, -1 behind
        the last; ``window_places`` [n], where each patch is among these. If it has learned positions,
        ``learned_index`` [n, 4], the four nearest of them, and ``learned_weights`` [n, 4] float32, theirs.
    """
    merge = facts.merge_size
    blocks = (height // merge, merge, width // merge, merge)
    rows, columns = (x.reshape(blocks).swapaxes(1, 2).ravel() for x in np.indices((height, width)))
    inputs = {"position_ids": np.stack([rows, columns], 1)}
    if facts.learned is not None:
        inputs |= _learned(facts.learned, (rows, height), (columns, width))
    if facts.window is None:
        return inputs
    row, column = (x.ravel() for x in np.indices((height // merge, width // merge)))
    window = row // facts.window * -(-(width // merge) // facts.window) + column // facts.window
    counts = np.bincount(window) * merge**2
    longest = np.arange(counts.max())
    inside = longest < counts[:, None]
    starts = np.cumsum(counts) - counts
    return inputs | {
        "window_index": np.argsort(window, kind="stable"),
        "windows": np.where(inside, starts[:, None] + longest, -1),
        "window_places": np.flatnonzero(inside),
    }


def _learned(side: int, *axes: tuple[Array, int]) -> dict[str, Array]:
    """Bilinear interpolation in a square of learned positions, corners on corners.

    Args:
        side: Of the square.
        axes: Of rows and columns: where each patch is [n], and how many there are.
    """
    taps, weights = [], []
    for places, size in axes:
        exact = places.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        nearest = np.floor(exact)[:, None] + np.arange(2, dtype=np.float32)
        taps.append(nearest.astype(np.int64).clip(0, side - 1))
        weights.append((1 - np.abs(exact[:, None] - nearest)).clip(0))
    index = taps[0][:, :, None] * side + taps[1][:, None]
    both = weights[0][:, :, None] * weights[1][:, None]
    return {"learned_index": index.reshape(-1, 4), "learned_weights": both.reshape(-1, 4)}
