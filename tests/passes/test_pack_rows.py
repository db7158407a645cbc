"""pack_rows: the packed graph, run as a whole and in pieces, gives each row what the oracle gives it alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

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
    run_graph,
    shared,
)

from vte_compile.kernels.packed_attention import packed_attention
from vte_compile.oracle import Oracle
from vte_compile.passes import PASSES, PassSettings, run_passes
from vte_compile.passes.annotate_layers import annotate_layers
from vte_compile.passes.lower_piecewise import lower_piecewise
from vte_compile.passes.pack_rows import pack_rows
from vte_compile.passes.residual import SDPA
from vte_compile.plan import Plan, SkippedAttention, StaticExit
from vte_compile.runtime.program import Program
from vte_compile.runtime.visual_tokens import PackedRows, VisualTokens

ROWS = ["ttvvvvtt", "vvttt", "tvtvvttvtt", "tttt", "tvv", "t"]
PLANS = {
    "none": [],
    "static 0": [StaticExit(0)],
    "static last": [StaticExit(LAYERS - 1)],
    "never": [gate(i, NEVER) for i in range(LAYERS)],
    "middle of three": [gate(0, NEVER), gate(1, ALWAYS), gate(2, ALWAYS)],
    "as the gates say": [gate(0, 0.0, seed=3), gate(1, 0.0, seed=3), StaticExit(2)],
}


def packed(plan: Plan, last: bool = False, family: str = "llama"):
    graph = replace(captured(family=family), phase="packed")
    results = run_passes(PASSES, graph, PassSettings(plan, last_token_logits=last))
    return graph, {result.name: result for result in results}


def prompt():
    """Embeddings of the rows, their positions, the visual mask and where they end, packed."""
    rows = [embeddings(len(cells), seed=i) for i, cells in enumerate(ROWS)]
    at = [positions(len(cells)) for cells in ROWS]
    ends = torch.tensor([0, *accumulate(map(len, ROWS))], dtype=torch.int32)
    return rows, [torch.cat(rows, 1), torch.cat(at, 1)], torch.cat(list(map(layout, ROWS)), 1), ends


def oracle(rows, exits, family="llama"):
    model = shared(family)
    return [Oracle(model, exits).forward(row, layout(cells)) for row, cells in zip(rows, ROWS, strict=True)]


def expected_logits(want, last):
    parts = [o.logits[0][layout(cells)[0].logical_not() | (int(o.exit_layer) < 0)] for o, cells in want]
    return torch.cat([part[-1:] if last else part for part in parts])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_rows_are_the_oracle(name, last):
    exits = plan(*PLANS[name])
    graph, results = packed(exits, last)
    assert (results["pack_rows"].applied, results["pack_rows"].refusals) == (LAYERS, [])
    assert results["insert_exits"].applied == len(PLANS[name])
    rows, inputs, visual, ends = prompt()
    want = oracle(rows, exits)
    layers = [int(o.exit_layer) for o in want]
    # The whole graph, which decides by itself.
    logits, *rest = run_graph(graph, *inputs, *([visual] if PLANS[name] else []), ends)
    assert_close(logits[0], expected_logits(list(zip(want, ROWS, strict=True)), last))
    for planned, fires in zip(PLANS[name], rest[2 * LAYERS :], strict=True):
        assert fires.tolist() == [planned.layer == layer for layer in layers]
    # In pieces, where the host decides.
    state = PackedRows(list(map(len, ROWS)), [VisualTokens.find(layout(cells)[0]) for cells in ROWS])
    with torch.no_grad():
        got = Program(lower_piecewise(graph), [], None).run([*inputs, ends], state)
    assert state.exit_layers == layers
    assert_close(got.logits, logits)
    for layer, pair in enumerate(got.kv):
        for index, part in enumerate(pair):
            assert_close(part, torch.cat([o.cache.rows[0].layers[layer][index] for o in want], dim=2))
            assert torch.equal(part, rest[2 * layer + index])


def test_the_plans_make_rows_differ():
    """Or the test above would show little."""
    exits = plan(*PLANS["as the gates say"])
    assert len({int(o.exit_layer) for o in oracle(prompt()[0], exits)}) >= 3


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma", "gemma2"])
def test_families(family):
    exits = plan(StaticExit(1))
    graph, results = packed(exits, True, family)
    assert results["pack_rows"].applied == LAYERS
    rows, inputs, visual, ends = prompt()
    logits, *_ = run_graph(graph, *inputs, visual, ends)
    assert_close(logits[0], expected_logits(list(zip(oracle(rows, exits, family), ROWS, strict=True)), True), 1e-4)


@pytest.mark.parametrize("skips", [(1,), (LAYERS - 1,), (0, LAYERS - 1)])
@pytest.mark.parametrize("exits", [(), (StaticExit(0),), (StaticExit(LAYERS - 2),)], ids=str)
def test_skipped_attentions(skips, exits):
    """Also of the last layer, of which last tokens are all that is left."""
    both = Plan(exits=exits, skips=[SkippedAttention(layer) for layer in skips])
    graph, results = packed(both, True)
    assert results["pack_rows"].applied == LAYERS - len(skips)
    rows, inputs, visual, ends = prompt()
    logits, *_ = run_graph(graph, *inputs, *([visual] if exits else []), ends)
    assert_close(logits[0], expected_logits(list(zip(oracle(rows, both), ROWS, strict=True)), True))


def test_the_last_layer_asks_for_last_tokens():
    graph, results = packed(plan(), True)
    assert results["last_layer_queries"].applied == 1
    attentions = nodes_of(graph, packed_attention._opoverload)
    assert [n.args[3] is n.args[4] for n in attentions] == [True] * (LAYERS - 1) + [False]


def test_equal_layers_are_one_piece():
    lowered = lower_piecewise(packed(plan(StaticExit(0)))[0])
    keys = [step.key for step in lowered.steps if hasattr(step, "key")]
    assert len(set(keys)) == 3  # before the layers, a layer, behind them


def test_a_mask_that_is_not_known_is_refused():
    graph = replace(captured(), phase="packed")
    run_passes([annotate_layers], graph, PassSettings(plan()))
    result = pack_rows(graph, PassSettings(plan()))  # plain_causal did not run
    assert result.applied == 0
    assert "not known to be plain causal" in result.refusals[0].reason
    assert graph.phase == "prefill"
    assert nodes_of(graph, SDPA)


def test_other_phases_are_left_alone():
    for phase in ("prefill", "extend", "decode"):
        graph = captured(phase)
        assert pack_rows(graph, PassSettings(plan())).applied == 0
        assert not nodes_of(graph, packed_attention._opoverload)
