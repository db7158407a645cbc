"""What a cache keeps of each row's prompt for adapters, beside keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vte_compile.runtime.prompt_value import PromptValue


@dataclass(frozen=True)
class PromptState:
    """The values that prefill gave out, in its order, for all rows of a batch. Never changed in place."""

    kinds: Sequence[PromptValue]
    values: list[Tensor]
    """[B, ...] where they are per row."""
    one_prompt: bool
    """Whether all rows come from one prompt; then some values may be the same for all."""

    @classmethod
    def of_rows(cls, kinds: Sequence[PromptValue], rows: Sequence[Sequence[Tensor]], one_prompt: bool) -> PromptState:
        """From the values of each row's prefill."""
        values = [
            (torch.cat(parts) if kind.per_row else parts[0])
            for kind, parts in zip(kinds, map(list, zip(*rows, strict=True)), strict=True)
        ]
        return cls(kinds, values, one_prompt)

    def select(self, rows: Tensor) -> PromptState:
        """These rows, in this order."""
        values = [
            value.index_select(0, rows.to(value.device)) if kind.per_row else value
            for kind, value in zip(self.kinds, self.values, strict=True)
        ]
        return PromptState(self.kinds, values, self.one_prompt)
