"""What stands around the decoder in an ONNX engine: gates, and the embedding of tokens and image features."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def gate_function(gated: bool) -> Callable[..., tuple[Tensor]]:
    """Should the visual tokens leave? (kernels/exit_gate.py says how a gate decides.) For rows with padding behind.

    Args:
        gated: Ask a gate; else they leave always.

    Returns:
        A function of hidden_states [B, T, C], visual_mask [B, T], lengths [B] and, of a gate, w1, w2 and threshold [],
        that gives [B] bool: never for a row without visual tokens, or without text behind them.
    """

    def leaves(visual_mask: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.arange(visual_mask.shape[1])
        start = torch.where(visual_mask, index + 1, 0).amax(1)
        return (start > 0) & (start < lengths), index, start

    def static(hidden_states: Tensor, visual_mask: Tensor, lengths: Tensor) -> tuple[Tensor]:
        return (leaves(visual_mask, lengths)[0],)

    def asked(
        hidden_states: Tensor, visual_mask: Tensor, lengths: Tensor, w1: Tensor, w2: Tensor, threshold: Tensor
    ) -> tuple[Tensor]:
        may, index, start = leaves(visual_mask, lengths)
        hidden = hidden_states.float()
        last = (lengths - 1)[:, None]
        question = (index >= start[:, None]) & (index < last)
        # No question but the last token: 0 / 0, and it never fires.
        mean = torch.where(question[..., None], hidden, 0.0).sum(1) / question.sum(1, keepdim=True)
        at = last[..., None].expand(-1, -1, hidden.shape[2])
        features = torch.cat([mean, hidden.gather(1, at)[:, 0]], dim=-1)
        logits = F.linear(F.gelu(F.linear(features, w1)), w2)
        return (may & (start < lengths - 1) & (logits[:, 1] - logits[:, 0] > threshold),)

    return asked if gated else static


def embedding_function(placeholders: list[int]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Embed tokens, with image features in the places of their placeholders, in order.

    Placeholders without a feature are tokens like others: models may generate some.

    Args:
        placeholders: The ids that stand for visual tokens.

    Returns:
        A function of input_ids [B, T], image_features [N, C] and the table [vocabulary, C] that gives embeddings [B, T,
        C] and the visual mask [B, T].
    """

    def embed(input_ids: Tensor, image_features: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        visual = torch.zeros_like(input_ids, dtype=torch.bool)
        for token in placeholders:
            visual = visual | (input_ids == token)
        # TensorRT sums floating-point numbers only; exact up to 2^24 tokens.
        nth = (visual.reshape(-1).float().cumsum(0).long() - 1).reshape(input_ids.shape)
        visual = visual & (nth < image_features.shape[0])
        embeds = F.embedding(input_ids.masked_fill(input_ids >= table.shape[0], 0), table)
        # One more row, so that there is one to gather where no feature is.
        features = torch.cat([image_features, table[:1] * 0])
        return torch.where(visual[..., None], F.embedding(nth.masked_fill(~visual, 0), features), embeds), visual

    return embed
