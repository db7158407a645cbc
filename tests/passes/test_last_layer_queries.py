"""last_layer_queries: the same logits and the same keys and values, with one query in the last layer."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import (
    ALWAYS,
    LAYERS,
    C,
    assert_close,
    captured,
    chunk_inputs,
    embeddings,
    gate,
    layout,
    nodes_of,
    plan,
    positions,
    random_kv,
    run_graph,
)
from tiny_models import random_adapter

from vte_compile.adapters import PIA
from vte_compile.passes import PASSES, PassSettings, run_passes
from vte_compile.passes.annotate_layers import annotate_layers
from vte_compile.passes.cleanup import cleanup
from vte_compile.passes.insert_exits import insert_exits
from vte_compile.passes.last_layer_queries import last_layer_queries
from vte_compile.plan import Plan, SkippedAttention, StaticExit

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def inputs_of(phase):
    return [embeddings(6), positions(6, 9), *(random_kv((9, 5, 2)) if phase == "extend" else [])]


@pytest.mark.parametrize("phase", ["prefill", "extend"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_same_numbers_from_one_query(phase, family):
    graph = captured(phase, family=family)
    inputs = inputs_of(phase)
    logits, *kv = run_graph(graph, *inputs)
    results = {r.name: r for r in run_passes(PASSES, graph, PassSettings(plan()))}
    assert (results["last_layer_queries"].applied, results["last_layer_queries"].refusals) == (1, [])
    last, *rest = run_graph(graph, *inputs)
    assert_close(last, logits[:, -1:])
    assert_close(rest, kv)
    assert [t.shape for t in rest] == [t.shape for t in kv]
    queries = [n.args[0].meta["val"].shape[2] for n in nodes_of(graph, SDPA)]
    assert queries[-1] == 1
    assert all(isinstance(q, torch.SymInt) for q in queries[:-1])
    # What follows from the one query is one token wide, up to the logits.
    wide = [n for n in graph.graph.nodes if graph.layer_of.get(n) == LAYERS]
    assert {n.meta["val"].shape[1] for n in wide} == {1}


@pytest.mark.parametrize("phase", ["prefill", "extend"])
@pytest.mark.parametrize("layer", [0, 1])
def test_behind_an_exit(phase, layer):
    graph, whole = captured(phase), captured(phase)
    settings = PassSettings(plan(gate(layer, ALWAYS)))
    run_passes(PASSES, graph, settings)
    run_passes([annotate_layers, insert_exits, cleanup], whole, settings)
    embeds, where, *past = inputs_of(phase)
    inputs = [embeds, where, layout("tvvttt"), *past]
    got, want = run_graph(graph, *inputs), run_graph(whole, *inputs)
    assert want[0].shape[1] == 4
    assert_close(got[0], want[0][:, -1:])
    assert_close(got[1 : 1 + 2 * LAYERS], want[1 : 1 + 2 * LAYERS])


@pytest.mark.parametrize(("phase", "wanted"), [("decode", True), ("prefill", False)])
def test_left_alone(phase, wanted):
    graph = captured(phase)
    settings = PassSettings(plan(), last_token_logits=wanted)
    annotate_layers(graph, settings)
    before = [n.format_node() for n in graph.graph.nodes]
    assert last_layer_queries(graph, settings).applied == 0
    assert [n.format_node() for n in graph.graph.nodes] == before


def test_refuses_an_exit_behind_the_last_layer():
    graph = captured()
    results = {r.name: r for r in run_passes(PASSES, graph, PassSettings(plan(StaticExit(LAYERS - 1))))}
    assert results["last_layer_queries"].applied == 0
    assert "takes the tokens of the layer apart" in results["last_layer_queries"].refusals[0].reason
    assert results["last_token_logits"].applied == 1


def test_refuses_a_last_layer_that_uses_more_than_its_own_stream():
    graph = captured()
    settings = PassSettings(plan())
    annotate_layers(graph, settings)
    attention = nodes_of(graph, SDPA)[-1]
    other = nodes_of(graph, SDPA)[0]
    following = next(iter(attention.users))
    with graph.graph.inserting_before(following):
        mixed = graph.graph.call_function(torch.ops.aten.add.Tensor, (attention, other))
    mixed.meta["val"], graph.layer_of[mixed] = attention.meta["val"], LAYERS - 1
    following.replace_input_with(attention, mixed)
    result = last_layer_queries(graph, settings)
    assert result.applied == 0
    assert f"also uses {other.name}" in result.refusals[0].reason


def skipping(*layers, adapter=False):
    def pia(layer):
        return random_adapter(PIA, layer, hidden_size=C) if adapter else None

    return Plan(skips=[SkippedAttention(layer, pia(layer)) for layer in layers])


@pytest.mark.parametrize("phase", ["prefill", "extend"])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("layers", [(2,), (1, 2), (0, 1, 2)])
def test_skipped_layers_at_the_end(phase, adapter, layers):
    """Without attention the last token is all they need, but for the means that adapters of a prompt are after."""
    graph, whole = captured(phase), captured(phase)
    eas = skipping(*layers, adapter=adapter)
    settings = PassSettings(eas)
    results = {r.name: r for r in run_passes(PASSES, graph, settings)}
    assert results["last_layer_queries"].refusals == []
    kept = LAYERS - len(layers)
    means = adapter and phase == "prefill"
    assert results["last_layer_queries"].applied == (1 if means else min(len(layers) + 1, LAYERS))
    run_passes(PASSES, whole, PassSettings(eas, last_token_logits=False, folded=settings.folded))
    past = random_kv((9, 5, 2)[:kept]) if phase == "extend" else []
    inputs = [embeddings(6), positions(6, 9), *past]
    if adapter and phase == "extend":
        prefill = captured("prefill")
        run_passes(PASSES, prefill, settings)
        inputs += run_graph(prefill, embeddings(5, seed=1), positions(5))[1 + 2 * kept :]
    got, want = run_graph(graph, *inputs), run_graph(whole, *inputs)
    assert_close(got[0], want[0][:, -1:])
    assert_close(got[1:], want[1:])
    linears = [n for n in nodes_of(graph, torch.ops.aten.linear.default) if graph.layer_of[n] in layers[-1:]]
    assert linears
    assert {n.meta["val"].shape[1] for n in linears if n.meta["val"].ndim == 3} == {1}
    # One cut, where the last token is first all that counts.
    cuts = [n for n in nodes_of(graph, torch.ops.aten.slice.Tensor) if n.args[2:] == (-1, sys.maxsize)]
    assert len({graph.layer_of[n] for n in cuts if graph.layer_of[n] < LAYERS}) <= 1


def test_an_exit_before_a_skipped_layer_is_asked_with_all_tokens():
    graph = captured()
    results = run_passes(PASSES, graph, PassSettings(Plan(exits=[gate(1, ALWAYS)], skips=[SkippedAttention(2)])))
    assert {r.name: r.applied for r in results}["last_layer_queries"] == 1
    assert graph.streams[1].meta["val"].shape[1] == graph.placeholder("inputs_embeds").meta["val"].shape[1]
    whole = captured()
    settings = PassSettings(Plan(exits=[gate(1, ALWAYS)], skips=[SkippedAttention(2)]), last_token_logits=False)
    run_passes(PASSES, whole, settings)
    inputs = [embeddings(6), positions(6), layout("tvvttt")]
    got, want = run_graph(graph, *inputs), run_graph(whole, *inputs)
    assert want[0].shape[1] == 4
    assert_close(got[0], want[0][:, -1:])


# ---------------------------------------------------------------- chunks of engines


def of_last(logits, lengths):
    return torch.stack([row[length - 1 :][:1] for row, length in zip(logits, lengths, strict=True)])


@pytest.mark.parametrize("lengths", [[5, 3], [1, 1]])
def test_chunks_whose_rows_have_padding(lengths):
    """All tokens ask, since the cache's operators want that; behind the attention there is each row's last token."""
    graph, whole = captured("chunk"), captured("chunk")
    results = {r.name: r for r in run_passes(PASSES, graph, PassSettings(plan()))}
    assert (results["last_layer_queries"].applied, results["last_layer_queries"].refusals) == (1, [])
    inputs = chunk_inputs(lengths, [2, 0])
    got, want = run_graph(graph, *inputs), run_graph(whole, *inputs)
    assert_close(got[0], of_last(want[0], lengths))
    assert_close(got[1:], want[1:])
    linears = [n for n in nodes_of(graph, torch.ops.aten.linear.default) if graph.layer_of[n] == LAYERS - 1]
    widths = [n.meta["val"].shape[1] for n in linears]
    assert [isinstance(w, int) and w == 1 for w in widths] == [False] * 3 + [True] * 4  # q, k, v; o, gate, up, down
    assert len(nodes_of(graph, torch.ops.aten.gather.default)) == 2  # of the attention's result, and of the stream


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("layers", [(2,), (1, 2)])
def test_skipped_layers_at_the_end_of_chunks(adapter, layers):
    """Rows with a past and without one, whose adapters hear of this chunk's tokens."""
    graph, whole = captured("chunk"), captured("chunk")
    settings = PassSettings(skipping(*layers, adapter=adapter), one_prompt=False)
    results = {r.name: r for r in run_passes(PASSES, graph, settings)}
    assert results["last_layer_queries"].refusals == []
    assert results["last_layer_queries"].applied == (1 if adapter else len(layers) + 1)
    options = {"last_token_logits": False, "one_prompt": False, "folded": settings.folded}
    run_passes(PASSES, whole, PassSettings(settings.plan, **options))
    lengths = [5, 3, 4]
    inputs = chunk_inputs(lengths, [2, 0, 0])
    known = [n for n in graph.graph.nodes if n.op == "placeholder" and n.name.startswith("prompt_")]
    generator = torch.Generator().manual_seed(3)
    given = [torch.rand(3, *n.meta["val"].shape[1:], generator=generator) for n in known]
    inputs = [*inputs[: 4 + 2 * (LAYERS - len(layers))], *given]
    got, want = run_graph(graph, *inputs), run_graph(whole, *inputs)
    assert_close(got[0], of_last(want[0], lengths))
    assert_close(got[1:], want[1:])
    ends = [n for n in nodes_of(graph, torch.ops.aten.linear.default) if graph.layer_of[n] == LAYERS - 1]
    assert 1 in [n.meta["val"].shape[1] for n in ends if n.meta["val"].ndim == 3]


@pytest.mark.parametrize(("layer", "applied"), [(LAYERS - 1, 0), (LAYERS - 2, 1)])
def test_chunks_are_whole_where_an_exit_is(layer, applied):
    graph = captured("chunk")
    skips = [SkippedAttention(LAYERS - 1)]
    results = {r.name: r for r in run_passes(PASSES, graph, PassSettings(Plan([StaticExit(layer)], skips=skips)))}
    assert results["last_layer_queries"].applied == applied
    tokens = graph.placeholder("inputs_embeds").meta["val"].shape[1]
    assert graph.streams[layer].meta["val"].shape[1] == tokens
    assert next(n for n in graph.graph.nodes if n.op == "output").args[0][0].meta["val"].shape[1] == 1
