"""fold_adapters: each form in each phase gives the oracle's numbers, with the weights, values and products it says."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from helpers import (
    HEAD_SIZE,
    LAYERS,
    C,
    assert_close,
    captured,
    embeddings,
    nodes_of,
    positions,
    run_graph,
    shared,
    tiny,
)
from tiny_models import random_adapter
from torch import nn

from vte_compile import KeptAdapter, Oracle, Plan, SkippedAttention, folded_weights
from vte_compile.adapter_costs import Forms
from vte_compile.adapters import PIA, PlainAdapter, StaticRouter
from vte_compile.capture import capture
from vte_compile.families.decoder import describe
from vte_compile.folded_weights import FoldedWeights
from vte_compile.passes import PASSES, PassSettings, run_passes
from vte_compile.passes.annotate_layers import annotate_layers
from vte_compile.passes.fold_adapters import fold_adapters
from vte_compile.passes.skip_attention import skip_attention
from vte_compile.runtime.prompt_state import PromptState

aten = torch.ops.aten
LINEAR = aten.linear.default
FFN, PROMPT, TURN = 48, 7, 4


@dataclass(frozen=True)
class Case:
    """A pair of forms, and what it means for a PIA and for a plain adapter, in this order."""

    prompt: str
    step: str
    static: bool
    prompt_products: tuple[int, int]
    """Matrix products per token, beyond the layer without its adapter, in prefill."""
    step_products: tuple[int, int]
    """In later chunks."""
    once: tuple[int, int]
    """Products of one row, once per prompt: the router, the pool, and each bias with each expert."""
    state: tuple[str, str]
    """What prefill hands on."""


BIASES = ("bias_0 bias_1", "bias_0 bias_1 bias_2")
BLENDED = ("bias_0 bias_1 weight_0 weight_1", "bias_0 bias_1 bias_2 weight_0 weight_1 weight_2")
LOW_RANK = ("bias_0 bias_1 share", "bias_0 bias_1 bias_2 share")
CASES = {
    "constant": Case("constant", "constant", True, (0, 0), (0, 0), (3, 0), (BIASES[0], "")),
    "blended": Case("blended", "blended", False, (0, 0), (0, 0), (6, 1), BLENDED),
    "blended, low_rank": Case("blended", "low_rank", False, (0, 0), (3, 4), (6, 1), LOW_RANK),
    "low_rank": Case("low_rank", "low_rank", False, (3, 4), (3, 4), (6, 1), LOW_RANK),
    "unfolded": Case("unfolded", "unfolded", False, (3, 3), (3, 3), (4, 1), ("share shift",) * 2),
    "unfolded, static": Case("unfolded", "unfolded", True, (2, 2), (2, 2), (2, 0), ("shift", "")),
}
# Where the PIA is, and where the plain adapter is: the last layer is another case, since it computes one token only.
PLACES = {"PIA first": (0, 2), "PIA last": (2, 0)}


@functools.cache
def planned(place: str, static: bool) -> Plan:
    router = StaticRouter((0.3, 0.7)) if static else None
    pia, plain = PLACES[place]
    return Plan(
        skips=[SkippedAttention(pia, random_adapter(PIA, 1, router=router))],
        adapters=[KeptAdapter(plain, random_adapter(PlainAdapter, 2, router=router))],
    )


@pytest.fixture
def forced(monkeypatch):
    """Let every adapter take these forms."""

    def force(case: Case) -> None:
        forms = Forms(case.prompt, case.step, "because the test says so")
        monkeypatch.setattr(folded_weights, "choose_forms", lambda *args: forms)

    return force


class Run:
    """The graphs of one plan, which share their folded weights."""

    def __init__(self, plan: Plan, family: str = "llama") -> None:
        self.plan, self.family, self.folded = plan, family, FoldedWeights()

    def graph(self, phase, batched=False):
        graph = captured(phase, batched, self.family)
        settings = PassSettings(self.plan, folded=self.folded)
        results = {r.name: r for r in run_passes(PASSES, graph, settings)}
        assert (results["fold_adapters"].applied, results["fold_adapters"].refusals) == (2, [])
        assert (results["skip_attention"].applied, results["skip_attention"].refusals) == (1, [])
        return graph

    def prefill(self, graph, embeds):
        """Logits, keys and values, and what is known of the prompt."""
        out = run_graph(graph, embeds, positions(embeds.shape[1]))
        return out[0], out[1 : 1 + 2 * (LAYERS - 1)], out[1 + 2 * (LAYERS - 1) :]


@functools.cache
def without_adapters(phase, batched, place):
    """The same graph with the attention skipped and no adapter: the matrix products of its tokens."""
    graph = captured(phase, batched)
    run_passes(PASSES, graph, PassSettings(Plan(skips=[SkippedAttention(PLACES[place][0])])))
    return products(graph)[0]


def products(graph) -> tuple[int, int]:
    """aten.linear of tokens, and of one row alone."""
    linears = nodes_of(graph, LINEAR)
    of_tokens = [n for n in linears if n.meta["val"].ndim == 3]
    return len(of_tokens), len(linears) - len(of_tokens)


def shape_of(value: str, pia: bool) -> list[int]:
    """Of one row's value; behind a plain adapter, q has as many channels as the model, k and v have two heads."""
    kind, _, index = value.partition("_")
    if kind in ("share", "shift"):
        return [1, 1] if kind == "share" else [1, C]
    outputs = ([FFN, FFN] if pia else [C, 2 * HEAD_SIZE, 2 * HEAD_SIZE])[int(index)]
    return [outputs, C] if kind == "weight" else [1, outputs]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CASES)
