"""Run chunks through a decoder's programs: prompts packed or row by row, decode steps as a batch.

Where the programs come from is a subclass's business. Nothing here needs transformers: engines run without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vte_compile.errors import InputError
from vte_compile.runtime.cache import RowKV, RowsCache
from vte_compile.runtime.companion import with_companion, without_companion
from vte_compile.runtime.prompt_state import PromptState
from vte_compile.runtime.prompt_value import PromptValue
from vte_compile.runtime.steps import Phase, StepProgram
from vte_compile.runtime.visual_tokens import PackedRows, VisualTokens

if TYPE_CHECKING:
    from vte_compile.runtime.decode_graphs import DecodeGraphs

_RowInput = tuple[Tensor, ...]
"""One row without padding: embeddings [n, C], visual mask [n] (on the host), positions [n] or, multimodal ones, [3, n],
and what else graphs of prompts take, each [n, ...]."""


@dataclass
class RunnerOutput:
    """What one chunk gives."""

    logits: Tensor
    """[B, T, vocabulary], or [B, 1, vocabulary] of each row's last token; zeros at padding and removed tokens."""
    exit_layer: Tensor
    """[B] int64; -1 = never."""


@dataclass
class _RowOutput:
    logits: Tensor
    kv: RowKV
    exit_layer: int
    kept: Tensor
    """[n] int64: which of the row's tokens the logits belong to."""
    prompt_state: list[Tensor]
    """What adapters know of the row's prompt; of prefill only."""


