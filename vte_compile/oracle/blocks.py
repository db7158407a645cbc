"""Decoder blocks as the oracle runs them: unchanged, with an adapter before the attention, or without attention.

The forms are those of EAS (arXiv 2403.15226) for pre-norm blocks, literally::

    kept:    h = x + MHA(AD(RMS_in x)) ;  out = h + MLP(RMS_post h)
    skipped: out = x + MLP(g * PIA(RMS_in x))            g: the weight of RMS_post
    skipped, training-free: out = x + MLP(RMS_post x)

Blocks of other forms (Gemma's later ones have norms behind attention and MLP, mixtures have experts) take no adapters;
skipped, they are the layer's own forward with an attention that gives zeros.

Every block takes one row: x [1, n, C], the statistics of the row's prompt in this layer (None: x is the prompt), and
the arguments of its attention. It returns its output [1, n, C] and the statistics. With given statistics, a row for
each, it takes several rows; `statistics()` makes them, where a row holds more than its prompt, or a companion token
goes along with it: a mean that a PIA pools counts that as one token more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vte_compile.adapters import PIA, PlainAdapter, apply_pia, apply_plain, pool, route
from vte_compile.errors import UnsupportedModelError
from vte_compile.families.blocks import attention_name, block_parts, can_be_taken_apart, rms_gain
from vte_compile.module_tree import shallow_copy
from vte_compile.plan import Plan


@dataclass(frozen=True, eq=False)
class PromptStatistics:
    """What an adapter remembers of a row's prompt: router weights [1, 2] and, a PIA, the pooled vector [1, D]."""

    weights: Tensor
    pooled: Tensor | None


class OwnBlock:
    """The layer's own forward."""

    adapter = None
    attends = True

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, x: Tensor, known: PromptStatistics | None, **attention: Any) -> tuple[Tensor, None]:
        output = self._layer(x, **attention)
        return (output[0] if isinstance(output, tuple) else output), None

    def statistics(self, x: Tensor, prompt_mask: Tensor, companion: Tensor | None = None) -> None:
        """There is no adapter that needs any."""


class KeptBlock:
    """A block with a plain adapter in front of its attention. Without one it is `OwnBlock`, spelled out."""

    attends = True

    def __init__(self, layer: nn.Module, adapter: PlainAdapter | None) -> None:
        self._parts = block_parts(layer)
        self.adapter = adapter

    def __call__(
        self, x: Tensor, known: PromptStatistics | None, **attention: Any
    ) -> tuple[Tensor, PromptStatistics | None]:
        normed = self._parts.input_norm(x)
        if self.adapter is not None:
            known = known or self._of(normed)
            assert known is not None
            normed = apply_plain(self.adapter, normed, known.weights)
        attended: Tensor = x + self._parts.attention(hidden_states=normed, **attention)[0]
        return attended + _tensor(self._parts.mlp(self._parts.post_norm(attended))), known

    def statistics(self, x: Tensor, prompt_mask: Tensor, companion: Tensor | None = None) -> PromptStatistics | None:
        """Of rows [B, T, C] whose prompts are the tokens of the mask [B, T]; a companion changes nothing here."""
        return self._of(self._parts.input_norm(x), prompt_mask)

    def _of(self, normed: Tensor, prompt_mask: Tensor | None = None) -> PromptStatistics | None:
        return None if self.adapter is None else PromptStatistics(route(self.adapter.router, normed, prompt_mask), None)


class SkippedBlock:
    """A block without its attention: it caches nothing."""

    attends = False

    def __init__(self, layer: nn.Module, adapter: PIA | None) -> None:
        self._parts = block_parts(layer)
        self._gain = None if adapter is None else rms_gain(self._parts.post_norm)
        self.adapter = adapter

    def __call__(
        self, x: Tensor, known: PromptStatistics | None, **attention: Any
    ) -> tuple[Tensor, PromptStatistics | None]:
        if self.adapter is None or self._gain is None:
            return x + _tensor(self._parts.mlp(self._parts.post_norm(x))), None
        normed = self._parts.input_norm(x)
        known = known or self._of(normed)
        assert known is not None
        assert known.pooled is not None
        adapted = self._gain * apply_pia(self.adapter, normed, known.weights, known.pooled)
        return x + _tensor(self._parts.mlp(adapted.to(x.dtype))), known

    def statistics(self, x: Tensor, prompt_mask: Tensor, companion: Tensor | None = None) -> PromptStatistics | None:
        """Of rows [B, T, C] whose prompts are the tokens of the mask [B, T], and their companions [B, 1, C]."""
        return self._of(
            self._parts.input_norm(x), prompt_mask, None if companion is None else self._parts.input_norm(companion)
        )

    def _of(
        self, normed: Tensor, prompt_mask: Tensor | None = None, companion: Tensor | None = None
    ) -> PromptStatistics | None:
        if self.adapter is None:
            return None
        weights = route(self.adapter.router, normed, prompt_mask)
        if companion is not None and prompt_mask is not None:
            normed = torch.cat([companion, normed], 1)
            prompt_mask = F.pad(prompt_mask, (1, 0), value=True)
        return PromptStatistics(weights, pool(self.adapter, normed, prompt_mask))


class SilencedBlock:
    """A block that cannot be taken apart, without its attention: the layer's own forward, where that gives zeros.

    Raises UnsupportedModelError if zeros are not the same as no attention: what else the layer has makes something of
    them (a norm with a bias).
    """

    attends = False
    adapter = None

    def __init__(self, layer: nn.Module) -> None:
        name = attention_name(layer)
        for other, module in layer.named_children():
            weights = dict(module.named_parameters())
            if "bias" in weights and weights["weight"].ndim == 1:
                raise UnsupportedModelError(
                    f"{type(layer).__name__} has {other}, a norm with a bias: it could make something of no attention"
                )
        self._layer = shallow_copy(layer)
        self._layer._modules[name] = _Silence()

    def __call__(self, x: Tensor, known: PromptStatistics | None, **attention: Any) -> tuple[Tensor, None]:
        return OwnBlock(self._layer)(x, known, **attention)

    def statistics(self, x: Tensor, prompt_mask: Tensor, companion: Tensor | None = None) -> None:
        """There is no adapter that needs any."""


class _Silence(nn.Module):
    def forward(self, hidden_states: Tensor, **attention: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


Block = OwnBlock | KeptBlock | SkippedBlock | SilencedBlock


def planned_blocks(layers: Sequence[nn.Module], plan: Plan) -> list[Block]:
    """The form each layer has under `plan`.

    Raises:
        UnsupportedModelError: a layer that changes its form is not a block that can be taken apart.
    """
    blocks: list[Block] = [OwnBlock(layer) for layer in layers]
    for field in ("skips", "adapters"):
        for part in getattr(plan, field):
            try:
                blocks[part.layer] = _planned(layers[part.layer], field, part.adapter)
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"layer {part.layer}: {error}; the plan's {field} cannot apply") from error
    return blocks


def _planned(layer: nn.Module, field: str, adapter: Any) -> Block:
    if field == "adapters":
        return KeptBlock(layer, adapter)
    if adapter is None and not can_be_taken_apart(layer):
        return SilencedBlock(layer)
    return SkippedBlock(layer, adapter)


def _tensor(output: object) -> Tensor:
    if not isinstance(output, Tensor):
        raise UnsupportedModelError(f"an MLP that returns a {type(output).__name__}: not a block of pre-norm form")
    return output
