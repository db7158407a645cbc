"""The oracle against the golden data of the authors' code, against Hugging Face itself, and against what an exit means.

`masked_reference` is the second opinion: the model's own forward, all tokens present, with hooks that hide the visual
keys above the exit layer. DyVTE shows that this equals removing them. Layouts are strings: t text, v visual, . padding.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    CASES,
    DATA,
    IMAGE,
    LAYERS,
    NEVER,
    TINY,
    C,
    assert_close,
    chunk,
    gate,
    load_golden,
    one_thread,  # noqa: F401
    plan,
    tiny,
    tiny_llava,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from vte_compile.errors import InputError, PlanMismatchError, UnsupportedModelError
from vte_compile.oracle import Oracle, embed
from vte_compile.plan import GateExit, StaticExit

TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}


@pytest.fixture(scope="module")
def golden():
    return load_golden()


@pytest.fixture(scope="module")
def llama():
    return tiny()


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


def masked_reference(model, embeds, hidden_above: list[tuple[torch.Tensor, int]]):
    """Logits [T, vocab] of one row by the model's own forward; each mask [T] is hidden as keys above its layer."""
    length = embeds.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    def hide(index):
        def hook(module, args, kwargs):
            allowed = causal.clone()
            for tokens, layer in hidden_above:
                if 0 <= layer < index:
                    allowed &= ~tokens
            allowed |= torch.eye(length, dtype=torch.bool)  # hidden tokens need some key; their rows are not compared
            mask = embeds.new_zeros(allowed.shape).masked_fill(~allowed, torch.finfo(embeds.dtype).min)
            return args, {**kwargs, "attention_mask": mask[None, None]}

        return hook

    handles = [
        layer.register_forward_pre_hook(hide(i), with_kwargs=True) for i, layer in enumerate(model.get_decoder().layers)
    ]
    with torch.no_grad():
        logits = model(inputs_embeds=embeds, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits


# ---------------------------------------------------------------- golden parity


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("case", CASES)
def test_golden(golden, case, dtype):
    models, w1, image = golden
    data = np.load(DATA / f"dyvte_{case}.npz")
    suffix = ".f64" if dtype == torch.float64 else ".f32"

    def expected(key):
        return torch.from_numpy(np.asarray(data[key + suffix]))

    def close(actual, key, index=None):
        want = expected(key) if index is None else expected(key)[index]
        torch.testing.assert_close(actual, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

    def kv_sums(cache):
        return torch.stack([torch.stack([k[0].sum(1), v[0].sum(1)]) for k, v in cache.rows[0].layers])

    w2 = torch.from_numpy(data["router_w2"]).double()
    oracle = Oracle(models[dtype], plan(*[GateExit(i, w1[i], w2[i]) for i in range(6)]))
    embeds = torch.from_numpy(data["inputs_embeds"]).to(dtype)
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[:, image] = True
    out = oracle.forward(embeds, visual)

    assert out.exit_layer.tolist() == [data["exit_layer"].item()]
    assert list(out.gate_features) == list(range(len(data["gate_feats.f64"])))
    close(torch.stack([out.gate_features[i][0] for i in out.gate_features]), "gate_feats")
    close(torch.stack([out.gate_logits[i][0] for i in out.gate_logits]), "gate_logits")
    assert out.hidden_lens == [data["hidden_lens"].tolist()]
    close(out.last_hidden_state[0], "last_hidden_state", 0)
    close(out.logits[:, -1], "logits_last")
    assert out.cache.lengths() == [data["kv_lens_prefill"].tolist()]
    close(kv_sums(out.cache), "kv_sum_prefill")

    cache = out.cache
    for step, tokens in enumerate(torch.from_numpy(data["dec_tokens"])):
        assert cache.next_positions() == [data["dec_positions"][step]]
        out = oracle.forward(models[dtype].get_input_embeddings()(tokens[:, None]).detach(), cache=cache)
        cache = out.cache
        assert not out.gate_features
        assert out.exit_layer.tolist() == [-1]
        close(out.logits[:, 0], "dec_logits", step)
        assert cache.lengths() == [data["dec_kv_lens"][step].tolist()]
    close(kv_sums(cache), "kv_sum_final")


@pytest.mark.parametrize("case", ["exit_layer2", "never"])
def test_golden_greedy_tokens(golden, case):
    """dec_tokens are the authors' greedy choices."""
    models, w1, image = golden
    data = np.load(DATA / f"dyvte_{case}.npz")
    w2 = torch.from_numpy(data["router_w2"]).double()
    oracle = Oracle(models[torch.float64], plan(*[GateExit(i, w1[i], w2[i]) for i in range(6)]))
    embeds = torch.from_numpy(data["inputs_embeds"]).double()
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[:, image] = True
    generation = oracle.generate(embeds, visual, max_new_tokens=4)
    assert generation.tokens == data["dec_tokens"].T.tolist()
    assert generation.exit_layer.tolist() == [data["exit_layer"].item()]


# ---------------------------------------------------------------- without exits: Hugging Face itself


SLIDING = {
    "mistral": dict(sliding_window=3),
    "qwen2": dict(use_sliding_window=True, sliding_window=3, max_window_layers=2),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("mistral", {}), ("qwen2", {}), *SLIDING.items()],
    ids=["llama", "mistral", "qwen2", "mistral-sliding", "qwen2-sliding"],
)
def test_no_exit_is_the_models_own_forward(name, options, attention):
    model = tiny(name, attn_implementation=attention, **options)
    embeds, visual, real = chunk("..tvvtt", "ttvvtvt", "tttt...")
    out = Oracle(model, plan()).forward(embeds, visual, real)
    position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        want = model(inputs_embeds=embeds, attention_mask=real.long(), position_ids=position_ids).logits
    assert_close(out.logits[real], want[real])
    assert (out.logits[~real] == 0).all()
    assert out.exit_layer.tolist() == [-1] * 3
    assert out.exit_layer.dtype == torch.int64
    assert out.cache.lengths() == [[5] * LAYERS, [7] * LAYERS, [4] * LAYERS]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_no_exit_generates_as_the_model(name):
    model = tiny(name, **SLIDING.get(name, {}))
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    # The first row's third token ends it; the other goes on.
    free = Oracle(model, plan()).generate(input_ids=ids, attention_mask=mask, max_new_tokens=6)
    eos = free.tokens[0][2]
    ours = Oracle(model, plan()).generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, eos_token_id=eos)
    for b in range(2):
        solo = ids[b, mask[b].bool()][None]
        theirs = model.generate(solo, do_sample=False, max_new_tokens=6, eos_token_id=eos, pad_token_id=0)
        assert ours.tokens[b] == theirs[0, solo.shape[1] :].tolist()
        n = solo.shape[1] + len(ours.tokens[b]) - 1
        assert ours.cache.lengths()[b] == [n] * LAYERS
        assert ours.cache.next_positions()[b] == n
    assert len(ours.tokens[0]) <= 3
    assert ours.tokens[0][-1] == eos
    assert len(ours.tokens[1]) > len(ours.tokens[0])


