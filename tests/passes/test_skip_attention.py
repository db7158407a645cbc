"""skip_attention: no node, weight, key or value of a skipped attention is left, and what is left is right."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    ALWAYS,
    LAYERS,
    VOCAB,
    C,
    assert_close,
    captured,
    embeddings,
    gate,
    layout,
    nodes_of,
    positions,
    random_kv,
    run_graph,
    shared,
    tiny,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import random_adapter

from vte_compile import GateExit, Oracle, Plan, SkippedAttention, optimize
from vte_compile.adapters import PIA
from vte_compile.capture import capture
from vte_compile.families.decoder import describe
from vte_compile.passes import PASSES, PassSettings, run_passes
from vte_compile.passes.annotate_layers import annotate_layers
from vte_compile.passes.skip_attention import skip_attention

aten = torch.ops.aten


def skipping(*layers: int, exits=()) -> Plan:
    return Plan(exits=exits, skips=[SkippedAttention(layer) for layer in layers])


def without_attention(family: str, layers) -> torch.nn.Module:
    """A model whose skipped attentions give nothing: the same numbers by other means."""
    model = tiny(family)
    with torch.no_grad():
        for layer in layers:
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            if model.model.layers[layer].self_attn.o_proj.bias is not None:
                model.model.layers[layer].self_attn.o_proj.bias.zero_()
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma"])
@pytest.mark.parametrize("layers", [(0,), (1, 2), tuple(range(LAYERS))])
def test_nothing_of_a_skipped_attention_is_left(family, layers):
    graph = captured(family=family)
    results = {r.name: r for r in run_passes(PASSES, graph, PassSettings(skipping(*layers)))}
    assert (results["skip_attention"].applied, results["skip_attention"].refusals) == (len(layers), [])
    assert len(nodes_of(graph, aten.scaled_dot_product_attention.default)) == LAYERS - len(layers)
    weights = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    assert weights == set(graph.parameters)
    assert weights == {n for n, _ in (*graph.module.named_parameters(), *graph.module.named_buffers())}
    for layer in range(LAYERS):
        kept = {w for w in weights if w.startswith(f"decoder.layers.{layer}.self_attn.")}
        assert bool(kept) == (layer not in layers)
        # A block without attention has one norm.
        assert (f"decoder.layers.{layer}.input_layernorm.weight" in weights) == (layer not in layers)
    assert graph.kv_layers == [layer for layer in range(LAYERS) if layer not in layers]
    logits, *kv = run_graph(graph, embeddings(7), positions(7))
    assert len(kv) == 2 * len(graph.kv_layers)
    with torch.no_grad():
        want = without_attention(family, layers)(inputs_embeds=embeddings(7)).logits[:, -1:]
    assert_close(logits, want)


@pytest.mark.parametrize(("phase", "batched"), [("extend", False), ("decode", False), ("decode", True)])
@pytest.mark.parametrize("layers", [(0,), (LAYERS - 1,)])
def test_past_of_a_skipped_layer_is_no_input(phase, batched, layers):
    graph = captured(phase, batched)
    results = {r.name: r for r in run_passes(PASSES, graph, PassSettings(skipping(*layers)))}
    assert results["skip_attention"].applied == 1
    names = {n.name for n in graph.graph.nodes if n.op == "placeholder"}
    for layer in range(LAYERS):
        assert (f"past_key_{layer}" in names) == (f"past_value_{layer}" in names) == (layer not in layers)
        assert (f"kv_start_{layer}" in names) == (batched and layer not in layers)
    tokens, rows = (1, 2) if batched else (1 if phase == "decode" else 4, 1)
    past = random_kv((9, 5)[: LAYERS - 1], batch=rows)
    starts = [torch.zeros(rows, dtype=torch.long)] * ((LAYERS - 1) * batched)
    out = run_graph(graph, embeddings(tokens, rows), positions(tokens, 9).expand(rows, -1), *past, *starts)
    assert [t.shape[2] for t in out[1:]] == [9 + tokens, 9 + tokens, 5 + tokens, 5 + tokens]


def test_without_skips_nothing_changes():
    graph = captured()
    annotate_layers(graph, PassSettings(Plan()))
    before = [n.format_node() for n in graph.graph.nodes]
    result = skip_attention(graph, PassSettings(Plan()))
    assert (result.applied, result.refusals) == (0, [])
    assert [n.format_node() for n in graph.graph.nodes] == before


def test_refuses_a_block_whose_residual_is_not_its_input():
    """Post-norm: the stream that attention is added to went through a norm first."""
    graph = captured()
    annotate_layers(graph, PassSettings(Plan()))
    add = next(
        n
        for n in nodes_of(graph, aten.add.Tensor)
        if graph.layer_of[n] == 1 and getattr(n.args[1], "target", None) is aten.linear.default
    )
    with graph.graph.inserting_before(add):
        scaled = graph.graph.call_function(aten.mul.Tensor, (add.args[0], 2.0))
    graph.layer_of[scaled] = 1
    add.update_arg(0, scaled)
    result = skip_attention(graph, PassSettings(skipping(1)))
    assert result.applied == 0
    assert [r.layer for r in result.refusals] == [1]
    assert "not a pre-norm block" in result.refusals[0].reason


def test_refuses_if_something_else_reads_the_attention():
    """Parallel blocks feed the attention's result into more than the residual stream."""
    graph = captured()
    annotate_layers(graph, PassSettings(Plan()))
    attention = nodes_of(graph, aten.scaled_dot_product_attention.default)[0]
    output = next(n for n in graph.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], attention),)
    result = skip_attention(graph, PassSettings(skipping(0)))
    assert result.applied == 0
    assert "besides the residual addition" in result.refusals[0].reason


