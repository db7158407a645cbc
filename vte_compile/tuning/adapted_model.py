"""A frozen model with trainable adapters: the loss of its answers, with any set of attentions skipped.

Blocks are the oracle's (vte_compile/oracle/blocks.py). Rows are padded on the right, where causal attention never
looks. Router weights and pooled vectors are means over the row's prompt, which ends where its answer begins: that is
what an adapter knows at inference, and what the authors' LLaVA code does in training, by its question mask. (In the
rewards of their search the answer is part of the means, which lets it be seen: not so here.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vte_compile.adapters import PIA, PlainAdapter
from vte_compile.errors import InputError
from vte_compile.families.token_blocks import NAME as BLOCKS
from vte_compile.fingerprint import Fingerprint
from vte_compile.oracle import Oracle
from vte_compile.oracle.blocks import Block, KeptBlock, OwnBlock, SkippedBlock
from vte_compile.plan import KeptAdapter, Plan, SkippedAttention
from vte_compile.tuning.adapter_modules import AdapterModule
from vte_compile.tuning.answered import embed_answered
from vte_compile.tuning.batches import IGNORE
from vte_compile.tuning.examine import Examiner
from vte_compile.tuning.layer_run import LayerRun, run_block
from vte_compile.tuning.samples import Sample


class AdaptedModel(nn.Module):
    """Adapters around the model of `examiner`, which is no submodule: it is neither trained nor saved.

    `pias`, `plain`: by layer. `skipped`: the layers whose attentions are skipped, which may change between calls; each
    has a PIA. Other layers have their plain adapter, if there is one. `distill`: share, 0 to 1, of the divergence from
    the full model's distribution in the loss; the rest is the cross entropy of the answer. `companion`: of the plan; it
    is not trained.

    Raises UnsupportedModelError if a layer is not of the form that its adapter assumes.
    """

    def __init__(
        self,
        examiner: Examiner,
        pias: Mapping[int, PIA],
        plain: Mapping[int, PlainAdapter],
        skipped: Sequence[int],
        distill: float = 0.0,
        companion: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._examiner = examiner
        # The oracle tries out that the blocks have the form.
        Oracle(examiner.model, Plan(skips=[SkippedAttention(layer, pia) for layer, pia in pias.items()]))
        Oracle(examiner.model, Plan(adapters=[KeptAdapter(layer, each) for layer, each in plain.items()]))
        device = examiner.spec.device
        self.pias = nn.ModuleDict({str(layer): AdapterModule(pia).to(device) for layer, pia in pias.items()})
        self.plain = nn.ModuleDict({str(layer): AdapterModule(each).to(device) for layer, each in plain.items()})
        self.skipped = tuple(skipped)
        self._distill, self._companion = distill, companion
        layers = examiner.layers
        self._own: list[Block] = [OwnBlock(layer) for layer in layers]
        # Modules compute as the adapters they were made of.
        self._skipping = {i: SkippedBlock(layers[i], cast(PIA, self.pias[str(i)])) for i in pias}
        self._keeping = {i: KeptBlock(layers[i], cast(PlainAdapter, self.plain[str(i)])) for i in plain}

    def forward(
        self, embeds: Tensor, prompt_mask: Tensor, labels: Tensor, positions: Tensor, **token_inputs: Tensor
    ) -> dict[str, Tensor]:
        """The mean over rows of each answer's mean loss, as `loss`; arguments as :meth:`collate` gives them.

        Raises:
            InputError: It is NaN or infinite.
        """
        spec = self._examiner.spec
        # Multimodal positions are [3, B, T] to the decoder.
        run = LayerRun(spec, embeds, positions.movedim(0, -2), [token_inputs[name] for name in spec.token_inputs])
        hidden, beside = embeds, None
        if self._companion is not None:
            beside = self._companion.to(embeds).expand(len(embeds), 1, -1)
        for index in range(len(self._own)):
            hidden, beside = run_block(self._block(index), index, hidden, prompt_mask, run, beside)
        answered = labels != IGNORE
        logits = self._logits(hidden[answered])
        losses = F.cross_entropy(logits, labels[answered], reduction="none")
        if self._distill:
            with torch.no_grad():
                full = embeds
                for index, own in enumerate(self._own):
                    full = run.behind(index, own(full, None, **run.arguments(index))[0])
                expected = F.log_softmax(self._logits(full[answered]), -1)
            divergence = F.kl_div(F.log_softmax(logits, -1), expected, log_target=True, reduction="none").sum(-1)
            losses = (1 - self._distill) * losses + self._distill * divergence
        # Each row counts the same, however long its answer: so the loss does not depend on how rows are distributed.
        shares = (answered / (answered.sum(1, keepdim=True) * len(labels)))[answered]
        loss = (losses * shares).sum()
        if not bool(torch.isfinite(loss)):
            raise InputError(f"the loss is {float(loss.detach())}, with attentions {list(self.skipped)} skipped.")
        return {"loss": loss}

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """A batch for :meth:`forward`: embeds [B, T, C], prompt_mask bool [B, T], labels [B, T], positions [B, (3,) T].

        A label is the token that follows, -100 where none of the answer does. What else the decoder takes of tokens is
        there by the names of ``DecoderSpec.token_inputs``, [B, T, ...] each.
        """
        spec = self._examiner.spec
        rows = [embed_answered(self._examiner.model, spec, sample) for sample in samples]
        length = max(row.embeds.shape[1] for row in rows)
        embeds = torch.cat([F.pad(row.embeds, (0, 0, 0, length - row.embeds.shape[1])) for row in rows])
        prompt_mask = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        labels = torch.full_like(prompt_mask, IGNORE, dtype=torch.long)
        for index, row in enumerate(rows):
            prompt_mask[index, : row.prompt] = True
            labels[index, row.prompt - 1 : row.embeds.shape[1]] = row.answer
        positions = torch.cat([F.pad(row.positions, (0, length - row.positions.shape[-1])) for row in rows], -2)
        positions = positions.movedim(-2, 0)
        batch = {"embeds": embeds, "prompt_mask": prompt_mask, "labels": labels, "positions": positions}
        for name, values in zip(spec.token_inputs, zip(*(row.token_inputs for row in rows), strict=True), strict=True):
            batch[name] = _padded(values, length, fill=-1 if name == BLOCKS else 0)
        return batch

    def plan(self) -> Plan:
        """What to do to the model: skip what is skipped now, with the adapters as they are now.

        Raises:
            PlanError: A parameter is NaN or infinite.
        """
        pias = {index: cast(AdapterModule, self.pias[str(index)]).adapter() for index in self.skipped}
        plain = {
            index: cast(AdapterModule, self.plain[str(index)]).adapter()
            for index in self._keeping
            if index not in self.skipped
        }
        return Plan(
            skips=[SkippedAttention(index, cast(PIA, pia)) for index, pia in pias.items()],
            adapters=[KeptAdapter(index, cast(PlainAdapter, each)) for index, each in plain.items()],
            companion=self._companion,
            fingerprint=Fingerprint.of(self._examiner.model),
        )

    def _block(self, index: int) -> Block:
        if index in self.skipped:
            return self._skipping[index]
        return self._keeping.get(index, self._own[index])

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._examiner.lm_head(self._examiner.decoder.norm(hidden))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _padded(values: Sequence[Tensor], length: int, fill: int) -> Tensor:
    """[1, T, ...] of rows with different T as [B, length, ...]."""
    batch = values[0].new_full((len(values), length, *values[0].shape[2:]), fill)
    for row, value in zip(batch, values, strict=True):
        row[: value.shape[1]] = value[0]
    return batch


def frozen(model: Any) -> list[nn.Parameter]:
    """Stop the gradients of a model's parameters; returns those that had them, to be given them back."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    return trained
