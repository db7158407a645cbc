"""Token reductions: against the model's own layers run by hand, against exits, and their FLOPs against a budget."""

import pytest
import torch
from internlm import with_intern_blocks
from tiny_models import (
    LAYERS,
    C,
    assert_close,
    chunk,
    one_thread,  # noqa: F401
    shared_model,
    tiny,
    tiny_llava,
)

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.flops import prefill_flops
from vte_compile.oracle import Oracle
from vte_compile.plan import Plan, StaticExit
from vte_compile.tuning import baselines, watched_attention
from vte_compile.tuning.baselines import AttentionPruning, RandomDropping, ReducingOracle, TokenReduction
from vte_compile.tuning.matching import (
    Prompt,
    Removed,
    cached_bytes,
    exit_within,
    flops,
    mean_flops,
    removed,
    share_within,
)

LAYOUT = "ttvvvvvvtvvvvttt"
VISUAL = LAYOUT.count("v")


def left(output):
    """Columns of the tokens that reach the last layer, in one row."""
    return output.logits[0].abs().sum(-1).nonzero().flatten().tolist()


def by_hand(model, embeds, columns, layer):
    """Logits [n, vocab] of the tokens `columns`, when only they go on behind `layer`: the model's layers, no cache."""
    decoder, positions = model.model, torch.arange(embeds.shape[1])[None]
    hidden = embeds
    for index, block in enumerate(decoder.layers):
        length = hidden.shape[1]
        hidden = block(
            hidden,
            attention_mask=torch.full((1, 1, length, length), -torch.inf).triu(1),
            position_ids=positions,
            position_embeddings=decoder.rotary_emb(hidden, position_ids=positions),
        )
        if index == layer:
            hidden, positions = hidden[:, columns], positions[:, columns]
    return model.lm_head(decoder.norm(hidden))[0]


@pytest.mark.parametrize("kind", [RandomDropping, AttentionPruning])
@pytest.mark.parametrize("layer", [0, 2])
def test_ends_are_the_full_model_and_the_static_exit(kind, layer):
    model = shared_model("llama")
    embeds, visual, _ = chunk(LAYOUT)
    everything = ReducingOracle(model, kind(layer, 1.0))
    assert_close(everything(embeds, visual).logits, Oracle(model, Plan())(embeds, visual).logits)
    nothing = everything.with_reduction(kind(layer, 0.0))(embeds, visual)
    expected = Oracle(model, Plan([StaticExit(layer)]))(embeds, visual)
    assert_close(nothing.logits, expected.logits)
    assert nothing.cache.lengths() == expected.cache.lengths()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "internlm2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pruning_keeps_exactly_the_top_tokens(name, attention):
    model = with_intern_blocks(tiny()) if name == "internlm2" else tiny(name, attn_implementation=attention)
    model.config._attn_implementation = attention
    embeds, visual, _ = chunk(LAYOUT)
    output = ReducingOracle(model, AttentionPruning(1, 0.35))(embeds, visual)
    reference = tiny(name, attn_implementation="eager") if name != "internlm2" else tiny(attn_implementation="eager")
    paid = reference(inputs_embeds=embeds, output_attentions=True).attentions[1][0].mean(0)[-1]
    ranked = sorted(visual[0].nonzero().flatten().tolist(), key=lambda column: -paid[column])
    columns = sorted([*ranked[:3], *(~visual[0]).nonzero().flatten().tolist()])  # 3 = 0.35 * 10, rounded down
    assert left(output) == columns
    assert output.cache.lengths()[0] == [16, 16, 9, 9]
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("reduction", [RandomDropping(1, 0.5, seed=3), AttentionPruning(0, 0.5)], ids=str)
def test_generates_as_by_hand(reduction):
    """What a token says depends on the text and on the visual tokens that were left in the prompt, also in decode."""
    model = shared_model("llama")
    embeds, visual, _ = chunk(LAYOUT)
    oracle = ReducingOracle(model, reduction)
    prompt = oracle(embeds, visual)
    found = oracle.generate(embeds, visual, max_new_tokens=5)
    said = model.get_input_embeddings()(torch.tensor([found.tokens[0][:-1]]))
    columns = [*left(prompt), *range(16, 20)]
    logits = by_hand(model, torch.cat([embeds, said], 1), columns, reduction.layer)
    assert logits[-5:].argmax(-1).tolist() == found.tokens[0]
    assert found.cache.lengths()[0] == [20] * (reduction.layer + 1) + [15] * (LAYERS - reduction.layer - 1)


def test_rows_are_independent_of_padding():
    model = shared_model("llama")
    embeds, visual, real = chunk("ttvvvvvvtvvvvttt", "..tvvvvtttttt...", "tttttttttttttttt", seed=4)
    oracle = ReducingOracle(model, AttentionPruning(1, 0.5))
    together = oracle(embeds, visual, real)
    for row in range(3):
        columns = real[row].nonzero().flatten()
        alone = oracle(embeds[row : row + 1, columns], visual[row : row + 1, columns])
        assert_close(together.logits[row, columns], alone.logits[0])
    assert together.cache.lengths()[2] == [16] * LAYERS  # text only