def test_the_whole_branch_goes_whatever_is_on_it():
    class Less(torch.nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention, self.layer_idx = attention, attention.layer_idx

        def forward(self, hidden_states, **kwargs):
            output, weights = self.attention(hidden_states=hidden_states, **kwargs)
            return output - hidden_states, weights

    model = tiny()
    layer = model.model.layers[1]
    layer.self_attn = Less(layer.self_attn)
    graph = capture(describe(model), "prefill")
    results = {r.name: r for r in run_passes(PASSES, graph, PassSettings(skipping(1)))}
    assert (results["skip_attention"].applied, results["skip_attention"].refusals) == (1, [])
    assert len(nodes_of(graph, aten.scaled_dot_product_attention.default)) == LAYERS - 1


def test_a_skip_whose_adapter_is_not_there_is_refused():
    graph = captured()
    plan = Plan(skips=[SkippedAttention(0, random_adapter(PIA, hidden_size=C)), SkippedAttention(1)])
    annotate_layers(graph, PassSettings(plan))
    result = skip_attention(graph, PassSettings(plan))
    assert result.applied == 1
    assert [(r.layer, r.reason) for r in result.refusals] == [(0, "its adapter could not be put into the graph.")]


rows = st.lists(st.sampled_from(["ttvvtttt", "tvvvvtt", "ttttt", "vtt", "tvtvvtttt"]), min_size=1, max_size=3)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(["llama", "qwen2", "gemma"]),
    layers=st.sets(st.integers(0, LAYERS - 1)),
    exit_layer=st.sampled_from([None, 0, 1]),
    rows=rows,
    left=st.booleans(),
)
def test_optimized_equals_the_oracle(family, layers, exit_layer, rows, left):
    model = shared(family)
    exits = [] if exit_layer is None else [gate(exit_layer, ALWAYS)]
    plan = skipping(*sorted(layers), exits=exits)
    fast = optimize(_base(family), plan)
    width = max(map(len, rows))
    padded = [r.rjust(width, ".") if left else r.ljust(width, ".") for r in rows]
    visual = torch.cat([layout(r) for r in padded])
    mask = torch.tensor([[cell != "." for cell in r] for r in padded])
    embeds = embeddings(width, len(rows))
    got = fast(inputs_embeds=embeds, visual_mask=visual, attention_mask=mask.long())
    oracle = Oracle(model, plan)
    want = oracle.forward(embeds, visual, mask)
    assert got.exit_layer.tolist() == want.exit_layer.tolist()
    assert_close(got.logits, want.logits)
    assert got.past_key_values.lengths.T.tolist() == want.cache.lengths()
    tokens = fast.generate(
        inputs_embeds=embeds, visual_mask=visual, attention_mask=mask.long(), max_new_tokens=3, do_sample=False
    )
    assert tokens.tolist() == oracle.generate(embeds, visual, mask, max_new_tokens=3).tokens


_bases: dict = {}


def _base(family: str):
    """One traced model per family."""
    if family not in _bases:
        model = shared(family)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        _bases[family] = optimize(model, Plan(), compile=False)
    return _bases[family]


def test_gates_see_what_is_left():
    """A skipped attention below a gate changes its features: the decision is the oracle's."""
    weights = torch.Generator().manual_seed(3)
    exits = [GateExit(1, torch.randn(5, 2 * C, generator=weights), torch.randn(2, 5, generator=weights))]
    decisions = set()
    for seed in range(8):
        visual, embeds = layout("tvvvttt"), embeddings(7, seed=seed)
        plan = skipping(0, exits=exits)
        got = optimize(_base("llama"), plan)(inputs_embeds=embeds, visual_mask=visual)
        assert got.exit_layer.tolist() == Oracle(shared(), plan).forward(embeds, visual).exit_layer.tolist()
        assert got.logits.shape[-1] == VOCAB
        decisions.add(int(got.exit_layer))
    assert decisions == {-1, 1}
