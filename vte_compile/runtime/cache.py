"""Keys and values of layers, and of rows, that may differ in length: what is left after exits.

Without transformers, since engines run where it is not installed; as a DynamicCache: exit_cache.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vte_compile.errors import InputError
from vte_compile.runtime.growing import GrowingLayer
from vte_compile.runtime.prompt_state import PromptState

RowKV = list[tuple[Tensor, Tensor] | None]
"""Keys and values of each layer; None where attention is skipped."""


class CacheLayer(GrowingLayer):
    """A layer, where there is no transformers."""

    is_initialized = False

    def get_seq_length(self) -> int:
        """Its columns."""
        return self.keys.shape[-2] if self.is_initialized else 0


class RowsCache:
    """Keys and values of each layer, [B, heads, columns of that layer, head size], rows aligned at the end.

    Row b of layer i begins at column ``starts[i, b]``; what lies before is padding and never attended to.
    ``get_seq_length()`` counts the columns of the prompt and the tokens generated so far, removed ones included, as
    generate() expects; ``lengths`` tells what each layer really holds.
    """

    layer_class: ClassVar[type[GrowingLayer]] = CacheLayer
    layers: list[Any]
    starts: Tensor
    """[L, B] int64."""
    next_positions: Tensor
    """[B] int64: the position of each row's next token."""
    exit_layer: Tensor | None
    """[B] int64: where the visual tokens left in the latest chunk that was no decode step; -1 = never."""
    prompt_state: PromptState | None
    """What adapters know of each row's prompt; None without adapters, and in an empty cache."""
    _columns: int
    _decoded: int

    @classmethod
    def empty(cls) -> RowsCache:
        """A cache that holds nothing yet."""
        cache = cls()
        cache.reset()
        return cache

    @property
    def lengths(self) -> Tensor:
        """[L, B] int64: how many tokens each layer holds of each row."""
        columns = torch.tensor([layer.get_seq_length() for layer in self.layers], device=self.starts.device)
        return columns[:, None] - self.starts

    @property
    def is_empty(self) -> bool:
        """Whether nothing was cached yet."""
        return self._columns == 0

    @property
    def _filled(self) -> list[Any]:
        return [layer for layer in self.layers if layer.is_initialized]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, in the original numbering; the same for all layers."""
        return self._columns

    def row(self, index: int) -> RowKV:
        """Keys and values of one row, [1, heads, its length, head size] per layer, without padding."""
        starts = self.starts[:, index].tolist()
        return [
            (layer.keys[index : index + 1, :, start:], layer.values[index : index + 1, :, start:])
            if layer.is_initialized
            else None
            for layer, start in zip(self.layers, starts, strict=True)
        ]

    def replace(
        self,
        rows: Sequence[RowKV],
        new_columns: int,
        next_positions: Tensor,
        exit_layer: Tensor,
        buffers: RowKV | None = None,
    ) -> None:
        """Take the rows of a prefill or continuation.

        Args:
            rows: Keys and values of each.
            new_columns: That the chunk had.
            next_positions: [B] int64.
            exit_layer: [B] int64.
            buffers: Of each layer, what the rows are views of, if that is a cache already: aligned at the end of its
                first columns, with room behind them.
        """
        starts = []
        layers = []
        for index, kv in enumerate(zip(*rows, strict=True)):
            parts = [part for part in kv if part is not None]
            if not parts:
                layers.append(self.layer_class())
                starts.append([0] * len(rows))
                continue
            lengths = [keys.shape[2] for keys, _ in parts]
            longest = max(lengths)
            made = None if buffers is None else buffers[index]
            if made is None:
                keys, values = (_align_end([part[i] for part in parts], longest) for i in (0, 1))
                layers.append(self.layer_class.filled(keys, values))
            else:
                layers.append(self.layer_class.in_buffers(*made, longest))
            starts.append([longest - length for length in lengths])
        self.layers = layers
        device = next_positions.device
        self.starts = torch.tensor(starts, dtype=torch.long).to(device, non_blocking=True)
        self.next_positions, self.exit_layer = next_positions, exit_layer
        self._columns += new_columns
        self._decoded = 0

    def next_columns(self) -> list[Tensor]:
        """Keys and values of each layer that has them, in turn, with one more column for a decode step to write."""
        return [tensor for layer in self._filled for tensor in layer.next_column()]

    def reserve(self) -> list[int]:
        """Make room for :meth:`next_columns`; of each layer that has keys, how many columns there are with the next."""
        return [layer.reserve() for layer in self._filled]

    def buffers(self) -> list[Tensor]:
        """What :meth:`next_columns` gives views of, in the same order; after :meth:`reserve`."""
        return [tensor for layer in self._filled for tensor in layer.buffers]

    def append(self, kv: RowKV) -> None:
        """Take the result of a decode step: what :meth:`next_columns` gave, written."""
        for layer, pair in zip(self.layers, kv, strict=True):
            if pair is not None:
                layer.append(*pair)
        self.next_positions = self.next_positions + 1
        self._columns += 1
        self._decoded += 1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the latest tokens (a negative number), or shorten to a length (a positive one).

        Raises:
            InputError: More tokens than were decoded since the last prompt: those of a prompt differ per layer.
        """
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self._columns - tokens_to_remove)
        if count > self._decoded:
            raise InputError(
                f"crop: cannot remove {count} tokens, only the {self._decoded} decoded since the last prompt: an exit "
                "removed some of the earlier ones already."
            )
        if count:
            for layer in self._filled:
                layer.drop_last(count)
            self.next_positions = self.next_positions - count
            self._columns -= count
            self._decoded -= count

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.batch_select_indices(torch.arange(self.starts.shape[1]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        for layer in self._filled:
            layer.select(indices)
        rows = indices.to(self.starts.device)
        self.starts = self.starts[:, rows].contiguous()
        self.next_positions = self.next_positions[rows]
        if self.exit_layer is not None:
            self.exit_layer = self.exit_layer[rows]
        if self.prompt_state is not None:
            self.prompt_state = self.prompt_state.select(rows)

    def reset(self) -> None:
        """Forget everything."""
        self.layers = []
        self._columns = self._decoded = 0
        self.exit_layer = self.prompt_state = None

    def __copy__(self) -> RowsCache:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__, layers=[copy.copy(layer) for layer in self.layers])
        return twin


def _align_end(rows: Sequence[Tensor], length: int) -> Tensor:
    if all(row.shape[2] == length for row in rows):
        return torch.cat(list(rows)) if len(rows) > 1 else rows[0].contiguous()
    first = rows[0]
    aligned = first.new_zeros(len(rows), first.shape[1], length, first.shape[3])
    for target, row in zip(aligned, rows, strict=True):
        target[:, length - row.shape[2] :] = row[0]
    return aligned
