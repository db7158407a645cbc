"""Do tokens know only of the tokens before them, in their own row? In a decoder, attention alone may mix them.

Mixtures of experts in which each token chooses its experts keep to that. Where experts choose their tokens, or have
room for so many only, a token's result depends on what else is computed with it: rows of a batch would change each
other, and a decode step would not continue its prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vte_compile.capture.model_state import evaluating
from vte_compile.errors import UnsupportedModelError
from vte_compile.families.decoder import DecoderSpec
from vte_compile.families.token_blocks import masks_of

_TOKENS = 8
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Largest difference of a token's hidden state, relative to the largest of them."""


@torch.no_grad()
def check_independence(model: nn.Module, spec: DecoderSpec) -> None:
    """Compare tokens of a text with the same ones when later tokens are away and another row is beside them.

    Half of the tokens may differ: rounding changes which expert is chosen where two are as good.

    Args:
        model: The user's model; its own decoder is asked.
        spec: Where that is.

    Raises:
        UnsupportedModelError: Most tokens differ.
    """
    decoder: Any = spec.decoder
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embeddings.num_embeddings, (2, _TOKENS), generator=generator).to(spec.device)
    half = _TOKENS // 2
    with evaluating(decoder):
        embeds = embeddings(ids)
        whole, halves = (
            decoder(inputs_embeds=part, use_cache=False, **_causal(spec, part)).last_hidden_state
            for part in (embeds[:1], embeds[:, :half])
        )
    expected = whole[0, :half]
    errors = (halves[0] - expected).abs().amax(-1) / expected.abs().max().clamp_min(1e-30)
    # `not <=` rather than `>`: NaN must fail too.
    if not errors.sort().values[half // 2 - 1] <= _TOLERANCE.get(expected.dtype, 5e-2):
        raise UnsupportedModelError(
            f"{type(model).__name__}: a token's hidden state depends on later tokens, or on other rows of the batch "
            f"(relative difference {float(errors.median()):.1e}), so tokens cannot leave without changing others. Do "
            "experts choose tokens in it (expert-choice routing), or have a capacity? Only routing where each token "
            "chooses its experts is supported."
        )


def _causal(spec: DecoderSpec, embeds: torch.Tensor) -> dict[str, Any]:
    """A mask of text, where the decoder would let tokens attend to later ones without it."""
    if not spec.has_blocks:
        return {}
    blocks = torch.full(embeds.shape[:2], -1, device=embeds.device)
    return {"attention_mask": masks_of(blocks, spec.config)}