def test_every_form_in_every_phase(name, place, forced):
    case, plan = CASES[name], planned(place, CASES[name].static)
    forced(case)
    run, oracle = Run(plan), Oracle(shared(), plan)
    layers = PLACES[place]
    state_names = [
        f"prompt_{layer}_{value}"
        for layer, pia in sorted(zip(layers, (True, False), strict=True))
        for value in case.state[0 if pia else 1].split()
    ]
    # Of two prompts, unless the weights are those of one.
    prompts = [embeddings(PROMPT, seed=seed) for seed in ((0, 0) if case.step == "blended" else (0, 1))]

    graph = run.graph("prefill")
    assert [v.name for v in graph.prompt_state] == state_names
    assert [v.per_row for v in graph.prompt_state] == ["weight" not in n for n in state_names]
    base = without_adapters("prefill", False, place)
    assert products(graph) == (base + sum(case.prompt_products), sum(case.once))
    check_weights(graph, run.folded, layers, case.prompt)
    rows = [run.prefill(graph, embeds) for embeds in prompts]
    want = oracle.forward(torch.cat(prompts))
    assert_close(torch.cat([row[0] for row in rows])[:, 0], want.logits[:, -1])
    for b, (_, kv, state) in enumerate(rows):
        assert len(state) == len(state_names)
        for value, wanted in zip(state, state_names, strict=True):
            _, layer, name_of_value = wanted.split("_", 2)
            assert list(value.shape) == shape_of(name_of_value, int(layer) == layers[0])
        cached = [t for pair in want.cache.rows[b].layers if pair is not None for t in pair]
        assert_close(kv, cached)

    for phase, batched in (("extend", False), ("decode", False), ("decode", True)):
        graph = run.graph(phase, batched)
        assert [v.name for v in graph.prompt_state] == state_names
        placeholders = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
        assert placeholders[len(placeholders) - len(state_names) :] == state_names
        base = without_adapters(phase, batched, place)
        assert products(graph) == (base + sum(case.step_products), 0)
        check_weights(graph, run.folded, layers, case.step)
        tokens, batch = (TURN if phase == "extend" else 1), (2 if batched else 1)
        new = embeddings(tokens, batch, seed=5)
        past = [torch.cat(parts) for parts in zip(*(row[1] for row in rows[:batch]), strict=True)]
        starts = [torch.zeros(batch, dtype=torch.long)] * ((LAYERS - 1) * batched)
        known = PromptState.of_rows(graph.prompt_state, [row[2] for row in rows[:batch]], one_prompt=True).values
        out = run_graph(graph, new, positions(tokens, PROMPT).expand(batch, -1), *past, *starts, *known)
        cache = type(want.cache)(want.cache.rows[:batch])
        expected = oracle.forward(new, cache=cache)
        assert_close(out[0][:, -1], expected.logits[:, -1])
        cached = [[t for pair in row.layers if pair is not None for t in pair] for row in expected.cache.rows]
        assert_close(out[1:], [torch.cat(parts) for parts in zip(*cached, strict=True)])


