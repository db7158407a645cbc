"""Seeing what a layer's attention is given, while the layer runs as it is: its own projections, norms and rotary.

The layer attends through another function of transformers' AttentionInterface, which shows query and key to whoever
watches and then attends as usual (SDPA; where scores are capped, which that cannot do, as graphs of prompts do). So
attention scores can be had without a second implementation of any decoder.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vte_compile.capture.model_state import attention_implementation
from vte_compile.errors import UnsupportedModelError
from vte_compile.kernels.causal_attention import attend

Watch = Callable[[Tensor, Tensor, float, float | None], None]
"""Gets query [heads, n, D], key [kv_heads, keys, D], both after rotary, the factor of their products, and by how much
these are then capped (None: not at all).

Query head h attends to the keys of head h // (heads / kv_heads)."""

_ATTENTION = "vte_watched"
# What some models add to the scores: the softmax would be another one.
_UNKNOWN = ("s_aux",)
_watch: contextvars.ContextVar[Watch] = contextvars.ContextVar("vte_watch")


@contextlib.contextmanager
def watched(config: Any, index: int, layer: nn.Module, watch: Watch) -> Iterator[None]:
    """Let `watch` see the attention of one layer, number `index`, that runs meanwhile on one row.

    Args:
        config: The decoder's.
        index: Of the layer, for messages.
        layer: The layer, likewise.
        watch: Is called once.

    Raises:
        UnsupportedModelError: The layer does not attend through transformers' AttentionInterface, or its scores are
            more than the products of query and key, capped or not.
    """
    calls = 0

    def counted(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> None:
        nonlocal calls
        calls += 1
        watch(query, key, scaling, softcap)

    token = _watch.set(counted)
    try:
        with attention_implementation(config, _ATTENTION):
            yield
    finally:
        _watch.reset(token)
    if calls != 1:
        raise UnsupportedModelError(
            f"layer {index} ({type(layer).__name__}) does not attend through transformers' AttentionInterface: which "
            "tokens it attends to cannot be seen."
        )


def _watched_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one row, through the usual function: query [1, heads, n, D], key [1, kv_heads, keys, D]."""
    if extra := [name for name in _UNKNOWN if kwargs.get(name) is not None]:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with {', '.join(extra)}: which tokens it attends to is not known here."
        )
    _watch.get()(query[0], key[0], query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    if softcap is not None:
        seen = None if attention_mask is None else attention_mask == 0
        return attend(query, key, value, seen, scaling, softcap).transpose(1, 2).contiguous(), None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output, None


AttentionInterface.register(_ATTENTION, _watched_attention)
