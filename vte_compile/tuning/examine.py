"""What the exits of a model do to the answer of a sample: features, labels and losses of all layers from one pass.

DyVTE (arXiv 2411.19628) draws one layer per step and continues the batch with and without visual tokens. Here the
prompt and its answer go through the decoder once; after each layer the text tokens alone branch off and run on, all
branches side by side. That gives the same numbers for all layers at once, since text tokens are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vte_compile.errors import InputError
from vte_compile.families.decoder import describe
from vte_compile.families.live import find_splice
from vte_compile.optimized_model import OptimizedModel
from vte_compile.oracle import Oracle
from vte_compile.oracle.blocks import OwnBlock
from vte_compile.plan import Plan
from vte_compile.tuning.answered import Answered, embed_answered, placed
from vte_compile.tuning.layer_run import LayerRun, run_block
from vte_compile.tuning.samples import Sample, check_question

# The paper's two conditions for the label "may exit".
AGREEING_POSITIONS, LOSS_RATIO = 0.99, 1.03

# Of generate(): nothing but the argmax decides, whatever the model's generation config says.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "return_dict_in_generate": False,
}

# What limits memory: branches run together up to as many tokens as the pass with the image has, or this many.
_BRANCH_TOKENS = 4096
# Answer positions whose logits are there at once.
_LOGIT_ROWS = 512


@dataclass(frozen=True, eq=False)
class Examined:
    """What exits do to n samples, for the decoder's L layers.

    `features` [n, L, 2C] float32 (float64 of such a model): what a gate after each layer reads. `same` [n, L]: the
    share of answer positions at which an exit after that layer leaves the full model's argmax; after the last layer an
    exit changes nothing, so there it is 1, unless attentions are skipped or adapted. `loss` [n, L + 1]: mean cross
    entropy of the answer for each exit, and in the last column for none. `visual`, `tokens` [n] int64: visual tokens,
    and all tokens, of the prompt.
    """

    features: Tensor
    same: Tensor
    loss: Tensor
    visual: Tensor
    tokens: Tensor

    @property
    def unchanged(self) -> Tensor:
        """[n, L]: no answer position changes; in the last column by the skips and adapters alone."""
        return self.same == 1

    def may_exit(self, slack: float = 0.0) -> Tensor:
        """[n, L]: the label. With a slack of 0 it is the paper's; a slack lets a small loss grow by as much."""
        return (self.same > AGREEING_POSITIONS) & (self.loss[:, :-1] < LOSS_RATIO * self.loss[:, -1:] + slack)

    def at(self, places: Sequence[int]) -> Examined:
        """The samples at these places, in this order."""
        index = torch.tensor(places, dtype=torch.long)
        return Examined(*(getattr(self, field.name)[index] for field in fields(Examined)))

    @classmethod
    def concatenate(cls, parts: Sequence[Examined]) -> Examined:
        """The samples of all parts, in order."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


class Examiner:
    """Examines samples of one model.

    `model`: a Hugging Face MLLM in eval mode, as it was loaded, with "sdpa" or "eager" attention. That its layers can
    be run one by one is tried out once. `base`: skips and adapters that the exits come on top of; the answers that are
    to stay are still those of the model without them.

    Raises UnsupportedModelError if they cannot; InputError for an optimized model or a base with exits;
    PlanMismatchError if the base is for another model.
    """

    def __init__(self, model: nn.Module, base: Plan | None = None) -> None:
        if isinstance(model, OptimizedModel):
            raise InputError("model: is an optimized one, whose answers have exits in them: pass the original model.")
        self.model: Any = model
        self.spec = describe(model)
        base = base or Plan()
        if base.exits:
            raise InputError("base: has exits, which are what is to be found: pass a plan of skips and adapters only.")
        oracle = Oracle(model, base)  # for its checks
        self.layers, self.decoder, self.lm_head = oracle.layers, oracle.decoder, oracle.lm_head
        self._blocks, self._companion = oracle.blocks, base.companion
        self._changed = bool(base.skips or base.adapters)

    @torch.no_grad()
    def examine(self, sample: Sample) -> Examined:
        """One sample that has an answer (n = 1), on the CPU; see :func:`examine`."""
        check_question(sample.inputs["input_ids"][0], self.spec.visual_token_ids, sample.name)
        answered = embed_answered(self.model, self.spec, sample)
        return self.examine_embedded(answered, sample.name)

    @torch.no_grad()
    def examine_embedded(self, answered: Answered, name: str = "sample") -> Examined:
        """The same of embeddings."""
        embeds, visual, answer = answered.embeds, answered.visual, answered.answer
        branches, features = self._branch(answered, name)
        wide = features.dtype
        # Behind the image there is only text: the last A text tokens are those that predict the answer.
        losses, chosen = self._measure(branches[:, -len(answer) :], answer, wide)
        loss = losses.mean(-1)
        loss = torch.cat([loss, loss[-1:]])  # behind the last layer an exit changes nothing
        reference = chosen[-1:]
        if self._changed:
            _, reference = self._measure(self._full(answered)[:, -len(answer) :], answer, wide)
        same = (chosen == reference).to(wide).mean(-1)
        for what, value in (("loss", loss), ("features", features)):
            if not bool(torch.isfinite(value).all()):
                bad = sorted({int(index[0]) for index in (~torch.isfinite(value)).nonzero()})
                raise InputError(
                    f"{name}: NaN or infinite {what} for exits after layers {bad}: is the model's dtype "
                    f"({embeds.dtype}) wide enough for it, and are its weights sound?"
                )
        counts = (torch.tensor([int(visual.sum())]), torch.tensor([answered.prompt]))
        return Examined(features[None].cpu(), same[None].cpu(), loss[None].cpu(), *counts)

    @torch.no_grad()
    def right(self, sample: Sample) -> Tensor:
        """Which exits decode the sample's answer: bool [L] on the CPU; in the last place the full model.

        With the answer as input, each of its tokens wins. What would follow the answer is not looked at.

        Raises:
            InputError: The sample has no answer, or no image.
        """
        answered = embed_answered(self.model, self.spec, sample)
        branches, features = self._branch(answered, sample.name)
        _, chosen = self._measure(branches[:, -len(answered.answer) :], answered.answer, features.dtype)
        return (chosen == answered.answer).all(-1).cpu()

    def _branch(self, answered: Answered, name: str) -> tuple[Tensor, Tensor]:
        """What exits behind all layers lead to.

        Returns the text's states before the final norm [L, text tokens, C], and features [L, 2C] as in `Examined`.
        """
        embeds, visual = answered.embeds, answered.visual
        length, layers = embeds.shape[1], len(self.layers)
        if not bool(visual.any()):
            raise InputError(f"{name}: has no visual token, so there is nothing to leave.")
        question = slice(int(visual.nonzero().max()) + 1, answered.prompt)
        wide = torch.promote_types(embeds.dtype, torch.float32)
        text, run = ~visual, self.run(answered)
        text_run = run.where(text)
        # What adapters know of the prompt, at inference, is not of the answer.
        asks = torch.arange(length, device=embeds.device)[None] < answered.prompt
        text_asks = asks[:, text]
        at_once = max(1, max(length, _BRANCH_TOKENS) // text_asks.shape[1])

        hidden, features = embeds, []
        branches = embeds.new_empty(layers, text_asks.shape[1], embeds.shape[-1])
        # A companion token of the base, that of the whole prompt, and of each branch: an exit leaves it where it is.
        beside = None if self._companion is None else self._companion.to(embeds)[None, None]
        besides: list[Tensor] = []
        for index in range(layers):
            for start in range(0, index, at_once):
                rows = slice(start, min(start + at_once, index))
                theirs = torch.cat(besides[rows]) if besides else None
                states, theirs = self._run(index, branches[rows], text_asks, text_run, theirs)
                branches[rows] = states
                if theirs is not None:
                    besides[rows] = theirs.split(1)
            hidden, beside = self._run(index, hidden, asks, run, beside)
            branches[index] = hidden[0, text]
            if beside is not None:
                besides.append(beside)
            asked = hidden[0, question].to(wide)
            features.append(torch.cat([asked[:-1].mean(0), asked[-1]]))
        return branches, torch.stack(features)

    def _run(
        self, index: int, hidden: Tensor, asks: Tensor, run: LayerRun, beside: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What comes behind layer `index` with the base; `asks` [1, T]: where the prompt is."""
        return run_block(self._blocks[index], index, hidden, asks.expand(len(hidden), -1), run, beside)

    def _full(self, answered: Answered) -> Tensor:
        """The states [1, T, C] before the final norm of the model without the base."""
        hidden, run = answered.embeds, self.run(answered)
        for index in range(len(self.layers)):
            hidden = self.run_layer(index, hidden, run)
        return hidden

    def run(self, answered: Answered) -> LayerRun:
        """What layers are given of a sample besides hidden states."""
        return LayerRun(self.spec, answered.embeds, answered.positions, answered.token_inputs)

    def run_layer(self, index: int, hidden: Tensor, run: LayerRun) -> Tensor:
        """What comes behind a layer for hidden [B, T, C], without a cache.

        It is the model's own layer, whatever the base does to it.

        Args:
            index: Of the layer.
            hidden: What goes in.
            run: As :meth:`run` gives it.
        """
        return run.behind(index, OwnBlock(self.layers[index])(hidden, None, **run.arguments(index))[0])

    def _measure(self, states: Tensor, answer: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cross entropy and argmax at each position, [L, A] each, from states [L, A, C] before the final norm."""
        losses, chosen = [], []
        target = answer.repeat(len(states))
        for rows, wanted in zip(states.flatten(0, 1).split(_LOGIT_ROWS), target.split(_LOGIT_ROWS), strict=True):
            logits = self.lm_head(self.decoder.norm(rows)).to(wide)
            losses.append(F.cross_entropy(logits, wanted, reduction="none"))
            chosen.append(logits.argmax(-1))
        shape = (len(states), len(answer))
        return torch.cat(losses).unflatten(0, shape), torch.cat(chosen).unflatten(0, shape)


def examine(model: nn.Module, sample: Sample) -> Examined:
    """What each exit does to one sample (n = 1), on the CPU.

    Features are of the prompt only, as a gate reads them: the mean of the question's tokens but the last, and the last.
    For many samples make one :class:`Examiner`, which tries the model out once.

    Raises:
        InputError: The sample has no answer, no image, or no question behind it; or a loss or a feature is NaN or
            infinite. The message names the sample.
        UnsupportedModelError: The model's layers cannot be run one by one.
    """
    return Examiner(model).examine(sample)


def answer_of(model: nn.Module, sample: Sample, max_new_tokens: int) -> Sample:
    """The sample with the model's own greedy answer, through generate()."""
    return own_answer(Examiner(model), sample, max_new_tokens)


def own_answer(examiner: Examiner, sample: Sample, max_new_tokens: int) -> Sample:
    """See :func:`answer_of`."""
    if find_splice(type(examiner.model)) is not None:  # its generate() takes other arguments, and gives no prompt back
        prompt = embed_answered(examiner.model, examiner.spec, replace(sample, answer=(0,)))
        ends = examiner.model.generation_config.eos_token_id
        found = Oracle(examiner.model, Plan()).generate(prompt.embeds, max_new_tokens=max_new_tokens, eos_token_id=ends)
        return Sample.of(sample.inputs, found.tokens[0], sample.name)
    output = examiner.model.generate(**placed(examiner.spec, sample), **GREEDY, max_new_tokens=max_new_tokens)
    answer = output[0, sample.inputs["input_ids"].shape[1] :].tolist()
    return Sample.of(sample.inputs, answer, sample.name)