class RowRunner:
    """What all runners do with the programs of a decoder.

    Args:
        may_exit: Whether a program has exits.
        routed: Whether what adapters do depends on the prompt.
        decodes_one_row_apart: Whether there is a decode program for one row alone, without masks.
        position_rows: How many numbers make a token's position.
        companion: [C], what goes along with each prompt, if anything; then prompts run row by row.
    """

    def __init__(
        self,
        may_exit: bool,
        routed: bool,
        decodes_one_row_apart: bool,
        position_rows: int,
        companion: Tensor | None = None,
    ) -> None:
        self.may_exit, self.routed, self._one_row_apart = may_exit, routed, decodes_one_row_apart
        self._position_rows = position_rows
        self._companion = companion

    def program(
        self, phase: Phase, *, batched: bool = False, last: bool = True, one_prompt: bool = True
    ) -> StepProgram:
        """The program of one phase.

        Args:
            phase: ``prefill``, ``packed``, ``extend`` or ``decode``.
            batched: For any number of rows (decode only).
            last: With the logits of the last token only.
            one_prompt: All rows come from one prompt.
        """
        raise NotImplementedError

    def packed_program(self, last: bool) -> StepProgram | None:
        """The program of a packed prefill; None if prompts run row by row.

        Args:
            last: With the logits of each row's last token only.
        """
        return None

    def decode_graphs(self, program: StepProgram) -> DecodeGraphs | None:
        """What records and replays the steps of a decode program; None if they run as they are."""
        return None

    def run(
        self,
        embeds: Tensor,
        visual_mask: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: RowsCache,
        *,
        last: bool,
        token_inputs: Sequence[Tensor] = (),
    ) -> RunnerOutput:
        """Run one chunk and extend the cache.

        Args:
            embeds: [B, T, C].
            visual_mask: [B, T] bool.
            attention_mask: [B, T] bool of this chunk: False at padding. None: there is none, which a GPU need not be
                asked.
            position_ids: [B, T], or [3, B, T] if positions are multimodal; None to count each row's tokens.
            cache: Of the same rows; empty in prefill.
            last: Return the logits of each row's last token only.
            token_inputs: What else graphs of prompts take of each token, each [B, T, ...]; decode steps do not.
        """
        batch, tokens = embeds.shape[:2]
        if not cache.is_empty and cache.starts.shape[1] != batch:
            raise InputError(f"The cache holds {cache.starts.shape[1]} rows, the inputs {batch}.")
        # What is told of text alone, decode steps know: no features, no block.
        if (
            tokens == 1
            and not cache.is_empty
            and (attention_mask is None or bool(attention_mask.all()))
            and not (token_inputs and bool(visual_mask.any()))
        ):
            return self._decode(embeds, position_ids, cache)
        if attention_mask is None:
            attention_mask = torch.ones(batch, tokens, dtype=torch.bool)
        return self._rows(embeds, visual_mask, attention_mask, position_ids, cache, last, token_inputs)

    def _decode(self, embeds: Tensor, position_ids: Tensor | None, cache: RowsCache) -> RunnerOutput:
        batch = embeds.shape[0]
        positions = self._expanded(cache.next_positions[:, None] if position_ids is None else position_ids, batch)
        attending = [i for i, layer in enumerate(cache.layers) if layer.is_initialized]
        batched = batch > 1 or not self._one_row_apart
        starts = [cache.starts[i] for i in attending] if batched else []
        state = cache.prompt_state
        program = self.program("decode", batched=batched, one_prompt=state is None or state.one_prompt)
        _check_cache(cache, program)
        known = [] if state is None else state.values
        token = [embeds.contiguous(), positions.contiguous()]
        if (graphs := self.decode_graphs(program)) is None:
            output = program.run([*token, *cache.next_columns(), *starts, *known])
            logits, kv = output.logits, output.kv
        else:
            filled = cache.reserve()
            logits = graphs.run(token, cache.buffers(), [*starts, *known], filled)
            # Views are made while the GPU works: a replayed step is launched at once.
            columns = cache.next_columns()
            pairs = zip(columns[::2], columns[1::2], strict=True)
            kv = [next(pairs) if attends else None for attends in program.attends]
        cache.append(kv)
        return RunnerOutput(logits, torch.full((batch,), -1, device=embeds.device))

    def _expanded(self, positions: Tensor, batch: int) -> Tensor:
        """Positions as graphs take them, [B, T] or [3, B, T], from such of which leading dims are missing or 1."""
        rows = self._position_rows
        shape = (batch, positions.shape[-1]) if rows == 1 else (rows, batch, positions.shape[-1])
        if positions.ndim > len(shape):
            raise InputError(f"position_ids: this decoder takes {list(shape)}, got {list(positions.shape)}.")
        return positions.expand(shape)

    def _rows(
        self,
        embeds: Tensor,
        visual_mask: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None,
        cache: RowsCache,
        last: bool,
        token_inputs: Sequence[Tensor],
    ) -> RunnerOutput:
        batch, tokens = embeds.shape[:2]
        device = embeds.device
        # The host asks for masks once: a GPU that is asked row by row has nothing else to do. And where it hands
        # something over, it does not wait (non_blocking), or what comes behind a prompt would begin when that is done.
        visual_mask = visual_mask.cpu()
        real = [row.nonzero()[:, 0] for row in attention_mask.cpu()]
        if cache.is_empty and (empty := [b for b in range(batch) if not len(real[b])]):
            raise InputError(f"attention_mask: row {empty[0]} has no token.")
        if not any(len(columns) for columns in real):
            raise InputError("attention_mask: no row has a token.")
        places = [columns.to(device, non_blocking=True) for columns in real]
        inputs: list[_RowInput | None] = []
        next_positions = []
        for b in range(batch):
            start = 0 if cache.is_empty else int(cache.next_positions[b])
            if not len(real[b]):
                inputs.append(None)
                next_positions.append(start)
                continue
            if position_ids is None:
                counted = torch.arange(start, start + len(real[b]), device=device)
                positions = self._expanded(counted[None], 1)[..., 0, :]
                next_positions.append(start + len(real[b]))
            else:
                positions = self._expanded(position_ids, batch)[..., b, places[b]]
                next_positions.append(int(positions.max()) + 1)
            more = (value[b, places[b]] for value in token_inputs)
            inputs.append((embeds[b, places[b]], visual_mask[b, real[b]], positions, *more))
        buffers = None
        if cache.is_empty:
            rows, buffers = self._prompts(inputs, cache, last)
        else:
            rows = self._continue(inputs, cache, last)
        exits = torch.tensor([-1 if r is None else r.exit_layer for r in rows])
        exit_layer, following = (x.to(device, non_blocking=True) for x in (exits, torch.tensor(next_positions)))
        logits = self._lay_out(rows, places, tokens, last)
        kv = [cache.row(b) if r is None else r.kv for b, r in enumerate(rows)]
        cache.replace(kv, tokens, following, exit_layer, buffers)
        return RunnerOutput(logits, exit_layer)

    def _prompts(
        self, inputs: list[_RowInput | None], cache: RowsCache, last: bool
    ) -> tuple[list[_RowOutput | None], RowKV | None]:
        """Prefill, and what adapters will want to know of it; and what rows' keys are views of, if it is a cache."""
        # Beams and multiple samples start as copies of one prompt, one behind the other.
        copies = [a is not None and b is not None and _equal(a, b) for a, b in pairwise(inputs)]
        packed = self.packed_program(last) if self._companion is None and not all(copies) else None
        if packed is not None:
            first = [
                row for row, copied in zip(inputs, [False, *copies], strict=True) if row is not None and not copied
            ]
            outputs, buffers = self._packed(packed, first)
            placed: list[_RowOutput | None] = [outputs[i] for i in accumulate([0, *(not c for c in copies)])]
            return placed, None if any(copies) else buffers
        one_prompt = not self.routed or all(copies)
        program = self.program("prefill", last=last, one_prompt=one_prompt)
        rows: list[_RowOutput | None] = []
        for row, copied in zip(inputs, [False, *copies], strict=True):
            assert row is not None
            rows.append(rows[-1] if copied else self._prompt(program, row))
        if program.prompt_state:
            states = [row.prompt_state for row in rows if row is not None]
            cache.prompt_state = PromptState.of_rows(program.prompt_state, states, one_prompt)
        return rows, None

    def _packed(self, program: StepProgram, inputs: list[_RowInput]) -> tuple[list[_RowOutput], RowKV | None]:
        """Prefill of different rows at once; and what their keys are views of, if it is a cache."""
        lengths = [len(row[0]) for row in inputs]
        visual = [VisualTokens.find(row[1]) if self.may_exit else None for row in inputs]
        rows = PackedRows(list(lengths), visual)
        embeds, _, positions, *more = (
            torch.cat(values, dim=-1 if i == 2 else 0) for i, values in enumerate(zip(*inputs, strict=True))
        )
        bounds = rows.cu_seqlens(embeds.device)
        packed = [embeds[None], positions.unsqueeze(-2).contiguous(), bounds, *(value[None] for value in more)]
        output = program.run(packed, rows)
        device = embeds.device
        whole = [torch.arange(length, device=device) for length in lengths]
        kept = [
            every if v is None or v.exit_layer < 0 else v.keep.to(device, non_blocking=True)
            for every, v in zip(whole, visual, strict=True)
        ]
        if output.logits.shape[1] == len(inputs):  # of the last tokens
            logits = output.logits.split(1, dim=1)
        else:
            logits = output.logits.split([len(k) for k in kept], dim=1)
        kv: list[RowKV] = [[] for _ in inputs]
        for layer, pair in enumerate(output.kv):
            left = [
                len(every if e < 0 or e >= layer else k)
                for every, k, e in zip(whole, kept, rows.exit_layers, strict=True)
            ]
            for b, row in enumerate(kv):
                row.append(None if pair is None else _of_row(*pair, b, left, program.makes_caches))
        outputs = [_RowOutput(*row, []) for row in zip(logits, kv, rows.exit_layers, kept, strict=True)]
        return outputs, output.kv if program.makes_caches else None

    def _continue(self, inputs: list[_RowInput | None], cache: RowsCache, last: bool) -> list[_RowOutput | None]:
        """A chunk of rows that have a past."""
        state = cache.prompt_state
        program = self.program("extend", last=last, one_prompt=state is None or state.one_prompt)
        _check_cache(cache, program)
        rows: list[_RowOutput | None] = []
        for b, row in enumerate(inputs):
            if row is None:
                rows.append(None)
                continue
            past = [t.contiguous() for pair in cache.row(b) if pair is not None for t in pair]
            known = [] if state is None else state.select(torch.tensor([b])).values
            rows.append(self._row(program, row, [*past, *known]))
        return rows

    def _prompt(self, program: StepProgram, row: _RowInput) -> _RowOutput:
        if self._companion is None:
            return self._row(program, row, [])
        output = self._row(program, with_companion(row, self._companion), [])
        output.logits, output.kept = without_companion(output.logits, output.kept)
        return output

    def _row(self, program: StepProgram, row: _RowInput, past: list[Tensor]) -> _RowOutput:
        embeds, visual_mask, positions, *more = row
        visual = VisualTokens.find(visual_mask) if self.may_exit else None
        inputs = [embeds[None], positions.unsqueeze(-2).contiguous(), *(value[None] for value in more), *past]
        output = program.run(inputs, visual)
        if visual is None or visual.exit_layer < 0:
            kept, exit_layer = torch.arange(len(embeds), device=embeds.device), -1
        else:
            kept, exit_layer = visual.keep.to(embeds.device, non_blocking=True), visual.exit_layer
        return _RowOutput(output.logits, output.kv, exit_layer, kept, output.prompt_state)

    @staticmethod
    def _lay_out(rows: list[_RowOutput | None], real: list[Tensor], tokens: int, last: bool) -> Tensor:
        """Logits of all rows, as the chunk was laid out."""
        first = next(r for r in rows if r is not None).logits
        logits = first.new_zeros(len(rows), 1 if last else tokens, first.shape[-1])
        for target, row, positions in zip(logits, rows, real, strict=True):
            if row is not None:
                if last:
                    target[0] = row.logits[0, -1]
                else:
                    target[positions[row.kept]] = row.logits[0]
        return logits


