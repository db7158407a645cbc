"""The eager oracle: the reference that every other door of vte_compile is tested against.

It runs a Hugging Face decoder literally: row by row, without padding, one decoder layer after another. Where the plan
says so it drops the visual tokens of a row, skips an attention, or applies an adapter. No tracing, no batching, no
speed. The semantics are those of DyVTE (arXiv 2411.19628) and EAS (arXiv 2403.15226; vte_compile/oracle_blocks.py),
made precise where the authors' code is not: any number of images at any place, padding, several rows, further turns.

Words used here: a *chunk* is what one forward call brings, T new tokens per row (prefill, a later turn, or one decode
token). Padding is never a token. *Question tokens* are the text tokens after the last visual token of the chunk. A
row's *prompt* is its first chunk with a token: what adapters know of it, they keep for all later chunks.
A plan's *companion token* goes along with a prompt: it runs beside it, layer by layer, as a sequence of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from vte_compile.oracle_blocks import Block, KeptBlock, OwnBlock, PromptStatistics, SilencedBlock, planned_blocks
from vte_compile.plan import GateExit, Plan, StaticExit

__all__ = ["Oracle", "OracleCache", "OracleGeneration", "OracleOutput", "RowCache", "RowRun", "embed"]

# Attention implementations that take an additive 4-D mask. The flash variants ignore or refuse one.
_MASKED_ATTENTION = ("eager", "sdpa")
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class RowCache:
    """What one row of the batch has cached.

    `layers`: per decoder layer (k, v), each [1, kv_heads, length, head_dim] and k after rotary; None before the row's
    first token, and where the attention is skipped. The lengths differ between layers after an exit. `next_position`:
    position id of the row's next token, if none is given. `statistics`: by layer, of the row's prompt, for adapters.
    """

    layers: tuple[tuple[Tensor, Tensor] | None, ...]
    next_position: int = 0
    statistics: Mapping[int, PromptStatistics] = field(default_factory=dict)

    def lengths(self) -> list[int]:
        """Number of cached tokens in each layer, [L]."""
        return [0 if kv is None else kv[0].shape[-2] for kv in self.layers]


@dataclass(frozen=True)
class OracleCache:
    """KV cache of a batch: one independent `RowCache` per row. Never changed in place."""

    rows: tuple[RowCache, ...]

    def lengths(self) -> list[list[int]]:
        """Number of cached tokens per row and layer, [B][L]."""
        return [row.lengths() for row in self.rows]

    def next_positions(self) -> list[int]:
        """Position id of the next token of each row, [B]."""
        return [row.next_position for row in self.rows]


@dataclass(frozen=True)
class OracleOutput:
    """Result of one chunk; B rows, T tokens in the chunk's layout, L layers.

    `logits` [B, T, vocab], zeros for padding and for tokens that an exit removed. `exit_layer` int64 [B], -1 = no exit
    in this chunk. `last_hidden_state`: per row [n_kept, C] after the final norm. `hidden_lens`: per row [L + 1], the
    number of tokens that enter each layer, and then the final norm. `gate_features` / `gate_logits`: layer -> {row:
    [2C] / [2]} for the gates that were evaluated: [mean of the question tokens except the last; last token] and [keep,
    exit].
    """

    logits: Tensor
    exit_layer: Tensor
    cache: OracleCache
    last_hidden_state: list[Tensor]
    hidden_lens: list[list[int]]
    gate_features: dict[int, dict[int, Tensor]]
    gate_logits: dict[int, dict[int, Tensor]]


@dataclass(frozen=True)
class OracleGeneration:
    """Result of `Oracle.generate`.

    `tokens`: the new tokens of each row, the end token included. `exit_layer` int64 [B] of the prompt, -1 = no exit.
    `cache`: holds all but the last token of each row, which has not been fed back (as in Hugging Face).
    """

    tokens: list[list[int]]
    exit_layer: Tensor
    cache: OracleCache


@dataclass
class RowRun:
    """State of one row while it goes through the layers: n tokens, no padding."""

    hidden: Tensor  # [1, n, C]
    visual: Tensor  # bool [n]
    positions: Tensor  # int64 [1, n], or [3, 1, n] if positions are multimodal
    columns: Tensor  # int64 [n], where the tokens stand in the chunk
    statistics: dict[int, PromptStatistics]  # by layer, of the row's prompt
    blocks: Tensor  # int64 [n], tokens of one attend to each other in both directions; -1: as text
    deepstack: Sequence[Tensor] = ()  # [visual tokens, C], added to them behind layers 0, 1 ..
    companion: Tensor | None = None  # [1, 1, C], beside the tokens of a prompt
    exit_layer: int = -1
    lens: list[int] = field(default_factory=list)
    features: dict[int, Tensor] = field(default_factory=dict)
    gate_logits: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, keep: Tensor) -> None:
        """Remove all tokens but those of the mask [n]. Their positions keep their numbers.

        What would still be added to removed tokens goes with them.
        """
        self.deepstack = [features[keep[self.visual]] for features in self.deepstack]
        self.hidden, self.positions = self.hidden[:, keep], self.positions[..., keep]
        self.columns, self.visual, self.blocks = self.columns[keep], self.visual[keep], self.blocks[keep]


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
        _check_structure(self.decoder, self.has_blocks)
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
        self._check_against_model()
        planned = planned_blocks(self.layers, plan)
        for index, block in enumerate(planned):
            if not isinstance(block, (OwnBlock, SilencedBlock)):
                self._check_block(index)
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
        real = _chunk_mask(attention_mask, "attention_mask", inputs_embeds, default=True)
        visual = _chunk_mask(visual_mask, "visual_mask", inputs_embeds, default=False)
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
                self._positions(positions),
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
            inputs_embeds = self._embed_tokens(input_ids)
        real = _chunk_mask(attention_mask, "attention_mask", inputs_embeds, default=True)
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
            output = self.forward(self._embed_tokens(next_ids), None, chunk_mask, None, output.cache)
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

    def _positions(self, positions: Tensor) -> Tensor:
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
            layers.append(self._run_layer(index, self.blocks[index], run, past.layers[index]))
            if index < len(run.deepstack):
                run.hidden = run.hidden.clone()
                run.hidden[:, run.visual] += run.deepstack[index].to(run.hidden)
            self._maybe_exit(index, run)
        run.lens.append(run.hidden.shape[1])
        run.hidden = self.decoder.norm(run.hidden)
        return RowCache(tuple(layers), next_position, run.statistics)

    def _run_layer(
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
            attention_mask=_mask(run.blocks, past_length, layer_window(self.config, index), run.hidden),
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
            if candidate.layer == index and bool(run.visual.any()) and _fires(candidate, run):
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

    def _embed_tokens(self, input_ids: Tensor | None) -> Tensor:
        embeds: Tensor = self.model.get_input_embeddings()(input_ids)
        return embeds

    @torch.no_grad()
    def _check_against_model(self) -> None:
        """Compare with the model's own forward on a few tokens: the same modules, so only rounding may differ."""
        weight = self.model.get_input_embeddings().weight
        ids = torch.arange(min(8, weight.shape[0]), device=weight.device)[None]
        embeds = self._embed_tokens(ids)
        # Given, since a model with multimodal positions may count on from those of its latest images.
        expected = self.model(inputs_embeds=embeds, position_ids=ids, use_cache=False).logits
        actual = self.forward(embeds).logits
        scale = expected.abs().max().item()
        tolerance = 5e-2 if torch.finfo(expected.dtype).bits <= 16 else 1e-4
        error = (actual - expected).abs().max().item()
        # `not <=` rather than `>`: NaN must fail too.
        if not error <= tolerance * scale:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: running the decoder layer by layer gives other logits than the model's "
                f"own forward (off by {error:.1e}, logits up to {scale:.1e}). The model does something around its "
                "layers that the oracle does not know, or has dropout switched on (call model.eval())."
            )

    @torch.no_grad()
    def _check_block(self, index: int) -> None:
        """Compare the block form that a plan changes with the layer's own forward, on a few random tokens."""
        weight = self.model.get_input_embeddings().weight
        hidden = torch.randn(1, 8, self.config.hidden_size, generator=torch.Generator().manual_seed(index)).to(weight)
        positions = torch.arange(8, device=weight.device)
        outputs = []
        for block in (OwnBlock(self.layers[index]), KeptBlock(self.layers[index], None)):
            visual = torch.zeros_like(positions, dtype=torch.bool)
            run = RowRun(hidden, visual, self._positions(positions), positions, {}, torch.full_like(positions, -1))
            self._run_layer(index, block, run, None)
            outputs.append(run.hidden)
        own, spelled_out = outputs
        # The same operations: even low precision may not differ by more. `not <=` rather than `>`: NaN must fail too.
        if not (spelled_out - own).abs().max() <= 1e-4 * (own - hidden).abs().max():
            raise UnsupportedModelError(
                f"layer {index} ({type(self.layers[index]).__name__}) is not h = x + self_attn(input_layernorm(x)), "
                "h + mlp(post_attention_layernorm(h)): its attention cannot be skipped or adapted"
            )


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


