"""annotate_layers: nodes get the layers their modules say, the graph is sorted, and one stream leaves each layer."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import LAYERS, C, captured, embeddings, nodes_of, plan, positions, random_kv, run_graph

from vte_compile.errors import CaptureError
from vte_compile.passes import PassSettings
from vte_compile.passes.annotate_layers import annotate_layers
from vte_compile.passes.residual import ATTENTIONS

aten = torch.ops.aten
SETTINGS = PassSettings(plan())
ADD = (aten.add.Tensor, aten.to.dtype)


def inputs_of(phase):
    if phase == "prefill":
        return embeddings(6), positions(6)
    tokens = 4 if phase == "extend" else 1
    return embeddings(tokens), positions(tokens, 9), *random_kv((9, 5, 2))


@pytest.mark.parametrize("phase", ["prefill", "extend", "decode"])
def test_layers_and_streams(phase):
    graph = captured(phase)
    inputs = inputs_of(phase)
    before = run_graph(graph, *inputs)
    nodes = list(graph.graph.nodes)
    result = annotate_layers(graph, SETTINGS)
    assert (result.applied, result.refusals) == (LAYERS, [])
    assert set(graph.graph.nodes) == set(nodes)  # moved, and nothing else
    for got, want in zip(run_graph(graph, *inputs), before, strict=True):
        assert torch.equal(got, want)
    # Weights say which layer a node belongs to, independently of the pass.
    for node in nodes:
        for weight in (n for n in node.all_input_nodes if n.op == "get_attr"):
            found = re.search(r"layers\.(\d+)\.", weight.target)
            tail = weight.target in ("decoder.norm.weight", "lm_head.weight")
            assert graph.layer_of[node] == (int(found[1]) if found else LAYERS if tail else -1)
    order = [graph.layer_of[n] for n in graph.graph.nodes if n in graph.layer_of]
    assert order == sorted(order)
    assert set(order) == set(range(-1, LAYERS + 1))
    for node in graph.layer_of:
        assert graph.layer_of[node] >= max((graph.layer_of.get(n, -1) for n in node.all_input_nodes), default=-1)
    # A stream is the sum at the end of a layer, and all that later layers see of it.
    assert [graph.layer_of[stream] for stream in graph.streams] == list(range(LAYERS))
    for layer, stream in enumerate(graph.streams):
        assert stream.target in ADD
        assert stream.meta["val"].shape[-1] == C
        assert {graph.layer_of[user] for user in stream.users} - {layer} == {layer + 1}
    attentions = nodes_of(graph, *ATTENTIONS)
    assert [graph.layer_of[n] for n in attentions] == list(range(LAYERS))
    assert not any(n.op in ("placeholder", "get_attr", "output") for n in graph.layer_of)


def test_streams_are_the_hidden_states_of_the_model():
    graph = captured()
    annotate_layers(graph, SETTINGS)
    output = graph.graph.output_node()
    output.args = (tuple(graph.streams),)
    got = run_graph(graph, embeddings(6), positions(6))
    seen = []
    layers = graph.spec.decoder.layers
    handles = [layer.register_forward_hook(lambda *args: seen.append(args[2])) for layer in layers]
    with torch.no_grad():
        graph.spec.decoder(inputs_embeds=embeddings(6), position_ids=positions(6))
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(got, seen, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_nodes_without_a_module_stay_with_what_they_depend_on(layer):
    """Those in the last layer too, which are not the tail as long as a node of the layer needs them."""
    graph = captured()
    attention = nodes_of(graph, aten.scaled_dot_product_attention.default)[layer]
    del attention.meta["nn_module_stack"]
    annotate_layers(graph, SETTINGS)
    assert graph.layer_of[attention] == layer
    assert len(set(graph.streams)) == LAYERS


def test_annotating_twice_changes_nothing():
    graph = captured()
    annotate_layers(graph, SETTINGS)
    layers, streams, order = graph.layer_of, graph.streams, list(graph.graph.nodes)
    annotate_layers(graph, SETTINGS)
    assert (graph.layer_of, graph.streams, list(graph.graph.nodes)) == (layers, streams, order)


def test_refuses_two_streams():
    graph = captured()
    first, second = nodes_of(graph, aten.linear.default)[6], nodes_of(graph, aten.silu.default)[1]
    assert "layers.0" in str(first.meta["nn_module_stack"])
    with graph.graph.inserting_before(second):
        shortcut = graph.graph.call_function(
            aten.add.Tensor, (second.args[0], graph.graph.call_function(aten.sum.default, (first,)))
        )
    shortcut.meta = dict(second.args[0].meta)
    shortcut.args[1].meta = {"val": first.meta["val"].sum(), "nn_module_stack": second.meta["nn_module_stack"]}
    second.args = (shortcut,)
    with pytest.raises(
        CaptureError, match=rf"layer 0: expected one residual stream to leave it, found (\S+, )?{first}"
    ):
        annotate_layers(graph, SETTINGS)


def test_refuses_layers_without_a_trace():
    graph = captured()
    for node in graph.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    with pytest.raises(CaptureError, match="layer 0: expected one residual stream to leave it, found nothing"):
        annotate_layers(graph, SETTINGS)
