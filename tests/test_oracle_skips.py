"""The oracle with skipped attentions and adapters: golden data of the authors' code, rows, exits, what is refused."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    DATA,
    LAYERS,
    NEVER,
    TINY,
    assert_close,
    chunk,
    gate,
    image_prompt,
    one_thread,  # noqa: F401
    plan,
    random_adapter,
    shared_model,
    tiny,
    to_float64,
)
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from vte_compile import KeptAdapter, Oracle, Plan, SkippedAttention, StaticExit
from vte_compile.adapters import PIA, PlainAdapter, StaticRouter, apply_pia, apply_plain, pool, route
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.blocks import block_parts, rms_gain
from vte_compile.oracle import OracleCache, embed
from vte_compile.oracle.blocks import planned_blocks


def skip(layer: int, **options) -> SkippedAttention:
    return SkippedAttention(layer, random_adapter(PIA, layer, **options))


def kept(layer: int, **options) -> KeptAdapter:
    return KeptAdapter(layer, random_adapter(PlainAdapter, 10 + layer, **options))


# ---------------------------------------------------------------- golden parity


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def golden():
    """The golden data, its model in true float64, and its weights under the authors' names."""
    data = np.load(DATA / "eas_llava_model.npz")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    cfg = {name: int(data[f"cfg.{name}"]) for name in (*names, "num_key_value_heads")}
    rope = {"rope_type": "default", "rope_theta": float(data["cfg.rope_theta"])}
    model = LlamaForCausalLM(LlamaConfig(**cfg, rms_norm_eps=float(data["cfg.rms_norm_eps"]), rope_parameters=rope))
    weights = {key[2:]: torch.from_numpy(data[key]) for key in data.files if key.startswith("w.")}
    model.load_state_dict({key: value.float() for key, value in weights.items() if "adapter" not in key})
    return data, to_float64(model.eval()), weights


@contextmanager
def hidden_states(model, into: list):
    """Collect what enters each layer, and what leaves the final norm."""
    norms = [layer.input_layernorm for layer in model.model.layers]
    handles = [norm.register_forward_pre_hook(lambda module, args: into.append(args[0])) for norm in norms]
    handles.append(model.model.norm.register_forward_hook(lambda module, args, output: into.append(output)))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("case", ["A", "none"])
def test_golden(golden, case):
    data, model, weights = golden

    def expected(key):
        return torch.from_numpy(np.asarray(data[f"{case}.{key}.f64"]))

    eas = Plan.from_eas_checkpoint(weights, data[f"{case}.skip_layers"].tolist())
    oracle = Oracle(model, eas)
    embeds = torch.from_numpy(data["inputs_embeds"]).double()
    hidden: list[torch.Tensor] = []
    with hidden_states(model, hidden):
        out = oracle.forward(embeds)
    close(torch.cat(hidden), expected("hidden_states"))
    close(out.logits, expected("logits"))
    row = out.cache.rows[0]
    close(torch.cat([row.statistics[layer].weights for layer in range(6)]), expected("router_weights"))
    assert [0 if kv is None else kv[0].numel() for kv in row.layers] == data[f"{case}.cache_numel"].tolist()
    assert out.cache.lengths() == [[0 if numel == 0 else 23 for numel in data[f"{case}.cache_numel"]]]

    tokens = torch.from_numpy(data[f"{case}.dec_tokens"])
    new = model.get_input_embeddings()(tokens).detach()[None]
    cache = out.cache
    for step in range(5):
        hidden = []
        with hidden_states(model, hidden):
            out = oracle.forward(new[:, step : step + 1], cache=cache)
        cache = out.cache
        close(out.logits[0, 0], expected("dec_logits")[step])
        close(torch.cat(hidden)[:, 0], expected("dec_hidden_states")[step])
    # Without a cache the authors' code takes all tokens for the prompt.
    out = oracle.forward(torch.cat([embeds, new], 1))
    close(out.logits[0, -1], expected("uncached_logits_last"))


def test_golden_greedy_tokens(golden):
    data, model, weights = golden
    oracle = Oracle(model, Plan.from_eas_checkpoint(weights, data["A.skip_layers"].tolist()))
    generation = oracle.generate(torch.from_numpy(data["inputs_embeds"]).double(), max_new_tokens=5)
    assert generation.tokens == [data["A.dec_tokens"].tolist()]