def _fires(candidate: GateExit | StaticExit, run: RowRun) -> bool:
    """Whether the row, which has visual tokens, exits here (DyVTE, arXiv 2411.19628, the "hyper-network").

    Question tokens are what follows the last visual token. With none, nothing exits. With only one, the mean is that of
    no token at all: NaN, which keeps.
    """
    last_visual = int(run.visual.nonzero().max())
    question = run.hidden[0, last_visual + 1 :]
    if question.shape[0] == 0:
        return False
    if isinstance(candidate, StaticExit):
        return True
    question = question.to(torch.promote_types(question.dtype, torch.float32))
    feature = torch.cat([question[:-1].mean(0), question[-1]])
    z = candidate.w2.to(feature) @ nn.functional.gelu(candidate.w1.to(feature) @ feature)
    run.features[candidate.layer] = feature
    run.gate_logits[candidate.layer] = z
    return bool(z[1] - z[0] > candidate.threshold)


def _mask(blocks: Tensor, past_length: int, window: int | None, like: Tensor) -> Tensor:
    """Additive mask [1, 1, length, past_length + length], 0 = may attend, -inf = may not, causal by order in the row.

    Tokens of one block (blocks: int [length], -1 for none) attend to each other in both directions. A window limits
    how far back, but not in a block.
    Additive because eager attention adds it; sdpa takes it as well. No query is without a key: each sees itself.
    """
    length = len(blocks)
    query = torch.arange(past_length, past_length + length, device=like.device)[:, None]
    key = torch.arange(past_length + length, device=like.device)[None]
    allowed = key <= query
    if window is not None:
        allowed &= key > query - window
    allowed[:, past_length:] |= (blocks[:, None] == blocks) & (blocks[:, None] >= 0)
    return like.new_zeros(allowed.shape).masked_fill(~allowed, float("-inf"))[None, None]


