"""Turn the inputs of a model's forward into the inputs of its decoder, with the model's own merging code."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.decoder import DecoderSpec
from vte_compile.families.deepstack import FEATURES, MASK, spread
from vte_compile.families.token_blocks import TYPES, blocks_of, continued_inputs, unmasked_block

# What a merger may hand to its decoder and the runner decides itself; anything else would be lost.
_DECODER_ARGUMENTS = frozenset(
    "input_ids attention_mask position_ids cache past_key_values use_cache cache_position return_dict "
    "output_attentions output_hidden_states logits_to_keep".split()
)
# Inputs that only say of images and videos where they are and how large: without any of those they change nothing.
_PLACES = frozenset("mm_token_type_ids image_grid_thw video_grid_thw second_per_grid_ts".split())


@dataclass
class DecoderInputs:
    """One chunk (prefill, continuation or decode step) as the decoder sees it."""

    embeds: Tensor
    """[B, T, C], visual features in place."""
    visual_mask: Tensor
    """[B, T] bool, True at visual tokens."""
    image_hidden_states: Tensor | None
    """The projected visual features, if the family returns them."""
    position_ids: Tensor | None = None
    """[3, B, T] of a chunk with images, where positions are multimodal: counted from 0 in each row. None: as text."""
    token_inputs: list[Tensor] = field(default_factory=list)
    """[B, T, ...] each, as ``DecoderSpec.token_inputs`` names them."""


@dataclass
class _HandedOver:
    """What a model's merging code handed to its decoder, and what it returned."""

    embeds: Tensor
    positions: Tensor | None
    deepstack: tuple[Tensor, list[Tensor]] | None
    """Where the visual tokens are, and what is added to them behind layers."""
    mask: Any
    """Which tokens attend to which, where the model says so; else None."""
    output: Any


def chunk_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The one of both that was given.

    Raises:
        InputError: Both or none.
    """
    tokens = input_ids if input_ids is not None else inputs_embeds
    if tokens is None or (input_ids is not None and inputs_embeds is not None):
        raise InputError("Pass exactly one of input_ids and inputs_embeds.")
    return tokens


def _recorder(spec: DecoderSpec, recorded: list[dict[str, Any]]) -> nn.Module:
    """A stand-in for the decoder while the model's own code merges text and images: same attributes, no layers run."""

    decoder = spec.decoder
    known = _DECODER_ARGUMENTS | ({MASK, FEATURES} if spec.deepstack else set())

    def forward(inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        if extra := sorted(k for k, v in kwargs.items() if k not in known and v is not None):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} is given {', '.join(extra)} besides embeddings: not supported so far."
            )
        mask = kwargs.get("attention_mask")
        if mask is not None and not spec.has_blocks and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} is given a mask of its model's own making: only causal attention is "
                "supported so far."
            )
        recorded.append({"inputs_embeds": inputs_embeds, **kwargs})
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)

    stand_in = copy.copy(decoder)
    stand_in.forward = forward
    return stand_in


def _merge(model: nn.Module, spec: DecoderSpec, **inputs: Any) -> _HandedOver:
    """Run the model's merging code.

    What that code keeps on its module (Qwen2-VL its rope_deltas) is kept on a copy, and so forgotten.
    """
    parent, _, attribute = spec.path.rpartition(".")
    recorded: list[dict[str, Any]] = []
    merger = copy.copy(model.get_submodule(parent))
    merger._modules = {**merger._modules, attribute: _recorder(spec, recorded)}
    output = merger(**inputs)
    [given] = recorded
    features = given.get(FEATURES)
    deepstack = None if features is None else (given[MASK], list(features))
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    return _HandedOver(given["inputs_embeds"], positions, deepstack, mask, output)


def image_positions(
    model: nn.Module, spec: DecoderSpec, input_ids: Tensor, attention_mask: Tensor, multimodal: dict[str, Any]
) -> Tensor | None:
    """Positions of a chunk with images, of a model whose positions are multimodal, without looking at any pixel.

    Args:
        model: The user's model.
        spec: Where its decoder is.
        input_ids: [B, T].
        attention_mask: [B, T] bool.
        multimodal: Other inputs of the model's forward; of those of one number per token, the last T count.

    Returns:
        [3, B, T] int64, counted from 0 in each row; None if no image is spoken of.
    """
    places = {name: value for name, value in multimodal.items() if name in _PLACES and value is not None}
    types = places.get("mm_token_type_ids")
    if types is None or len(places) == 1:
        return None
    places["mm_token_type_ids"] = types[:, -input_ids.shape[1] :]
    merged = _merge(model, spec, input_ids=input_ids, attention_mask=attention_mask.long(), **places)
    positions = merged.positions
    return None if positions is None else positions[-spec.position_rows :]