@pytest.mark.parametrize("kind", ["skipped", "kept"])
def test_golden_block_alone(golden, kind):
    """The blocks the authors folded, before folding."""
    data, model, weights = golden
    layer = int(data[f"fold.{kind}.layer_index"])
    oracle = Oracle(model, Plan.from_eas_checkpoint(weights, data["A.skip_layers"].tolist()))
    embeds = torch.from_numpy(data["inputs_embeds"]).double()
    close(run_block(oracle, layer, embeds), torch.from_numpy(data[f"fold.{kind}.unfused_output.f64"]))


def run_block(oracle, layer, hidden, positions=None):
    """One block's output for the tokens of a prompt."""
    length = hidden.shape[1]
    positions = torch.arange(length)[None] if positions is None else positions
    mask = hidden.new_full((length, length), float("-inf")).triu(1)[None, None]
    cos_sin = oracle.decoder.rotary_emb(hidden, position_ids=positions)
    with torch.no_grad():
        return oracle.blocks[layer](hidden, None, attention_mask=mask, position_embeddings=cos_sin)[0]


# ---------------------------------------------------------------- the block forms


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("skips", [[0], [1, 3], [0, 1, 2, 3]])
def test_training_free_skip_is_a_model_whose_attention_gives_nothing(name, skips):
    model = tiny(name)
    silent = copy.deepcopy(model)
    for layer in skips:
        silent.model.layers[layer].self_attn.o_proj.weight.data.zero_()
    embeds, visual, _ = chunk("ttvvttt")
    out = Oracle(model, plan(*map(SkippedAttention, skips))).forward(embeds, visual)
    want = silent(inputs_embeds=embeds).logits.detach()
    assert_close(out.logits, want)
    assert out.cache.lengths() == [[0 if layer in skips else 7 for layer in range(LAYERS)]]
    assert out.cache.rows[0].statistics == {}
    generation = Oracle(model, plan(*map(SkippedAttention, skips))).generate(embeds, max_new_tokens=4)
    silent.generation_config.eos_token_id = None
    theirs = silent.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=4, pad_token_id=0)
    assert generation.tokens == theirs.tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_static_pia_and_adapter_spelled_out(attention):
    """Two layers by hand, prefill only: an adapter in front of attention, then a PIA in place of it."""
    model = tiny(num_hidden_layers=2, attn_implementation=attention)
    pia = random_adapter(PIA, router=StaticRouter((0.3, 0.7)))
    plain = random_adapter(PlainAdapter, 1)
    embeds = chunk("ttttt")[0]
    out = Oracle(model, plan(KeptAdapter(0, plain), SkippedAttention(1, pia))).forward(embeds)
    decoder = model.model
    first, second = decoder.layers
    with torch.no_grad():
        x = first.input_layernorm(embeds)
        positions = torch.arange(5)[None]
        mask = torch.full((5, 5), float("-inf")).triu(1)[None, None]
        h = (
            embeds
            + first.self_attn(
                hidden_states=apply_plain(plain, x, route(plain.router, x)),
                position_embeddings=decoder.rotary_emb(embeds, positions),
                attention_mask=mask,
            )[0]
        )
        h = h + first.mlp(first.post_attention_layernorm(h))
        x = second.input_layernorm(h)
        adapted = apply_pia(pia, x, torch.tensor([[0.3, 0.7]]), pool(pia, x))
        h = h + second.mlp(second.post_attention_layernorm.weight * adapted)
        want = model.lm_head(decoder.norm(h))
    assert_close(out.logits, want)


def test_decode_and_later_turns_keep_what_the_prompt_said():
    oracle = Oracle(shared_model("llama"), plan(skip(0), kept(1), SkippedAttention(2), skip(3)))
    turn, token = chunk("ttt", "t..", seed=1), chunk("t", "t", seed=2)
    first = oracle.forward(*chunk("ttvvt", ".tttt"))
    second = oracle.forward(*turn, cache=first.cache)
    third = oracle.forward(*token, cache=second.cache)
    for before, after in zip(first.cache.rows, third.cache.rows, strict=True):
        assert sorted(before.statistics) == [0, 1, 3]
        for layer, statistics in before.statistics.items():
            assert after.statistics[layer] is statistics
    assert third.cache.lengths() == [[0, 9, 0, 0], [0, 6, 0, 0]]
    assert third.cache.next_positions() == [9, 6]
    # Nothing of the later chunks is in the statistics: how they are cut makes no difference.
    together = oracle.forward(torch.cat([turn[0], token[0]], 1)[:1], cache=OracleCache(first.cache.rows[:1]))
    assert_close(together.logits[0, -1], third.logits[0, 0])


