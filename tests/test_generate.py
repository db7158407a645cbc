"""generate() of optimized models: against the model's own where nothing exits, against the oracle where it does."""

from __future__ import annotations

import threading

import pytest
import torch
from marks import thorough
from tiny_models import (
    IMAGE,
    LAYERS,
    assert_close,
    chunk,
    gate,
    image_prompt,
    one_thread,  # noqa: F401
    optimized,
    plan,
    shared_model,
)
from transformers import DynamicCache, GenerationConfig, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from vte_compile import Oracle, StaticExit
from vte_compile.errors import InputError
from vte_compile.oracle import embed
from vte_compile.runtime.exit_cache import ExitCache

PLANS = {
    "static": (StaticExit(1),),
    "gates": (gate(0, 0.5), gate(1, 0.5), gate(2, 0.5)),
    "first": (StaticExit(0),),
    "last": (StaticExit(LAYERS - 1),),
}
GREEDY = dict(do_sample=False, max_new_tokens=5, pad_token_id=0)


def greedy(model, **inputs):
    return model.generate(**inputs, **GREEDY)


def prompt_of(name, *layouts, seed=0):
    """Keyword arguments for generate() or forward(), and the same prompt for the oracle."""
    if name == "llava":
        ids, pixels, mask = image_prompt(*layouts, seed=seed)
        inputs = {"input_ids": ids, "attention_mask": mask} | ({} if pixels is None else {"pixel_values": pixels})
        return inputs, (*embed(shared_model(name), ids, pixels), mask)
    embeds, visual, real = chunk(*[layout.replace("i", "vvvv") for layout in layouts], seed=seed)
    return {"inputs_embeds": embeds, "visual_mask": visual, "attention_mask": real.long()}, (embeds, visual, real)


def own_inputs(inputs):
    """Without what only optimized models take."""
    return {k: v for k, v in inputs.items() if k != "visual_mask"}


# ---------------------------------------------------------------- nothing exits: the model's own


@pytest.mark.parametrize("name", ["llama", "llava"])
@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=False),
        dict(do_sample=True, top_k=7, temperature=1.5),
        dict(do_sample=True, num_return_sequences=3),
        dict(num_beams=3),
        dict(num_beams=4, num_return_sequences=2, length_penalty=0.5, early_stopping=True),
        dict(do_sample=False, repetition_penalty=1.7, eos_token_id=list(range(0, 20))),
    ],
    ids=["greedy", "sampling", "samples", "beams", "returned beams", "ends"],
)
def test_equals_the_model_where_nothing_exits(name, options):
    inputs, _ = prompt_of(name, "..titt", "titttt")
    options = dict(max_new_tokens=6, pad_token_id=0) | options

    def run(model, inputs):
        torch.manual_seed(3)
        return model.generate(**inputs, **options)

    ours = run(optimized(name), inputs)
    assert torch.equal(ours, run(shared_model(name), own_inputs(inputs)))
    assert ours.exit_layer.tolist() == [-1] * len(ours)
    assert ours.exit_layer.dtype == torch.int64


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_text_only_equals_the_model_whatever_the_plan(name):
    ids = torch.arange(3, 9)[None]
    fast = optimized(name, StaticExit(0))
    inputs = {"input_ids": ids}
    ours = greedy(fast, **inputs)
    assert torch.equal(ours, greedy(shared_model(name), **inputs))
    assert ours.exit_layer.tolist() == [-1]


# ---------------------------------------------------------------- exits: the oracle


@pytest.mark.parametrize(
    ("name", "exits"),
    [
        *[(name, exits) for name in ("llama", "llava") for exits in PLANS],
        ("qwen2", "gates"),
        thorough("mistral", "gates"),
        thorough("gemma", "gates"),
    ],
)
@pytest.mark.shows("generate")
def test_greedy_equals_the_oracle(name, exits):
    """Left, right and no padding, several images, none, an image last."""
    inputs, prompt = prompt_of(name, "...titt...", "tiitttt", "ittt......", ".titi..")
    tokens = greedy(optimized(name, *PLANS[exits]), **inputs)
    want = Oracle(shared_model(name), plan(*PLANS[exits])).generate(*prompt, max_new_tokens=5)
    assert tokens[:, -5:].tolist() == want.tokens
    assert tokens.exit_layer.tolist() == want.exit_layer.tolist()
    assert want.exit_layer[3] == -1
    if exits != "gates":
        assert (want.exit_layer[:3] == PLANS[exits][0].layer).all()