def decoder_inputs(
    model: nn.Module,
    spec: DecoderSpec,
    *,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    visual_mask: Tensor | None,
    may_exit: bool,
    multimodal: dict[str, Any],
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    continued: bool = False,
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
        attention_mask: [B, T] bool of this chunk; only multimodal positions depend on it.
        position_ids: [3, B or 1, T] or [B or 1, T] if the caller knows them: then none are asked for.
        continued: Whether earlier chunks are cached.

    Raises:
        InputError: Contradicting or misshaped inputs; the message says which.
    """
    tokens = chunk_tokens(input_ids, inputs_embeds)
    shape = tuple(tokens.shape[:2])
    decoding = continued and shape[1] == 1 and not may_exit and not _has_images(multimodal)
    mask = _visual_mask(spec, input_ids, visual_mask, shape, may_exit, decoding, tokens.device)
    if shape[1] == 1:  # a token alone attends to itself and those before it, whatever its type
        multimodal = {name: value for name, value in multimodal.items() if name != TYPES}
    if _has_images(multimodal) and input_ids is not None and not bool(mask.any()):
        raise InputError(
            f"pixel_values was given, but input_ids holds no image placeholder (ids {list(spec.visual_token_ids)}): "
            "put the image token into the prompt, or leave pixel_values out. In a later turn with a cache, pass only "
            "the images of the new turn."
        )
    if not multimodal.keys() - _PLACES or not spec.is_multimodal:
        if multimodal and not spec.is_multimodal:
            raise InputError(
                f"{type(model).__name__}: an optimized language model takes no {', '.join(sorted(multimodal))}: pass "
                "inputs_embeds and visual_mask, or call its generate() if that makes embeddings."
            )
        embeds = inputs_embeds if inputs_embeds is not None else model.get_input_embeddings()(input_ids)  # type: ignore[operator]
        return DecoderInputs(embeds, mask, None, None, _token_inputs(spec, embeds, None, continued))
    inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, **multimodal}
    if spec.position_rows == 1:
        if spec.has_blocks:
            inputs = continued_inputs(inputs, shape[0], shape[1], continued)
        return _decoder_inputs(spec, _merge(model, spec, **inputs), mask, None, continued)
    real = None if attention_mask is None else attention_mask.long()
    merged = _merge(model, spec, **inputs, attention_mask=real, position_ids=position_ids)
    positions = merged.positions
    if position_ids is not None:
        positions = None
    elif _has_images(multimodal) and (positions is None or input_ids is None):
        raise InputError(
            f"{type(model).__name__} cannot tell the positions of its images from these inputs: pass input_ids, "
            "mm_token_type_ids and image_grid_thw (or video_grid_thw), as the processor gives them, or position_ids."
        )
    positions = None if positions is None else positions[-spec.position_rows :]
    return _decoder_inputs(spec, merged, mask, positions, continued)


def _decoder_inputs(
    spec: DecoderSpec, merged: _HandedOver, visual_mask: Tensor, positions: Tensor | None, continued: bool
) -> DecoderInputs:
    features = getattr(merged.output, "image_hidden_states", None)
    token_inputs = _token_inputs(spec, merged.embeds, merged, continued)
    return DecoderInputs(merged.embeds, visual_mask, features, positions, token_inputs)


def _token_inputs(spec: DecoderSpec, embeds: Tensor, merged: _HandedOver | None, continued: bool) -> list[Tensor]:
    """What graphs take besides, from what the model's merging code handed over; None: it need not run, of text."""
    if merged is None or merged.deepstack is None:
        token_inputs = [torch.zeros_like(embeds) for _ in range(spec.deepstack)]
    else:
        mask, features = merged.deepstack
        if len(features) != spec.deepstack:
            raise UnsupportedModelError(
                f"{type(spec.decoder).__name__} is given {FEATURES} for {len(features)} layers, where its config says "
                f"{spec.deepstack}."
            )
        token_inputs = spread(mask, features, embeds)
    if spec.has_blocks:
        batch, tokens = embeds.shape[:2]
        unmasked = -1 if continued else unmasked_block(spec.decoder)
        made = None if merged is None else merged.mask
        try:
            token_inputs.append(blocks_of(made, batch, tokens, unmasked, embeds.device))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{type(spec.decoder).__name__}: {error}") from None
    return token_inputs


def _has_images(multimodal: dict[str, Any]) -> bool:
    # generate() may run the vision tower first and pass what it gave.
    return any(multimodal.get(name) is not None for name in ("pixel_values", "pixel_values_videos")) or bool(
        multimodal.get("mm_encoder_outputs")
    )


def _visual_mask(
    spec: DecoderSpec,
    input_ids: Tensor | None,
    given: Tensor | None,
    shape: tuple[int, ...],
    may_exit: bool,
    decoding: bool,
    device: torch.device,
) -> Tensor:
    """[B, T]; of a decode step nothing is visual, and nobody asks: a GPU would only be kept waiting."""
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
        if not decoding:
            # A language model alone embeds text only, so no id of it can be visual.
            ids = torch.tensor(spec.visual_token_ids, dtype=input_ids.dtype).to(device, non_blocking=True)
            return torch.isin(input_ids, ids)
    elif may_exit:
        raise InputError(
            "The plan has exits, but which tokens are visual is not known: with inputs_embeds alone no visual token id "
            "can be looked up. Pass visual_mask ([batch, tokens] bool, all False for a text-only prompt) beside it."
        )
    return torch.zeros(shape, dtype=torch.bool, device=device)
