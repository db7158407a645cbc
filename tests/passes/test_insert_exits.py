"""insert_exits: the rewritten graph, run as a whole, against the oracle; what it rewired; and what it must refuse."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    ALWAYS,
    LAYERS,
    NEVER,
    assert_close,
    captured,
    embeddings,
    gate,
    layout,
    nodes_of,
    plan,
    positions,
    random_kv,
    row_cache,
    run_graph,
    shared,
)

from vte_compile.kernels.exit_gate import exit_gate, static_exit
from vte_compile.kernels.token_exit import token_exit, unpack_dims
from vte_compile.oracle import Oracle, OracleCache
from vte_compile.passes import PassSettings, run_passes
from vte_compile.passes.annotate_layers import annotate_layers
from vte_compile.passes.cleanup import cleanup
from vte_compile.passes.insert_exits import insert_exits
from vte_compile.passes.plain_causal import plain_causal
from vte_compile.plan import StaticExit

aten = torch.ops.aten
GATE, STATIC, MARKER = exit_gate._opoverload, static_exit._opoverload, token_exit._opoverload
PLANS = {
    "static 0": [StaticExit(0)],
    "static 1": [StaticExit(1)],
    "static last": [StaticExit(LAYERS - 1)],
    "learned 0": [gate(0, ALWAYS)],
    "learned last": [gate(LAYERS - 1, ALWAYS)],
    "never": [gate(i, NEVER) for i in range(LAYERS)],
    "first of three": [gate(i, ALWAYS) for i in range(LAYERS)],
    "middle of three": [gate(0, NEVER), gate(1, ALWAYS), gate(2, ALWAYS)],
    "last, static": [gate(0, NEVER), gate(1, NEVER), StaticExit(2)],
    "as the gates say": [gate(i, 0.0, seed=3) for i in range(LAYERS)],
}
LAYOUTS = ["ttvvvvtt", "vvttt", "tvtvvttvtt", "vtt", "tttt", "tvv", "tvvt"]


def rewrite(graph, exits, *, prove_masks=True):
    """insert_exits' result, between the passes it stands between."""
    passes = [annotate_layers, *([plain_causal] if prove_masks else []), insert_exits, cleanup]
    return run_passes(passes, graph, PassSettings(plan(*exits)))[-2]


def check(graph, exits, cells, past=None, start=0):
    """Run a rewritten graph on one row and compare all it gives with the oracle; returns the exit layer."""
    visual, embeds = layout(cells), embeddings(len(cells), seed=len(cells))
    cache = None if past is None else OracleCache((row_cache(past, start),))
    want = Oracle(shared(), plan(*exits)).forward(embeds, visual, cache=cache)
    inputs = [embeds, positions(len(cells), start), visual, *(past or [])]
    logits, *rest = run_graph(graph, *inputs)
    kv, fired = rest[: 2 * LAYERS], rest[2 * LAYERS :]
    layer = int(want.exit_layer)
    kept = torch.ones_like(visual[0]) if layer < 0 else ~visual[0]
    assert_close(logits[0], want.logits[0, kept])
    assert_close(kv, [t for pair in want.cache.rows[0].layers for t in pair])
    assert [bool(f) for f in fired] == [planned.layer == layer for planned in exits]
    return layer


@pytest.mark.parametrize("name", PLANS)
def test_prefill_is_the_oracle(name):
    exits = PLANS[name]
    graph = captured()
    result = rewrite(graph, exits)
    assert (result.applied, result.refusals) == (len(exits), [])
    layers = {cells: check(graph, exits, cells) for cells in LAYOUTS}
    assert layers["tttt"] == layers["tvv"] == -1  # no image, no question
    expected = {
        "static 0": 0, "static 1": 1, "static last": 2, "learned 0": 0, "learned last": 2,
        "never": -1, "first of three": 0, "middle of three": 1, "last, static": 2,
    }  # fmt: skip
    if name in expected:
        assert layers["ttvvvvtt"] == layers["tvtvvttvtt"] == expected[name]
    if name == "learned 0":
        assert layers["tvvt"] == -1  # a question of one token: the mean is NaN, which keeps
    if name == "static 0":
        assert layers["tvvt"] == 0


def test_gates_that_decide_by_themselves():
    """Gates of one plan fire at different layers for different rows."""
    exits = [gate(i, threshold, seed=3) for i, threshold in enumerate((1.0, 0.5, 0.0))]
    graph = captured()
    rewrite(graph, exits)
    layouts = ["t" * a + "v" * b + "t" * c for a in (0, 2) for b in (1, 3) for c in (2, 3, 5, 8)]
    assert len({check(graph, exits, cells) for cells in layouts}) > 2


