"""Logits that a model caps behind its head, and scores likewise, as Gemma 2 does (arXiv 2408.00118)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def logit_softcap(config: Any) -> float | None:
    """By how much a decoder's config says that logits are capped; None: they are not."""
    return getattr(config, "final_logit_softcapping", None) or None


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """``softcap * tanh(logits / softcap)``; the logits themselves, if it is None. Scores of attention, too."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


@torch.no_grad()
def softcap_of(model: nn.Module, config: Any) -> float | None:
    """By how much a model caps its logits, which its config alone does not tell: PaliGemma 2 did not in 5.17.

    Args:
        model: The user's model.
        config: Its decoder's.
    """
    softcap = logit_softcap(config)
    if softcap is None:
        return None
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    plain: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, inputs, output: plain.append(output))
    try:
        tokens = torch.arange(2, device=embeddings.weight.device)[None]
        logits = model(inputs_embeds=embeddings(tokens), position_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()
    return None if torch.equal(logits, plain[0]) else softcap
