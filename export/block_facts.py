"""Whether the blocks of tokens that a model's mask has are those that engines can make, told by the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vte_compile.errors import UnsupportedModelError
from vte_compile.export.manifest import BLOCK_RULES, PROMPTS
from vte_compile.export.token_inputs import block_ids
from vte_compile.export.vision import example_image, tokens_of_image
from vte_compile.families.inputs import decoder_inputs
from vte_compile.families.token_blocks import TYPES, allowed


def block_rule(fast: Any) -> str | None:
    """Which tokens attend to each other in both directions, one of BLOCK_RULES.

    Args:
        fast: From :func:`vte_compile.optimize`.

    Returns:
        None if all are causal.

    Raises:
        UnsupportedModelError: The model's own code makes other blocks, or none, of a prompt.
    """
    if not fast._vte_spec.has_blocks:
        return None
    reasons = {rule: _difference(fast, rule) for rule in BLOCK_RULES}
    if fitting := [rule for rule, reason in reasons.items() if not reason]:
        return fitting[0]
    said = "; ".join(f"by the rule {rule!r} it {reason}" for rule, reason in reasons.items())
    raise UnsupportedModelError(
        f"{type(fast).__name__}: some of its tokens attend to later ones, and which do engines have to tell from token "
        f"ids: {said}."
    )


def _difference(fast: Any, rule: str) -> str:
    """What the model's own code does otherwise, on prompts and later turns; "" if nothing."""
    image = example_image(fast)
    text, some = [False] * 3, [True] * 3
    try:
        count = tokens_of_image(fast, image)
        trials = {
            "prompts with images": ([*text, *some, *text, *some, *some, *text], None, False),
            "prompts of text": ([*text, *text], None, False),
            "later turns of text": ([*text, *text], None, True),
            "later turns with an image": ([*text, *[True] * count, *text], image, True),
        }
        for name, (placeholders, pixels, continued) in trials.items():
            marked = np.array(placeholders)
            theirs = _blocks_of_model(fast, rule, marked, pixels, continued)
            ours = torch.from_numpy(block_ids(rule, marked, not continued))[None]
            if not torch.equal(allowed(theirs, len(marked)), allowed(ours, len(marked))):
                return f"makes others of {name}"
    except Exception as error:  # whatever the model's own code raises
        return f"raises {type(error).__name__} ({error})"
    return ""


def _blocks_of_model(fast: Any, rule: str, placeholders: Any, pixels: Any, continued: bool) -> torch.Tensor:
    """[1, n], with token types as the model's processor gives them under this rule."""
    spec = fast._vte_spec
    word = next(i for i in range(len(spec.visual_token_ids) + 1) if i not in spec.visual_token_ids)
    marked = torch.from_numpy(placeholders)[None].to(spec.device)
    ids = torch.where(marked, spec.visual_token_ids[0], word)
    given = {TYPES: torch.zeros_like(ids) if rule == PROMPTS else marked.long()}
    if pixels is not None:
        given["pixel_values"] = pixels
    options: dict[str, Any] = {"inputs_embeds": None, "visual_mask": None, "may_exit": False}
    with torch.no_grad():
        made = decoder_inputs(fast, spec, input_ids=ids, multimodal=given, continued=continued, **options)
    return made.token_inputs[-1].cpu()
