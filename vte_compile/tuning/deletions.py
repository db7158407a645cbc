"""What deleting attentions does to the answer of a sample: loss and argmax, for many deletions from one pass.

A deleted attention is a skip without adapter: out = x + MLP(RMS_post x). The layers below the lowest deleted one give
what they gave, so all deletions share them: each branches off at its layer, and all branches run on side by side.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vte_compile.errors import InputError
from vte_compile.oracle import Oracle
from vte_compile.oracle.blocks import Block, OwnBlock, planned_blocks
from vte_compile.plan import Plan, SkippedAttention
from vte_compile.tuning.answered import Answered
from vte_compile.tuning.examine import Examiner

# What limits memory: branches run together up to this many tokens, and one at least.
_BRANCH_TOKENS = 4096


class Deleter:
    """Deletes attentions of one model, in eval mode, as it was loaded, with "sdpa" or "eager" attention.

    Raises UnsupportedModelError if one of its attentions cannot be skipped, InputError for an optimized model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.examiner = Examiner(model)
        layers = self.examiner.layers
        every = Plan(skips=[SkippedAttention(layer) for layer in range(len(layers))])
        Oracle(model, every)  # tries out that each block has the form that a skip assumes
        self._own: list[Block] = [OwnBlock(layer) for layer in layers]
        self._skipped = planned_blocks(layers, every)

    @property
    def layers(self) -> int:
        """Number of layers, L."""
        return len(self._own)

    @torch.no_grad()
    def effects(
        self, sample: Answered, deleted: Collection[int], candidates: Sequence[int], name: str = "sample"
    ) -> tuple[Tensor, Tensor, float]:
        """What it does to an answer that the attentions of the layers `deleted`, and one more, go.

        Args:
            sample: With its answer.
            deleted: Layers.
            candidates: Other layers, ascending, n of them: which one more.
            name: Of the sample, for messages.

        Returns:
            For each candidate, [n] on the CPU: the answer's mean cross entropy (infinite where it is not finite), and
            the share of answer positions at which the full model's argmax is another. And the full model's mean cross
            entropy.

        Raises:
            InputError: The full model's is not finite.
        """
        states = self._run(sample, deleted, candidates)
        full = self._run(sample, (), ()) if deleted else states[-1:]
        loss, argmax = self._measure(full, sample.answer)
        if not bool(torch.isfinite(loss).all()):
            raise InputError(
                f"{name}: the full model's loss is NaN or infinite: is its dtype ({sample.embeds.dtype}) wide enough "
                "for it, and are its weights sound?"
            )
        losses, argmaxes = self._measure(states[:-1], sample.answer)
        losses = losses.masked_fill(~torch.isfinite(losses), torch.inf)
        changed = (argmaxes != argmax).to(losses.dtype).mean(-1)
        return losses.cpu(), changed.cpu(), float(loss)

    def _run(self, sample: Answered, deleted: Collection[int], candidates: Sequence[int]) -> Tensor:
        """States before the final norm [n + 1, T, C]: for each candidate, and for none."""
        embeds, length, run = sample.embeds, sample.embeds.shape[1], self.examiner.run(sample)
        at_once = max(1, _BRANCH_TOKENS // length)
        states = embeds.new_empty(len(candidates) + 1, length, embeds.shape[-1])
        states[-1:] = embeds
        branched = 0
        for index in range(self.layers):
            block = self._skipped[index] if index in deleted else self._own[index]
            attention = run.arguments(index)
            for start in range(0, branched, at_once):
                part = states[start : min(start + at_once, branched)]
                part.copy_(run.behind(index, block(part, None, **attention)[0]))
            if index in candidates:
                states[branched] = run.behind(index, self._skipped[index](states[-1:], None, **attention)[0])[0]
                branched += 1
            states[-1:] = run.behind(index, block(states[-1:], None, **attention)[0])
        return states

    def _measure(self, states: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy [n], and argmax [n, A], of the answer, from states [n, T, C] before the final norm."""
        losses, chosen = [], []
        for state in states[:, -len(answer) :]:
            logits = self.examiner.lm_head(self.examiner.decoder.norm(state))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses.append(F.cross_entropy(logits, answer))
            chosen.append(logits.argmax(-1))
        return torch.stack(losses), torch.stack(chosen)