@pytest.mark.parametrize("name", ["static 0", "middle of three", "static last"])
def test_extend_is_the_oracle(name):
    exits = PLANS[name]
    graph = captured("extend")
    result = rewrite(graph, exits)
    assert (result.applied, result.refusals) == (len(exits), [])
    for lengths in ((9, 9, 9), (9, 4, 6)):
        for cells in ("tvvvtt", "ttt"):
            check(graph, exits, cells, random_kv(lengths), 9)


@pytest.mark.parametrize("phase", ["prefill", "extend"])
@pytest.mark.parametrize("name", ["static 0", "static last", "first of three"])
def test_ops_before_and_after(phase, name):
    exits = PLANS[name]
    graph = captured(phase)
    run_passes([annotate_layers, plain_causal], graph, PassSettings(plan()))
    assert nodes_of(graph, GATE, STATIC, MARKER) == []
    outputs = len(graph.graph.output_node().args[0])
    lengths = nodes_of(graph, aten.sym_size.int)
    length = next(n for n in lengths if n.args == (graph.placeholder("inputs_embeds"), 1))
    assert any(graph.layer_of[user] > exits[0].layer for user in length.users) == (exits[0].layer < LAYERS - 1)
    result = insert_exits(graph, PassSettings(plan(*exits)))
    graph.graph.lint()
    assert result.applied == len(exits) == len(nodes_of(graph, MARKER))
    assert len(nodes_of(graph, STATIC)) == (1 if name.startswith("static") else 0)
    assert len(nodes_of(graph, GATE)) == len(exits) - len(nodes_of(graph, STATIC))
    placeholders = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    assert placeholders[:3] == ["inputs_embeds", "position_ids", "visual_mask"]
    results = graph.graph.output_node().args[0]
    assert len(results) == outputs + len(exits)
    assert {n.target for n in results[outputs:]} <= {GATE, STATIC}
    # Behind an exit, nothing of what was as long as the sequence is used any more.
    first = exits[0].layer
    symbol = graph.placeholder("inputs_embeds").meta["val"].shape[1].node.expr
    for node in graph.graph.nodes:
        if graph.layer_of.get(node, -1) <= first:
            continue
        for used in node.all_input_nodes:
            value = used.meta.get("val")
            if graph.layer_of.get(used, -1) > first or used.target == torch.ops.aten.sym_size.int:
                assert used is not length
                continue
            sizes = [value] if isinstance(value, torch.SymInt) else getattr(value, "shape", ())
            as_long = any(isinstance(s, torch.SymInt) and symbol in s.node.expr.free_symbols for s in sizes)
            assert not as_long or _is_renewed(used), (node, used)
    # Marker, its values and the decision belong to the layer in front of them; streams are what is left.
    for planned, marker in zip(exits, nodes_of(graph, MARKER), strict=True):
        assert graph.layer_of[marker] == graph.layer_of[marker.args[0]] == planned.layer
        assert graph.streams[planned.layer].args[0] is marker
        count = 4 if planned.layer < LAYERS - 1 else 2  # cos and sin of the layers behind, stream, visual mask
        assert unpack_dims(*marker.args[3:]) == [[1]] * len(marker.args[2]) == [[1]] * count
        assert marker.args[2][-1] is marker.args[1]


def _is_renewed(node):
    """Whether a value of the exit's own layer comes from behind its marker."""
    return node.target is not MARKER and any(n.target is MARKER or _is_renewed(n) for n in node.all_input_nodes)


def test_the_visual_mask_goes_from_exit_to_exit():
    graph = captured()
    rewrite(graph, PLANS["first of three"])
    masks = [marker.args[1] for marker in nodes_of(graph, MARKER)]
    assert masks[0] is graph.placeholder("visual_mask")
    for mask, marker in zip(masks[1:], nodes_of(graph, MARKER), strict=False):
        assert mask.args[0] is marker
    for decision, mask in zip(nodes_of(graph, GATE), masks, strict=True):
        assert decision.args[1] is mask


