"""Which tokens leave at an exit: those of one row, or of some of many rows that are packed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vte_compile.kernels.token_exit import compact

if TYPE_CHECKING:
    from vte_compile.runtime.steps import ExitStep


@dataclass
class VisualTokens:
    """Which tokens of one row are visual, as the host needs it at exits."""

    keep: Tensor
    """[n] int64: the positions of the text tokens; on the host, as all here."""
    question_start: int
    """Index of the first token behind the last visual one."""
    exit_layer: int = -1
    """Where they left."""

    @classmethod
    def find(cls, visual_mask: Tensor) -> VisualTokens | None:
        """Of one row's mask [S] bool; None if its tokens can never leave (none is visual, or no text follows)."""
        positions = visual_mask.nonzero()[:, 0]
        if not len(positions) or int(positions[-1]) == len(visual_mask) - 1:
            return None
        return cls((~visual_mask).nonzero()[:, 0], int(positions[-1]) + 1)

    def at_exit(self, step: ExitStep, stream: Tensor, values: list[Tensor]) -> list[Tensor]:
        """What goes on behind an exit, of what arrives there."""
        if self.exit_layer >= 0 or not step.fires(stream[0], self.question_start):
            return values
        self.exit_layer = step.layer
        return compact(values, step.dims, self.keep.to(stream.device, non_blocking=True))


@dataclass
class PackedRows:
    """The rows of a packed prefill, as the host needs them at exits."""

    lengths: list[int]
    """Tokens that each row has now."""
    visual: list[VisualTokens | None]
    """Of each row; None if its tokens can never leave."""

    @property
    def exit_layers(self) -> list[int]:
        """Where each row's visual tokens left; -1: they did not."""
        return [-1 if visual is None else visual.exit_layer for visual in self.visual]

    @property
    def ends(self) -> list[int]:
        """Where each row ends."""
        return list(accumulate(self.lengths))

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """[B + 1] int32: where rows begin and end."""
        return torch.tensor([0, *self.ends], dtype=torch.int32).to(device, non_blocking=True)

    def at_exit(self, step: ExitStep, stream: Tensor, values: list[Tensor]) -> list[Tensor]:
        """What goes on behind an exit, of what arrives there; the host waits once for the gate of all rows."""
        waiting = [v if v is not None and v.exit_layer < 0 else None for v in self.visual]
        if not any(waiting):
            return values
        begins, ends = [0, *self.ends[:-1]], self.ends
        starts = [e if v is None else b + v.question_start for v, b, e in zip(waiting, begins, ends, strict=True)]
        fires = step.rows_fire(stream[0], self, starts)
        if not any(fires):
            return values
        keep = []
        for row, (visual, begin) in enumerate(zip(waiting, begins, strict=True)):
            if visual is not None and fires[row]:
                visual.exit_layer = step.layer
                keep.append(begin + visual.keep)
                self.lengths[row] = len(visual.keep)
            else:
                keep.append(torch.arange(begin, ends[row]))
        index = torch.cat(keep).to(stream.device, non_blocking=True)
        bounds = self.cu_seqlens(stream.device)
        return [
            compact([value], [dims], index)[0] if dims else bounds
            for value, dims in zip(values, step.dims, strict=True)
        ]
