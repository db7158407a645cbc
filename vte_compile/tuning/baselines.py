"""Reduction of visual tokens without training, for comparison: random dropping, and pruning by attention (FastV).

Both leave a share of the visual tokens behind a layer, the same for every sample. They run in eager PyTorch, row by
row, as the oracle does. With a share of 0 both are the static exit after that layer (VTW, arXiv 2405.05803).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vte_compile.errors import InputError
from vte_compile.families.logits import capped
from vte_compile.oracle import Oracle, RowRun, layer_window
from vte_compile.oracle.blocks import Block
from vte_compile.plan import Plan
from vte_compile.tuning.watched_attention import watched


@dataclass(frozen=True)
class TokenReduction:
    """Behind `layer` (counted from 0) only a share of each prompt's visual tokens is left.

    As in an exit, what stays keeps its position, the layers up to `layer` have cached all tokens, and nothing happens
    in a prompt without text behind its last visual token.

    Raises:
        InputError: `layer` is negative, or `share` not between 0 and 1.
    """

    layer: int
    share: float

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise InputError(f"layer={self.layer}: expected 0 or more.")
        if not 0.0 <= self.share <= 1.0:
            raise InputError(f"share={self.share}: expected a number between 0 and 1.")

    def kept(self, visual: int) -> int:
        """How many of so many visual tokens stay: their share, rounded down."""
        return math.floor(self.share * visual + 1e-9)  # 0.3 * 10 is to be 3, and 0.29 * 100 to be 29


@dataclass(frozen=True)
class RandomDropping(TokenReduction):
    """Which tokens stay is drawn: the same for the same seed and number of tokens."""

    seed: int = 0


@dataclass(frozen=True)
class AttentionPruning(TokenReduction):
    """Those stay to which the last token pays most attention in `layer`, in the mean of its heads.

    FastV, arXiv 2403.06764; its K, the number of layers that see all tokens, is `layer` + 1. Of equal ones the first.
    """


class ReducingOracle(Oracle):
    """Runs a model with a reduction of its visual tokens, see :class:`vte_compile.oracle.Oracle`.

    Raises InputError if the decoder has no layer behind that of the reduction, and as the oracle does.
    """

    def __init__(self, model: nn.Module, reduction: TokenReduction) -> None:
        super().__init__(model, Plan())
        self.reduction = self._checked(reduction)

    def with_reduction(self, reduction: TokenReduction) -> ReducingOracle:
        """The same model with another reduction, without trying the model out again.

        Raises:
            InputError: The decoder has no layer behind that of the reduction.
        """
        other = copy.copy(self)
        other.reduction = self._checked(reduction)
        return other

    def _checked(self, reduction: TokenReduction) -> TokenReduction:
        if reduction.layer >= len(self.layers) - 1:
            raise InputError(
                f"layer={reduction.layer}: no layer is behind it, the decoder has {len(self.layers)} (0.."
                f"{len(self.layers) - 1})."
            )
        return reduction

    def run_layer(
        self, index: int, block: Block, run: RowRun, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor] | None:
        # While the oracle tries the model out, on text, there is no reduction yet.
        if not bool(run.visual.any()) or bool(run.visual[-1]) or index != self.reduction.layer:
            return super().run_layer(index, block, run, past)
        if isinstance(self.reduction, AttentionPruning):
            paid: list[Tensor] = []
            window = layer_window(self.config, index)

            def watch(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> None:
                paid.append(_last_query_attention(query, key, scaling, window, softcap))

            with watched(self.config, index, self.layers[index], watch):
                cached = super().run_layer(index, block, run, past)
            scores = paid[0][-len(run.visual) :]  # of this chunk's tokens
        else:
            cached = super().run_layer(index, block, run, past)
            assert isinstance(self.reduction, RandomDropping)
            generator = torch.Generator().manual_seed(self.reduction.seed)
            scores = torch.rand(len(run.visual), generator=generator).to(run.visual.device)
        run.keep(~run.visual | _highest(scores, run.visual, self.reduction.kept(int(run.visual.sum()))))
        return cached


def _last_query_attention(
    query: Tensor, key: Tensor, scaling: float, window: int | None, softcap: float | None = None
) -> Tensor:
    """What the last query pays to each key [keys], in the mean of the heads; arguments as `Watch` gets them.

    It attends to all keys, or to those of its window: its scores are computed once more, without those of all others.
    """
    keys = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = capped((keys.to(wide) @ query[:, -1, :, None].to(wide))[..., 0] * scaling, softcap)
    if window is not None:
        scores[:, :-window] = -math.inf
    return scores.softmax(-1).mean(0)


def _highest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Mask [n] of the `count` highest scores among those of a mask [n]."""
    order = scores.masked_fill(~among, -math.inf).argsort(descending=True, stable=True)
    highest = torch.zeros_like(among)
    highest[order[:count]] = True
    return highest
