"""What a model's own code makes of images: what an encoder that was cut out of it is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vte_compile.errors import UnsupportedModelError, VTEError
from vte_compile.families.inputs import decoder_inputs

# Of features, relative to the largest.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def image_token(fast: Any) -> int:
    """The placeholder of images.

    Raises:
        UnsupportedModelError: The model's config names none.
    """
    token = getattr(fast.config, "image_token_id", getattr(fast.config, "image_token_index", None))
    if token is None:
        raise UnsupportedModelError(f"the config of {type(fast).__name__} names no image token.")
    return int(token)


def own_features(fast: Any, count: int, given: str, **multimodal: Any) -> Tensor:
    """What the model's own code puts where placeholders are.

    Args:
        fast: The optimized model.
        count: How many placeholders.
        given: What is given, for the message.
        multimodal: Inputs of the model's forward beside ids; those of one number per token are made of placeholders.

    Returns:
        [count, C]; with DeepStack [count, (1 + layers) * C]: behind an embedding what is added to it.

    Raises:
        UnsupportedModelError: It raises.
    """
    spec = fast._vte_spec
    ids = torch.full((1, count), image_token(fast), device=spec.device)
    if spec.position_rows > 1:
        multimodal["mm_token_type_ids"] = torch.ones_like(ids)
    options: dict[str, Any] = {"inputs_embeds": None, "visual_mask": None, "may_exit": False}
    try:
        made = decoder_inputs(fast, spec, input_ids=ids, multimodal=multimodal, **options)
        return torch.cat([made.embeds[0], *(added[0] for added in made.token_inputs[: spec.deepstack])], dim=-1)
    except VTEError:
        raise
    except Exception as error:  # whatever the model's own code raises
        raise UnsupportedModelError(f"{type(fast).__name__} cannot encode an image from {given}: {error}") from error


def check_features(fast: Any, got: Tensor, want: Tensor, otherwise: str) -> None:
    """Compare features with the model's own.

    Raises:
        UnsupportedModelError: They differ; ``otherwise`` says what the model's code must be doing.
    """
    differs = float((got.double() - want.double()).abs().max()) if got.shape == want.shape else float("inf")
    if not differs <= _TOLERANCE.get(want.dtype, 1e-4) * float(want.abs().max()):
        raise UnsupportedModelError(
            f"{type(fast).__name__}: its image encoder does more than {otherwise} (features differ by {differs:.3g})."
        )
