"""Embeddings of text and images of an MLLM, as its own forward makes them."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from vte_compile.errors import InputError


@torch.no_grad()
def embed(
    model: nn.Module, input_ids: Tensor, pixel_values: Tensor | None = None, **processor_outputs: Any
) -> tuple[Tensor, Tensor]:
    """Input embeddings of a LLaVA-type MLLM, and where its visual tokens are.

    `model` has `get_image_features` and `config.image_token_id`; input_ids [B, T] is already expanded to one
    placeholder per visual token. Of the other outputs of the processor those named image_* or pixel_*, and those that
    `get_image_features` names, go there; the rest (attention_mask, ...) is ignored. Returns inputs_embeds [B, T, C] and
    visual_mask bool [B, T]; multimodal positions are the model's own business (`get_rope_index`), and so is what it
    adds behind layers (`deepstack_features` of what `get_image_features` gives). Raises InputError if the placeholders
    and the image features do not match in number.
    """
    mllm = cast(Any, model)
    image_token_id = getattr(mllm.config, "image_token_id", None)
    visual_mask = (
        torch.zeros_like(input_ids, dtype=torch.bool) if image_token_id is None else input_ids == image_token_id
    )
    # The placeholder id may lie outside the embedding table; these rows are overwritten anyway.
    inputs_embeds: Tensor = mllm.get_input_embeddings()(input_ids.masked_fill(visual_mask, 0))
    features = inputs_embeds.new_zeros(0, inputs_embeds.shape[-1])
    if pixel_values is not None:
        taken = inspect.signature(mllm.get_image_features).parameters
        extras = {
            key: value
            for key, value in processor_outputs.items()
            if key.startswith(("image_", "pixel_")) or (key in taken and key not in ("input_ids", "attention_mask"))
        }
        output = mllm.get_image_features(pixel_values=pixel_values, **extras)
        images = getattr(output, "pooler_output", output)
        features = torch.cat([image.reshape(-1, image.shape[-1]) for image in images]).to(inputs_embeds)
    if int(visual_mask.sum()) != len(features):
        raise InputError(
            f"the prompt has {int(visual_mask.sum())} image placeholders, the images have {len(features)} visual tokens"
        )
    inputs_embeds[visual_mask] = features
    return inputs_embeds, visual_mask
