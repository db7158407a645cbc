"""Turn the inputs of a model's forward into the inputs of its decoder, with the model's own merging code."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.decoder import DecoderSpec

# What a merger may hand to its decoder and the runner decides itself; anything else would be lost.
_DECODER_ARGUMENTS = frozenset(
    "attention_mask position_ids past_key_values use_cache cache_position return_dict output_attentions "
    "output_hidden_states logits_to_keep".split()
)


@dataclass
class DecoderInputs:
    """One chunk (prefill, continuation or decode step) as the decoder sees it."""

    embeds: Tensor
    """[B, T, C], visual features in place."""
    visual_mask: Tensor
    """[B, T] bool, True at visual tokens."""
    image_hidden_states: Tensor | None
    """The projected visual features, if the family returns them."""


def _recorder(decoder: nn.Module, recorded: list[Tensor]) -> nn.Module:
    """A stand-in for the decoder while the model's own code merges text and images: same attributes, no layers run."""

    def forward(inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        if extra := sorted(k for k, v in kwargs.items() if k not in _DECODER_ARGUMENTS and v is not None):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} is given {', '.join(extra)} besides embeddings: not supported so far."
            )
        recorded.append(inputs_embeds)
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)

    stand_in = copy.copy(decoder)
    stand_in.forward = forward
    return stand_in


def decoder_inputs(
    model: nn.Module,
    spec: DecoderSpec,
    *,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    visual_mask: Tensor | None,
    may_exit: bool,
    multimodal: dict[str, Any],
) -> DecoderInputs:
    """Embed one chunk.

    Args:
        model: The user's model.
        spec: Where its decoder is.
        input_ids: [B, T], or None if ``inputs_embeds`` is given.
        inputs_embeds: [B, T, C], or None.
        visual_mask: [B, T] bool; found from the placeholder ids if None.
        may_exit: Whether it matters which tokens are visual (the plan has exits and this is not a decode step).
        multimodal: The other inputs of the model's forward (``pixel_values`` ...).

    Raises:
        InputError: Contradicting or misshaped inputs; the message says which.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("Pass exactly one of input_ids and inputs_embeds.")
    tokens = input_ids if input_ids is not None else inputs_embeds
    assert tokens is not None
    shape = tuple(tokens.shape[:2])
    mask = _visual_mask(spec, input_ids, visual_mask, shape, may_exit, tokens.device)
    if _has_images(multimodal) and input_ids is not None and not bool(mask.any()):
        raise InputError(
            f"pixel_values was given, but input_ids holds no image placeholder (ids {list(spec.visual_token_ids)}): "
            "put the image token into the prompt, or leave pixel_values out. In a later turn with a cache, pass only "
            "the images of the new turn."
        )
    parent, _, attribute = spec.path.rpartition(".")
    if not multimodal or not spec.is_multimodal:
        if multimodal:
            raise InputError(f"{type(model).__name__} takes no {', '.join(sorted(multimodal))}.")
        embeds = inputs_embeds if inputs_embeds is not None else model.get_input_embeddings()(input_ids)  # type: ignore[operator]
        return DecoderInputs(embeds, mask, None)
    recorded: list[Tensor] = []
    merger = copy.copy(model.get_submodule(parent))
    merger._modules = {**merger._modules, attribute: _recorder(spec.decoder, recorded)}
    output = merger(input_ids=input_ids, inputs_embeds=inputs_embeds, **multimodal)
    return DecoderInputs(recorded[0], mask, getattr(output, "image_hidden_states", None))


def _has_images(multimodal: dict[str, Any]) -> bool:
    # generate() may run the vision tower first and pass what it gave.
    return "pixel_values" in multimodal or bool(multimodal.get("mm_encoder_outputs"))


def _visual_mask(
    spec: DecoderSpec,
    input_ids: Tensor | None,
    given: Tensor | None,
    shape: tuple[int, ...],
    may_exit: bool,
    device: torch.device,
) -> Tensor:
    if given is not None:
        if tuple(given.shape) != shape or given.dtype != torch.bool:
            raise InputError(
                f"visual_mask: expected a bool tensor of shape {list(shape)} ([batch, tokens of this call]), got "
                f"{str(given.dtype).removeprefix('torch.')} of shape {list(given.shape)}."
            )
        return given.to(device)
    if input_ids is not None:
        if may_exit and spec.is_multimodal and not spec.visual_token_ids:
            raise InputError(
                "The plan has exits, but no visual token id is known: the model's config has neither image_token_id "
                "nor video_token_id. Set it, or pass visual_mask ([batch, tokens] bool)."
            )
        # A language model alone embeds text only, so no id of it can be visual.
        return torch.isin(input_ids, torch.tensor(spec.visual_token_ids, device=device, dtype=input_ids.dtype))
    if may_exit:
        raise InputError(
            "The plan has exits, but which tokens are visual is not known: with inputs_embeds alone no visual token id "
            "can be looked up. Pass visual_mask ([batch, tokens] bool, all False for a text-only prompt) beside it."
        )
    return torch.zeros(shape, dtype=torch.bool, device=device)
