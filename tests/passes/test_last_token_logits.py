"""last_token_logits: the tail computes one position, with and without an exit behind the last layer."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    ALWAYS,
    LAYERS,
    VOCAB,
    assert_close,
    captured,
    embeddings,
    gate,
    layout,
    nodes_of,
    plan,
    positions,
    random_kv,
    run_graph,
)

from vte_compile.passes import PassSettings, run_passes
from vte_compile.passes.annotate_layers import annotate_layers
from vte_compile.passes.cleanup import cleanup
from vte_compile.passes.insert_exits import insert_exits
from vte_compile.passes.last_token_logits import last_token_logits

aten = torch.ops.aten


def inputs_of(phase, tokens=6):
    return [embeddings(tokens), positions(tokens, 9), *(random_kv((9, 5, 2)) if phase == "extend" else [])]


@pytest.mark.parametrize("phase", ["prefill", "extend"])
def test_logits_of_the_last_token(phase):
    graph = captured(phase)
    inputs = inputs_of(phase)
    logits, *kv = run_graph(graph, *inputs)
    settings = PassSettings(plan())
    annotate_layers(graph, settings)
    count = len(graph.graph.nodes)
    result = last_token_logits(graph, settings)
    assert (result.applied, result.refusals) == (1, [])
    assert len(graph.graph.nodes) == count + 1
    cleanup(graph, settings)
    last, *rest = run_graph(graph, *inputs)
    assert last.shape == (1, 1, VOCAB)
    assert_close(last, logits[:, -1:])
    assert all(torch.equal(a, b) for a, b in zip(rest, kv, strict=True))
    # The slice comes first in the tail, and the tail is what has one position.
    tail = [n for n in graph.graph.nodes if graph.layer_of.get(n) == LAYERS]
    assert (tail[0].target, tail[0].args[:3]) == (aten.slice.Tensor, (graph.streams[-1], 1, -1))
    assert {n.meta["val"].shape[1] for n in tail} == {1}
    assert set(graph.streams[-1].users) - set(tail[1:]) == {tail[0]}


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_behind_an_exit(layer):
    graph = captured()
    settings = PassSettings(plan(gate(layer, ALWAYS)), last_token_logits=False)
    run_passes([annotate_layers, insert_exits], graph, settings)
    inputs = [embeddings(8), positions(8), layout("ttvvvttt")]
    logits = run_graph(graph, *inputs)[0]
    assert logits.shape == (1, 5, VOCAB)
    assert last_token_logits(graph, PassSettings(settings.plan)).applied == 1
    assert_close(run_graph(graph, *inputs)[0], logits[:, -1:])


@pytest.mark.parametrize(("phase", "wanted"), [("prefill", False), ("extend", False), ("decode", True)])
def test_left_alone(phase, wanted):
    graph = captured(phase)
    annotate_layers(graph, PassSettings(plan()))
    before = str(graph.graph)
    result = last_token_logits(graph, PassSettings(plan(), last_token_logits=wanted))
    assert (result.applied, result.refusals) == (0, [])
    assert str(graph.graph) == before


def test_refuses_a_tail_that_uses_more_than_the_stream():
    graph = captured()
    settings = PassSettings(plan())
    annotate_layers(graph, settings)
    head = nodes_of(graph, aten.linear.default)[-1]
    embeds = graph.placeholder("inputs_embeds")
    with graph.graph.inserting_before(head):
        mixed = graph.graph.call_function(aten.add.Tensor, (head.args[0], embeds))
    mixed.meta["val"] = embeds.meta["val"]
    graph.layer_of[mixed] = LAYERS
    head.replace_input_with(head.args[0], mixed)
    before = run_graph(graph, *inputs_of("prefill"))
    result = last_token_logits(graph, settings)
    assert result.applied == 0
    (refusal,) = result.refusals
    assert refusal.reason == f"{mixed.name} behind the last layer uses inputs_embeds besides the residual stream."
    assert refusal.node == mixed.name
    after = run_graph(graph, *inputs_of("prefill"))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_norm_that_computes_with_its_weight():
    """Gemma multiplies by 1 + weight: that belongs to the tail, and has no positions to cut."""
    graph = captured(family="gemma")
    inputs = inputs_of("prefill")
    logits = run_graph(graph, *inputs)[0]
    results = run_passes([annotate_layers, last_token_logits, cleanup], graph, PassSettings(plan()))
    assert (results[1].applied, results[1].refusals) == (1, [])
    assert_close(run_graph(graph, *inputs)[0], logits[:, -1:])


def test_what_is_computed_from_weights_belongs_where_it_is_used():
    graph = captured(family="gemma")
    annotate_layers(graph, PassSettings(plan()))
    constants = [n for n in graph.layer_of if n.users and {i.op for i in n.all_input_nodes} == {"get_attr"}]
    assert {graph.layer_of[n] for n in constants} >= {0, 1, LAYERS}
    assert all(graph.layer_of[n] == min(graph.layer_of[user] for user in n.users) for n in constants)
