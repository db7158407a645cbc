"""Captured graphs against Hugging Face where all layers hold equally much, and against the oracle where they do not."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    LAYERS,
    assert_close,
    captured,
    embeddings,
    nodes_of,
    plan,
    positions,
    random_kv,
    row_cache,
    run_graph,
    shared,
    tiny,
)
from torch import nn
from transformers import DynamicCache

from vte_compile.capture import capture
from vte_compile.capture.model_state import evaluating
from vte_compile.errors import CaptureError
from vte_compile.families.cache_name import CACHE
from vte_compile.families.decoder import describe
from vte_compile.kernels.append_attention import append_attention
from vte_compile.oracle import Oracle, OracleCache

SMALL = dict(num_hidden_layers=2)
FAMILIES = [
    pytest.param("llama", {}, id="llama-gqa"),
    pytest.param("qwen2", SMALL, id="qwen2-bias"),
    pytest.param("mistral", SMALL, id="mistral-no-window"),
    pytest.param("gemma", SMALL, id="gemma-mqa-tied"),
]


def hugging_face(model, embeds, position_ids, past=()):
    """[logits, key_0, value_0, ...] by the model's own forward."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
        cache.update(keys, values, layer)
    with torch.no_grad():
        out = model(inputs_embeds=embeds, position_ids=position_ids, past_key_values=cache, use_cache=True)
    return [out.logits, *[t for layer in cache.layers for t in (layer.keys, layer.values)]]


def by_oracle(model, embeds, past, start):
    """The same for one row whose layers may hold differently much."""
    cache = OracleCache((row_cache(past, start),))
    out = Oracle(model, plan()).forward(embeds, cache=cache)
    return [out.logits, *[t for layer in out.cache.rows[0].layers for t in layer]]


def input_names(graph):
    return [node.name for node in graph.graph.nodes if node.op == "placeholder"]


# ---------------------------------------------------------------- numerics


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_prefill(family, options):
    graph, model = captured("prefill", family=family, **options), shared(family, **options)
    assert input_names(graph) == ["inputs_embeds", "position_ids"]
    for length in (2, 3, 11, 23):  # 11 is the length it was traced with
        args = embeddings(length, seed=length), positions(length)
        got = run_graph(graph, *args)
        assert_close(got, hugging_face(model, *args))
        assert all(t.is_contiguous() for t in got[1:])
    # Positions are what is passed, not counted: those behind an exit have holes.
    args = embeddings(5), torch.tensor([[0, 1, 6, 7, 40]])
    with_holes = run_graph(graph, *args)
    assert_close(with_holes, hugging_face(model, *args))
    assert not torch.allclose(with_holes[0], run_graph(graph, args[0], positions(5))[0], atol=1e-3)


@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 4, 6), (2, 9, 2), (17, 18, 19)], ids=str)
@pytest.mark.parametrize("tokens", [2, 5])
def test_extend(lengths, tokens):
    graph, model = captured("extend"), shared()
    assert input_names(graph)[2:] == [f"past_{kind}_{i}" for i in range(LAYERS) for kind in ("key", "value")]
    past, embeds = random_kv(lengths), embeddings(tokens)
    got = run_graph(graph, embeds, positions(tokens, 20), *past)
    assert [t.shape[2] for t in got[1::2]] == [t.shape[2] for t in got[2::2]] == [n + tokens for n in lengths]
    assert_close(got, by_oracle(model, embeds, past, 20))
    if len(set(lengths)) == 1:
        assert_close(got, hugging_face(model, embeds, positions(tokens, 20), past))


@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 4, 6), (2, 1, 30)], ids=str)
def test_decode_one_row(lengths):
    graph, model = captured("decode"), shared()
    assert input_names(graph)[2:] == [f"past_{kind}_{i}" for i in range(LAYERS) for kind in ("key", "value")]
    past, embeds = random_kv(lengths), embeddings(1)
    got = run_graph(graph, embeds, positions(1, 20), *past)
    assert_close(got, by_oracle(model, embeds, past, 20))
    assert_close(got, hugging_face(model, embeds, positions(1, 20), past))  # one token: the model makes no mask either
    # One op a layer appends and attends, to rows that begin at 0; nothing is left of the model's own ways to do so.
    attentions = nodes_of(graph, append_attention._opoverload)
    assert [[n.name for n in attention.args[3:5]] for attention in attentions] == [
        [f"past_key_{i}", f"past_value_{i}"] for i in range(LAYERS)
    ]
    assert all(attention.args[5] is None for attention in attentions)
    assert not nodes_of(graph, torch.ops.aten.scaled_dot_product_attention.default)