def test_positions_given_and_counted_on(llama):
    embeds, visual, real = chunk("..ttvvtt")
    given = torch.tensor([[9, 9, 3, 4, 10, 11, 12, 40]])
    out = Oracle(llama, plan()).forward(embeds, visual, real, given)
    with torch.no_grad():
        want = llama(inputs_embeds=embeds[:, 2:], position_ids=given[:, 2:]).logits
    assert_close(out.logits[:, 2:], want)
    assert out.cache.next_positions() == [41]
    more = chunk("tt", seed=1)[0]
    counted = Oracle(llama, plan()).forward(more, cache=out.cache)
    explicit = Oracle(llama, plan()).forward(more, position_ids=torch.tensor([[41, 42]]), cache=out.cache)
    other = Oracle(llama, plan()).forward(more, position_ids=torch.tensor([[6, 7]]), cache=out.cache)
    assert torch.equal(counted.logits, explicit.logits)
    assert not torch.allclose(counted.logits, other.logits, atol=1e-3)


# ---------------------------------------------------------------- what an exit does


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_removing_equals_masking(name, layer, attention):
    model = tiny(name, attn_implementation=attention)
    embeds, visual, _ = chunk("vtvvttvtt")
    out = Oracle(model, plan(StaticExit(layer))).forward(embeds, visual)
    text = ~visual[0]
    want = masked_reference(model, embeds, [(visual[0], layer)])
    assert_close(out.logits[0, text], want[text])
    assert (out.logits[0, visual[0]] == 0).all()
    assert out.exit_layer.tolist() == [layer]
    assert out.cache.lengths() == [[9] * (layer + 1) + [5] * (LAYERS - 1 - layer)]
    assert out.hidden_lens == [[9] * (layer + 1) + [5] * (LAYERS - layer)]
    assert out.last_hidden_state[0].shape == (5, C)
    if layer < LAYERS - 1:  # the reference does hide something
        unmasked = masked_reference(model, embeds, [])
        assert not torch.allclose(want[text], unmasked[text], atol=1e-3)