def _of_row(keys: Tensor, values: Tensor, row: int, lengths: list[int], cached: bool) -> tuple[Tensor, Tensor]:
    """A row's part of what a packed program gives: [1, heads, its length, head size]."""
    if cached:
        ends = slice(max(lengths) - lengths[row], max(lengths))
        return keys[row : row + 1, :, ends], values[row : row + 1, :, ends]
    begin = sum(lengths[:row])
    return keys.narrow(2, begin, lengths[row]), values.narrow(2, begin, lengths[row])


def _check_cache(cache: RowsCache, program: StepProgram) -> None:
    """Refuse the cache of a model with other skips or adapters: its tensors would be taken for something else."""
    remedy = "pass a cache this model returned, or an empty one"
    for layer, (held, attends) in enumerate(zip(cache.layers, program.attends, strict=True)):
        if held.is_initialized != attends:
            has, does = ("no ", "attends") if attends else ("", "does not attend")
            raise InputError(f"past_key_values holds {has}keys of layer {layer}, which {does} in this plan: {remedy}.")
    kinds = [] if cache.prompt_state is None else list(cache.prompt_state.kinds)
    if kinds != program.prompt_state:
        raise InputError(f"past_key_values holds {_named(kinds)}, this plan's adapters take other things: {remedy}.")


def _named(kinds: list[PromptValue]) -> str:
    return f"what other adapters kept ({', '.join(kind.name for kind in kinds)})" if kinds else "nothing of adapters"


def _equal(row: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(row, other, strict=True))