def test_row_whose_prompt_comes_later():
    oracle = Oracle(shared_model("llama"), plan(skip(1), kept(2)))
    first = oracle.forward(*chunk("tvt", "..."))
    assert first.cache.rows[1].statistics == {}
    turn = chunk("tt", "tt", seed=1)
    second = oracle.forward(*turn, cache=first.cache)
    alone = oracle.forward(turn[0][1:])
    assert torch.equal(second.logits[1], alone.logits[0])


parts = st.fixed_dictionaries({layer: st.sampled_from(["own", "free", "skip", "kept"]) for layer in range(LAYERS)})


def planned(forms, *exits) -> Plan:
    made = {"free": SkippedAttention, "skip": skip, "kept": kept}
    return plan(*exits, *(made[form](layer) for layer, form in forms.items() if form != "own"))


@settings(max_examples=25, deadline=None)
@given(
    forms=parts,
    rows=st.lists(st.text("tv", max_size=6).map(lambda s: s + "t"), min_size=1, max_size=3),
    exit_layer=st.integers(-1, LAYERS - 1),
    places=st.data(),
    seed=st.integers(0, 99),
)
def test_rows_are_independent_of_batch_and_padding(forms, rows, exit_layer, places, seed):
    """Prefill, a second turn and decode: each row of a padded batch is what it is alone."""
    oracle = Oracle(shared_model("llama"), planned(forms, *([StaticExit(exit_layer)] if exit_layer >= 0 else [])))
    width = max(map(len, rows)) + 2
    padded = []
    for row in rows:
        columns = sorted(places.draw(st.permutations(range(width)), label="columns")[: len(row)])
        cells = ["."] * width
        for column, cell in zip(columns, row, strict=True):
            cells[column] = cell
        padded.append("".join(cells))
    turns = [
        chunk(*padded, seed=seed),
        chunk(*["tvt"] * len(rows), seed=seed + 1),
        chunk(*["t"] * len(rows), seed=seed),
    ]
    together, alone = None, [None] * len(rows)
    for embeds, visual, real in turns:
        embeds = embeds.masked_fill(~real[..., None], float("nan"))
        together = oracle.forward(embeds, visual, real, cache=together and together.cache)
        for b in range(len(rows)):
            solo = (x[b : b + 1, real[b]] for x in (embeds, visual))
            alone[b] = oracle.forward(*solo, cache=alone[b] and alone[b].cache)
            assert torch.equal(together.logits[b, real[b]], alone[b].logits[0])
            assert together.cache.lengths()[b] == alone[b].cache.lengths()[0]
            assert together.cache.next_positions()[b] == alone[b].cache.next_positions()[0]


# ---------------------------------------------------------------- with exits


def test_means_above_an_exit_are_of_what_is_left():
    model = shared_model("llama")
    embeds, visual, _ = chunk("tvvttt")
    both = plan(StaticExit(1), skip(1), skip(2), kept(3))
    hidden: list[torch.Tensor] = []
    with hidden_states(model, hidden):
        out = Oracle(model, both).forward(embeds, visual)
    hidden = hidden[-LAYERS - 1 :]
    assert out.exit_layer.tolist() == [1]
    assert out.hidden_lens == [[6, 6, 4, 4, 4]]
    assert out.cache.lengths() == [[6, 0, 0, 4]]
    statistics = out.cache.rows[0].statistics
    with torch.no_grad():
        for layer, part in ((1, both.skips[0]), (2, both.skips[1]), (3, both.adapters[0])):
            x = model.model.layers[layer].input_layernorm(hidden[layer])
            assert x.shape[1] == out.hidden_lens[0][layer]
            assert torch.equal(statistics[layer].weights, route(part.adapter.router, x))
            if layer < 3:
                assert torch.equal(statistics[layer].pooled, pool(part.adapter, x))


