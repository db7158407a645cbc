"""A sample as the decoder sees it: the embeddings of its prompt and of its answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vte_compile.errors import InputError
from vte_compile.families.inputs import decoder_inputs
from vte_compile.tuning.examine import Examiner
from vte_compile.tuning.samples import Sample

# Inputs of the model that follow from the tokens.
_FROM_TOKENS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True, eq=False)
class Answered:
    """`embeds` [1, T, C] of the prompt, and of the answer but for its last token, which nothing follows; `answer` [A].

    So the last A positions are those that predict the answer.
    """

    embeds: Tensor
    answer: Tensor

    @property
    def prompt(self) -> int:
        """Number of tokens of the prompt."""
        return self.embeds.shape[1] + 1 - len(self.answer)


@torch.no_grad()
def embed_answered(examiner: Examiner, sample: Sample) -> Answered:
    """Embed a sample, on the model's device; the model's own code merges text and images.

    Raises:
        InputError: The sample has no answer, or one outside the vocabulary, or its images and tokens do not fit.
    """
    if not sample.answer:
        raise InputError(f"{sample.name}: has no answer to compare; answer_of() lets the model give one.")
    if wrong := [token for token in sample.answer if not 0 <= token < examiner.spec.config.vocab_size]:
        raise InputError(f"{sample.name}: answer tokens {wrong[:5]} are not in the model's vocabulary.")
    inputs = examiner.placed(sample)
    try:
        prompt = decoder_inputs(
            examiner.model,
            examiner.spec,
            input_ids=inputs["input_ids"],
            inputs_embeds=None,
            visual_mask=None,
            may_exit=False,
            multimodal={name: value for name, value in inputs.items() if name not in _FROM_TOKENS},
        )
    except ValueError as error:  # also the model's own, where images and placeholders do not match in number
        raise InputError(f"{sample.name}: {error}") from error
    # As in decode: what the model says is text, even if it says a placeholder's token.
    answer = inputs["input_ids"].new_tensor(sample.answer)
    said = examiner.model.get_input_embeddings()(answer[None, :-1])
    return Answered(torch.cat([prompt.embeds, said], 1), answer)
