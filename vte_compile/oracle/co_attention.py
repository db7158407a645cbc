"""What a plan makes of co-attention layers, in plain PyTorch, literally as the formulas say: the passes' reference.

The formulas are in the head of vte_compile/plan/co_attention.py; the layers are those of transformers' BridgeTower.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vte_compile.adapters import PIA, PlainAdapter, apply_plain, pia_term, pool, route
from vte_compile.errors import UnsupportedModelError
from vte_compile.families.co_attention import find_co_attention, with_layers
from vte_compile.plan import Plan
from vte_compile.plan.co_attention import SIDES, CoAttention

ModelT = TypeVar("ModelT", bound=nn.Module)


def co_attention_oracle(model: ModelT, plan: Plan) -> ModelT:
    """A shallow copy of a BridgeTower model, in eval mode, whose co-attention layers run the formulas.

    Raises:
        PlanMismatchError: The plan does not fit the model.
        UnsupportedModelError: The model has no co-attention layers, or not those of BridgeTower.
    """
    plan.check(model)
    spec = find_co_attention(model)
    if spec is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no co-attention layers (only BridgeTower's are known)")
    parts = {part.place: part for part in plan.co_attention}
    layers: dict[str, list[nn.Module]] = {
        side: [
            OracleLayer(spec.layer(side, level), parts.get((index, level), CoAttention(side, level)))
            for level in range(spec.levels)
        ]
        for index, side in enumerate(SIDES)
    }
    return with_layers(model, spec, layers)


class OracleLayer(nn.Module):
    """One co-attention layer under a plan, with the arguments and results of BridgeTowerBertCrossLayer."""

    def __init__(self, layer: nn.Module, part: CoAttention) -> None:
        super().__init__()
        self.layer, self.part = layer, part

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, None, None]:
        """The output [B, T, C], for h [B, T, C] and e [B, S, C]; masks are added to scores [B, heads, T, T or S]."""
        layer: Any = self.layer
        part, h, e = self.part, hidden_states, encoder_hidden_states
        if part.skip_self:
            mixed = _pia(part.self_adapter, h, h)
        else:
            adapted = _adapt(part.self_adapter, h)
            mixed = _attention(layer.attention, adapted, adapted, attention_mask)
        a = layer.attention.output.LayerNorm(mixed + h)
        if part.skip_cross:
            mixed = _pia(part.cross_adapter, h, e)
        else:
            mixed = _attention(layer.crossattention, _adapt(part.cross_adapter, a), e, encoder_attention_mask)
        c = layer.crossattention.output.LayerNorm(mixed + a)
        inner = layer.intermediate.intermediate_act_fn(layer.intermediate.dense(_adapt(part.ffn_adapter, c)))
        return layer.output.LayerNorm(layer.output.dense(inner) + c), None, None


def _adapt(adapter: Any, x: Tensor) -> Tensor:
    """AD(x), or x without an adapter."""
    if adapter is None:
        return x
    assert isinstance(adapter, PlainAdapter)
    return apply_plain(adapter, x, route(adapter.router, x))


def _pia(pia: Any, u: Tensor, v: Tensor) -> Tensor:
    """PIA(u, v), or nothing."""
    if pia is None:
        return torch.zeros_like(u)
    assert isinstance(pia, PIA)
    return pia_term(pia, u, route(pia.router, u), pool(pia, v))


def _attention(attention: Any, x: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
    """Wo . softmax(q k / sqrt(d) + mask) v + bo."""
    own = attention.self
    q, k, v = (
        linear(tokens).unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2)
        for linear, tokens in ((own.query, x), (own.key, other), (own.value, other))
    )
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask
    output: Tensor = attention.output.dense((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
    return output