def test_visual_mask_with_input_ids():
    """A bare language model whose caller says which ids are visual."""
    ids = torch.tensor([[5, 9, 9, 9, 4, 3], [7, 8, 8, 1, 5, 2]])
    visual = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]]).bool()
    model = shared_model("llama")
    embeds = model.get_input_embeddings()(ids).detach()
    want = Oracle(model, plan(StaticExit(1))).generate(embeds, visual, max_new_tokens=5)
    fast = optimized("llama", StaticExit(1))
    tokens = greedy(fast, input_ids=ids, visual_mask=visual)
    assert tokens.tolist() == [[*row, *new] for row, new in zip(ids.tolist(), want.tokens, strict=True)]
    assert tokens.exit_layer.tolist() == [1, 1]
    positional = fast.generate(ids, visual_mask=visual, **GREEDY)
    assert torch.equal(positional, tokens)
    assert positional.exit_layer.tolist() == [1, 1]
    assert greedy(fast, input_ids=ids).exit_layer.tolist() == [-1, -1]


def test_right_padding_counts_positions_of_its_own():
    """Hugging Face's own positions go wrong behind padding on the right."""
    inputs, prompt = prompt_of("llama", "tvvtt....", "tvvtttttt")
    fast = optimized("llama", StaticExit(1))
    out = fast.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    want = Oracle(shared_model("llama"), plan(StaticExit(1))).generate(*prompt, max_new_tokens=5)
    assert out.sequences.tolist() == want.tokens
    assert out.past_key_values.next_positions.tolist() == want.cache.next_positions() == [9, 13]


def test_position_ids_given():
    inputs, prompt = prompt_of("llama", "tvvtt")
    positions = torch.tensor([[3, 4, 5, 9, 12]])
    fast = optimized("llama", StaticExit(1))
    tokens = greedy(fast, **inputs, position_ids=positions)
    want = Oracle(shared_model("llama"), plan(StaticExit(1))).generate(*prompt, positions, max_new_tokens=5)
    assert tokens.tolist() == want.tokens


def test_attention_mask_absent():
    inputs, prompt = prompt_of("llava", "titt")
    del inputs["attention_mask"]
    tokens = greedy(optimized("llava", StaticExit(1)), **inputs)
    want = Oracle(shared_model("llava"), plan(StaticExit(1))).generate(*prompt[:2], max_new_tokens=5)
    assert tokens[:, -5:].tolist() == want.tokens


def test_rows_that_end_early():
    """Finished rows are fed padding tokens; the others must not notice."""
    inputs, prompt = prompt_of("llava", "..titt", "titttt")
    oracle = Oracle(shared_model("llava"), plan(StaticExit(1)))
    free = oracle.generate(*prompt, max_new_tokens=6)
    end = next(token for token in free.tokens[0] if token not in free.tokens[1])
    want = oracle.generate(*prompt, max_new_tokens=6, eos_token_id=end)
    tokens = optimized("llava", StaticExit(1)).generate(
        **inputs, do_sample=False, max_new_tokens=6, eos_token_id=end, pad_token_id=0
    )
    for row, wanted in zip(tokens[:, inputs["input_ids"].shape[1] :].tolist(), want.tokens, strict=True):
        assert row == wanted + [0] * (len(row) - len(wanted))
    assert len(want.tokens[0]) < len(want.tokens[1]) == 6


# ---------------------------------------------------------------- beams and samples with exits


def slow_beams(oracle, prompt, beams: int, steps: int):
    """Beam search without an end token, every hypothesis recomputed by the oracle: [(score, tokens)], best first."""
    table = oracle.model.get_input_embeddings().weight.detach()
    first = oracle.forward(*prompt)
    hypotheses = [(0.0, [])]
    for _ in range(steps):
        longer = []
        for score, tokens in hypotheses:
            logits, cache = first.logits[0, -1], first.cache
            for token in tokens:
                out = oracle.forward(table[token][None, None], cache=cache)
                logits, cache = out.logits[0, -1], out.cache
            scores = logits.log_softmax(-1)
            longer += [(score + float(s), [*tokens, t]) for t, s in enumerate(scores)]
        hypotheses = sorted(longer, reverse=True)[:beams]
    return hypotheses


