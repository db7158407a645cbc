"""A companion token in front of a prompt: put there before prefill, taken away behind it.

It is in front, so that it is no part of a question that a gate reads, and never the last token. (Graphs of the phase
"chunk" have it behind, among the padding: passes/companion_token.py.)
"""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "companion"
"""Of its embedding [C], among weights of graphs and engines."""


def with_companion(row: tuple[Tensor, ...], companion: Tensor) -> tuple[Tensor, ...]:
    """A row's embeddings [n, C], visual mask [n] and positions [n] or [3, n], with one token more: [1 + n, ...].

    Its position does not matter, since it attends to itself alone.
    """
    embeds, visual, positions = row
    return (
        torch.cat([companion.to(embeds)[None], embeds]),
        torch.cat([visual.new_zeros(1), visual]),
        torch.cat([positions[..., :1], positions], -1),
    )


def without_companion(logits: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [1, 1 + tokens left, vocabulary], or [1, 1, vocabulary] of the last token, and which tokens are left,
    counted with the companion: the same without it."""
    return logits[:, 1:] if logits.shape[1] == len(kept) else logits, kept[1:] - 1