def test_exit_after_the_last_layer_only_takes_the_rows(llama):
    embeds, visual, _ = chunk("tvvtt")
    full = Oracle(llama, plan()).forward(embeds, visual)
    out = Oracle(llama, plan(StaticExit(LAYERS - 1))).forward(embeds, visual)
    assert out.exit_layer.tolist() == [LAYERS - 1]
    assert_close(out.logits[~visual], full.logits[~visual])
    assert (out.logits[visual] == 0).all()
    assert (full.logits[visual] != 0).any()
    assert out.cache.lengths() == full.cache.lengths()


@pytest.mark.parametrize(
    ("layout", "gate_exits", "static_exits", "evaluated"),
    [
        ("tttt", False, False, False),  # no image
        ("ttvv", False, False, False),  # no question
        ("tvtv", False, False, False),  # no question after the last image
        ("ttvv..", False, False, False),
        ("tvvt", False, True, True),  # the mean of no token is NaN, which keeps
        ("tvvt..", False, True, True),
        ("vvtt", True, True, True),
        (".vtvtt.", True, True, True),
    ],
)
def test_which_questions_can_exit(llama, layout, gate_exits, static_exits, evaluated):
    args = chunk(layout)
    eager_gate = Oracle(llama, plan(gate(1, -NEVER))).forward(*args)
    assert eager_gate.exit_layer.tolist() == [1 if gate_exits else -1]
    assert bool(eager_gate.gate_features) == evaluated
    if evaluated:
        assert eager_gate.gate_logits[1][0].isnan().any() == (not gate_exits)
    static = Oracle(llama, plan(StaticExit(1))).forward(*args)
    assert static.exit_layer.tolist() == [1 if static_exits else -1]
    assert not static.gate_features


def test_gate_reads_the_question_after_the_last_image(llama):
    """The feature from hidden states that the model itself reports, and the strict threshold."""
    embeds, visual, _ = chunk("ttvtvvttt")
    out = Oracle(llama, plan(gate(2, NEVER))).forward(embeds, visual)
    with torch.no_grad():
        hidden = llama(inputs_embeds=embeds, output_hidden_states=True).hidden_states[3][0]
    feature = torch.cat([hidden[6:8].mean(0), hidden[8]])
    assert_close(out.gate_features[2][0], feature)
    w1, w2 = gate(2).w1, gate(2).w2
    z = w2 @ (lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)))(w1 @ feature)
    assert_close(out.gate_logits[2][0], z)
    margin = float(out.gate_logits[2][0][1] - out.gate_logits[2][0][0])
    for threshold, want in [(margin, -1), (margin - 1e-6 * abs(margin) - 1e-6, 2)]:
        assert Oracle(llama, plan(gate(2, threshold))).forward(embeds, visual).exit_layer.tolist() == [want]