@pytest.mark.parametrize("exits", ["static", "gates"])
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_beams_with_exits(name, exits):
    """Of a batch padded on the left: each row's beams are those of a slow search on that row alone."""
    inputs, prompt = prompt_of(name, "...titt", "tittttt")
    out = optimized(name, *PLANS[exits]).generate(
        **inputs,
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=4,
        length_penalty=0.0,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    oracle = Oracle(shared_model(name), plan(*PLANS[exits]))
    exit_layers = []
    for b in range(2):
        real = prompt[2][b].bool()
        row = (prompt[0][b : b + 1, real], prompt[1][b : b + 1, real])
        exit_layers += [oracle.forward(*row).exit_layer.item()] * 2
        for i, (score, tokens) in enumerate(slow_beams(oracle, row, 3, 4)[:2]):
            assert out.sequences[2 * b + i, -4:].tolist() == tokens
            assert abs(float(out.sequences_scores[2 * b + i]) - score) < 1e-4
    assert out.exit_layer.tolist() == exit_layers


@pytest.mark.parametrize("options", [dict(do_sample=True, num_return_sequences=3), dict(num_beams=2)])
def test_prompt_is_prefilled_once_per_row(options, monkeypatch):
    """Beams and samples begin as copies of their prompt, which is computed once."""
    fast = optimized("llama", StaticExit(1))
    inputs, _ = prompt_of("llama", "tvvtt", "ttvvt")
    packed, runner = [], type(fast._vte_runner)
    run = runner._packed
    monkeypatch.setattr(
        runner, "_packed", lambda self, program, rows: packed.append(len(rows)) or run(self, program, rows)
    )
    tokens = fast.generate(**inputs, max_new_tokens=2, pad_token_id=0, **options)
    assert packed == [2]
    assert tokens.exit_layer.tolist() == [1] * len(tokens)


# ---------------------------------------------------------------- results, streamers, caches


def test_dict_result():
    inputs, prompt = prompt_of("llava", "titt", "ittt")
    fast = optimized("llava", StaticExit(2))
    out = fast.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert out.exit_layer.tolist() == [2, 2]
    assert isinstance(out.past_key_values, ExitCache)
    length = inputs["input_ids"].shape[1] + 4  # the last token is not fed back
    assert out.past_key_values.lengths.tolist() == [[length] * 2] * 3 + [[length - 4] * 2]
    want = Oracle(shared_model("llava"), plan(StaticExit(2))).forward(*prompt)
    assert_close(out.logits[0], want.logits[:, -1])


class Collect(BaseStreamer):
    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got += value.flatten().tolist()

    def end(self):
        self.ended = True


class Words:
    """As much of a tokenizer as TextIteratorStreamer needs."""

    def decode(self, ids, **kwargs):
        return "".join(f"{int(i)} " for i in ids)


def test_streamers():
    inputs, _ = prompt_of("llava", "titt")
    fast = optimized("llava", StaticExit(1))
    want = greedy(fast, **inputs)[0].tolist()
    collect = Collect()
    greedy(fast, **inputs, streamer=collect)
    assert collect.got == want
    assert collect.ended
    text = TextIteratorStreamer(Words(), skip_prompt=True, timeout=60)
    thread = threading.Thread(target=greedy, args=(fast,), kwargs={**inputs, "streamer": text})
    thread.start()
    words = "".join(text)
    thread.join()
    assert words.split() == [str(t) for t in want[-5:]]


@pytest.mark.parametrize("config", [False, True], ids=["DynamicCache()", "DynamicCache(config)"])
def test_own_cache_is_filled_and_serves_turn_two(config):
    """Turn two by the full sequence, as chat code does it: generate() cuts it to what is new."""
    model, fast = shared_model("llava"), optimized("llava", StaticExit(1))
    oracle = Oracle(model, plan(StaticExit(1)))
    inputs, prompt = prompt_of("llava", "..titt", "titttt")
    cache = DynamicCache(config=model.config.get_text_config()) if config else DynamicCache()
    tokens = greedy(fast, **inputs, past_key_values=cache)
    first = oracle.generate(*prompt, max_new_tokens=5)
    assert tokens[:, -5:].tolist() == first.tokens
    assert cache.lengths.T.tolist() == first.cache.lengths()
    assert cache.exit_layer.tolist() == [1, 1]

    question, images, mask = image_prompt("tit", "itt", seed=7)
    ids = torch.cat([tokens, question], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long), mask], 1)
    second = greedy(fast, input_ids=ids, attention_mask=mask, pixel_values=images, past_key_values=cache)
    new = ids[:, tokens.shape[1] - 1 :]
    embeds, visual = embed(model, new, images)
    want = oracle.generate(embeds, visual, cache=first.cache, max_new_tokens=5)
    assert second[:, -5:].tolist() == want.tokens
    assert second.exit_layer.tolist() == [1, 1]
    assert cache.lengths.T.tolist() == want.cache.lengths()


