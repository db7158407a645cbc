"""cleanup: what does nothing is gone, what is left computes the same, and what does not fit together is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import ALWAYS, LAYERS, captured, embeddings, gate, layout, nodes_of, plan, positions, random_kv, run_graph

from vte_compile.errors import CaptureError
from vte_compile.kernels.token_exit import token_exit
from vte_compile.passes import PassSettings, run_passes
from vte_compile.passes.annotate_layers import annotate_layers
from vte_compile.passes.cleanup import cleanup
from vte_compile.passes.insert_exits import insert_exits
from vte_compile.passes.plain_causal import plain_causal
from vte_compile.plan import StaticExit

aten = torch.ops.aten
ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
)


@pytest.mark.parametrize("phase", ["prefill", "extend", "decode"])
def test_removes_what_does_nothing(phase):
    graph = captured(phase)
    tokens = 1 if phase == "decode" else 4
    inputs = [embeddings(tokens), positions(tokens, 9), *([] if phase == "prefill" else random_kv((9, 5, 2)))]
    before = run_graph(graph, *inputs)
    settings = PassSettings(plan())
    annotate_layers(graph, settings)
    computing = len(nodes_of(graph, aten.linear.default))
    assert nodes_of(graph, *ASSERTIONS)
    placeholders = graph.graph.find_nodes(op="placeholder")
    count = len(graph.graph.nodes)
    result = cleanup(graph, settings)
    assert result.refusals == []
    assert result.applied == count - len(graph.graph.nodes) > 0
    assert nodes_of(graph, *ASSERTIONS) == []
    assert all(n.users or n.op in ("placeholder", "output") for n in graph.graph.nodes)
    assert graph.graph.find_nodes(op="placeholder") == placeholders  # the interface stays, used or not
    assert len(nodes_of(graph, aten.linear.default)) == computing
    assert set(graph.layer_of) <= set(graph.graph.nodes)
    with torch.no_grad():
        after = graph.module(*inputs)  # recompiled already
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert cleanup(graph, settings).applied == 0


def test_an_unused_visual_mask_stays_an_input():
    graph = captured()
    run_passes([annotate_layers, insert_exits], graph, PassSettings(plan(StaticExit(0))))
    output = graph.graph.output_node()
    output.args = (output.args[0][1:3],)  # keys and values of layer 0, which no exit touches
    cleanup(graph, PassSettings(plan()))
    assert nodes_of(graph, token_exit._opoverload) == []
    assert [n.name for n in graph.graph.find_nodes(op="placeholder")] == [
        "inputs_embeds",
        "position_ids",
        "visual_mask",
    ]


def with_exits(*exits):
    graph = captured()
    settings = PassSettings(plan(*exits))
    run_passes([annotate_layers, plain_causal, insert_exits], graph, settings)
    return graph, settings


@pytest.mark.parametrize("layer", [0, 1])
def test_refuses_an_old_length_behind_an_exit(layer):
    """The mistake that insert_exits is there not to make: it shows as soon as the exit fires."""
    graph, settings = with_exits(StaticExit(layer))
    old, new = nodes_of(graph, aten.sym_size.int)[0], nodes_of(graph, aten.sym_size.int)[-1]
    assert graph.layer_of[new] == layer
    user = next(n for n in nodes_of(graph, aten.view.default) if graph.layer_of[n] > layer)
    user.replace_input_with(new, old)
    inputs = embeddings(6), positions(6)
    run_graph(graph, *inputs, layout("tttttt"))  # nothing wrong as long as nothing leaves
    with pytest.raises(CaptureError, match=r"shapes do not fit with token_exit_default: .*(shape|invalid)"):
        cleanup(graph, settings)


def test_refuses_a_value_that_skips_the_last_exit():
    graph, settings = with_exits(gate(0, ALWAYS), gate(1, ALWAYS))
    first, last = nodes_of(graph, token_exit._opoverload)
    cos = next(user for user in last.users if user.args[1] == 0)
    cos.replace_all_uses_with(last.args[2][0])
    with pytest.raises(CaptureError, match=f"shapes do not fit with {last.name}: "):
        cleanup(graph, settings)
    assert first.users


def test_refuses_shapes_that_never_fit():
    graph, settings = with_exits()
    view = nodes_of(graph, aten.view.default)[0]
    view.args = (view.args[0], [1, view.args[1][1], -1, 7])
    with pytest.raises(CaptureError, match="shapes do not fit without an exit: "):
        cleanup(graph, settings)


def test_checks_without_running_the_weights():
    """The check is on fake tensors: weights are not even read."""
    graph, settings = with_exits(StaticExit(0))
    reads = []
    for name, read in list(graph.parameters.items()):
        meta = torch.empty_like(read(), device="meta")
        graph.parameters[name] = lambda name=name, meta=meta: (reads.append(name), meta)[1]
    with pytest.raises(CaptureError, match="device"):  # of the inputs, which are on the CPU
        cleanup(graph, settings)
    assert reads


def test_all_layers_stay():
    graph, settings = with_exits(StaticExit(LAYERS - 1))
    cleanup(graph, settings)
    assert set(graph.layer_of.values()) == set(range(-1, LAYERS + 1))
