"""A sample as the decoder sees it: the embeddings of its prompt and of its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vte_compile.errors import InputError
from vte_compile.families.decoder import DecoderSpec
from vte_compile.families.inputs import DecoderInputs, decoder_inputs
from vte_compile.families.live import PREPARE, find_splice, spliced
from vte_compile.tuning.samples import Sample

# Inputs of the model that follow from the tokens.
_FROM_TOKENS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True, eq=False)
class Answered:
    """`embeds` [1, T, C] of the prompt, and of the answer but for its last token, which nothing follows; `answer` [A].

    So the last A positions are those that predict the answer. `visual` [T] bool: which tokens are visual. `positions`:
    their numbers, [1, T], or [3, 1, T] of a decoder with multimodal positions. `token_inputs`: what else the decoder
    takes of each token, each [1, T, ...], as ``DecoderSpec.token_inputs`` names it; the answer is text.
    """

    embeds: Tensor
    visual: Tensor
    answer: Tensor
    positions: Tensor
    token_inputs: tuple[Tensor, ...] = ()

    @property
    def prompt(self) -> int:
        """Number of tokens of the prompt."""
        return self.embeds.shape[1] + 1 - len(self.answer)

    def oracle_inputs(self, spec: DecoderSpec) -> dict[str, Any]:
        """The same as arguments of the oracle, by name."""
        features = [value[0, self.visual] for value in self.token_inputs[: spec.deepstack]]
        return {
            "inputs_embeds": self.embeds,
            "visual_mask": self.visual[None],
            "position_ids": self.positions,
            "deepstack": features or None,
            "block_ids": self.token_inputs[-1] if spec.has_blocks else None,
        }


def placed(spec: DecoderSpec, sample: Sample) -> dict[str, Tensor]:
    """The sample's inputs on the model's device, floating-point ones in its dtype."""
    return {
        name: value.to(spec.device, spec.dtype if value.is_floating_point() else value.dtype)
        for name, value in sample.inputs.items()
    }


@torch.no_grad()
def embed_answered(model: nn.Module, spec: DecoderSpec, sample: Sample) -> Answered:
    """Embed a sample, on the model's device; the model's own code merges text and images.

    Raises:
        InputError: The sample has no answer, or one outside the vocabulary, or its images and tokens do not fit.
    """
    if not sample.answer:
        raise InputError(f"{sample.name}: has no answer to compare; answer_of() lets the model give one.")
    if wrong := [token for token in sample.answer if not 0 <= token < spec.config.vocab_size]:
        raise InputError(f"{sample.name}: answer tokens {wrong[:5]} are not in the model's vocabulary.")
    inputs = placed(spec, sample)
    multimodal = {name: value for name, value in inputs.items() if name not in _FROM_TOKENS}
    try:
        if find_splice(type(model)) == PREPARE:
            prompt = _spliced_prompt(model, inputs["input_ids"], multimodal)
        else:
            prompt = decoder_inputs(
                model,
                spec,
                input_ids=inputs["input_ids"],
                inputs_embeds=None,
                visual_mask=None,
                may_exit=False,
                attention_mask=torch.ones_like(inputs["input_ids"], dtype=torch.bool),
                multimodal=multimodal,
            )
    except (ValueError, TypeError) as error:  # also the model's own, where images and placeholders do not match
        raise InputError(f"{sample.name}: {error}") from error
    # As in decode: what the model says is text, even if it says a placeholder's token.
    answer = inputs["input_ids"].new_tensor(sample.answer)
    said = model.get_input_embeddings()(answer[None, :-1])  # type: ignore[operator]
    visual = F.pad(prompt.visual_mask[0], (0, said.shape[1]))
    embeds = torch.cat([prompt.embeds, said], 1)
    token_inputs = [F.pad(value, (0, 0, 0, said.shape[1])) for value in prompt.token_inputs[: spec.deepstack]]
    if spec.has_blocks:
        token_inputs.append(F.pad(prompt.token_inputs[-1], (0, said.shape[1]), value=-1))
    return Answered(embeds, visual, answer, _positions(spec, prompt.position_ids, embeds), tuple(token_inputs))


def _spliced_prompt(model: Any, ids: Tensor, multimodal: dict[str, Any]) -> DecoderInputs:
    """A prompt of LLaVA's own code, in which one placeholder stands for an image (vte_compile/families/live.py)."""
    given = dict.fromkeys(PREPARE.takes) | {"images": None, "input_ids": ids} | multimodal
    result, visual = spliced(PREPARE, model.prepare_inputs_labels_for_multimodal, (), given)
    if visual is None:
        return DecoderInputs(model.get_input_embeddings()(ids), torch.zeros_like(ids, dtype=torch.bool), None)
    return DecoderInputs(result[PREPARE.embeds], visual, None)


def _positions(spec: DecoderSpec, of_prompt: Tensor | None, embeds: Tensor) -> Tensor:
    """A prompt's positions, and on from them those of its answer; None: all are counted, as of text."""
    length = embeds.shape[1]
    counted = torch.arange(length, device=embeds.device)[None]
    if spec.position_rows == 1:
        return counted
    if of_prompt is None:
        return counted.expand(spec.position_rows, 1, -1)
    said = torch.arange(length - of_prompt.shape[-1], device=embeds.device) + int(of_prompt.max()) + 1
    return torch.cat([of_prompt, said.expand(*of_prompt.shape[:-1], -1)], -1)
