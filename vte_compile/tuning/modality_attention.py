"""How attention is shared between modalities, layer by layer: the softmax mass of groups of queries on groups of keys.

DyVTE (arXiv 2411.19628, the empirical study) reads three stages from such curves; it gives no formula for them. Here a
query's share on a group of keys is the sum of its softmax weights on them, and a group of queries has the mean over
its tokens and all heads. So the shares of one group of queries sum to one.

The scores [heads, S, S] of a layer are never there at once: queries go block by block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vte_compile.tuning.answered import Answered
from vte_compile.tuning.examine import Examiner
from vte_compile.tuning.watched_attention import watched

QUERIES = ("visual", "question", "answer")
"""Groups of queries: the visual tokens; the question, which is the text behind the last of them, but for its last
token; and the positions that predict the answer, which are the prompt's last token and those of the answer but its
last."""
KEYS = ("first", "before", "visual", "question", "answer")
"""Groups of keys, which each token is in one of: the prompt's first token where it is text, since much attention ends
there whatever it says (an attention sink, arXiv 2309.17453); the other text in front of the last visual token; the
visual tokens; the text behind them up to the answer; the answer."""

# Scores that are there at once, unless one query has more: 64 MiB in float32, and as much again for their softmax.
_SCORES = 2**24


def query_groups(visual: Tensor, prompt: int) -> Tensor:
    """Which tokens are in which of `QUERIES`: bool [3, T], from `visual` [T] and the prompt's length."""
    place = torch.arange(len(visual), device=visual.device)
    last_visual = int(visual.nonzero().max())
    return torch.stack([visual, (place > last_visual) & (place < prompt - 1), place >= prompt - 1])


def key_groups(visual: Tensor, prompt: int) -> Tensor:
    """Which tokens are in which of `KEYS`: bool [5, T], from `visual` [T] and the prompt's length."""
    place = torch.arange(len(visual), device=visual.device)
    last_visual = int(visual.nonzero().max())
    first = (place == 0) & ~visual
    before = (place < last_visual) & ~visual & ~first
    return torch.stack([first, before, visual, (place > last_visual) & (place < prompt), place >= prompt])


def uniform_shares(queries: Tensor, keys: Tensor, seen: Tensor | None = None) -> Tensor:
    """The shares if every query attended equally to all it may see: float64 [Q, K] from bool [Q, T] and [K, T].

    What that is stands in `seen` [T, T] bool; None: all tokens up to itself.
    """
    counts = keys.double().cumsum(-1) if seen is None else (keys.float() @ seen.float().T).double()
    return _mean_over(queries, counts / counts.sum(0))


def attention_shares(
    query: Tensor,
    key: Tensor,
    scaling: float,
    queries: Tensor,
    keys: Tensor,
    seen: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The shares of attention in one layer, computed in float32 or wider.

    Args:
        query: [heads, T, D].
        key: [kv_heads, T, D]; query head h attends to the keys of head h // (heads / kv_heads).
        scaling: Of their products.
        queries: Groups of queries, bool [Q, T], none of them empty.
        keys: Groups of keys, bool [K, T].
        seen: Which tokens each of them attends to, bool [T, T]; None: all up to itself.
        softcap: By how much the scores are capped; None: not at all.

    Returns:
        Float64 [Q, K] on the CPU.
    """
    (heads, length, size), kv_heads = query.shape, len(key)
    wide = torch.promote_types(query.dtype, torch.float32)
    transposed, groups = key.to(wide).transpose(1, 2), keys.T.to(wide)
    place = torch.arange(length, device=query.device)
    by_token = torch.zeros(len(keys), length, dtype=torch.float64, device=query.device)
    for block in queries.any(0).nonzero().flatten().split(max(1, _SCORES // (heads * length))):
        # Behind the last token that these queries may see there is nothing for them.
        end = 1 + int(block[-1] if seen is None else seen[block].any(0).nonzero().max())
        asked = query[:, block].to(wide).reshape(kv_heads, -1, size)
        scores = (asked @ transposed[..., :end]).view(heads, len(block), end).mul_(scaling)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        scores.masked_fill_(place[:end] > block[:, None] if seen is None else ~seen[block, :end], -torch.inf)
        shares = scores.softmax(-1) @ groups[:end]
        by_token[:, block] = shares.double().mean(0).T
    return _mean_over(queries, by_token).cpu()


@torch.no_grad()
def measure_attention(examiner: Examiner, answered: Answered) -> Tensor:
    """All layers' attention shares for one prompt with its answer: float64 [L, Q, K] on the CPU.

    Raises:
        UnsupportedModelError: A layer's attention cannot be seen.
    """
    queries, keys = (groups(answered.visual, answered.prompt) for groups in (query_groups, key_groups))
    hidden, run = answered.embeds, examiner.run(answered)
    found: list[Tensor] = []

    def watch(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> None:
        found.append(attention_shares(query, key, scaling, queries, keys, run.seen(len(found)), softcap))

    for index, layer in enumerate(examiner.layers):
        with watched(examiner.decoder.config, index, layer, watch):
            hidden = examiner.run_layer(index, hidden, run)
    return torch.stack(found)


def _mean_over(groups: Tensor, values: Tensor) -> Tensor:
    """Means [Q, K] over the tokens of each group, bool [Q, T], of values [K, T]."""
    chosen = groups.to(values.dtype)
    return chosen @ values.T / chosen.sum(-1, keepdim=True)
