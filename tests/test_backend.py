"""torch.compile(backend="vte"): token for token what optimize() gives, for every family and cache; and its errors."""

import logging

import pytest
import torch
from marks import thorough
from test_families import ALL, handed_over
from tiny_families import family_inputs, shared_family, tiny_family
from tiny_models import gate, plan, random_adapter, tiny
from torch._inductor.exc import InductorError
from transformers import DynamicCache

from vte_compile import Oracle, Plan, SkippedAttention, StaticExit, explain, optimize
from vte_compile.adapters import PIA
from vte_compile.dynamo.backend import Options, vte
from vte_compile.dynamo.decoder_call import exit_layers
from vte_compile.dynamo.report import recording
from vte_compile.errors import InputError, PlanMismatchError

TOKENS = 6
_COMMON = ("llava", "qwen2_vl")
UNSUPPORTED = {"num_hidden_layers": 2, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
"""Of a Llama."""


@pytest.fixture(autouse=True)
def dynamo():
    """A fresh Dynamo, that may compile one frame for many kinds of prompts."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


def compiled(model, plan_, dynamic=None, **options):
    options = {"plan": plan_, "compile": False} | options
    model.forward = torch.compile(model.forward, backend="vte", dynamic=dynamic, options=options)
    return model


def generate(model, inputs, **options):
    return model.generate(
        **inputs, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )


def gates():
    """Gates by which prompts leave at different layers."""
    return plan(*(gate(layer, 0.1 * layer, seed=layer) for layer in range(3)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "cache"),
    # A StaticCache is another graph, but the same one in all families of one kind of positions.
    [
        *((family, "dynamic") for family in _COMMON),
        # Qwen3-VL has a test of its own.
        *(thorough(family, "dynamic") for family in ALL if family not in (*_COMMON, "qwen3_vl")),
        ("llava", "static"),
        thorough("qwen2_vl", "static"),
    ],
)
@pytest.mark.shows('backend="vte"')
def test_families(family, cache):
    """One image, and a batch of one, two and none with padding; of text alone, graphs are the same in all families."""
    planned = gates()
    fast = optimize(shared_family(family), planned, compile=False)
    model = compiled(tiny_family(family), planned)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    seen = set()
    for images, batch in ((1, 1), ([1, 2, 0], 3), *([(0, 1)] if family == "llava" else [])):
        inputs = family_inputs(family, images, batch, seed=batch)
        expected, got = generate(fast, inputs), generate(model, inputs, **options)
        assert torch.equal(got.sequences, expected.sequences)
        assert torch.equal(exit_layers(got.past_key_values), expected.past_key_values.exit_layer)
        for a, b in zip(got.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        seen |= set(expected.past_key_values.exit_layer.tolist())
    assert len(seen) >= 2


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.shows('backend="vte"', "qwen3_vl")
def test_features_behind_layers():
    """Rows with an image and without, which leave between the layers that have features, behind them, or never."""
    inputs = family_inputs("qwen3_vl", [1, 0, 1])
    planned = plan(gate(0, seed=3), StaticExit(2))
    expected = generate(optimize(shared_family("qwen3_vl"), planned, compile=False), inputs)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        got = generate(compiled(tiny_family("qwen3_vl"), planned), inputs)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(exit_layers(got.past_key_values), expected.past_key_values.exit_layer)
    assert set(expected.past_key_values.exit_layer.tolist()) == {0, -1, 2}


def test_features_behind_layers_need_a_setting(caplog):
    """Without it Dynamo would split the decoder, of prompts with images alone: so text is refused, too."""
    inputs = family_inputs("qwen3_vl", 0)
    got = generate(compiled(tiny_family("qwen3_vl"), gates()), inputs).sequences
    assert torch.equal(got, generate(shared_family("qwen3_vl"), inputs).sequences)
    assert "set torch._dynamo.config.capture_dynamic_output_shape_ops = True before the first call" in caplog.text


@pytest.mark.parametrize("layer", [0, thorough(1), thorough(2), None])
def test_exits(layer):
    """Against the oracle: exits at the first layer, in the middle, at the last and never; text only beside it."""
    planned = plan(*([] if layer is None else [StaticExit(layer)]))
    inputs = family_inputs("llava", [1, 0], 2)
    got = generate(compiled(tiny_family("llava"), planned), inputs)
    oracle = Oracle(shared_family("llava"), planned)
    expected = oracle.generate(**handed_over("llava", inputs), max_new_tokens=TOKENS)
    assert got.sequences[:, -TOKENS:].tolist() == expected.tokens
    assert exit_layers(got.past_key_values).tolist() == [-1 if layer is None else layer, -1]


@pytest.mark.parametrize("cache", ["dynamic", thorough("static")])
def test_skips_and_adapters(cache):
    """The first attention too: positions must not come from its cache. An adapter with a router knows the prompt, and
    of the companion token."""
    adapter = random_adapter(PIA, 1)
    companion = torch.linspace(-1, 1, adapter.hidden_size)
    planned = Plan([StaticExit(1)], skips=[SkippedAttention(0), SkippedAttention(2, adapter)], companion=companion)
    inputs = family_inputs("llava", [1, 0], 2)
    expected = generate(optimize(shared_family("llava"), planned, compile=False), inputs)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    got = generate(compiled(tiny_family("llava"), planned), inputs, **options)
    assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("family", ["llava", thorough("qwen2_vl")])
def test_two_turns(family):
    """The second turn continues the first one's cache; its images may leave at another layer."""
    planned = gates()
    fast, model = optimize(shared_family(family), planned, compile=False), compiled(tiny_family(family), planned)
    first, second = family_inputs(family, 1), family_inputs(family, 0, seed=3)
    turns = {}
    for name, each in (("fast", fast), ("model", model)):
        answer = generate(each, first, past_key_values=DynamicCache())
        ids = torch.cat([answer.sequences, second["input_ids"]], 1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        turns[name] = generate(each, again, past_key_values=answer.past_key_values)
    assert torch.equal(turns["model"].sequences, turns["fast"].sequences)


@pytest.mark.shows('backend="vte"')
@pytest.mark.parametrize("name", ["llama", thorough("gemma")])
def test_language_model_alone_in_one_graph_and_without_a_mask(name):
    """Gemma scales its embeddings."""
    model, ids = tiny(name, num_hidden_layers=2), torch.tensor([[5, 6, 7, 8, 9]])
    expected = generate(optimize(tiny(name, num_hidden_layers=2), Plan(), compile=False), {"input_ids": ids})
    with recording() as graphs:
        got = generate(compiled(model, None), {"input_ids": ids})
    assert torch.equal(got.sequences, expected.sequences)
    assert {graph.phase for graph in graphs if graph.runner} == {"prefill", "decode"}


def test_the_whole_model_compiled():
    """torch.compile(model): the wrapper's own forward; all logits, not the last token's alone."""
    planned, inputs = plan(StaticExit(1)), family_inputs("llava")
    model = torch.compile(tiny_family("llava"), backend="vte", options={"plan": planned, "compile": False})
    with torch.no_grad():
        got = model(**inputs)
    expected = optimize(shared_family("llava"), planned, compile=False)(**inputs)
    assert got.logits.shape == expected.logits.shape
    kept = inputs["input_ids"][0] != shared_family("llava").config.image_token_id
    torch.testing.assert_close(got.logits[:, kept], expected.logits[:, kept], atol=1e-4, rtol=1e-4)


def test_the_plan_may_be_a_path(tmp_path):
    planned, inputs = plan(StaticExit(1)), family_inputs("llava")
    planned.save_pretrained(tmp_path / "plan")
    got = generate(compiled(tiny_family("llava"), str(tmp_path / "plan")), inputs)
    assert exit_layers(got.past_key_values).tolist() == [1]


@pytest.mark.parametrize("dynamic", [None, thorough(True)])
def test_compiled_by_inductor(dynamic):
    """Around the decoder too (torch 2.11's Inductor fails on the mask of a batch; a warning says so).

    With dynamic=True Dynamo reads Python's floats from tensors, which Inductor does not.
    """
    planned, inputs = gates(), family_inputs("llava", [1, 0], 2)
    got = generate(compiled(tiny_family("llava"), planned, dynamic, compile=None), inputs)
    expected = generate(optimize(shared_family("llava"), planned, compile=False), inputs)
    assert torch.equal(got.sequences, expected.sequences)


# ---------------------------------------------------------------- options


def test_found_without_import():
    assert "vte" in torch.compiler.list_backends()


def test_unknown_options_are_listed():
    valid = "plan, compile, fold, cuda_graphs, visual_token_ids"
    with pytest.raises(InputError, match=rf"unknown budget, exits; valid are {valid}"):
        Options.read({"exits": 3, "budget": 1})


def test_options_of_other_types():
    with pytest.raises(InputError, match=r"options\['plan'\]: expected a Plan"):
        Options.read({"plan": 3})
    with pytest.raises(InputError, match=r"options\['fold'\]: expected True or False, got 'yes'"):
        Options.read({"fold": "yes"})


def test_a_plan_for_another_model():
    model = compiled(tiny_family("llava"), plan(StaticExit(11)))
    with pytest.raises(Exception, match=r"exits\[0\]") as caught:
        generate(model, family_inputs("llava"))
    assert isinstance(caught.value, PlanMismatchError) or "PlanMismatchError" in str(caught.value)


# ---------------------------------------------------------------- what cannot be


def test_an_unsupported_decoder_runs_as_it_is(caplog):
    """The model still gives what it gives uncompiled."""
    model, ids = tiny(**UNSUPPORTED), torch.tensor([[5, 6, 7, 8, 9]])
    expected = generate(tiny(**UNSUPPORTED), {"input_ids": ids})
    with caplog.at_level(logging.WARNING, "vte_compile"):
        got = generate(compiled(model, plan(StaticExit(0))), {"input_ids": ids})
    assert "dynamic rotary positions" in caplog.text
    assert torch.equal(got.sequences, expected.sequences)


def test_eager_attention_runs_as_it_is(caplog):
    model, ids = tiny(num_hidden_layers=2), torch.tensor([[5, 6, 7, 8, 9]])
    model.set_attn_implementation("eager")
    expected = generate(tiny(num_hidden_layers=2), {"input_ids": ids})
    with caplog.at_level(logging.WARNING, "vte_compile"):
        got = generate(compiled(model, plan(StaticExit(0))), {"input_ids": ids})
    assert "attn_implementation='sdpa'" in caplog.text
    assert torch.equal(got.sequences, expected.sequences)


def test_gradients_are_left_alone(caplog):
    model, ids = tiny(num_hidden_layers=2), torch.tensor([[5, 6, 7, 8, 9]])
    with caplog.at_level(logging.WARNING, "vte_compile"):
        compiled(model, plan(StaticExit(0)))(input_ids=ids, labels=ids).loss.backward()
    assert "torch.no_grad()" in caplog.text
    assert model.get_input_embeddings().weight.grad is not None


def test_a_copied_cache_is_refused():
    """Beam search selects rows of the cache, of which the compiled model returned handles only."""
    model = compiled(tiny_family("llava"), plan(StaticExit(1)))
    with pytest.raises(InputError, match="Beam search"):
        model.generate(**family_inputs("llava"), max_new_tokens=4, num_beams=2, do_sample=False)


def test_a_cache_cannot_go_back():
    model, ids = compiled(tiny(num_hidden_layers=2), None), torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        early = model(input_ids=ids, use_cache=True).past_key_values
        handles = [(layer.keys, layer.values) for layer in early.layers]
        model(input_ids=ids[:, :1], past_key_values=early)
        for layer, (keys, values) in zip(early.layers, handles, strict=True):
            layer.keys, layer.values = keys, values
        with pytest.raises(InputError, match="cannot go back"):
            model(input_ids=ids[:, :1], past_key_values=early)


def test_embeddings_made_elsewhere():
    """Which tokens are visual is not known; a plan without exits need not know."""
    embeds = torch.randn(1, 5, 32)
    with torch.no_grad():
        compiled(tiny(num_hidden_layers=2), None)(inputs_embeds=embeds)
        torch._dynamo.reset()
        with pytest.raises(InputError, match="which tokens are visual is not known"):
            compiled(tiny(num_hidden_layers=2), plan(StaticExit(0)))(inputs_embeds=embeds)


# ---------------------------------------------------------------- explain


def test_explain_names_passes_layers_and_phases():
    planned = plan(StaticExit(1), SkippedAttention(2))
    told = explain(tiny_family("llava"), family_inputs("llava"), planned)
    lines = {(f.graph.partition(" ")[2], f.name, f.layer, f.outcome) for f in told.findings}
    assert ("prefill", "insert_exits", 1, "applied") in lines
    assert ("prefill", "skip_attention", 2, "applied") in lines
    assert ("decode", "skip_attention", 2, "applied") in lines
    assert ("decode", "insert_exits", None, "nothing to do") in lines
    assert any(f.name == "graph break" and f.reason for f in told.findings)
    assert not told.refused
    assert "insert_exits" in str(told)


def test_explain_of_an_unsupported_block():
    told = explain(tiny(**UNSUPPORTED), {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}, plan(StaticExit(0)))
    assert {f.name for f in told.refused} == {"decoder"}
    assert "dynamic rotary positions" in str(told)


def test_what_inductor_cannot_compile_runs_uncompiled_aloud(caplog, monkeypatch):
    def fails(*args, **kwargs):
        raise InductorError(RuntimeError("no code for this"), None)

    monkeypatch.setattr(torch._inductor, "standalone_compile", fails)
    gm = torch.fx.symbolic_trace(lambda x: (x + 1,))
    for node in gm.graph.nodes:
        node.meta["example_value"] = torch.ones(2)
    with caplog.at_level(logging.WARNING, "vte_compile"):
        compiled_graph = vte(gm, [torch.ones(2)], options={"compile": True})
    assert "no code for this" in caplog.text
    assert torch.equal(compiled_graph(torch.ones(2))[0], torch.full((2,), 2.0))