def check_weights(graph, folded, layers, form) -> None:
    """The graph reads the folded weights and not those they were folded from; unfolded, those of the layers."""
    names = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    assert names == set(graph.parameters)
    for name in (n for n in names if n.startswith("folded_")):
        _, layer, weight = name.split("_", 2)
        assert graph.parameters[name]() is folded.get_submodule(f"layer_{layer}").get_parameter(weight)
    pia, plain = (f"decoder.layers.{layer}." for layer in layers)
    original = {f"{pia}mlp.gate_proj.weight", f"{pia}mlp.up_proj.weight"}
    original |= {f"{plain}self_attn.{n}_proj.weight" for n in "qkv"}
    assert names & original == (original if form == "unfolded" else set())
    # A skipped block has one norm, the first.
    assert f"{pia}input_layernorm.weight" in names
    assert f"{pia}post_attention_layernorm.weight" not in names
    assert not [n for n in names if n.startswith(f"{pia}self_attn.")]
    assert {f"{plain}{n}.weight" for n in ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj")} <= names


@pytest.mark.parametrize("name", ["constant", "blended", "unfolded"])
@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_families(family, name, forced):
    """Own biases of q, k and v; norms that multiply by 1 + weight, and one head of keys and values."""
    case, plan = CASES[name], planned("PIA first", CASES[name].static)
    forced(case)
    run, oracle = Run(plan, family), Oracle(shared(family), plan)
    embeds, token = embeddings(PROMPT), embeddings(1, seed=5)
    graph = run.graph("prefill")
    logits, kv, state = run.prefill(graph, embeds)
    want = oracle.forward(embeds)
    assert_close(logits[:, -1], want.logits[:, -1])
    biases = {n for n in graph.parameters if n.startswith("decoder.layers.2.self_attn.") and n.endswith("bias")}
    assert len(biases) == (3 if family == "qwen2" and name == "unfolded" else 0)
    out = run_graph(run.graph("decode"), token, positions(1, PROMPT), *kv, *state)
    assert_close(out[0][:, -1], oracle.forward(token, cache=want.cache).logits[:, -1])


# ---------------------------------------------------------------- folded weights


def test_weights_are_folded_once(forced):
    """By whichever graph comes first, in whatever forms the others take; the report says what they are."""
    case = CASES["blended, low_rank"]
    forced(case)
    run = Run(planned("PIA first", False))
    run.graph("prefill")
    reports, weights = dict(run.folded.reports), dict(run.folded.named_parameters())
    run.graph("decode", True)
    assert run.folded.reports == reports
    assert all(weights[name] is value for name, value in run.folded.named_parameters())
    assert [(r.layer, r.kind) for r in reports.values()] == [(0, "PIA"), (2, "PlainAdapter")]
    for layer, report in reports.items():
        assert report.one_prompt == report.many_prompts == Forms("blended", "low_rank", "because the test says so")
        assert 0 < report.rounding_error < 1e-7
        held = run.folded.get_submodule(f"layer_{layer}").parameters()
        assert report.added_bytes == sum(p.nbytes for p in held)
    assert not any(p.requires_grad for p in weights.values())


@pytest.mark.parametrize("one_prompt", [True, False])
def test_forms_depend_on_whether_rows_share_their_prompt(one_prompt, monkeypatch):
    def choose(sizes, device, dtype, one):
        return Forms("blended", "blended", "one") if one else Forms("low_rank", "low_rank", "many")

    monkeypatch.setattr(folded_weights, "choose_forms", choose)
    graph = captured()
    run_passes(PASSES, graph, PassSettings(planned("PIA first", False), one_prompt=one_prompt))
    assert ("prompt_0_weight_0" in {v.name for v in graph.prompt_state}) == one_prompt
    assert ("prompt_0_share" in {v.name for v in graph.prompt_state}) != one_prompt


def test_fold_false_leaves_adapters_in_front_of_own_weights():
    folded = FoldedWeights(fold=False)
    plan = planned("PIA first", False)
    graph = captured()
    run_passes(PASSES, graph, PassSettings(plan, folded=folded))
    assert {(f.prompt, f.step, f.reason) for r in folded.reports.values() for f in (r.one_prompt, r.many_prompts)} == {
        ("unfolded", "unfolded", "fold=False")
    }
    assert "decoder.layers.0.mlp.gate_proj.weight" in graph.parameters
    # The adapter's own factors alone, not those of the layers behind it.
    assert not [n for n, _ in folded.named_parameters() if n.split(".")[1].startswith(("base", "factor", "const"))]


def test_without_adapters_nothing_changes():
    graph = captured()
    plan = Plan(skips=[SkippedAttention(1)])
    annotate_layers(graph, PassSettings(plan))
    before = [n.format_node() for n in graph.graph.nodes]
    result = fold_adapters(graph, PassSettings(plan))
    assert (result.applied, result.refusals) == (0, [])
    assert [n.format_node() for n in graph.graph.nodes] == before
    assert graph.prompt_state == []


# ---------------------------------------------------------------- weights that are computed


class Int8Linear(nn.Module):
    """Weight-only quantization as many libraries do it: codes times a scale per output, at every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale)


def test_computed_weights_stay_unfolded():
    """Of all layers behind the PIA, and of one of the three behind the plain adapter."""
    model = tiny()
    mlp, attention = model.model.layers[0].mlp, model.model.layers[2].self_attn
    mlp.gate_proj, mlp.up_proj = Int8Linear(mlp.gate_proj), Int8Linear(mlp.up_proj)
    attention.k_proj = Int8Linear(attention.k_proj)
    folded, plan = FoldedWeights(), planned("PIA first", True)
    graph = capture(describe(model), "prefill")
    results = {r.name: r for r in run_passes(PASSES, graph, PassSettings(plan, folded=folded))}
    assert (results["fold_adapters"].applied, results["fold_adapters"].refusals) == (2, [])
    for report in folded.reports.values():
        assert (report.one_prompt.prompt, report.one_prompt.step) == ("unfolded", "unfolded")
        assert report.one_prompt.reason == "the layers behind it have no plain weights to fold into"
    assert {n for n in graph.parameters if n.endswith("codes")} == {
        "decoder.layers.0.mlp.gate_proj.codes",
        "decoder.layers.0.mlp.up_proj.codes",
        "decoder.layers.2.self_attn.k_proj.codes",
    }
    embeds = embeddings(PROMPT)
    logits = run_graph(graph, embeds, positions(PROMPT))[0]
    assert_close(logits[:, -1], Oracle(model, plan).forward(embeds).logits[:, -1])


# ---------------------------------------------------------------- refusals


def test_refuses_where_the_site_is_not_what_it_should_be():
    """Something else reads what the attention reads. The attention then stays too: there is nothing in its place."""
    graph, plan = captured(), planned("PIA first", False)
    annotate_layers(graph, PassSettings(plan))
    source = nodes_of(graph, LINEAR)[0].args[0]
    with graph.graph.inserting_after(source):
        spy = graph.graph.call_function(aten.neg.default, (source,))
    spy.meta["val"], graph.layer_of[spy] = source.meta["val"], 0
    output = next(n for n in graph.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], spy),)
    settings = PassSettings(plan)
    before = len(nodes_of(graph, LINEAR))
    result = fold_adapters(graph, settings)
    assert result.applied == 1
    assert [(r.layer, r.reason) for r in result.refusals] == [
        (0, f"{spy.name} reads the attention's input besides q, k and v.")
    ]
    assert graph.adapted == set(settings.folded.reports) == {2}
    assert len(nodes_of(graph, LINEAR)) > before
    skipped = skip_attention(graph, settings)
    assert skipped.applied == 0
    assert [(r.layer, r.reason) for r in skipped.refusals] == [(0, "its adapter could not be put into the graph.")]
