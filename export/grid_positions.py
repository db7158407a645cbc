"""Multimodal rotary positions of prompts with images and videos, as Qwen2-VL and Qwen3-VL number them.

A token's position is three numbers: time, height and width. Text counts all three on, one by one. A visual token has
its frame, row and column in the grid of its image, counted from where the text before it ended; the text behind goes on
beyond the grid's longer side. In Qwen3-VL, each frame of a video is numbered as an image, and text stands between them.
At export, the numbers are compared with those of the model's own code (`export/grid_facts.py`). With numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vte_compile.errors import InputError
from vte_compile.export.manifest import IMAGES, GridFacts, ModelFacts

Array = np.ndarray[Any, Any]
TEXT, IMAGE, VIDEO = 0, 1, 2
"""Kinds of tokens, as processors number them in ``mm_token_type_ids``."""


def token_kinds(facts: GridFacts | None, ids: Array) -> Array:
    """TEXT, IMAGE or VIDEO, for token ids of any shape; TEXT for all of a model whose positions are no grids."""
    if facts is None:
        return np.full(ids.shape, TEXT)
    video = -1 if facts.video_token_id is None else facts.video_token_id
    return np.where(ids == facts.image_token_id, IMAGE, np.where(ids == video, VIDEO, TEXT))


@dataclass(frozen=True)
class Grids:
    """The images and videos of a call, in the order of the prompts' placeholders."""

    images: Array
    """[n, 3] int64: how many patches in time, height and width."""
    videos: Array
    """[n, 3] int64."""
    seconds: Array
    """[videos] float32: how long each step in time lasts."""

    @classmethod
    def of(cls, facts: GridFacts, image_grid_thw: Any, video_grid_thw: Any, second_per_grid_ts: Any = None) -> Grids:
        """Check what a processor gave.

        Args:
            facts: Of the model.
            image_grid_thw: [images, 3] integers, or None.
            video_grid_thw: [videos, 3] integers, or None.
            second_per_grid_ts: [videos], or None: one second each.

        Raises:
            InputError: Not of these shapes, or not in whole tokens.
        """
        images = _grid("image_grid_thw", image_grid_thw, facts.merge_size)
        videos = _grid("video_grid_thw", video_grid_thw, facts.merge_size)
        seconds = np.ones(len(videos), np.float32)
        if second_per_grid_ts is not None:
            seconds = np.asarray(second_per_grid_ts, np.float32)
        if seconds.shape != (len(videos),):
            raise InputError(
                f"second_per_grid_ts: expected {len(videos)} numbers, one for each video, got {list(seconds.shape)}."
            )
        return cls(images, videos, seconds)

    def positions(self, facts: GridFacts, rows: Sequence[Array]) -> list[Array]:
        """Number the tokens of all rows.

        Args:
            facts: Of the model.
            rows: The kinds of each row's tokens [n].

        Returns:
            [3, n] int64 of each row, counted from 0.

        Raises:
            InputError: Placeholders and grids do not fit together.
        """
        images = _sized("image_grid_thw", facts, self.images, np.zeros(len(self.images), np.float32))
        intervals = np.ones_like(self.seconds)
        if facts.tokens_per_second is not None:
            seconds = np.floor(self.seconds) if facts.whole_seconds else self.seconds
            intervals = seconds * np.float32(facts.tokens_per_second)
        grids = self.videos
        if facts.frames_apart:
            steps = grids[:, 0]
            grids, intervals = np.repeat(grids, steps, 0), np.repeat(intervals, steps)
            grids[:, 0] = 1
        videos = _sized("video_grid_thw", facts, grids, intervals)
        result = [_row(kinds, {IMAGE: images, VIDEO: videos}) for kinds in rows]
        for name, left in (("image_grid_thw", images), ("video_grid_thw", videos)):
            if next(left.grids, None) is not None:
                raise InputError(f"{name}: has more entries than input_ids have runs of placeholders.")
        return result


