"""A layer's attention in a Dynamo graph: torch's own, or, where scores are capped, written out as transformers does it.

softmax(softcap * tanh(scale * query keys^T / softcap) + mask) values
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from vte_compile.errors import UnsupportedModelError


@dataclass(frozen=True)
class Attention:
    """What it reads."""

    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    """Bool, or added to the scores; None: torch's own is causal, or a decode step's."""


def find_attention(nodes: Sequence[fx.Node], layer: int, softcap: float | None) -> Attention:
    """The attention among a layer's nodes.

    Args:
        nodes: In order.
        layer: Its number, for messages.
        softcap: By how much the config says that scores are capped; None: they are not.

    Raises:
        UnsupportedModelError: There is another number than one, or it caps scores in another way than the config says.
    """
    target: Any = F.scaled_dot_product_attention if softcap is None else F.softmax
    found = [n for n in nodes if n.target is target]
    if len(found) != 1:
        needed = "sdpa" if softcap is None else "eager"
        raise UnsupportedModelError(
            f"layer {layer}: {len(found)} {target.__name__}, expected one: load the model with "
            f"attn_implementation={needed!r}."
        )
    if softcap is not None:
        return _capped(found[0], layer, softcap)
    _, key, value, *more = found[0].args
    mask = found[0].kwargs.get("attn_mask", more[0] if more else None)
    return Attention(key, value, mask if isinstance(mask, fx.Node) else None)  # type: ignore[arg-type]


def _capped(softmax: fx.Node, layer: int, softcap: float) -> Attention:
    scores, mask = _operands(softmax.args[0], operator.add)
    bound, by = _operands(scores, operator.mul)
    inside, _ = _operands(bound, torch.tanh)
    inner, divisor = _operands(inside, operator.truediv)
    products, _ = _operands(inner, operator.mul)
    _, key = _operands(products, torch.matmul)
    if not isinstance(key, fx.Node) or not isinstance(mask, fx.Node) or {_number(by), _number(divisor)} != {softcap}:
        raise UnsupportedModelError(
            f"layer {layer}: what {softmax.name} takes are not products of queries and keys, capped by {softcap} as "
            "the config says (attn_logit_softcapping), and a mask."
        )
    return Attention(key, _values(softmax, layer), mask)


def _values(softmax: fx.Node, layer: int) -> Any:
    """What the weights, at most in another dtype and after a dropout, are multiplied with."""
    weights = softmax
    while len(weights.users) == 1:
        [user] = weights.users
        if _calls(user, torch.matmul) and user.args[0] is weights:
            return user.args[1]
        if not _calls(user, F.dropout, "to", "type_as"):
            break
        weights = user
    raise UnsupportedModelError(
        f"layer {layer}: its attention weights ({weights.name}) are used for more than to weigh the values "
        "(output_attentions?)."
    )


def _calls(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in targets


def _operands(node: Any, target: Any) -> tuple[Any, Any]:
    """A node's first two arguments, None where it has no second; or of both, if it calls something else."""
    first, second, *_ = (*node.args, None, None) if _calls(node, target) else (None, None)
    return first, second


def _number(value: Any) -> float | None:
    """Also one that Dynamo reads from a tensor (dynamic=True), which becomes a constant with a guard."""
    value = value.meta.get("example_value") if isinstance(value, fx.Node) else value
    return float(value) if isinstance(value, (int, float, torch.SymFloat)) else None
