"""A cache layer with room to grow, so that a decode step writes one column instead of copying all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MIN_ROOM, _ROOM_PART = 64, 4
"""New buffers have room for this many more columns, or for this part (1 / n) of those they hold, if that is more."""


def with_room(columns: int) -> int:
    """Columns of a buffer that is made for so many, so that it has some to grow."""
    return columns + max(_MIN_ROOM, columns // _ROOM_PART)


class GrowingLayer:
    """Keys and values of one layer [B, heads, columns, head size]; none where attention is skipped.

    Decode steps write into buffers with more columns, made at the first of them; ``keys`` and ``values`` are views of
    what is filled. A column that was shown is never written again: whoever holds ``keys`` (or copies the layer) keeps
    what it saw, whatever is cropped and appended later.
    """

    keys: Tensor
    values: Tensor
    dtype: torch.dtype
    device: torch.device
    is_initialized: bool
    _buffers: tuple[Tensor, Tensor] | None = None
    """[B, heads, columns with room, head size]."""

    @classmethod
    def filled(cls, keys: Tensor, values: Tensor) -> Any:
        """A layer that holds these, as they are."""
        layer = cls()
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        layer.dtype, layer.device = keys.dtype, keys.device
        return layer

    @classmethod
    def in_buffers(cls, keys: Tensor, values: Tensor, columns: int) -> Any:
        """A layer that holds the first columns of buffers, and may write behind them."""
        layer = cls.filled(keys[:, :, :columns], values[:, :, :columns])
        layer._buffers = keys, values
        return layer

    def reserve(self) -> int:
        """Make room for one more column where there is none; how many columns there are with it."""
        columns = self.keys.shape[2]
        if self._buffers is None or self._buffers[0].shape[2] == columns:
            capacity = with_room(columns)
            # One after the other, so that only one of them is there twice.
            key_buffer, self.keys = _with_room(self.keys, capacity)
            value_buffer, self.values = _with_room(self.values, capacity)
            self._buffers = key_buffer, value_buffer
        return columns + 1

    def next_column(self) -> tuple[Tensor, Tensor]:
        """Keys and values with one more column, which is to be written before :meth:`append` takes it."""
        columns = self.reserve()
        keys, values = self.buffers
        return keys[:, :, :columns], values[:, :, :columns]

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """What :meth:`next_column` gives views of."""
        assert self._buffers is not None
        return self._buffers

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take what :meth:`next_column` gave, written."""
        self.keys, self.values = keys, values

    def drop_last(self, count: int) -> None:
        """Forget the last columns."""
        columns = self.keys.shape[2] - count
        self.keys, self.values, self._buffers = self.keys[:, :, :columns], self.values[:, :, :columns], None
        self.next_column()

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        rows = rows.to(self.keys.device)
        if self._buffers is None:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
            return
        capacity = self._buffers[0].shape[2]
        key_buffer, self.keys = _with_room(self.keys, capacity, rows)
        value_buffer, self.values = _with_room(self.values, capacity, rows)
        self._buffers = key_buffer, value_buffer

    def __getstate__(self) -> dict[str, Any]:
        # Copies have no room: two layers must not write into the same.
        return {name: value for name, value in self.__dict__.items() if name != "_buffers"}


def _with_room(filled: Tensor, capacity: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A buffer with so many columns, and the view of what is filled in it: a copy, of these rows alone."""
    batch, heads, columns, size = filled.shape
    with torch.inference_mode(False):  # so that it can be written in and outside of inference mode
        buffer = filled.new_empty(batch if rows is None else len(rows), heads, capacity, size)
        view = buffer[:, :, :columns]
    if rows is None:
        view.copy_(filled)
    else:
        torch.index_select(filled, 0, rows, out=view)
    return buffer, view
