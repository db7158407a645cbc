"""backend="vte" with sliding windows: below the window, across it and beyond, token for token what optimize() gives."""

from __future__ import annotations

import pytest
import torch
from marks import thorough
from test_backend import compiled, dynamo, generate  # noqa: F401
from test_windows import WINDOWS
from tiny_families import family_inputs, shared_family, tiny_family
from tiny_models import (
    IMAGE,
    gate,
    one_thread,  # noqa: F401
    plan,
    tiny,
)
from torch._dynamo.utils import counters
from transformers import DynamicCache

from vte_compile import Plan, StaticExit, explain, optimize
from vte_compile.dynamo.decoder_call import exit_layers
from vte_compile.dynamo.report import recording
from vte_compile.errors import InputError

WINDOW = 9
OPTIONS = {name: options | {"sliding_window": WINDOW} for name, options in WINDOWS.items()}


def prompt(*layouts: str, seed: int = 0):
    """Token ids with the placeholder v of an image, padded on the left; ids and mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE, (len(layouts), len(layouts[0])), generator=generator)
    for row, layout in zip(ids, layouts, strict=True):
        row[[i for i, c in enumerate(layout) if c == "v"]] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.tensor([[int(c != ".") for c in row] for row in layouts])}


def both(name, planned, dynamic=None):
    """The model through optimize() and through the backend; ids of images are said, since it is a language model."""
    fast = optimize(tiny(name, **OPTIONS[name]), planned, compile=False)
    return fast, compiled(tiny(name, **OPTIONS[name]), planned, dynamic, visual_token_ids=[IMAGE])


def assert_same(fast, model, inputs, fast_cache=None, cache=None):
    ids = inputs["input_ids"]
    new = ids[:, 0 if fast_cache is None else fast_cache.get_seq_length() :]
    of_fast, of_model = ({} if each is None else {"past_key_values": each} for each in (fast_cache, cache))
    want, got = generate(fast, inputs, visual_mask=new == IMAGE, **of_fast), generate(model, inputs, **of_model)
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert torch.equal(exit_layers(got.past_key_values), want.past_key_values.exit_layer)
    return want, got


@pytest.mark.slow
@pytest.mark.shows('backend="vte"')
@pytest.mark.parametrize("name", ["gemma2", thorough("qwen2"), thorough("mistral")])
def test_equals_optimize(name):
    """In the last layer and in all; padded rows that leave at different layers; decode across the window, and a prompt
    that is longer. Gemma2's scores are capped, by eager attention."""
    fast, model = both(name, plan(gate(0, 0.1, seed=2), StaticExit(1)))
    left = []
    for layouts in (("tvvvtt", "..tvtt"), ("tttvvvvttttt", "....tttttttt")):
        want, _ = assert_same(fast, model, prompt(*layouts))
        left += want.past_key_values.exit_layer.tolist()
    assert {-1, 0} <= set(left)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "of_windows"),
    [("qwen2", True), *(thorough(*case) for case in (("qwen2", False), ("mistral", True), ("gemma2", True)))],
)
def test_second_turn(name, of_windows):
    """Of a cache that the user made, with windows or without: turns below the window and beyond it."""
    fast, model = both(name, plan(StaticExit(0)))
    config = {"config": model.config} if of_windows else {}
    caches = DynamicCache(), DynamicCache(**config)
    said = prompt("tvvtt")
    for turn, layout in enumerate(("tt", "tvvttt")):
        want, _ = assert_same(fast, model, said, *caches)
        ids = torch.cat([want.sequences, prompt(layout, seed=turn)["input_ids"]], 1)
        said = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert_same(fast, model, said, *caches)


@pytest.mark.slow
@pytest.mark.thorough
def test_numbers_that_dynamo_makes_symbolic():
    """Of windows and caps, by dynamic=True."""
    fast, model = both("gemma2", plan(gate(0, 0.1, seed=2), StaticExit(1)), dynamic=True)
    for layouts in (("tvvvtt", "..tvtt"), ("tttvvvvttttt", "....tttttttt")):
        assert_same(fast, model, prompt(*layouts))


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["gemma3", "paligemma2"])
def test_second_turn_of_images(name):
    """Gemma3: blocks of tokens, two kinds of layers, rotary tables for each. PaliGemma 2: capped scores of blocks."""
    planned = plan(StaticExit(1))
    fast, model = optimize(shared_family(name), planned, compile=False), compiled(tiny_family(name), planned)
    first, second = family_inputs(name, 1), family_inputs(name, 0, seed=3)
    turns = []
    for each in (fast, model):
        answer = generate(each, first)
        ids = torch.cat([answer.sequences, second["input_ids"]], 1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        turns.append(generate(each, again, past_key_values=answer.past_key_values).sequences)
    assert torch.equal(*turns)


@pytest.mark.slow
@pytest.mark.thorough
def test_compiled_by_inductor():
    """Around the decoder too, where numbers of tokens are counted."""
    planned = plan(gate(0, 0.1, seed=2), StaticExit(1))
    fast = optimize(tiny("qwen2", **OPTIONS["qwen2"]), planned, compile=False)
    model = compiled(tiny("qwen2", **OPTIONS["qwen2"]), planned, visual_token_ids=[IMAGE], compile=None)
    assert_same(fast, model, prompt("tvvvtt", "..tvtt"))


@pytest.mark.slow
@pytest.mark.thorough
def test_serves_without_new_graphs():
    """After a generation across the window, and prompts of two lengths below it and beyond, nothing is compiled anew.

    (But for a prompt that ends where a layer begins to forget: one token shorter than the window.)
    """
    _, model = both("qwen2", plan(StaticExit(0)))
    options = dict(max_new_tokens=12, do_sample=False)
    for length in (5, 7, 13, 14):
        model.generate(**prompt("tv" + "t" * (length - 2)), **options)
    before = counters["stats"]["unique_graphs"]
    for length in (4, 6, 10, 15, 20):
        model.generate(**prompt("tv" + "t" * (length - 2), seed=length), **options)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.thorough
def test_static_caches_are_refused(caplog):
    """Their layers with windows overwrite what left: the model runs as it is."""
    inputs, options = prompt("tttttt"), dict(cache_implementation="static")
    want = generate(tiny("qwen2", **OPTIONS["qwen2"]), inputs, **options)
    _, model = both("qwen2", plan(StaticExit(0)))
    with recording() as graphs:
        got = generate(model, inputs, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert "a StaticCache of layers with sliding windows" in caplog.text
    assert not any(graph.runner for graph in graphs)


def test_explain():
    told = explain(tiny("qwen2", **OPTIONS["qwen2"]), prompt("tttttt"), Plan())
    assert not told.refused
    assert {finding.outcome for finding in told.findings if finding.name == "decoder"} == {"rewritten"}


def test_a_generation_that_dynamo_gives_up_is_an_error():
    """The model's own code would attend to handles, whose windows are NaN."""
    _, model = both("mistral", Plan())
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(InputError, match="recompile_limit"):
        generate(model, prompt("tttttt"))