@pytest.mark.parametrize("exit_layer", range(LAYERS))
def test_an_exit_with_skips_is_the_text_alone_from_there(exit_layer):
    """By layers of the same oracle: everything up to the exit, then only the text, which keeps its positions."""
    model = shared_model("llama")
    embeds, visual, _ = chunk("tvvtvttt")
    changed = [skip(0), kept(1), SkippedAttention(2), skip(3)]
    out = Oracle(model, plan(StaticExit(exit_layer), *changed)).forward(embeds, visual)
    oracle = Oracle(model, plan(*changed))
    hidden, positions = embeds, torch.arange(8)[None]
    for layer in range(LAYERS):
        hidden = run_block(oracle, layer, hidden, positions)
        if layer == exit_layer:
            hidden, positions = hidden[:, ~visual[0]], positions[:, ~visual[0]]
    want = model.lm_head(model.model.norm(hidden)).detach()
    assert_close(out.logits[0, ~visual[0]], want[0])


def test_gates_read_behind_a_skipped_layer():
    model = shared_model("llama")
    args = chunk("tvvttt")
    out = Oracle(model, plan(gate(1, NEVER), skip(1))).forward(*args)
    hidden: list[torch.Tensor] = []
    with hidden_states(model, hidden):
        Oracle(model, plan(skip(1))).forward(*args)
    question = hidden[-LAYERS - 1 :][2][0, 3:]
    assert_close(out.gate_features[1][0], torch.cat([question[:-1].mean(0), question[-1]]))
    fires = Oracle(model, plan(gate(1, -NEVER), skip(1))).forward(*args)
    assert fires.exit_layer.tolist() == [1]


def test_inside_a_multimodal_model():
    """The same as its decoder and lm_head alone, through prefill with an exit, and greedy decoding."""
    llava = shared_model("llava")
    ids, pixels, real = image_prompt("tittt", "..itt")
    embeds, visual = embed(llava, ids, pixels)
    text = LlamaForCausalLM(llava.config.text_config).eval()
    text.model, text.lm_head = llava.get_decoder(), llava.lm_head
    both = plan(StaticExit(1), skip(0), kept(1), SkippedAttention(2), skip(3))
    ours, theirs = (Oracle(model, both).generate(embeds, visual, real, max_new_tokens=3) for model in (llava, text))
    assert ours.tokens == theirs.tokens
    assert ours.exit_layer.tolist() == [1, 1]
    assert ours.cache.lengths() == [[0, 10, 0, 0], [0, 8, 0, 0]]


# ---------------------------------------------------------------- precision and norms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    exact = Oracle(shared_model("llama"), plan(skip(1), kept(2)))
    embeds = chunk("ttvtt")[0].to(dtype)
    out = Oracle(tiny().to(dtype), plan(skip(1), kept(2))).forward(embeds)
    assert out.logits.dtype == dtype
    assert out.cache.rows[0].statistics[1].weights.dtype == torch.float32
    want = exact.forward(embeds.float()).logits
    assert (out.logits - want).abs().max() < 0.1 * want.abs().max()


def tiny_of(config, cls, **options):
    torch.manual_seed(0)
    model = cls(config(**{**TINY, "head_dim": 8, "attention_dropout": 0.0, **options})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 0.7, 0.3)  # as trained: neither 0 nor 1
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gain_of_norms(dtype):
    gemma = tiny_of(GemmaConfig, GemmaForCausalLM).to(dtype).model.norm
    llama = tiny_of(LlamaConfig, LlamaForCausalLM).to(dtype).model.norm
    assert torch.equal(rms_gain(llama), llama.weight)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(rms_gain(gemma), 1 + gemma.weight.to(wide))
    gemma.weight.data.mul_(200)  # where bfloat16 hardly tells w from 1 + w
    assert torch.equal(rms_gain(gemma), 1 + gemma.weight.to(wide))
    for norm in (nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.LayerNorm(8, elementwise_affine=False)):
        with pytest.raises(UnsupportedModelError, match="LayerNorm is not an RMSNorm with a weight per channel"):
            rms_gain(norm.to(dtype))


def test_gemma_blocks():
    """Their norms multiply by 1 + weight."""
    model = tiny_of(GemmaConfig, GemmaForCausalLM)
    embeds = chunk("ttttt")[0]
    part = skip(1)
    oracle, layer = Oracle(model, plan(part)), model.model.layers[1]
    with torch.no_grad():
        x = layer.input_layernorm(embeds)
        adapted = apply_pia(part.adapter, x, route(part.adapter.router, x), pool(part.adapter, x))
        want = embeds + layer.mlp(adapted * (1 + layer.post_attention_layernorm.weight))
    assert_close(run_block(oracle, 1, embeds), want)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "cls", "message"),
    [
        (Gemma2Config, Gemma2ForCausalLM, "has post_feedforward_layernorm, pre_feedforward_layernorm besides"),
        (Olmo2Config, Olmo2ForCausalLM, "has no input_layernorm"),
    ],
    ids=["gemma2", "olmo2"],
)
def test_blocks_with_other_norms_are_refused(config, cls, message):
    layer = tiny_of(config, cls).model.layers[0]
    with pytest.raises(UnsupportedModelError, match=f"{type(layer).__name__} {message}"):
        block_parts(layer)


