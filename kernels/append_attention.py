"""One decode step of a layer's attention: append a token to its keys and values, and attend to all of them.

``vte::append_attention`` is the op that graphs of the phase "decode" hold. It is the naive reference: like all ops of a
graph it changes nothing in place, so it copies what was cached. When the graph runs, it does not: lower_piecewise cuts
the graph there, and ``append_and_attend`` writes one column into a cache with room for it (runtime/cache.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vte_compile.kernels.causal_attention import attend


def append_and_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor | None,
    scale: float | None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Write a token into the last column of ``keys`` and ``values``, and attend to all columns, or to the last ones.

    Args:
        query: [B, heads, 1, D].
        key: [B, kv_heads, 1, D]; ``value`` likewise, with a head size of its own.
        keys: [B, kv_heads, columns, D], and ``values``: views are fine, whose last column may hold anything.
        starts: [B] int64: the first real column of each row; None where all rows begin at 0.
        scale: Of the scores; None for 1 / sqrt(D).
        window: How many columns are seen, the last ones; 0: all.
        softcap: Scores s become ``softcap * tanh(s / softcap)``; 0: as they are.

    Returns:
        [B, 1, heads, D of the values], contiguous.
    """
    keys.narrow(2, keys.shape[2] - 1, 1).copy_(key)
    values.narrow(2, values.shape[2] - 1, 1).copy_(value)
    return _attend(query, keys, values, starts, scale, window, softcap)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor | None, scale: float | None, window: int, softcap: float
) -> Tensor:
    batch, heads, _, size = query.shape
    if window and (hidden := keys.shape[2] - window) > 0:
        keys, values = keys[:, :, hidden:], values[:, :, hidden:]
        starts = None if starts is None else starts - hidden
    kv_heads, columns = keys.shape[1:3]
    mask: Tensor | None = None
    if starts is not None:
        mask = (torch.arange(columns, device=query.device) >= starts[:, None])[:, None, None]
    # The heads of a group are rows of their key/value head, so that keys need no repetition.
    query = query.reshape(batch, kv_heads, heads // kv_heads, size)
    output = attend(query, keys, values, mask, scale, softcap)
    return output.reshape(batch, 1, heads, values.shape[3])


@torch.library.custom_op("vte::append_attention", mutates_args=())
def append_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    starts: Tensor | None,
    scale: float | None,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`append_and_attend` does, without changing anything.

    Args:
        past_keys: [B, kv_heads, columns, D], and ``past_values``: without the new token.

    Returns:
        The attention's output [B, 1, heads, D of the values], and keys and values with one column more.
    """
    keys, values = torch.cat([past_keys, key], 2), torch.cat([past_values, value], 2)
    return _attend(query, keys, values, starts, scale, window, softcap), keys, values


@append_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, past_keys: Tensor, past_values: Tensor, *args: object
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads = query.shape[:2]
    keys, values = (
        past.new_empty(*past.shape[:2], past.shape[2] + 1, past.shape[3]) for past in (past_keys, past_values)
    )
    return query.new_empty(batch, 1, heads, past_values.shape[3]), keys, values
