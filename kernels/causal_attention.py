"""Causal attention with what torch's own does not have: a sliding window, and scores that are capped.

``vte::causal_attention`` is what graphs of prompts hold where attention has one of these; elsewhere they hold torch's
own. Its queries are those of the last columns. ``attend`` and ``attend_causally`` are what the ops of packed prompts
and of decode steps share with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERIES = 256
"""Whose scores, where they are capped, are in memory at a time."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, softcap: float = 0.0
) -> Tensor:
    """Softmax attention, of scores that may be capped (Gemma 2, arXiv 2408.00118).

    Args:
        query: [B, heads, T, D].
        key: [B, kv_heads, S, D], and ``value``, with a head size of its own. ``heads`` is a multiple of ``kv_heads``.
        mask: Broadcast to [B, 1, T, S], True where a query attends; None: everywhere.
        scale: Of the scores; None for 1 / sqrt(D).
        softcap: Scores s become ``softcap * tanh(s / softcap)``; 0: as they are.

    Returns:
        [B, heads, T, D of the values].
    """
    batch, heads, tokens, size = query.shape
    kv_heads, columns = key.shape[1:3]
    if not softcap:
        grouped = heads != kv_heads
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    if tokens > _QUERIES:
        masks = None if mask is None else mask.broadcast_to(*mask.shape[:-2], tokens, columns).split(_QUERIES, -2)
        parts = [
            attend(part, key, value, None if masks is None else masks[i], scale, softcap)
            for i, part in enumerate(query.split(_QUERIES, 2))
        ]
        return torch.cat(parts, 2)
    # In the order and precision of transformers' eager attention; heads of a group are rows of their key/value head.
    scores = query.reshape(batch, kv_heads, -1, size) @ key.mT
    scores.mul_(size**-0.5 if scale is None else scale).div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(batch, heads, tokens, columns)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    output = weights.view(batch, kv_heads, -1, columns) @ value
    return output.view(batch, heads, tokens, value.shape[3])


def causal_mask(tokens: int, columns: int, window: int, device: torch.device) -> Tensor:
    """Which columns the last tokens see, [tokens, columns] bool: those up to their own, with a window the last of them.

    Args:
        tokens: The last ones.
        columns: Of all tokens.
        window: How many columns are seen; 0: all.
        device: Of the result.
    """
    column = torch.arange(columns, device=device)
    own = column[columns - tokens :, None]
    mask = column <= own
    return mask & (column > own - window) if window else mask


def attend_causally(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int = 0, softcap: float = 0.0
) -> Tensor:
    """:func:`attend`, where queries are those of the last columns, and see the columns up to their own.

    Args:
        window: How many columns a query sees, its own included, the last ones; 0: all.
    """
    tokens, columns = query.shape[2], key.shape[2]
    narrow = 0 < window < columns
    if tokens == 1:
        seen = slice(columns - window if narrow else 0, columns)
        return attend(query, key[:, :, seen], value[:, :, seen], None, scale, softcap)
    if tokens == columns and not narrow and not softcap:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return attend(query, key, value, causal_mask(tokens, columns, window, query.device), scale, softcap)


@torch.library.custom_op("vte::causal_attention", mutates_args=())
def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beside: Tensor | None,
    scale: float | None,
    window: int,
    softcap: float,
) -> Tensor:
    """Attend to the columns up to one's own, or to the last of them; and to some more.

    Args:
        query: [B, heads, T, D], of the last T columns.
        key: [B, kv_heads, S, D], and ``value``, with a head size of its own. ``heads`` is a multiple of ``kv_heads``.
        beside: [1, 1, T, S] bool, True at columns that are seen wherever they stand; None: there are none.
        scale: Of the scores; None for 1 / sqrt(D).
        window: How many columns a query sees else, the last ones up to its own; 0: all.
        softcap: Scores s become ``softcap * tanh(s / softcap)``; 0: as they are.

    Returns:
        [B, heads, T, D of the values], laid out as [B, T, heads, D] is.
    """
    if beside is None:
        output = attend_causally(query, key, value, scale, window, softcap)
    else:
        mask = causal_mask(query.shape[2], key.shape[2], window, query.device) | beside
        output = attend(query, key, value, mask, scale, softcap)
    return output.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


@causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: object) -> Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[3]).transpose(1, 2)