def test_thresholds_and_weights_are_the_plans():
    exits = [gate(0, 0.25), gate(2, -1.5)]
    graph = captured()
    rewrite(graph, exits)
    for planned, decision in zip(exits, nodes_of(graph, GATE), strict=True):
        stream, _, w1, w2, threshold = decision.args
        assert graph.layer_of[stream] == planned.layer
        assert threshold == planned.threshold
        assert torch.equal(graph.parameters[w1.target](), planned.w1)
        assert torch.equal(graph.parameters[w2.target](), planned.w2)


@pytest.mark.parametrize("name", ["static 1", "middle of three"])
def test_a_mask_that_stays_is_cut_in_both_dims(name):
    """Without plain_causal one mask serves all layers."""
    exits = PLANS[name]
    graph = captured()
    result = rewrite(graph, exits, prove_masks=False)
    assert (result.applied, result.refusals) == (len(exits), [])
    for marker in nodes_of(graph, MARKER):
        dims = unpack_dims(*marker.args[3:])
        assert ([2, 3] in dims) == (graph.layer_of[marker] < LAYERS - 1)  # nothing attends behind the last layer
    assert all(n.args[3] is not None for n in nodes_of(graph, aten.scaled_dot_product_attention.default))
    for cells in LAYOUTS:
        check(graph, exits, cells)


def doubled_table(graph, reader_layer):
    """Let a layer read the rotary table from a value twice as long as the sequence."""
    annotate_layers(graph, PassSettings(plan()))
    reader = next(
        n for n in nodes_of(graph, aten.unsqueeze.default)
        if graph.layer_of[n] == reader_layer and graph.layer_of.get(n.args[0]) == -1
    )  # fmt: skip
    table = reader.args[0]
    with torch.no_grad(), table.meta["val"].fake_mode, graph.graph.inserting_after(table):
        twice = graph.graph.call_function(aten.cat.default, ([table, table], 1))
        twice.meta["val"] = aten.cat.default([table.meta["val"]] * 2, 1)
    with torch.no_grad(), table.meta["val"].fake_mode, graph.graph.inserting_before(reader):
        length = graph.graph.call_function(aten.sym_size.int, (graph.placeholder("inputs_embeds"), 1))
        length.meta["val"] = graph.placeholder("inputs_embeds").meta["val"].shape[1]
        half = graph.graph.call_function(aten.slice.Tensor, (twice, 1, 0, length))
        half.meta["val"] = table.meta["val"]
    reader.args = (half, 1)
    graph.layer_of |= {twice: -1, half: reader_layer, length: reader_layer}
    return twice


def test_refuses_a_value_of_which_the_sequence_is_a_part():
    graph = captured()
    twice = doubled_table(graph, reader_layer=1)
    settings = PassSettings(plan(gate(0, ALWAYS), gate(1, ALWAYS), gate(2, ALWAYS)))
    result = run_passes([plain_causal, insert_exits], graph, settings)[-1]
    assert result.applied == 2  # behind layer 1 nobody reads it
    (refusal,) = result.refusals
    length = graph.placeholder("inputs_embeds").meta["val"].shape[1]
    assert refusal.reason == f"{twice.name}: dim 1 is 2*{length}, of which only a part is the sequence."
    assert (refusal.node, refusal.layer) == (twice.name, 0)
    assert [graph.layer_of[m] for m in nodes_of(graph, MARKER)] == [1, 2]
    # What is left is right: the plan without the refused exit.
    assert check(graph, [gate(1, ALWAYS), gate(2, ALWAYS)], "ttvvvvtt") == 1


def test_refuses_every_exit_it_crosses():
    graph = captured()
    twice = doubled_table(graph, reader_layer=2)
    result = run_passes([plain_causal, insert_exits], graph, PassSettings(plan(gate(0), StaticExit(1))))[-1]
    assert result.applied == 0
    assert [(r.node, r.layer) for r in result.refusals] == [(twice.name, 0), (twice.name, 1)]
    assert nodes_of(graph, MARKER, GATE, STATIC) == []
    visual = layout("ttvvtt")
    got = run_graph(graph, embeddings(6), positions(6), visual)
    assert_close(got, run_graph(captured(), embeddings(6), positions(6)))


@pytest.mark.parametrize(("phase", "exits"), [("decode", [StaticExit(0)]), ("prefill", []), ("extend", [])])
def test_leaves_graphs_without_exits_alone(phase, exits):
    graph = captured(phase)
    annotate_layers(graph, PassSettings(plan()))
    before = str(graph.graph)
    result = insert_exits(graph, PassSettings(plan(*exits)))
    assert (result.applied, result.refusals) == (0, [])
    assert str(graph.graph) == before