@pytest.mark.parametrize(
    ("dtype", "gate_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_gate_precision(dtype, gate_dtype):
    embeds, visual, _ = chunk("tvvtt")
    out = Oracle(tiny().to(dtype), plan(gate(0, NEVER))).forward(embeds.to(dtype), visual)
    assert out.gate_features[0][0].dtype == out.gate_logits[0][0].dtype == gate_dtype
    assert out.logits.dtype == dtype


def test_each_row_exits_at_its_own_layer_and_first_exit_wins(llama):
    args = chunk("..vvtttt", "ttvvvttt", "tvtvtt..", "tttttttt", "vvvvtttt", "tttvttt.", seed=3)
    all_kept = Oracle(llama, plan(*[gate(i, NEVER) for i in range(LAYERS)])).forward(*args)
    margins = {layer: {b: float(z[1] - z[0]) for b, z in rows.items()} for layer, rows in all_kept.gate_logits.items()}
    assert all(sorted(rows) == [0, 1, 2, 4, 5] for rows in margins.values())
    # At every layer the largest of the remaining rows exits: thresholds between the first and the second margin.
    thresholds, want, left = [], [-1] * 6, [0, 1, 2, 4, 5]
    for layer in range(LAYERS):
        ranked = sorted(left, key=lambda b: margins[layer][b])
        thresholds.append((margins[layer][ranked[-1]] + margins[layer][ranked[-2]]) / 2)
        want[ranked[-1]] = layer
        left.remove(ranked[-1])
    out = Oracle(llama, plan(*[gate(i, t) for i, t in enumerate(thresholds)])).forward(*args)
    assert out.exit_layer.tolist() == want
    for layer in range(LAYERS):
        assert sorted(out.gate_logits[layer]) == [b for b in (0, 1, 2, 4, 5) if want[b] == -1 or want[b] >= layer]
    for b in range(6):
        real, visual = args[2][b], args[1][b]
        full, text = int(real.sum()), int((real & ~visual).sum())
        k = want[b] if want[b] >= 0 else LAYERS
        assert out.cache.lengths()[b] == [full if i <= k else text for i in range(LAYERS)]


layouts = st.lists(st.text("tv", min_size=0, max_size=6).map(lambda s: s + "t"), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(
    rows=layouts,
    holes=st.data(),
    layer=st.integers(0, LAYERS - 1),
    seed=st.integers(0, 99),
)
def test_rows_are_independent_of_batch_and_padding(rows, holes, layer, seed):
    """Padding anywhere, images anywhere: each row is what it is alone, and what masking gives."""
    model = _shared_llama()
    width = max(map(len, rows)) + 2
    places = [sorted(holes.draw(st.permutations(range(width)), label="columns")[: len(row)]) for row in rows]
    padded = []
    for row, columns in zip(rows, places, strict=True):
        cells = ["."] * width
        for column, cell in zip(columns, row, strict=True):
            cells[column] = cell
        padded.append("".join(cells))
    args = chunk(*padded, seed=seed)
    oracle = Oracle(model, plan(gate(0), gate(1), StaticExit(layer)) if layer > 1 else plan(StaticExit(layer)))
    out = oracle.forward(*args)
    for b, columns in enumerate(places):
        embeds, visual = args[0][b : b + 1, columns], args[1][b, columns]
        solo = oracle.forward(embeds, visual[None])
        assert torch.equal(out.logits[b, columns], solo.logits[0])
        assert torch.equal(out.last_hidden_state[b], solo.last_hidden_state[0])
        assert out.exit_layer[b] == solo.exit_layer[0]
        assert out.cache.lengths()[b] == solo.cache.lengths()[0]
        k = int(solo.exit_layer[0])
        assert (k >= 0) == bool(visual.any())
        want = masked_reference(model, embeds, [(visual, k)])
        assert_close(solo.logits[0, ~visual], want[~visual])
    assert (out.logits[~args[2]] == 0).all()


_LLAMA: list = []


def _shared_llama():
    """The tiny Llama for hypothesis tests, which do not take fixtures well."""
    if not _LLAMA:
        _LLAMA.append(tiny())
    return _LLAMA[0]


# ---------------------------------------------------------------- further turns


@pytest.mark.parametrize(("first", "second"), [(0, 2), (2, 0), (1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_second_turn_with_a_new_image(llama, first, second):
    """Each turn's image leaves above its own exit layer; what is cached stays."""
    turn1, turn2 = chunk("ttvvvtt", seed=1), chunk("tvvtt", seed=2)
    out1 = Oracle(llama, plan(StaticExit(first)) if first >= 0 else plan()).forward(*turn1)
    out2 = Oracle(llama, plan(StaticExit(second)) if second >= 0 else plan()).forward(*turn2, cache=out1.cache)
    assert (out1.exit_layer.item(), out2.exit_layer.item()) == (first, second)
    visual1 = torch.cat([turn1[1][0], torch.zeros(5, dtype=torch.bool)])
    visual2 = torch.cat([torch.zeros(7, dtype=torch.bool), turn2[1][0]])
    want = masked_reference(llama, torch.cat([turn1[0], turn2[0]], 1), [(visual1, first), (visual2, second)])
    shown = torch.ones(5, dtype=torch.bool) if second < 0 else ~turn2[1][0]
    assert_close(out2.logits[0, shown], want[7:][shown])
    lengths = [(7 if i <= first or first < 0 else 4) + (5 if i <= second or second < 0 else 3) for i in range(LAYERS)]
    assert out2.cache.lengths() == [lengths]
    assert out2.cache.next_positions() == [12]


def test_second_turn_gates_only_rows_with_a_new_image(llama):
    oracle = Oracle(llama, plan(gate(1, -NEVER), StaticExit(2)))
    out1 = oracle.forward(*chunk("vvttt", "vvttt", ".tttt"))
    assert out1.exit_layer.tolist() == [1, 1, -1]
    out2 = oracle.forward(*chunk("ttt.", "vvtt", ".vtt"), cache=out1.cache)
    assert out2.exit_layer.tolist() == [-1, 1, 1]
    assert sorted(out2.gate_features[1]) == [1, 2]
    assert out2.cache.lengths() == [[8, 8, 6, 6], [9, 9, 5, 5], [7, 7, 6, 6]]
    assert out2.cache.next_positions() == [8, 9, 7]


def test_row_without_tokens_in_a_chunk_does_nothing(llama):
    oracle = Oracle(llama, plan(StaticExit(0)))
    out1 = oracle.forward(*chunk("vtt", "..."))
    assert out1.cache.lengths() == [[3, 2, 2, 2], [0] * LAYERS]
    assert out1.last_hidden_state[1].shape == (0, C)
    assert (out1.logits[1] == 0).all()
    turn2 = chunk("..", "tt", seed=1)
    out2 = oracle.forward(*turn2, cache=out1.cache)
    assert out2.cache.rows[0] is out1.cache.rows[0]
    alone = oracle.forward(turn2[0][1:])
    assert torch.equal(out2.logits[1], alone.logits[0])
    assert out2.cache.lengths()[1] == [2] * LAYERS


def test_reentrant(llama):
    """Neither the model, nor the oracle, nor a passed cache remembers a call."""
    oracle = Oracle(llama, plan(StaticExit(1)))
    out1 = oracle.forward(*chunk("tvvtt", "vtttt"))
    before = copy.deepcopy(out1.cache)
    turn2 = chunk("vtt", "ttt", seed=1)
    once = oracle.forward(*turn2, cache=out1.cache)
    oracle.generate(*chunk("vvtttt", seed=2), max_new_tokens=3)
    again = oracle.forward(*turn2, cache=out1.cache)
    assert torch.equal(once.logits, again.logits)
    assert once.cache.lengths() != out1.cache.lengths() == before.lengths()
    for row, kept in zip(out1.cache.rows, before.rows, strict=True):
        for (k, v), (k0, v0) in zip(row.layers, kept.layers, strict=True):
            assert torch.equal(k, k0)
            assert torch.equal(v, v0)


def test_generate_after_an_exit_is_masking_too(llama):
    """Every greedy token again by the masked reference on the sequence so far; then a second turn on the cache."""
    embeds, visual, _ = chunk("tvvvtt", seed=5)
    oracle = Oracle(llama, plan(StaticExit(1)))
    generation = oracle.generate(embeds, visual, max_new_tokens=4)
    assert generation.exit_layer.tolist() == [1]
    assert generation.cache.lengths() == [[9, 9, 6, 6]]
    table = llama.get_input_embeddings().weight.detach()
    so_far, hidden = embeds, visual[0]
    for token in generation.tokens[0]:
        assert token == int(masked_reference(llama, so_far, [(hidden, 1)])[-1].argmax())
        so_far = torch.cat([so_far, table[token][None, None]], 1)
        hidden = torch.cat([hidden, torch.tensor([False])])
    # The last token has not been fed yet: it begins the next turn.
    turn2 = torch.cat([so_far[:, -1:], table[None, 3:5]], 1)
    out = oracle.forward(turn2, cache=generation.cache)
    whole = torch.cat([so_far, table[None, 3:5]], 1)
    want = masked_reference(llama, whole, [(torch.cat([hidden, torch.zeros(2, dtype=torch.bool)]), 1)])
    assert_close(out.logits[0], want[-3:])


def test_generate_rows_as_alone(llama):
    args = chunk("..vvttt", "tvtvttt", "tttt...", seed=4)
    oracle = Oracle(llama, plan(gate(0, 0.0), StaticExit(2)))
    free = oracle.generate(*args, max_new_tokens=5)
    eos = [free.tokens[0][1], free.tokens[1][3]]
    together = oracle.generate(*args, max_new_tokens=5, eos_token_id=eos)
    assert len({len(row) for row in together.tokens}) > 1  # rows do end at different steps
    for b in range(3):
        alone = oracle.generate(*[x[b : b + 1] for x in args], max_new_tokens=5, eos_token_id=eos)
        assert alone.tokens == [together.tokens[b]]
        assert alone.cache.lengths() == [together.cache.lengths()[b]]
        assert alone.exit_layer[0] == together.exit_layer[b]


def test_sliding_window_counts_what_is_left():
    """Above the exit the window spans the remaining tokens: it reaches further back than original positions would."""
    model = tiny("mistral", sliding_window=3)
    embeds, visual, _ = chunk("tvvvvtt")
    out = Oracle(model, plan(StaticExit(0))).forward(embeds, visual)
    # By the model's own layers: layer 0 on everything, then layers 1.. on the text alone, with its old positions.
    decoder, length = model.get_decoder(), embeds.shape[1]

    def run(layers, hidden, positions):
        n = hidden.shape[1]
        allowed = torch.ones(n, n, dtype=torch.bool).tril().triu(-2)[None, None]
        cos_sin = decoder.rotary_emb(hidden, positions)
        for layer in layers:
            hidden = layer(hidden, attention_mask=allowed, position_embeddings=cos_sin, position_ids=positions)
        return hidden

    positions = torch.arange(length)[None]
    text = ~visual[0]
    with torch.no_grad():
        hidden = run(decoder.layers[:1], embeds, positions)
        hidden = run(decoder.layers[1:], hidden[:, text], positions[:, text])
        want = model.lm_head(decoder.norm(hidden))
    assert_close(out.logits[0, text], want[0])


# ---------------------------------------------------------------- LLaVA


def llava_inputs(count: int = 2):
    """A batch of two rows: an image each, one padded on the left."""
    pixel_values = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    i = IMAGE
    ids = torch.tensor([[0, 0, 1, i, i, i, i, 5, 6], [3, i, i, i, i, 7, 8, 9, 4]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    return ids, pixel_values, mask


def test_llava_embed_is_the_models_own(llava):
    ids, pixel_values, mask = llava_inputs()
    embeds, visual = embed(llava, input_ids=ids, pixel_values=pixel_values, attention_mask=mask)
    assert torch.equal(visual, ids == IMAGE)
    out = Oracle(llava, plan()).forward(embeds, visual, mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        want = llava(input_ids=ids, pixel_values=pixel_values, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    assert_close(out.logits[real], want[real])


def test_llava_generates_as_the_model_and_exits(llava):
    ids, pixel_values, mask = llava_inputs()
    embeds, visual = embed(llava, ids, pixel_values)
    ours = Oracle(llava, plan()).generate(embeds, visual, mask, max_new_tokens=4)
    theirs = llava.generate(
        input_ids=ids, pixel_values=pixel_values, attention_mask=mask, do_sample=False, max_new_tokens=4, pad_token_id=0
    )
    assert ours.tokens == theirs[:, ids.shape[1] :].tolist()
    left = Oracle(llava, plan(StaticExit(1))).generate(embeds, visual, mask, max_new_tokens=4)
    assert left.exit_layer.tolist() == [1, 1]
    assert left.cache.lengths() == [[10, 10, 6, 6], [12, 12, 8, 8]]


def test_llava_text_only_prompt(llava):
    ids = torch.tensor([[1, 2, 3]])
    embeds, visual = embed(llava, ids)
    assert not visual.any()
    out = Oracle(llava, plan(gate(0, -NEVER))).forward(embeds, visual)
    assert out.exit_layer.tolist() == [-1]
    assert not out.gate_features
    assert_close(out.logits, llava(input_ids=ids).logits.detach())


def test_embed_refuses_placeholders_without_their_image(llava):
    ids, pixel_values, _ = llava_inputs()
    with pytest.raises(InputError, match=r"8 image placeholders.* 0 visual"):
        embed(llava, ids)
    with pytest.raises(InputError, match=r"8 image placeholders.* 4 visual"):
        embed(llava, ids, pixel_values[:1])


# ---------------------------------------------------------------- refusals


def test_refuses_what_it_would_compute_wrongly(llama):
    with pytest.raises(UnsupportedModelError, match="get_decoder"):
        Oracle(nn.Linear(2, 2), plan())
    with pytest.raises(UnsupportedModelError, match="GPT2Model has no layers"):
        Oracle(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8, n_positions=16)), plan())
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        Oracle(tiny(attn_implementation="flex_attention"), plan())
    with pytest.raises(UnsupportedModelError, match="no output embeddings"):
        Oracle(llama.model, plan())
    for rope, message in [("dynamic", "dynamic rope"), ("default", "3-D")]:
        parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0}
        if rope == "default":
            parameters = {"rope_type": rope, "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        with pytest.raises(UnsupportedModelError, match=message):
            Oracle(tiny(rope_parameters=parameters), plan())


def test_refuses_a_model_that_does_more_than_its_layers(llama):
    class Scaled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.01
            return out

    with pytest.raises(UnsupportedModelError, match="other logits"):
        Oracle(Scaled(LlamaConfig(**TINY)).eval(), plan())
    with pytest.raises(UnsupportedModelError, match="dropout"):
        Oracle(tiny(attention_dropout=0.5).train(), plan())


def test_refuses_a_plan_for_another_model(llama):
    with pytest.raises(PlanMismatchError, match=r"0\.\.3"):
        Oracle(llama, plan(StaticExit(LAYERS)))
    with pytest.raises(PlanMismatchError, match=r"exits\[0\]\.w1"):
        Oracle(llama, plan(GateExit(0, torch.ones(4, 8), torch.ones(2, 4))))


def test_refuses_wrong_inputs(llama):
    oracle = Oracle(llama, plan())
    embeds, visual, _ = chunk("tvt", "ttt")
    with pytest.raises(InputError, match=r"\[B, T, C\]"):
        oracle.forward(embeds[0])
    with pytest.raises(InputError, match="attention_mask"):
        oracle.forward(embeds, visual, torch.ones(2, 5))
    with pytest.raises(InputError, match="visual_mask"):
        oracle.forward(embeds, visual[:1])
    with pytest.raises(InputError, match="position_ids"):
        oracle.forward(embeds, position_ids=torch.arange(3))
    with pytest.raises(InputError, match="1 rows, the chunk has 2"):
        oracle.forward(embeds, cache=oracle.forward(embeds[:1]).cache)
    with pytest.raises(InputError, match="either"):
        oracle.generate(embeds, input_ids=torch.ones(2, 3).long(), max_new_tokens=1)
    with pytest.raises(InputError, match="either"):
        oracle.generate(max_new_tokens=1)
    with pytest.raises(InputError, match="max_new_tokens"):
        oracle.generate(embeds, max_new_tokens=0)
    with pytest.raises(InputError, match=r"rows \[1\]"):
        oracle.generate(*chunk("tvt", "..."), max_new_tokens=1)