@dataclass(frozen=True)
class Media:
    """What a call says of its images and videos, beside their pixels or features; see ``prefill()`` of engines."""

    image_grid_thw: Any = None
    video_grid_thw: Any = None
    second_per_grid_ts: Any = None
    mm_token_type_ids: Any = None
    token_type_ids: Any = None

    def places(self, facts: ModelFacts, kinds: list[Array]) -> list[Array] | None:
        """Multimodal positions [3, n] of rows of tokens of these kinds; None: they are those of text.

        Raises:
            InputError: Grids are missing, or do not fit, or are of no use.
        """
        given = self.image_grid_thw is not None or self.video_grid_thw is not None
        if facts.grids is None:
            if given or self.mm_token_type_ids is not None:
                raise InputError(
                    f"{facts.name} knows no image_grid_thw, video_grid_thw, mm_token_type_ids: leave them out."
                )
            return None
        if not given:
            if any(row.any() for row in kinds):
                raise InputError(
                    "image_grid_thw (or video_grid_thw): is missing, and the positions of visual tokens follow from "
                    "it: pass it as the processor gives it."
                )
            return None
        grids = Grids.of(facts.grids, self.image_grid_thw, self.video_grid_thw, self.second_per_grid_ts)
        return grids.positions(facts.grids, kinds)

    def kinds(self, visual: Array) -> Array:
        """Kinds of tokens that have no ids, [B, T], of which some are visual [B, T] bool.

        Raises:
            InputError: They may be of images or of videos, or what was said of them is something else.
        """
        if self.mm_token_type_ids is not None:
            given = np.asarray(self.mm_token_type_ids)
            if given.shape != visual.shape or not np.array_equal(given != TEXT, visual):
                raise InputError("mm_token_type_ids: are not 1 or 2 where visual_mask is True, and 0 elsewhere.")
            return given
        if self.image_grid_thw is not None and self.video_grid_thw is not None:
            raise InputError(
                "inputs_embeds: which visual tokens are of images and which of videos is not known: pass "
                "mm_token_type_ids (1 and 2)."
            )
        return np.where(visual, IMAGE if self.video_grid_thw is None else VIDEO, TEXT)

    def check_blocks(self, facts: ModelFacts, placeholders: Array, real: Array) -> None:
        """Whether the token types that the caller gave make the blocks that the engine makes of token ids.

        Args:
            facts: Of the model.
            placeholders: [B, T] bool: tokens of images.
            real: [B, T] bool: False at padding.

        Raises:
            InputError: They do not, or the model knows no blocks.
        """
        if self.token_type_ids is None:
            return
        if facts.blocks is None:
            raise InputError(f"{facts.name} knows no token_type_ids: leave them out.")
        given = np.asarray(self.token_type_ids)
        expected = np.where(placeholders, int(facts.blocks == IMAGES), 0)
        if given.shape != expected.shape or (given != expected)[real].any():
            raise InputError(
                f"token_type_ids: are not those of a prompt ({'1 at images, else 0' if expected.any() else 'all 0'}): "
                "leave them out, the engine sees in input_ids which tokens attend to later ones."
            )

    def check_types(self, kinds: Array) -> None:
        """Whether the kinds of all tokens [B, T] are those that the caller gave.

        Raises:
            InputError: They are not.
        """
        if self.mm_token_type_ids is None:
            return
        given = np.asarray(self.mm_token_type_ids)
        if given.shape != kinds.shape or not np.array_equal(given, kinds):
            raise InputError(
                "mm_token_type_ids: are not those of input_ids (0 text, 1 image, 2 video): leave them out, the engine "
                "sees them in input_ids."
            )


@dataclass(frozen=True)
class _Sized:
    """Grids in tokens, to be taken one after the other."""

    name: str
    grids: Iterator[tuple[list[int], np.float32]]


def _sized(name: str, facts: GridFacts, grids: Array, intervals: Array) -> _Sized:
    tokens = grids // np.array([1, facts.merge_size, facts.merge_size])
    return _Sized(name, zip(tokens.tolist(), intervals, strict=True))


def _row(kinds: Array, media: dict[int, _Sized]) -> Array:
    """[3, n] of one row."""
    parts = [np.zeros((3, 0), np.int64)]
    start = at = 0
    while at < len(kinds):
        kind = int(kinds[at])
        run = int(np.argmax(np.append(kinds[at:] != kind, True)))
        if kind == TEXT:
            parts.append(np.broadcast_to(start + np.arange(run), (3, run)))
            start, at = start + run, at + run
            continue
        name = media[kind].name
        found = next(media[kind].grids, None)
        if found is None:
            raise InputError(f"{name}: has fewer entries than input_ids have runs of placeholders.")
        (time, height, width), interval = found
        if (size := time * height * width) > run:
            raise InputError(f"input_ids: {run} placeholders in a row, where {name} says {size}.")
        steps = (np.arange(time, dtype=np.float32) * interval).astype(np.int64)
        grid = np.meshgrid(steps, np.arange(height), np.arange(width), indexing="ij")
        parts.append(start + np.stack(grid).reshape(3, -1))
        start, at = start + max(height, width), at + size
    return np.concatenate(parts, axis=1)


def _grid(name: str, grid: Any, merge: int) -> Array:
    if grid is None:
        return np.zeros((0, 3), np.int64)
    grid = np.asarray(grid)
    if grid.ndim != 2 or grid.shape[1] != 3 or not np.issubdtype(grid.dtype, np.integer):
        raise InputError(f"{name}: expected integers of shape [n, 3], got {grid.dtype} of shape {list(grid.shape)}.")
    if (grid < 1).any() or (grid[:, 1:] % merge).any():
        raise InputError(f"{name}: expected positive heights and widths in multiples of {merge}, got {grid.tolist()}.")
    return grid.astype(np.int64)
