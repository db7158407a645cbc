"""Layers that are built alike are traced once, and the copies compute what tracing all of them gives."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, chunk_inputs, embeddings, positions, random_kv, run_graph, tiny

from vte_compile import Plan, SkippedAttention, StaticExit, optimize
from vte_compile.capture import capture, capture_chunk, tracing
from vte_compile.capture.repeated_layers import NotRepeatable, layer_kinds, layers_to_trace
from vte_compile.families.decoder import describe
from vte_compile.oracle import Oracle

pytestmark = pytest.mark.traces

DEPTH = 6
PHASES = {
    "prefill": lambda: [embeddings(4), positions(4)],
    "extend": lambda: [embeddings(4), positions(4, 9), *random_kv((9, 5, 2, 7, 3, 1))],
    "decode": lambda: [embeddings(1), positions(1, 9), *random_kv((9, 5, 2, 7, 3, 1))],
    "batch": lambda: [
        embeddings(1, batch=2),
        positions(1, 9).expand(2, -1),
        *random_kv((9, 5, 2, 7, 3, 4), batch=2),
        *[torch.tensor([0, i % 3]) for i in range(DEPTH)],
    ],
    "chunk": lambda: chunk_inputs((4, 3), (5, 0)),
}


@pytest.fixture
def traced(monkeypatch):
    """How many layers each call of torch.export saw."""
    seen = []
    export = torch.export.export

    def counting(module, *args, **kwargs):
        seen.append(len(module.decoder.layers))
        return export(module, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counting)
    return seen


def of_phase(spec, phase):
    if phase == "chunk":
        return capture_chunk(spec)
    return capture(spec, "decode" if phase == "batch" else phase, batched=phase == "batch")


def chunk_of_depth(inputs, depth):
    """The inputs of a chunk, for a decoder of so many layers."""
    fixed, past = inputs[:4], inputs[4:6]
    return [*fixed, *past * depth]


@pytest.mark.parametrize("phase", PHASES)
def test_copies_compute_what_tracing_all_layers_gives(phase, traced, monkeypatch):
    spec = describe(tiny(num_hidden_layers=DEPTH))
    inputs = PHASES[phase]()
    if phase == "chunk":
        inputs = chunk_of_depth(inputs, DEPTH)
    short = of_phase(spec, phase)
    assert traced == [3]
    monkeypatch.setattr(tracing, "layers_to_trace", len)
    whole = of_phase(spec, phase)
    assert traced == [3, DEPTH]
    assert [n.name for n in short.graph.find_nodes(op="placeholder")] == [
        n.name for n in whole.graph.find_nodes(op="placeholder")
    ]
    assert set(short.parameters) == set(whole.parameters)
    outputs, expected = run_graph(short, *inputs), run_graph(whole, *inputs)
    assert len(outputs) == len(expected) == 1 + 2 * DEPTH
    for ours, theirs in zip(outputs, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_number_of_traced_layers_does_not_grow(traced):
    for depth in (4, 8, 16):
        capture(describe(tiny(num_hidden_layers=depth)), "prefill")
    assert traced == [3, 3, 3]


def test_exits_and_skips_of_copied_layers():
    model = tiny(num_hidden_layers=DEPTH)
    plan = Plan([StaticExit(3)], skips=[SkippedAttention(4)])
    fast = optimize(model, plan, compile=False)
    embeds = embeddings(8)
    visual = torch.tensor([[False, True, True, True, False, False, False, False]])
    out = fast(inputs_embeds=embeds, visual_mask=visual)
    want = Oracle(model, plan).forward(embeds, visual)
    assert out.exit_layer.tolist() == [3]
    assert_close(out.logits, want.logits)
    token = torch.tensor([[5]])
    after = fast(input_ids=token, past_key_values=out.past_key_values)
    assert_close(after.logits, Oracle(model, plan).forward(model.model.embed_tokens(token), cache=want.cache).logits)


def test_weights_are_read_from_each_layer():
    """Copies refer to the model's own weights: changed ones count, and each layer has its own."""
    model = tiny(num_hidden_layers=DEPTH)
    graph = capture(describe(model), "prefill")
    before = run_graph(graph, *PHASES["prefill"]())[0]
    with torch.no_grad():
        model.model.layers[4].mlp.up_proj.weight *= 2
    graph = graph.rebound(describe(model))
    after = run_graph(graph, *PHASES["prefill"]())[0]
    with torch.no_grad():
        want = model(inputs_embeds=embeddings(4)).logits
    assert not torch.allclose(before, after)
    assert_close(after, want)


