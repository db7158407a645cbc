"""Seeing what a layer's attention is given, while the layer runs as it is: its own projections, norms and rotary.

The layer attends through another function of transformers' AttentionInterface, which shows query and key to whoever
watches and then attends as usual (SDPA). So attention scores can be had without a second implementation of any decoder.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vte_compile.capture import attention_implementation
from vte_compile.errors import UnsupportedModelError

Watch = Callable[[Tensor, Tensor, float], None]
"""Gets query [heads, n, D], key [kv_heads, keys, D], both after rotary, and the factor of their products.

Query head h attends to the keys of head h // (heads / kv_heads)."""

_ATTENTION = "vte_watched"
# What some models add to the scores: the softmax would be another one.
_UNKNOWN = ("softcap", "s_aux")
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
            more than the products of query and key.
    """
    calls = 0

    def counted(query: Tensor, key: Tensor, scaling: float) -> None:
        nonlocal calls
        calls += 1
        watch(query, key, scaling)

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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one row, through the usual function: query [1, heads, n, D], key [1, kv_heads, keys, D]."""
    if extra := [name for name in _UNKNOWN if kwargs.get(name) is not None]:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with {', '.join(extra)}: which tokens it attends to is not known here."
        )
    _watch.get()(query[0], key[0], query.shape[-1] ** -0.5 if scaling is None else scaling)
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output, None


AttentionInterface.register(_ATTENTION, _watched_attention)