@pytest.mark.parametrize("batch", [2, 3, 5])
def test_decode_batch(batch):
    """Rows aligned at the end, each with its own start in each layer; what lies before is never seen."""
    graph, model = captured("decode", batched=True), shared()
    assert input_names(graph)[-LAYERS:] == [f"kv_start_{i}" for i in range(LAYERS)]
    columns = (12, 7, 9)
    generator = torch.Generator().manual_seed(batch)
    starts = [torch.randint(0, columns[i], (batch,), generator=generator) for i in range(LAYERS)]
    starts[0][0] = 0
    assert len({tuple(s.tolist()) for s in starts}) > 1
    past, embeds = random_kv(columns, batch), embeddings(1, batch)
    poisoned = [t.clone() for t in past]
    for i, t in enumerate(poisoned):
        for row, start in zip(t, starts[i // 2], strict=True):
            row[:, : int(start)] = 1e4
    where = torch.arange(20, 20 + batch)[:, None]
    got = run_graph(graph, embeds, where, *poisoned, *starts)
    for b in range(batch):
        own = [t[b : b + 1, :, int(starts[i // 2][b]) :] for i, t in enumerate(past)]
        want = by_oracle(model, embeds[b : b + 1], own, 20 + b)
        assert_close(got[0][b], want[0][0])
        for i, t in enumerate(got[1:]):
            assert_close(t[b : b + 1, :, int(starts[i // 2][b]) :], want[1 + i])


@pytest.mark.parametrize(
    ("family", "options", "phase"),
    [
        ("qwen2", SMALL, "decode"),
        ("mistral", SMALL, "extend"),
        ("gemma", SMALL, "decode"),
    ],
)
def test_other_families_continue(family, options, phase):
    graph, model = captured(phase, family=family, **options), shared(family, **options)
    tokens, heads = (1 if phase == "decode" else 4), model.config.num_key_value_heads
    for lengths in ((8, 8), (8, 3)):
        past, embeds = random_kv(lengths, heads=heads), embeddings(tokens)
        got = run_graph(graph, embeds, positions(tokens, 20), *past)
        assert_close(got, by_oracle(model, embeds, past, 20))
        if len(set(lengths)) == 1:
            assert_close(got, hugging_face(model, embeds, positions(tokens, 20), past))


def test_gemma_scales_embeddings_as_the_model_itself_does():
    """Where a family scales its embeddings, in the lookup or in the decoder, is in the graph exactly if it is there."""
    model = shared("gemma", **SMALL)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        want = model(input_ids=ids).logits
        embeds = model.get_input_embeddings()(ids)
    assert_close(run_graph(captured("prefill", family="gemma", **SMALL), embeds, positions(5))[0], want)


def test_dtype_of_the_weights_is_kept():
    model = tiny(num_hidden_layers=1).bfloat16()
    args = embeddings(7, dtype=torch.bfloat16), positions(7)
    got = run_graph(capture(describe(model), "prefill"), *args)
    assert {t.dtype for t in got} == {torch.bfloat16}
    assert_close(got, hugging_face(model, *args), 2e-2)


# ---------------------------------------------------------------- what a graph holds


def test_lengths_stay_symbolic():
    for phase, batched in (("prefill", False), ("extend", False), ("decode", False), ("decode", True)):
        graph = captured(phase, batched)
        assert (graph.phase, graph.batched) == (phase, batched)
        sizes = {n.name: n.meta["val"].shape for n in graph.graph.nodes if n.op == "placeholder"}
        embeds = sizes.pop("inputs_embeds")
        assert sizes.pop("position_ids") == embeds[:2]
        assert [isinstance(s, torch.SymInt) for s in embeds] == [batched, phase != "decode", False]
        past = [shape for name, shape in sizes.items() if name.startswith("past_")]
        assert len(past) == (0 if phase == "prefill" else 2 * LAYERS)
        assert all(isinstance(shape[2], torch.SymInt) for shape in past)
        assert len({shape[2].node.expr for shape in past[::2]}) == len(past[::2])  # each layer has its own
        assert {shape[0] == embeds[0] for shape in past} <= {True}


def test_weights_are_referred_to():
    model = tiny(num_hidden_layers=2)
    graph = capture(describe(model), "prefill")
    args = embeddings(4), positions(4)
    before = run_graph(graph, *args)
    own = dict(model.named_parameters())
    assert {id(read()) for read in graph.parameters.values()} >= {
        id(p) for name, p in own.items() if "embed_tokens" not in name
    }
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1.5)
    after = run_graph(graph, *args)
    assert torch.equal(after[2], before[2])  # values of layer 0
    assert_close(after[4], 1.5 * before[4])  # and of layer 1
    assert_close(after, hugging_face(model, *args))
    # Whatever replaces a tensor later is found too.
    target = next(name for name in graph.parameters if name.endswith("q_proj.weight"))
    replacement = torch.nn.Parameter(torch.ones_like(model.model.layers[0].self_attn.q_proj.weight))
    model.model.layers[0].self_attn.q_proj.weight = replacement
    assert graph.parameters[target]() is replacement
    model.double()
    assert graph.parameters[target]().dtype == torch.float64
    inverse = next(name for name in graph.parameters if name.endswith("rotary_emb.inv_freq"))
    assert graph.parameters[inverse]() is model.model.rotary_emb.inv_freq


def test_weights_that_are_no_parameters_any_more_are_read_too():
    """A parametrization takes a weight's name away from its module's parameters."""
    model = tiny("llama")
    graph = capture(describe(model), "decode")
    [name] = [target for target in graph.parameters if target.endswith("layers.1.mlp.up_proj.weight")]
    module, before = model.model.layers[1].mlp.up_proj, graph.parameters[name]()
    assert before is module.weight

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
    assert torch.equal(graph.parameters[name](), 2 * before)


def test_clone_is_independent():
    graph = captured()
    clone = graph.clone()
    count = len(clone.graph.nodes)
    clone.graph.output_node().args = (clone.graph.output_node().args[0][:1],)
    clone.graph.eliminate_dead_code()
    clone.parameters.clear()
    assert len(clone.graph.nodes) < count == len(graph.graph.nodes)
    assert graph.parameters
    assert len(run_graph(graph, embeddings(3), positions(3))) == 1 + 2 * LAYERS
    assert len(run_graph(clone, embeddings(3), positions(3))) == 1
    assert clone.placeholder("position_ids").name == "position_ids"


# ---------------------------------------------------------------- the model stays as it was


def traces_of(model):
    config = copy.deepcopy(model.config.to_dict())
    return (
        config,
        model.config._attn_implementation,
        [m.training for m in model.modules()],
        copy.deepcopy(model.state_dict()),
    )


def assert_untouched(model, before):
    after = traces_of(model)
    assert after[:3] == before[:3]
    assert after[3].keys() == before[3].keys()
    assert all(torch.equal(after[3][key], value) for key, value in before[3].items())


def test_model_is_untouched():
    model = tiny(num_hidden_layers=1, attn_implementation="eager", attention_dropout=0.5)
    model.train()
    model.model.layers[0].mlp.eval()  # a mixture, which train() and eval() could not bring back
    before = traces_of(model)
    assert len(set(before[2])) == 2
    graphs = [capture(describe(model), phase) for phase in ("prefill", "extend")]
    assert_untouched(model, before)
    args = embeddings(5), positions(5)
    dropless = hugging_face(tiny(num_hidden_layers=1), *args)
    assert_close(run_graph(graphs[0], *args), dropless)  # traced in eval mode, by sdpa


def untraceable(model):
    """A layer that decides by its values, which no trace can follow."""
    layer = model.model.layers[0]
    inner = layer.mlp.forward
    layer.mlp.forward = lambda x: inner(x) if float(x.sum()) > 0 else -inner(x)
    return model


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_untraceable_model_is_refused_with_the_reason(phase):
    model = untraceable(tiny(num_hidden_layers=1).train())
    before = traces_of(model)
    with pytest.raises(CaptureError, match=f"could not trace the {phase} of LlamaModel: ") as refused:
        capture(describe(model), phase)
    assert refused.value.__cause__ is not None
    assert_untouched(model, before)


def test_attention_that_is_not_plain_is_refused_by_layer():
    model = tiny(num_hidden_layers=2)
    attention = model.model.layers[1].self_attn
    inner = attention.forward
    attention.forward = lambda *args, **kwargs: inner(*args, **kwargs, s_aux=torch.zeros(4))
    with pytest.raises(CaptureError, match="layer 1: attention with s_aux is not supported yet"):
        capture(describe(model), "decode")
    assert model.config._attn_implementation == "sdpa"


def test_keys_that_change_behind_the_cache_are_refused():
    """Decode appends what the cache was given, and attends to that."""
    model = tiny(num_hidden_layers=2)
    attention = model.model.layers[1].self_attn

    def forward(*args, **kwargs):
        cache = kwargs[CACHE]

        class Scaled:
            def update(self, *new, **kwargs):
                keys, values = cache.update(*new, **kwargs)
                return 2 * keys, values

        return type(attention).forward(attention, *args, **{**kwargs, CACHE: Scaled()})

    attention.forward = forward
    with pytest.raises(CaptureError, match="layer 1: keys or values change between cache and attention"):
        capture(describe(model), "decode")


def test_only_decode_is_batched():
    for phase in ("prefill", "extend"):
        with pytest.raises(ValueError, match="one row at a time"):
            capture(describe(shared()), phase, batched=True)


def test_evaluating_restores_after_an_error():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(1, 1).eval())

    def fail():
        with evaluating(model):
            assert not any(m.training for m in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [m.training for m in model.modules()] == [True, True, False]