@pytest.mark.parametrize("masked", [True, False])
def test_turn_two_text_only(masked):
    """The new tokens alone; without a mask, the padding of turn one must not count as tokens."""
    model, fast = shared_model("llava"), optimized("llava", StaticExit(0))
    oracle = Oracle(model, plan(StaticExit(0)))
    inputs, prompt = prompt_of("llava", "..titt", "titttt")
    first = greedy(fast, **inputs, return_dict_in_generate=True)
    known = oracle.generate(*prompt, max_new_tokens=5)
    new = torch.cat([first.sequences[:, -1:], torch.tensor([[4, 5], [6, 7]])], 1)
    full = torch.cat([first.sequences, new[:, 1:]], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 7, dtype=torch.long)], 1)
    extra = {"attention_mask": mask} if masked else {}
    second = greedy(fast, input_ids=full, past_key_values=first.past_key_values, **extra)
    want = oracle.generate(input_ids=new, cache=known.cache, max_new_tokens=5)
    assert second[:, -5:].tolist() == want.tokens
    assert second.exit_layer.tolist() == [-1, -1]


def test_continue_with_nothing_new():
    """More tokens of the same answer: one token is not yet cached."""
    fast = optimized("llava", StaticExit(1))
    inputs, _ = prompt_of("llava", "titt")
    whole = fast.generate(**inputs, **GREEDY | {"max_new_tokens": 8})
    first = fast.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    more = fast.generate(
        input_ids=first.sequences, past_key_values=first.past_key_values, **GREEDY | {"max_new_tokens": 3}
    )
    assert torch.equal(more, whole)
    assert more.exit_layer.tolist() == [-1]


def test_turn_two_visual_mask_of_all_columns_or_the_new_ones():
    fast = optimized("llama", StaticExit(1))
    ids = torch.tensor([[5, 9, 9, 4, 3]])
    visual = torch.tensor([[0, 1, 1, 0, 0]]).bool()
    turn = torch.tensor([[8, 8, 7]])
    turn_visual = torch.tensor([[1, 1, 0]]).bool()
    results = []
    for whole in (True, False):
        cache = DynamicCache()
        first = greedy(fast, input_ids=ids, visual_mask=visual, past_key_values=cache)
        full = torch.cat([first, turn], 1)
        past = torch.cat([visual, torch.zeros(1, 5, dtype=torch.bool)], 1)
        mask = torch.cat([past, turn_visual], 1) if whole else torch.cat([past[:, -1:], turn_visual], 1)
        second = greedy(fast, input_ids=full, visual_mask=mask, past_key_values=cache)
        assert second.exit_layer.tolist() == [1]
        assert cache.lengths[:, 0].tolist() == [17, 17, 13, 13]
        results.append(second.tolist())
    assert results[0] == results[1]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options",
    [
        dict(use_cache=False),
        dict(generation_config=GenerationConfig(use_cache=False)),
        dict(prefill_chunk_size=4),
        dict(prompt_lookup_num_tokens=2),
        dict(assistant_model=None),
    ],
    ids=["use_cache", "config", "chunks", "lookup", "assistant"],
)
def test_refuses_what_would_decide_exits_wrongly(options):
    fast = optimized("llama", StaticExit(1))
    if "assistant_model" in options:
        options = {"assistant_model": shared_model("llama")}
    inputs, _ = prompt_of("llama", "tvvtt")
    name = next(iter(options)) if "generation_config" not in options else "use_cache"
    with pytest.raises(InputError, match=rf"generate\({name}="):
        fast.generate(**inputs, max_new_tokens=2, **options)


def test_refuses_other_caches():
    fast = optimized("llama", StaticExit(1))
    inputs, _ = prompt_of("llama", "tvvtt")
    with pytest.raises(InputError, match=r"StaticCache .*DynamicCache"):
        fast.generate(**inputs, max_new_tokens=2, cache_implementation="static")


def test_image_tokens_generated_are_text():
    """A model may happen to generate the placeholder id; decoding goes on."""
    fast, model = optimized("llava", StaticExit(1)), shared_model("llava")
    inputs, prompt = prompt_of("llava", "titt")
    tokens = fast.generate(**inputs, max_new_tokens=3, prefix_allowed_tokens_fn=lambda b, ids: [IMAGE])
    assert tokens[0, -3:].tolist() == [IMAGE] * 3
    oracle = Oracle(model, plan(StaticExit(1)))
    cache, token = oracle.forward(*prompt).cache, model.get_input_embeddings().weight[IMAGE].detach()
    for _ in range(2):
        want = oracle.forward(token[None, None], cache=cache)
        cache = want.cache
    out = fast.generate(
        **inputs,
        max_new_tokens=3,
        prefix_allowed_tokens_fn=lambda b, ids: [IMAGE],
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert_close(out.logits[2], want.logits[:, 0])