def test_nothing_is_dropped_where_no_text_follows():
    embeds, visual, _ = chunk("ttvvvv")
    model = shared_model("llama")
    output = ReducingOracle(model, RandomDropping(0, 0.0))(embeds, visual)
    assert_close(output.logits, Oracle(model, Plan())(embeds, visual).logits)


def test_a_seed_draws_the_same_and_another_draws_others():
    model = shared_model("llama")
    embeds, visual, _ = chunk(LAYOUT)
    oracle = ReducingOracle(model, RandomDropping(0, 0.5))
    drawn = [left(oracle.with_reduction(RandomDropping(0, 0.5, seed))(embeds, visual)) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(columns) for columns in drawn}) > 2
    assert all(len(columns) == 16 - 5 for columns in drawn)


def test_equal_scores_keep_the_first():
    scores = torch.tensor([5.0, 1.0, 1.0, 1.0, 0.0])
    among = torch.tensor([False, True, True, True, True])
    assert baselines._highest(scores, among, 2).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("layer", "share", "message"),
    [(-1, 0.5, "layer=-1"), (0, 1.5, "share=1.5"), (0, float("nan"), "share=nan"), (LAYERS - 1, 0.5, "no layer")],
)
def test_bad_reductions(layer, share, message):
    with pytest.raises(InputError, match=message):
        ReducingOracle(shared_model("llama"), RandomDropping(layer, share))


def test_attention_that_cannot_be_seen_is_refused(monkeypatch):
    model = tiny(attn_implementation="eager")
    oracle = ReducingOracle(model, AttentionPruning(0, 0.5))
    monkeypatch.setattr(watched_attention, "_ATTENTION", "eager")  # a layer that pays no heed to what it is told
    with pytest.raises(UnsupportedModelError, match="layer 0"):
        oracle(*chunk(LAYOUT)[:2])


def test_images_of_a_llava_are_pruned_too():
    model = tiny_llava()
    embeds, visual, _ = chunk(LAYOUT)
    assert len(left(ReducingOracle(model, AttentionPruning(1, 0.2))(embeds, visual))) == 16 - VISUAL + 2


# ---------------------------------------------------------------- FLOPs

CONFIG = tiny().config
PROMPTS = [Prompt(tokens, visual, answer) for tokens, visual, answer in [(40, 30, 4), (33, 20, 1), (60, 47, 9)] * 3]


def test_shares_are_rounded_down():
    assert [TokenReduction(0, 0.3).kept(10), TokenReduction(0, 0.29).kept(100), TokenReduction(0, 0.35).kept(10)] == [
        3,
        29,
        3,
    ]
    assert TokenReduction(0, 1.0).kept(576) == 576


def test_flops_are_those_of_an_exit_at_the_ends():
    prompt = Prompt(40, 30, 4)
    gone = removed(prompt, TokenReduction(1, 0.0))
    assert gone == Removed(1, 30)
    assert flops(CONFIG, prompt, gone)[0] == prefill_flops(CONFIG, 40, 30, 1)
    everything = flops(CONFIG, prompt, removed(prompt, TokenReduction(1, 1.0)))
    assert everything == flops(CONFIG, prompt, Removed(-1, 0))
    assert everything[0] == prefill_flops(CONFIG, 40, 30, -1)


def test_flops_count_the_tokens_that_each_layer_sees():
    """40 tokens in two layers, 40 - 15 in the other two."""
    heads, kv_heads, size, mlp = 4, 2, C // 4, 48
    weights = 2 * C * (heads + kv_heads) * size + 3 * C * mlp
    lengths = [40, 40, 25, 25]
    expected = sum(2 * n * weights + n * (n + 1) // 2 * 4 * heads * size for n in lengths) + 2 * C * CONFIG.vocab_size
    prompt = Prompt(40, 30, 1)
    gone = removed(prompt, TokenReduction(1, 0.5))
    assert flops(CONFIG, prompt, gone) == (expected, expected)
    assert cached_bytes(CONFIG, prompt, gone, torch.float32) == 4 * 2 * kv_heads * size * sum(lengths)


@pytest.mark.parametrize("fraction", [0.5, 0.6, 0.75, 0.9, 0.999, 1.0])
def test_budgets_are_kept_and_used(fraction):
    full = mean_flops(CONFIG, PROMPTS, TokenReduction(0, 1.0))
    budget = fraction * full
    share = share_within(CONFIG, PROMPTS, 0, budget)
    assert share is not None
    assert mean_flops(CONFIG, PROMPTS, TokenReduction(0, share)) <= budget
    if share < 1:
        assert mean_flops(CONFIG, PROMPTS, TokenReduction(0, share + 1e-4)) > budget
    layer = exit_within(CONFIG, PROMPTS, budget)
    costs = [mean_flops(CONFIG, PROMPTS, TokenReduction(k, 0.0)) for k in range(LAYERS - 1)]
    assert layer == max((k for k, cost in enumerate(costs) if cost <= budget), default=None)


def test_a_budget_below_what_is_possible():
    assert share_within(CONFIG, PROMPTS, 2, mean_flops(CONFIG, PROMPTS, TokenReduction(1, 0.0))) is None
    assert exit_within(CONFIG, PROMPTS, 1.0) is None
    with pytest.raises(InputError, match="there are none"):
        share_within(CONFIG, [], 0, 1.0)