def layer_window(config: Any, index: int) -> int | None:
    """Sliding window of layer `index`, None = full attention. Without layer types, all layers have the same one."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[index] == "full_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _chunk_mask(mask: Tensor | None, name: str, inputs_embeds: Tensor, default: bool) -> Tensor:
    """`mask` as bool [B, T], checked against the chunk."""
    shape = inputs_embeds.shape[:2]
    if mask is None:
        return torch.full(shape, default, dtype=torch.bool, device=inputs_embeds.device)
    if mask.shape != shape:
        raise InputError(f"{name} must be {list(shape)} like the chunk (without the past), got {list(mask.shape)}")
    return mask.to(device=inputs_embeds.device, dtype=torch.bool)


def _check_structure(decoder: Any, has_blocks: bool) -> None:
    """Refuse decoders whose forward is more than rotary embedding, layers, norm."""
    name = type(decoder).__name__
    missing = [part for part in ("layers", "norm", "rotary_emb") if not hasattr(decoder, part)]
    if missing:
        raise UnsupportedModelError(
            f"decoder {name} has no {', '.join(missing)}: the oracle needs a stack of layers with rotary embeddings"
        )
    config = decoder.config
    if config._attn_implementation not in _MASKED_ATTENTION:
        raise UnsupportedModelError(
            f"decoder {name} uses attention {config._attn_implementation!r}, which takes no explicit mask; "
            f"load the model with attn_implementation one of {_MASKED_ATTENTION}"
        )
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES))
    if unknown:
        raise UnsupportedModelError(f"decoder {name} has layers of types {unknown}; the oracle knows {_LAYER_TYPES}")
    rope = getattr(config, "rope_parameters", None) or {}
    if any(each.get("rope_type") == "dynamic" for each in (rope, *rope.values()) if isinstance(each, dict)):
        raise UnsupportedModelError(
            f"decoder {name} has dynamic rope: it remembers the longest row, so rows would not be independent"
        )
    # The few short tokens of _check_against_model would not show it.
    if getattr(config, "use_bidirectional_attention", None) and not has_blocks:
        raise UnsupportedModelError(
            f"decoder {name} has use_bidirectional_attention, which the oracle does not support"
        )