# ---------------------------------------------------------------- which layers are alike


def test_layers_of_several_kinds_are_traced_up_to_where_all_occurred(traced):
    model = tiny(num_hidden_layers=8)
    for layer in (2, 4, 6):
        model.model.layers[layer].mlp.act_fn = torch.nn.ReLU()
    assert layer_kinds(model.model) == [0, 0, 2, 0, 2, 0, 2, 0]
    inputs = PHASES["prefill"]()
    outputs = run_graph(capture(describe(model), "prefill"), *inputs)
    assert traced == [4]
    with torch.no_grad():
        assert_close(outputs[0], model(inputs_embeds=inputs[0]).logits)


def _odd_attribute(model):
    model.model.layers[5].self_attn.scaling *= 2


def _odd_config(model):
    model.config.layer_types = ["full_attention"] * 5 + ["other"]


def _odd_forward(model):
    mlp = model.model.layers[5].mlp
    mlp.forward = type(mlp).forward.__get__(mlp)


def _hook(model):
    model.model.layers[5].register_forward_hook(lambda module, args, output: output)


def _shape(model):
    old = model.model.layers[5].mlp
    old.up_proj, old.gate_proj = (torch.nn.Linear(32, 40, bias=False) for _ in range(2))
    old.down_proj = torch.nn.Linear(40, 32, bias=False)


@pytest.mark.parametrize("change", [_odd_attribute, _odd_config, _odd_forward, _hook, _shape])
def test_a_layer_that_differs_is_of_its_own_kind(change):
    model = tiny(num_hidden_layers=DEPTH)
    change(model)
    kinds = layer_kinds(model.model)
    assert kinds == [0, 0, 0, 0, 0, 5]
    assert layers_to_trace(kinds) == DEPTH


def test_shared_weights_are_no_layers_own():
    model = tiny(num_hidden_layers=DEPTH)
    model.model.layers[5].mlp.up_proj.weight = model.model.layers[4].mlp.up_proj.weight
    assert layer_kinds(model.model) == list(range(DEPTH))


def test_what_cannot_be_continued_is_traced_as_a_whole(traced, monkeypatch, caplog):
    def refuse(module, whole, kinds, count):
        if count < DEPTH:
            raise NotRepeatable("two streams")

    monkeypatch.setattr(tracing, "repeat_layers", refuse)
    model = tiny(num_hidden_layers=DEPTH)
    with caplog.at_level("DEBUG", "vte_compile.capture"):
        graph = capture(describe(model), "prefill")
    assert traced == [3, DEPTH]
    assert "two streams" in caplog.text
    with torch.no_grad():
        assert_close(run_graph(graph, *PHASES["prefill"]())[0], model(inputs_embeds=PHASES["prefill"]()[0]).logits)


def test_a_value_that_skips_a_layer_is_not_repeatable(traced):
    """Layers that hand more than the residual stream on are traced all."""
    model = tiny(num_hidden_layers=DEPTH)
    kept = []

    class Remembering(type(model.model.layers[0].mlp)):
        def forward(self, x):
            kept.append(super().forward(x))
            return sum(kept)

    for layer in model.model.layers:
        layer.mlp.__class__ = Remembering
    assert layer_kinds(model.model) == [0] * DEPTH
    model.model.register_forward_pre_hook(lambda *_: kept.clear())
    inputs = PHASES["prefill"]()
    graph = capture(describe(model), "prefill")
    assert traced == [3, DEPTH]
    with torch.no_grad():
        want = model(inputs_embeds=inputs[0]).logits
    assert_close(run_graph(graph, *inputs)[0], want)
