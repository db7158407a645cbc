"""Causal attention of packed rows to themselves: what graphs of the phase "packed" hold.

Rows stand one behind the other in one sequence of T tokens, without padding. ``vte::packed_attention`` is the op: on
CPUs one call of torch's attention for each run of neighbours of equal length.
"""

from __future__ import annotations

from itertools import groupby, pairwise

import torch
from torch import Tensor

from vte_compile.kernels.causal_attention import attend_causally


@torch.library.custom_op("vte::packed_attention", mutates_args=())
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    scale: float | None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attend, in each row, causally: a row's last query sees all of its keys, the one before all but the last.

    Args:
        query: [1, heads, N, D].
        key: [1, kv_heads, T, D], and ``value``, with a head size of its own. ``heads`` is a multiple of ``kv_heads``.
        cu_queries: [B + 1] int32: row b has the queries ``cu_queries[b] .. cu_queries[b + 1] - 1``.
        cu_keys: [B + 1] int32, likewise; a row has as many keys as queries, or one query, its last.
        scale: Of the scores; None for 1 / sqrt(D).
        window: How many of these keys are seen, the last ones; 0: all.
        softcap: Scores s become ``softcap * tanh(s / softcap)``; 0: as they are.

    Returns:
        [1, heads, N, D of the values], laid out as [1, N, heads, D] is.
    """
    output = _empty_output(query, value)
    rows = zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()), strict=True)
    for _, run in groupby(rows, lambda row: tuple(end - begin for begin, end in row)):
        spans = list(run)
        q, k, v, out = (
            x[:, :, spans[0][i][0] : spans[-1][i][1]].unflatten(2, (len(spans), -1))[0].transpose(0, 1)
            for x, i in ((query, 0), (key, 1), (value, 1), (output, 0))
        )
        out.copy_(attend_causally(q, k, v, scale, window, softcap))
    return output


def _empty_output(query: Tensor, value: Tensor) -> Tensor:
    _, heads, queries, _ = query.shape
    return query.new_empty(1, queries, heads, value.shape[-1]).transpose(1, 2)


@packed_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: object) -> Tensor:
    return _empty_output(query, value)
