"""The oracle itself: rows one after another, layer by layer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.cache_name import cache_name
from vte_compile.families.decoder import find_decoder, position_rows
from vte_compile.families.deepstack import deepstack_layers, rows_of
from vte_compile.families.logits import capped, softcap_of
from vte_compile.families.refusals import refuse_other_architectures
from vte_compile.families.token_blocks import takes_blocks, unmasked_block
from vte_compile.oracle.blocks import Block, OwnBlock, SilencedBlock, planned_blocks
from vte_compile.oracle.checks import check_against_model, check_block, check_structure
from vte_compile.oracle.exits import fires
from vte_compile.oracle.masks import checked_mask, layer_window, row_mask
from vte_compile.oracle.rows import OracleCache, OracleGeneration, OracleOutput, RowCache, RowRun
from vte_compile.plan import Plan


class Oracle:
    """Runs `model` with the exits, skipped attentions and adapters of `plan`.

    `model`: a Hugging Face causal LM or MLLM in eval mode, whose decoder is a pre-norm stack with rotary embeddings
    (Llama, Mistral, Qwen2, Qwen3, ...) and "sdpa" or "eager" attention. A sliding attention window counts tokens in the
    order in which they stand in that layer's cache of the row; nothing that leaves the window is evicted from the
    cache. Layers that have an adapter must be blocks of the form
    h = x + self_attn(input_layernorm(x)) ; out = h + mlp(post_attention_layernorm(h)), and the second norm an RMSNorm
    where an adapter stands in for the attention; this is tried out on each of them. Without adapter, a layer of another
    form is skipped as one whose attention gives zeros.

    Raises UnsupportedModelError if the oracle would compute this model wrongly, PlanMismatchError if the plan does not
    fit it. As a safety net against model-specific extras (scaled embeddings or logits, dropout), a short text is run
    through the model's own forward and must give the same logits.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model = cast(Any, model)
        self.plan = plan
        self.decoder = cast(Any, find_decoder(model))
        refuse_other_architectures(model, self.decoder)
        self.has_blocks = takes_blocks(model)
        check_structure(self.decoder, self.has_blocks)
        self.config = self.decoder.config
        self.position_rows = position_rows(self.decoder)
        self.deepstack = deepstack_layers(model, self.decoder)
        self.layers: Sequence[nn.Module] = list(self.decoder.layers)[: self.config.num_hidden_layers]
        self._head: Any = self.model.get_output_embeddings()
        if self._head is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no output embeddings; pass the model with its lm_head"
            )
        self.logit_softcap = softcap_of(model, self.config)
        plan.check(model)
        self.blocks: list[Block] = [OwnBlock(layer) for layer in self.layers]
        check_against_model(self)
        planned = planned_blocks(self.layers, plan)
        for index, block in enumerate(planned):
            if not isinstance(block, (OwnBlock, SilencedBlock)):
                check_block(self, index)
        self.blocks = planned

    @torch.no_grad()
    def forward(
        self,
        inputs_embeds: Tensor,
        visual_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: OracleCache | None = None,
        deepstack: Sequence[Tensor] | None = None,
        block_ids: Tensor | None = None,
    ) -> OracleOutput:
        """Run one chunk.

        inputs_embeds [B, T, C]; visual_mask bool [B, T], True at visual tokens (None: there are none); attention_mask
        [B, T] of THIS chunk, nonzero = real token, padding anywhere (None: all real); position_ids int [B, T], or
        [3, B, T] if the decoder's positions are multimodal (None: each row counts its real tokens on from its cache, as
        of text); cache: of the earlier chunks, not modified; deepstack: of a decoder with DeepStack, features that are
        added to the visual tokens behind its first layers, of each of those [visual tokens of all rows, C];
        block_ids: int [B, T], tokens of the chunk with the same one, -1 excepted, attend to each other also backwards
        (None: what the model does without token types: all are -1, or, in a row's first chunk, of one block if the
        decoder's attention is not causal by itself). A row without a real token does nothing. Raises InputError on
        shapes that do not fit.
        """
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[0] == 0:
            raise InputError(f"inputs_embeds must be [B, T, C] with at least one row, got {list(inputs_embeds.shape)}")
        batch, length = inputs_embeds.shape[:2]
        real = checked_mask(attention_mask, "attention_mask", inputs_embeds, default=True)
        visual = checked_mask(visual_mask, "visual_mask", inputs_embeds, default=False)
        shapes = [(batch, length)] + ([(self.position_rows, batch, length)] if self.position_rows > 1 else [])
        if position_ids is not None and position_ids.shape not in shapes:
            raise InputError(
                f"position_ids must be {' or '.join(str(list(shape)) for shape in shapes)} like the chunk, got "
                f"{list(position_ids.shape)}"
            )
        if cache is None:
            cache = OracleCache((RowCache((None,) * len(self.layers)),) * batch)
        if len(cache.rows) != batch:
            raise InputError(f"the cache holds {len(cache.rows)} rows, the chunk has {batch}")

        features = self._features(visual, deepstack)
        runs, rows = [], []
        for b in range(batch):
            columns = real[b].nonzero().squeeze(-1)
            past = cache.rows[b]
            if position_ids is None:
                positions = torch.arange(len(columns), device=inputs_embeds.device) + past.next_position
            else:
                positions = position_ids[..., b, columns]
            embeds = inputs_embeds[b : b + 1, columns]
            if block_ids is None:
                unmasked = -1 if past.next_position else unmasked_block(self.decoder)
                blocks = torch.full_like(columns, unmasked)
            else:
                blocks = block_ids[b, columns]
            run = RowRun(
                embeds,
                visual[b, columns],
                self.row_positions(positions),
                columns,
                dict(past.statistics),
                blocks,
                features[b],
                self._companion(past, embeds),
            )
            rows.append(self._run_row(run, past))
            runs.append(run)
        return self._collect(runs, tuple(rows), length)

    __call__ = forward

    @torch.no_grad()
    def generate(
        self,
        inputs_embeds: Tensor | None = None,
        visual_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: OracleCache | None = None,
        deepstack: Sequence[Tensor] | None = None,
        block_ids: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> OracleGeneration:
        """Greedy decoding of every row, each until its own end token or `max_new_tokens`.

        The prompt is either inputs_embeds [B, T, C] or input_ids [B, T] (text, or pass visual_mask too); everything
        else as in `forward`. Raises InputError if not exactly one prompt is given, or if a row of it has no real token.
        """
        if (inputs_embeds is None) == (input_ids is None):
            raise InputError("pass either inputs_embeds or input_ids as the prompt")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        real = checked_mask(attention_mask, "attention_mask", inputs_embeds, default=True)
        empty = (~real.any(-1)).nonzero().flatten().tolist()
        if empty:
            raise InputError(f"rows {empty} of the prompt have no real token to generate from")
        ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())

        output = self.forward(inputs_embeds, visual_mask, attention_mask, position_ids, cache, deepstack, block_ids)
        exit_layer = output.exit_layer
        # The last real token of a row is never removed: without a question token there is no exit.
        last = [int(row.nonzero().max()) for row in real]
        tokens: list[list[int]] = [[] for _ in last]
        for step in range(max_new_tokens):
            running = [not row or row[-1] not in ends for row in tokens]
            for b, column in enumerate(last):
                if running[b]:
                    tokens[b].append(int(output.logits[b, column].argmax()))
            running = [row[-1] not in ends for row in tokens]
            if step == max_new_tokens - 1 or not any(running):
                break
            # A finished row takes part as a chunk of padding: it computes and caches nothing.
            next_ids = torch.tensor([[row[-1]] for row in tokens], device=inputs_embeds.device)
            chunk_mask = torch.tensor(running, device=inputs_embeds.device)[:, None]
            output = self.forward(self.embed_tokens(next_ids), None, chunk_mask, None, output.cache)
            last = [0] * len(tokens)
        return OracleGeneration(tokens, exit_layer, output.cache)

    def _features(self, visual: Tensor, deepstack: Sequence[Tensor] | None) -> list[list[Tensor]]:
        """Of each row, what is added to its visual tokens."""
        if deepstack is None and not (self.deepstack and bool(visual.any())):
            return [[]] * len(visual)
        given = 0 if deepstack is None else len(deepstack)
        if deepstack is None or given != self.deepstack:
            raise InputError(
                f"deepstack: {type(self.decoder).__name__} adds features to visual tokens behind {self.deepstack} "
                f"layers, and {given} are given"
            )
        return rows_of(visual, deepstack)

    def _companion(self, past: RowCache, embeds: Tensor) -> Tensor | None:
        """What goes along with the first chunk of a row."""
        embedding = self.plan.companion
        return None if embedding is None or past.next_position else embedding.to(embeds)[None, None]

    def row_positions(self, positions: Tensor) -> Tensor:
        """A row's positions [n] or [3, n] as the rotary embedding takes them: [1, n], or [3, 1, n]."""
        lead = (self.position_rows, 1) if self.position_rows > 1 else (1,)
        return positions.unsqueeze(-2).expand(*lead, -1)

    def _rotary(self, index: int, run: RowRun) -> Any:
        """The rotary tables of a layer; some decoders have one for each type of layer."""
        rotary = self.decoder.rotary_emb
        by_type = "layer_type" in inspect.signature(rotary.forward).parameters
        kind = {"layer_type": self.config.layer_types[index]} if by_type else {}
        return rotary(run.hidden, position_ids=run.positions, **kind)

    def _run_row(self, run: RowRun, past: RowCache) -> RowCache:
        """Take one row through all layers and the final norm (in `run`), and return its new cache."""
        if run.hidden.shape[1] == 0:
            run.lens = [0] * (len(self.layers) + 1)
            return past
        self._check_cache(past)
        next_position = int(run.positions.max()) + 1
        layers = []
        for index in range(len(self.layers)):
            run.lens.append(run.hidden.shape[1])
            layers.append(self.run_layer(index, self.blocks[index], run, past.layers[index]))
            if index < len(run.deepstack):
                run.hidden = run.hidden.clone()
                run.hidden[:, run.visual] += run.deepstack[index].to(run.hidden)
            self._maybe_exit(index, run)
        run.lens.append(run.hidden.shape[1])
        run.hidden = self.decoder.norm(run.hidden)
        return RowCache(tuple(layers), next_position, run.statistics)

    def run_layer(
        self, index: int, block: Block, run: RowRun, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor] | None:
        """Apply layer `index`, in the form `block`, to the row's tokens.

        Returns the layer's (k, v) with them appended; None for a skipped attention.
        """
        cache = DynamicCache()
        past_length = 0
        if past is not None:
            cache.update(*past, index)  # copies: `past` stays as it is
            past_length = past[0].shape[-2]
        length = run.hidden.shape[1]
        if run.companion is not None:
            self._accompany(index, block, run)
        run.hidden, statistics = block(
            run.hidden,
            run.statistics.get(index),
            attention_mask=row_mask(run.blocks, past_length, layer_window(self.config, index), run.hidden),
            position_ids=run.positions,
            position_embeddings=self._rotary(index, run),
            use_cache=True,
            **{cache_name(self.layers[index].forward): cache},
        )
        if statistics is not None:
            run.statistics[index] = statistics
        if not block.attends:
            return None
        cached = cache.layers[index] if index < len(cache.layers) else None
        keys, values = getattr(cached, "keys", None), getattr(cached, "values", None)
        if keys is None or values is None or keys.shape[-2] != past_length + length:
            raise UnsupportedModelError(
                f"layer {index} ({type(self.layers[index]).__name__}) did not append its {length} tokens to the cache; "
                "is gradient checkpointing on, or does the layer share another layer's KV?"
            )
        return keys, values

    def _accompany(self, index: int, block: Block, run: RowRun) -> None:
        """Apply a layer to the companion of a prompt, a sequence of its own, in which the adapter knows the prompt."""
        assert run.companion is not None
        tokens = torch.ones_like(run.hidden[..., 0], dtype=torch.bool)
        known = block.statistics(run.hidden, tokens, run.companion)
        if known is not None:
            run.statistics[index] = known
        # Any position will do: what attends to itself alone does not depend on it.
        alone = replace(run, hidden=run.companion, positions=run.positions[..., :1])
        run.companion, _ = block(
            run.companion,
            known,
            attention_mask=None,
            position_ids=alone.positions,
            position_embeddings=self._rotary(index, alone),
            use_cache=False,
        )

    def _check_cache(self, past: RowCache) -> None:
        """Refuse the cache of another plan: a row that has tokens, but not in the layers that attend here."""
        if past.next_position == 0:
            return
        for index, block in enumerate(self.blocks):
            if (past.layers[index] is not None) != block.attends:
                has, does = ("no ", "attends") if block.attends else ("", "does not")
                raise InputError(f"the cache holds {has}keys of layer {index}, which {does} in this plan")
            if (index in past.statistics) != (block.adapter is not None):
                has, does = ("no ", "an") if block.adapter is not None else ("", "no")
                raise InputError(f"the cache holds {has}statistics of layer {index}, which has {does} adapter")

    def _maybe_exit(self, index: int, run: RowRun) -> None:
        """Drop the row's visual tokens, if any are left, where the exit after layer `index`, if any, fires."""
        for candidate in self.plan.exits:
            if candidate.layer == index and bool(run.visual.any()) and fires(candidate, run):
                run.exit_layer = index
                run.keep(~run.visual)

    def _collect(self, runs: list[RowRun], rows: tuple[RowCache, ...], length: int) -> OracleOutput:
        """Lay the rows' results out as the chunk was."""
        hidden = [run.hidden[0] for run in runs]
        row_logits = [self.lm_head(h) for h in hidden]
        logits = row_logits[0].new_zeros(len(runs), length, row_logits[0].shape[-1])
        features: dict[int, dict[int, Tensor]] = {}
        gate_logits: dict[int, dict[int, Tensor]] = {}
        for b, run in enumerate(runs):
            logits[b, run.columns] = row_logits[b]
            for layer in run.features:
                features.setdefault(layer, {})[b] = run.features[layer]
                gate_logits.setdefault(layer, {})[b] = run.gate_logits[layer]
        return OracleOutput(
            logits=logits,
            exit_layer=torch.tensor([run.exit_layer for run in runs], device=logits.device),
            cache=OracleCache(rows),
            last_hidden_state=hidden,
            hidden_lens=[run.lens for run in runs],
            gate_features=features,
            gate_logits=gate_logits,
        )

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states behind the final norm, as the model gives them."""
        return capped(self._head(hidden), self.logit_softcap)

    def embed_tokens(self, input_ids: Tensor | None) -> Tensor:
        """What the model embeds tokens [B, T] as, [B, T, C]."""
        embeds: Tensor = self.model.get_input_embeddings()(input_ids)
        return embeds