def test_oracle_names_the_layer_it_cannot_change():
    model = tiny_of(Olmo2Config, Olmo2ForCausalLM)
    Oracle(model, plan())
    for part, field in ((skip(2), "skips"), (kept(2), "adapters")):
        with pytest.raises(UnsupportedModelError, match=rf"^layer 2: .* has no input_layernorm.* plan's {field}"):
            Oracle(model, plan(part))


@pytest.mark.parametrize("part", [SkippedAttention(1), skip(1), kept(1)], ids=["free", "pia", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_only_look_pre_norm_are_refused(part, dtype):
    granite = tiny_of(GraniteConfig, GraniteForCausalLM, residual_multiplier=0.98).to(dtype)
    parallel = tiny_of(StableLmConfig, StableLmForCausalLM, use_parallel_residual=True)
    with pytest.raises(UnsupportedModelError, match=r"^layer 1 \(GraniteDecoderLayer\) is not h = x"):
        Oracle(granite, plan(part))
    with pytest.raises(UnsupportedModelError):
        Oracle(parallel, plan(part))


def test_layer_norm_may_be_skipped_without_an_adapter_only():
    model = tiny_of(StableLmConfig, StableLmForCausalLM)
    Oracle(model, plan(SkippedAttention(1), kept(2)))
    with pytest.raises(UnsupportedModelError, match=r"^layer 1: LayerNorm is not an RMSNorm"):
        Oracle(model, plan(skip(1)))


def test_cache_of_another_plan_is_refused():
    model = shared_model("llama")
    prompt, token = chunk("ttt")[0], chunk("t")[0]
    plain, free, pia, adapter = (
        Oracle(model, plan(*part)) for part in ([], [SkippedAttention(1)], [skip(1)], [kept(1)])
    )
    caches = [oracle.forward(prompt).cache for oracle in (plain, free, pia, adapter)]
    for oracle, cache, message in [
        (free, caches[0], "holds keys of layer 1, which does not in this plan"),
        (plain, caches[1], "holds no keys of layer 1, which attends in this plan"),
        (pia, caches[1], "holds no statistics of layer 1, which has an adapter"),
        (free, caches[2], "holds statistics of layer 1, which has no adapter"),
        (adapter, caches[0], "holds no statistics of layer 1"),
        (plain, caches[3], "holds statistics of layer 1, which has no adapter"),
    ]:
        with pytest.raises(InputError, match=f"the cache {message}"):
            oracle.forward(token, cache=cache)


def test_nothing_is_remembered_and_the_model_is_untouched():
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    oracle = Oracle(model, plan(skip(0), kept(2)))
    args = chunk("tvvt")
    once = oracle.forward(*args)
    statistics = dict(once.cache.rows[0].statistics)
    oracle.forward(*chunk("tt", seed=4), cache=once.cache)
    assert torch.equal(oracle.forward(*args).logits, once.logits)
    assert once.cache.rows[0].statistics == statistics
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_makes_something_of_no_attention_is_refused():
    """A block with norms behind its parts is skipped as one whose attention gives zeros, which no bias may change."""

    class Sandwich(nn.Module):
        def __init__(self, norm: type[nn.Module]) -> None:
            super().__init__()
            self.self_attn, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)
            self.behind_attention = norm(4)

        def forward(self, hidden_states):
            attended, _ = self.self_attn(hidden_states)
            return hidden_states + self.behind_attention(attended) + self.mlp(hidden_states)

    x, layer = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)), Sandwich(nn.RMSNorm)
    skipped = Plan(skips=[SkippedAttention(0)])
    [block] = planned_blocks([layer], skipped)
    torch.testing.assert_close(block(x, None)[0], x + layer.mlp(x))
    with pytest.raises(UnsupportedModelError, match=r"^layer 0: Sandwich has behind_attention, a norm with a bias"):
        planned_blocks([Sandwich(nn.LayerNorm)], skipped)
