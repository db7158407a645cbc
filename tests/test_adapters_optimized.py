"""optimize() with skipped attentions and adapters: the oracle's numbers from every door, and the weights that are left.

What is rewritten is traced anew for each set of skips and adapters once their weights are freed. Where numbers alone
matter, the tests rewrite what was traced before (`unfreed`); the others go through optimize() as it is.
"""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ALWAYS, LAYERS, NEVER, C, captured, gate, shared
from helpers import tiny as tiny_decoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_generate import slow_beams
from tiny_models import (
    DATA,
    TINY,
    assert_relative,
    chunk,
    image_prompt,
    one_thread,  # noqa: F401
    plan,
    random_adapter,
    shared_model,
    to_float64,
)
from torch import nn
from transformers import DynamicCache, GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from vte_compile import KeptAdapter, Oracle, Plan, SkippedAttention, StaticExit, optimize, optimizer
from vte_compile.adapter_costs import Forms
from vte_compile.adapters import PIA, PlainAdapter, StaticRouter
from vte_compile.errors import InputError, PlanError, PlanMismatchError, UnsupportedModelError
from vte_compile.fingerprint import Fingerprint
from vte_compile.oracle import OracleCache, embed
from vte_compile.runtime.decoder_runner import DecoderRunner
from vte_compile.runtime.exit_cache import ExitCache

NAMES = ("inputs_embeds", "visual_mask", "attention_mask")
GREEDY = dict(do_sample=False, max_new_tokens=4, pad_token_id=0)


def skip(layer: int, **options) -> SkippedAttention:
    return SkippedAttention(layer, random_adapter(PIA, layer, **options))


def kept(layer: int, **options) -> KeptAdapter:
    return KeptAdapter(layer, random_adapter(PlainAdapter, 10 + layer, **options))


STATIC = {"router": StaticRouter((0.3, 0.7))}
# The same objects each time: only with those can a plan be changed once weights are freed.
PARTS = (skip(0), kept(1))


def inputs_of(*layouts: str, seed: int = 0) -> dict:
    return dict(zip(NAMES, chunk(*layouts, seed=seed), strict=True))


def equal_rows(inputs: dict, count: int) -> dict:
    """The first row, several times."""
    return {name: value[:1].expand(count, *value.shape[1:]).contiguous() for name, value in inputs.items()}


@functools.cache
def lossless(family: str = "llama", **options):
    """One model for all plans, of which most is traced by the tests of the passes already."""
    model = shared(family, **options)
    model.generation_config.eos_token_id = None
    fast = optimize(model, Plan(), compile=False)
    if not options:
        for phase, batched in (("extend", False), ("decode", False), ("decode", True)):
            where = (fast._vte_spec.dtype, fast._vte_spec.device)
            fast._vte_runner._captures[(phase, batched, *where)] = captured(phase, batched, family)
    return fast


def unfreed(fast, changed: Plan, fold: bool = True):
    """optimize() of an optimized model, without taking away the weights that are not read any more."""
    with mock.patch.object(optimizer, "_free", lambda fast: fast):
        return optimize(fast, changed, fold=fold)


@functools.cache
def main():
    """A PIA and a plain adapter, as optimize() gives it."""
    return optimize(lossless(), plan(*PARTS))


@functools.cache
def with_exits(*exits):
    return optimize(main(), plan(*exits, *PARTS))


def assert_cache(cache: ExitCache, want: OracleCache, tolerance: float = 1e-5) -> None:
    assert cache.lengths.T.tolist() == want.lengths()
    assert cache.next_positions.tolist() == want.next_positions()
    for b, row in enumerate(want.rows):
        for ours, theirs in zip(cache.row(b), row.layers, strict=True):
            assert (ours is None) == (theirs is None)
            for a, b_ in zip(ours or (), theirs or (), strict=True):
                assert_relative(a, b_, tolerance)


def assert_same(fast, oracle: Oracle, inputs: dict, cache=None, known=None):
    """One chunk of both: logits, exits, caches."""
    out = fast(**inputs, past_key_values=cache)
    want = oracle.forward(*[inputs.get(name) for name in NAMES], cache=known)
    assert out.exit_layer.tolist() == want.exit_layer.tolist()
    assert_relative(out.logits, want.logits)
    assert_cache(out.past_key_values, want.cache)
    return out.past_key_values, want.cache


# ---------------------------------------------------------------- the oracle's numbers

MADE = {
    "own": lambda layer: [],
    "free": lambda layer: [SkippedAttention(layer)],
    "PIA": lambda layer: [skip(layer)],
    "static PIA": lambda layer: [skip(layer, **STATIC)],
    "plain": lambda layer: [kept(layer)],
    "static plain": lambda layer: [kept(layer, **STATIC)],
}
EXITS = {"none": [], "never": [gate(1, NEVER)]}
EXITS |= {f"gate {layer}": [gate(layer, ALWAYS)] for layer in range(LAYERS)}


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    forms=st.tuples(*[st.sampled_from(list(MADE))] * LAYERS),
    exits=st.sampled_from(list(EXITS)),
    fold=st.booleans(),
    rows=st.lists(st.text("tv", min_size=1, max_size=6).map(lambda s: s + "t"), min_size=1, max_size=3),
    copies=st.booleans(),
    left=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_oracle(forms, exits, fold, rows, copies, left, seed):
    """Prefill, a second turn, a decode step on top; and generate()."""
    parts = [part for layer, form in enumerate(forms) for part in MADE[form](layer)]
    changed = plan(*EXITS[exits], *parts)
    fast, oracle = unfreed(lossless(), changed, fold), Oracle(shared(), changed)
    width = max(map(len, rows))
    first = inputs_of(*[r.rjust(width, ".") if left else r.ljust(width, ".") for r in rows], seed=seed)
    first = equal_rows(first, len(rows)) if copies else first
    caches = assert_same(fast, oracle, first)
    caches = assert_same(fast, oracle, inputs_of(*["tvt"] * len(rows), seed=seed + 1), *caches)
    assert_same(fast, oracle, inputs_of(*["t"] * len(rows), seed=seed + 2), *caches)
    tokens = fast.generate(**first, **GREEDY)
    assert tokens.tolist() == oracle.generate(*first.values(), max_new_tokens=4).tokens


@pytest.mark.parametrize("heads", [4, 1])
def test_heads(heads):
    """As many heads of keys and values as of queries, and one."""
    options, changed = dict(num_hidden_layers=1, num_key_value_heads=heads), plan(kept(0))
    fast, oracle = unfreed(lossless(**options), changed), Oracle(shared(**options), changed)
    caches = assert_same(fast, oracle, inputs_of("ttvvt", ".tttt"))
    assert caches[0].layers[0].keys.shape[1] == heads
    assert_same(fast, oracle, inputs_of("t", "t", seed=1), *caches)


@pytest.mark.parametrize("rows", [["tvvttt", "tttttt"], ["..vvtt", "tvtvtt", ".ttttt"]])
def test_after_freeing(rows):
    """The same through optimize() as it is: traced anew, without the weights that were freed."""
    fast, oracle = main(), Oracle(shared(), plan(*PARTS))
    caches = assert_same(fast, oracle, inputs_of(*rows))
    caches = assert_same(fast, oracle, inputs_of(*["tt"] * len(rows), seed=1), *caches)
    assert_same(fast, oracle, inputs_of(*["t"] * len(rows), seed=2), *caches)
    inputs = inputs_of(*rows, seed=3)
    assert fast.generate(**inputs, **GREEDY).tolist() == oracle.generate(*inputs.values(), max_new_tokens=4).tokens
    freed = {f"decoder.{name}" for name in fast._vte_spec.freed}
    lowered = [graph for graph, _ in fast._vte_runner._graphs.values()]
    assert len(lowered) >= 4
    assert all(graph.weights and not graph.weights & freed for graph in lowered)


def test_gates_read_behind_adapters():
    """Their decisions are the oracle's, and not all the same."""
    exits, decisions = gate(1), set()
    fast, oracle = with_exits(exits), Oracle(shared(), plan(exits, *PARTS))
    for seed in range(8):
        inputs = inputs_of("tvvvttt", seed=seed)
        want = oracle.forward(*inputs.values())
        z = want.gate_logits[1][0]
        assert abs(float(z[1] - z[0])) > 1e-3
        got = fast(**inputs)
        assert got.exit_layer.tolist() == want.exit_layer.tolist()
        assert_relative(got.logits, want.logits)
        decisions.add(int(got.exit_layer))
    assert decisions == {-1, 1}


def test_means_are_of_the_prompt():
    """A later turn does not change what adapters know, and another prompt of the same length does."""
    fast = main()
    cache = fast(**inputs_of("tvvtt")).past_key_values
    before = [value.clone() for value in cache.prompt_state.values]
    fast(**inputs_of("tvvt", seed=1), past_key_values=cache)
    fast(**inputs_of("t", seed=2), past_key_values=cache)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.prompt_state.values, strict=True))
    other = fast(**inputs_of("tvvtt", seed=9)).past_key_values
    assert not any(torch.equal(a, b) for a, b in zip(before, other.prompt_state.values, strict=True))


# ---------------------------------------------------------------- rows


def test_rows_are_what_they_are_alone():
    """Alone they are blended; together each is routed by its own."""
    fast = with_exits(gate(0, ALWAYS))
    rows = ["..tvvtt", "vvttttt", "tttt..."]
    together = fast(**inputs_of(*rows))
    tokens = fast.generate(**inputs_of(*rows), **GREEDY)
    inputs = inputs_of(*rows)
    for b, row in enumerate(rows):
        columns = [i for i, cell in enumerate(row) if cell != "."]
        own = {name: value[b : b + 1, columns] for name, value in inputs.items()}
        alone = fast(**own)
        assert alone.exit_layer.tolist() == [together.exit_layer[b]]
        assert_relative(together.logits[b, columns], alone.logits[0])
        assert tokens[b].tolist() == fast.generate(**own, **GREEDY)[0].tolist()
    assert together.exit_layer.tolist() == [0, 0, -1]


def test_equal_prompts_share_the_blended_weights(monkeypatch):
    calls = []
    row = DecoderRunner._row
    monkeypatch.setattr(DecoderRunner, "_row", lambda self, *args: calls.append(1) or row(self, *args))
    fast = main()
    inputs = inputs_of("tvvtt")
    alone, copies = fast(**inputs), fast(**equal_rows(inputs, 3))
    assert len(calls) == 2
    assert torch.equal(copies.logits, alone.logits.expand(3, -1, -1))
    one, state = alone.past_key_values.prompt_state, copies.past_key_values.prompt_state
    assert state.one_prompt
    assert {kind.name for kind in state.kinds if not kind.per_row} == {
        *(f"prompt_0_weight_{i}" for i in range(2)),
        *(f"prompt_1_weight_{i}" for i in range(3)),
    }
    for kind, value, own in zip(state.kinds, state.values, one.values, strict=True):
        assert value.shape == (torch.Size([3, *own.shape[1:]]) if kind.per_row else own.shape)
    different = fast(**inputs_of("tvvtt", "tvvtt")).past_key_values.prompt_state
    assert not different.one_prompt
    assert all(kind.per_row and len(value) == 2 for kind, value in zip(different.kinds, different.values, strict=True))
    # Three equal prompts, and then different tokens: each row goes its own way with the shared weights.
    token = inputs_of("t", "t", "t", seed=4)
    cache = copies.past_key_values
    out = fast(**token, past_key_values=cache)
    for b in range(3):
        own = fast(**{n: v[b : b + 1] for n, v in token.items()}, past_key_values=copy.deepcopy(alone.past_key_values))
        assert_relative(out.logits[b], own.logits[0])


@pytest.mark.parametrize("rows", [["tvvttt"], ["..tvtt", "tvvttt"]], ids=["one prompt", "two"])
def test_beams(rows):
    """Each row's are those of a slow search by the oracle, whether or not all beams come from one prompt."""
    exits, inputs = gate(0, ALWAYS), inputs_of(*rows)
    fast, oracle = with_exits(exits), Oracle(shared(), plan(exits, *PARTS))
    out = fast.generate(
        **inputs,
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=3,
        length_penalty=0.0,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert out.past_key_values.prompt_state.one_prompt == (len(rows) == 1)
    for b in range(len(rows)):
        real = inputs["attention_mask"][b]
        row = (inputs["inputs_embeds"][b : b + 1, real], inputs["visual_mask"][b : b + 1, real])
        for i, (score, tokens) in enumerate(slow_beams(oracle, row, 3, 3)[:2]):
            assert out.sequences[2 * b + i].tolist() == tokens
            assert abs(float(out.sequences_scores[2 * b + i]) - score) < 1e-4
    assert out.exit_layer.tolist() == [0] * 2 * len(rows)


def test_samples_of_one_prompt():
    fast, inputs = main(), inputs_of("tvvtt")
    torch.manual_seed(0)
    out = fast.generate(
        **inputs,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert out.past_key_values.prompt_state.one_prompt
    assert len({tuple(row) for row in out.sequences.tolist()}) == 3
    oracle, table = Oracle(shared(), plan(*PARTS)), shared().get_input_embeddings().weight.detach()
    for b, row in enumerate(out.sequences):
        want = oracle.forward(*inputs.values())
        for step, token in enumerate(row):
            assert_relative(out.logits[step][b], want.logits[0, -1])
            want = oracle.forward(table[token][None, None], cache=want.cache)


# ---------------------------------------------------------------- caches


def of_two_prompts():
    """Caches of ours and of the oracle."""
    return assert_same(main(), Oracle(shared(), plan(*PARTS)), inputs_of(".tvvtt", "tttttt"))


@pytest.mark.parametrize(
    ("operation", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: None, [0, 1]),
    ],
    ids=["reorder", "same twice", "repeat", "select", "nothing"],
)
def test_rows_keep_what_their_prompt_said(operation, rows):
    """Then a decode step and another turn."""
    fast, oracle = main(), Oracle(shared(), plan(*PARTS))
    ours, theirs = of_two_prompts()
    untouched = copy.deepcopy(ours)
    operation(ours)
    theirs = OracleCache(tuple(theirs.rows[b] for b in rows))
    caches = assert_same(fast, oracle, inputs_of(*["t"] * len(rows), seed=1), ours, theirs)
    assert_same(fast, oracle, inputs_of(*["tt"] * len(rows), seed=2), *caches)
    # The copy is of its own, what adapters know included.
    assert_same(fast, oracle, inputs_of("t", "t", seed=3), untouched, of_two_prompts()[1])


def test_reset_forgets_the_prompt():
    fast, oracle = main(), Oracle(shared(), plan(*PARTS))
    cache, _ = of_two_prompts()
    cache.reset()
    assert cache.prompt_state is None
    ours, _ = assert_same(fast, oracle, inputs_of("tvt", seed=7), cache)
    assert ours is cache


@functools.cache
def cached_by(plan_of: str):
    """A rewritten model for each plan that a cache may come from."""
    adapters = {"PIA": [PARTS[0]], "plain": [PARTS[1]], "static": [skip(0, **STATIC)]}
    return unfreed(lossless(), plan(*adapters.get(plan_of, [SkippedAttention(0)] if plan_of == "free" else [])))


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ("none", "free", "holds keys of layer 0, which does not attend in this plan"),
        ("PIA", "none", "holds no keys of layer 0, which attends in this plan"),
        ("free", "PIA", "holds nothing of adapters, this plan's adapters take other things"),
        ("PIA", "free", r"holds what other adapters kept \(prompt_0_bias_0, prompt_0_bias_1, prompt_0_weight_0, .*\)"),
        ("plain", "none", r"holds what other adapters kept \(prompt_1_bias_0"),
        ("PIA", "static", r"holds what other adapters kept \(prompt_0_bias_0"),
    ],
)
def test_cache_of_another_plan_is_refused(theirs, ours, message):
    """Its tensors would be taken for something else."""
    cache = cached_by(theirs)(**inputs_of("tvvtt")).past_key_values
    for turn in ("t", "tt"):
        with pytest.raises(InputError, match=f"^past_key_values {message}.*: pass a cache this model returned"):
            cached_by(ours)(**inputs_of(turn, seed=1), past_key_values=cache)


def test_without_adapters_nothing_is_kept():
    fast = unfreed(lossless(), plan(SkippedAttention(1)))
    assert fast(**inputs_of("tvt")).past_key_values.prompt_state is None
    assert fast.fold_reports == []


# ---------------------------------------------------------------- models, dtypes, copies


def test_llava():
    """Images, through the model's own merging code."""
    parts = [StaticExit(1), skip(0), kept(1), kept(3, **STATIC)]
    model = shared_model("llava")
    fast, oracle = optimize(model, plan(*parts), compile=False), Oracle(model, plan(*parts))
    ids, pixels, mask = image_prompt("......titt", "tiittt.")
    prompt = (*embed(model, ids, pixels), mask)
    tokens = fast.generate(input_ids=ids, pixel_values=pixels, attention_mask=mask, **GREEDY)
    want = oracle.generate(*prompt, max_new_tokens=4)
    assert tokens[:, -4:].tolist() == want.tokens
    assert tokens.exit_layer.tolist() == want.exit_layer.tolist() == [1, 1]
    out = fast(input_ids=ids, pixel_values=pixels, attention_mask=mask, logits_to_keep=1)
    ends = [int(row.nonzero().max()) for row in mask]
    assert_relative(out.logits[:, 0], oracle.forward(*prompt).logits[torch.arange(2), ends])
    names = dict(fast.named_parameters())
    assert "model.language_model.layers.0.self_attn.q_proj.weight" not in names
    assert "model.language_model.folded_adapters.layer_0.base_0" in names
    assert names.keys() >= {n for n, _ in model.named_parameters() if "language_model.layers" not in n}


# Of the largest logit: bfloat16 has 8 bits, and errors add up over two layers.
BFLOAT16 = 5e-2


def two_layers():
    """A model of its own, which tests may change, and a copy that they do not."""
    model = tiny_decoder(num_hidden_layers=2)
    return model, copy.deepcopy(model)


def test_bfloat16():
    """Folded in float64 and rounded once: as near to the exact numbers as the unfolded model."""
    model, exact = two_layers()
    base = optimize(model.to(torch.bfloat16), Plan(), compile=False)
    inputs = inputs_of("tvvtt")
    want = Oracle(exact, plan(*PARTS)).forward(*inputs.values())
    for fold in (True, False):
        fast = unfreed(base, plan(*PARTS), fold)
        out = fast(**inputs | {"inputs_embeds": inputs["inputs_embeds"].bfloat16()})
        assert out.logits.dtype == torch.bfloat16
        assert_relative(out.logits.float(), want.logits, BFLOAT16)
        for report in fast.fold_reports:
            assert 1e-5 < report.rounding_error < 4e-3
        dtypes = {n.split(".")[1]: p.dtype for n, p in fast._vte_runner.folded.named_parameters()}
        wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
        assert wide == {"router_weight", "router_bias", "pool_weight", "pool_bias"}
        assert {dtypes[name] for name in dtypes.keys() - wide} == {torch.bfloat16}


def test_moved_after_optimizing():
    """Folded weights follow. What was rounded to float32 or bfloat16 stays so."""
    model, exact = two_layers()
    fast, inputs = optimize(model, plan(*PARTS), compile=False), inputs_of("tvvtt")
    token = inputs_of("t", seed=1)
    want = Oracle(exact, plan(*PARTS)).forward(*inputs.values())
    then = Oracle(exact, plan(*PARTS)).forward(token["inputs_embeds"], cache=want.cache)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, BFLOAT16)):
        assert fast.to(dtype) is fast
        assert {p.dtype for p in fast.parameters()} == {dtype}
        out = fast(**inputs | {"inputs_embeds": inputs["inputs_embeds"].to(dtype)})
        assert out.logits.dtype == dtype
        assert_relative(out.logits.float(), want.logits, tolerance)
        assert all(value.dtype == dtype for value in out.past_key_values.prompt_state.values)
        step = fast(inputs_embeds=token["inputs_embeds"].to(dtype), past_key_values=out.past_key_values)
        assert_relative(step.logits.float(), then.logits, tolerance)


def test_deepcopy_and_state_dict():
    fast, inputs = main(), inputs_of("tvvtt")
    before = fast(**inputs)
    twin = copy.deepcopy(fast)
    ours, theirs = dict(fast.named_parameters()), dict(twin.named_parameters())
    assert ours.keys() == theirs.keys()
    assert not {id(p) for p in ours.values()} & {id(p) for p in theirs.values()}
    assert torch.equal(twin(**inputs).logits, before.logits)
    state = {name: value.clone() for name, value in twin.state_dict().items()}
    with torch.no_grad():
        for name, parameter in theirs.items():
            if "folded_adapters" in name:
                parameter.mul_(0.5)
    assert not torch.allclose(twin(**inputs).logits, before.logits, atol=1e-3)
    assert torch.equal(fast(**inputs).logits, before.logits)
    twin.load_state_dict(state)
    assert torch.equal(twin(**inputs).logits, before.logits)


def test_runner_survives_pickling():
    """What was folded goes with it; its programs are made again. (Models themselves do not: their class is made.)"""
    fast = main()
    runner = pickle.loads(pickle.dumps(fast._vte_runner))
    assert runner.folded.reports == fast._vte_runner.folded.reports
    inputs = inputs_of("tvvtt")
    cache = ExitCache.adopt(DynamicCache())
    with torch.no_grad():
        out = runner.run(*inputs.values(), None, cache, last=True)
    assert torch.equal(out.logits, fast(**inputs, logits_to_keep=1).logits)


@pytest.mark.slow
def test_compiled():
    """Through Inductor: prefill, another turn, decode of one row; decode of a batch of two prompts."""
    model, _ = two_layers()
    fast, oracle = optimize(model, plan(*PARTS), compile=True), Oracle(two_layers()[0], plan(*PARTS))

    def run(seed: int, *rows: str) -> None:
        caches = assert_same(fast, oracle, inputs_of(*rows, seed=seed))
        if len(rows) == 1:
            caches = assert_same(fast, oracle, inputs_of("t" * (2 + seed), seed=seed + 10), *caches)
        assert_same(fast, oracle, inputs_of(*["t"] * len(rows), seed=seed + 20), *caches)

    run(0, "tvvtt")
    run(1, "tvvtt", ".tttt")
    known = fast._vte_runner.compiler.compilations
    run(2, "ttvvvttt")
    run(3, "tttttt", "tvvttt", "..tttt")
    assert fast._vte_runner.compiler.compilations == known > 0


# ---------------------------------------------------------------- golden data


@functools.cache
def golden():
    """The golden data, its weights under the authors' names, and its model in true float64, traced once."""
    data = np.load(DATA / "eas_llava_model.npz")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    cfg = {name: int(data[f"cfg.{name}"]) for name in (*names, "num_key_value_heads")}
    rope = {"rope_type": "default", "rope_theta": float(data["cfg.rope_theta"])}
    model = LlamaForCausalLM(LlamaConfig(**cfg, rms_norm_eps=float(data["cfg.rms_norm_eps"]), rope_parameters=rope))
    weights = {key[2:]: torch.from_numpy(data[key]) for key in data.files if key.startswith("w.")}
    model.load_state_dict({key: value.float() for key, value in weights.items() if "adapter" not in key})
    model.generation_config.eos_token_id = None
    return data, weights, optimize(to_float64(model.eval()), Plan(), compile=False)


FORMS = [("blended", "blended"), ("low_rank", "low_rank"), ("blended", "low_rank"), ("unfolded", "unfolded")]


@pytest.mark.parametrize("forms", FORMS, ids="-".join)
@pytest.mark.parametrize("case", ["A", "none"])
def test_golden(case, forms, monkeypatch):
    data, weights, base = golden()
    monkeypatch.setattr("vte_compile.folded_weights.choose_forms", lambda *args: Forms(*forms, "the test says so"))

    def close(actual, key, index=...):
        expected = torch.from_numpy(np.asarray(data[f"{case}.{key}.f64"]))[index]
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    skips = data[f"{case}.skip_layers"].tolist()
    fast = unfreed(base, Plan.from_eas_checkpoint(weights, skips), fold=True)
    embeds = torch.from_numpy(data["inputs_embeds"]).double()
    out = fast(inputs_embeds=embeds)
    assert [report.layer for report in fast.fold_reports] == list(range(6))
    assert {(report.one_prompt.prompt, report.one_prompt.step) for report in fast.fold_reports} == {forms}
    close(out.logits, "logits")
    cache = out.past_key_values
    layers = [0 if layer in skips else 23 for layer in range(6)]
    assert cache.lengths[:, 0].tolist() == layers
    assert [0 if kv is None else kv[0].numel() for kv in cache.row(0)] == data[f"{case}.cache_numel"].tolist()

    tokens = torch.from_numpy(data[f"{case}.dec_tokens"])
    for step, token in enumerate(tokens):
        out = fast(input_ids=token[None, None], past_key_values=cache)
        close(out.logits[0, 0], "dec_logits", step)
    assert cache.lengths[:, 0].tolist() == [length and length + 5 for length in layers]
    # dec_tokens are the authors' greedy choices.
    greedy = fast.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=5, pad_token_id=0)
    assert greedy[0].tolist() == tokens.tolist()


def test_constants_equal_unfolded_exactly():
    """The golden adapters with static routers, folded at compile time, against themselves."""
    data, weights, base = golden()
    router = StaticRouter((0.3, 0.7))
    eas = Plan.from_eas_checkpoint(weights, [2, 4, 5])
    static = Plan(
        skips=[SkippedAttention(part.layer, replace(part.adapter, router=router)) for part in eas.skips],
        adapters=[KeptAdapter(part.layer, replace(part.adapter, router=router)) for part in eas.adapters],
    )
    folded, unfolded = (unfreed(base, static, fold) for fold in (True, False))
    embeds = torch.from_numpy(data["inputs_embeds"]).double()
    out, want = (fast(inputs_embeds=embeds) for fast in (folded, unfolded))
    assert {report.one_prompt.step for report in folded.fold_reports} == {"constant"}
    torch.testing.assert_close(out.logits, want.logits, rtol=1e-10, atol=1e-10)
    token = torch.tensor([[5]])
    out, want = (
        fast(input_ids=token, past_key_values=before.past_key_values)
        for fast, before in ((folded, out), (unfolded, want))
    )
    torch.testing.assert_close(out.logits, want.logits, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- freed weights


SKIPPED = {f"layers.0.self_attn.{n}_proj.weight" for n in "qkvo"} | {"layers.0.post_attention_layernorm.weight"}
BEHIND = {f"layers.0.mlp.{n}_proj.weight" for n in ("gate", "up")} | {
    f"layers.1.self_attn.{n}_proj.weight" for n in "qkv"
}


def blended_only(sizes, device, dtype, one_prompt):
    """Forms that leave no use for the original weights, as models of real size take them."""
    return Forms("blended", "blended" if one_prompt else "low_rank", "because the test says so")


@pytest.fixture
def folding(monkeypatch):
    monkeypatch.setattr("vte_compile.folded_weights.choose_forms", blended_only)


def test_freed_weights(folding):
    """Those of the skipped attention, and those that were folded; the user's model keeps all of its own."""
    model, before = two_layers()
    fast = optimize(model, plan(*PARTS), compile=False)
    gone = {f"model.{name}" for name in SKIPPED | BEHIND}
    assert set(fast._vte_spec.freed) == SKIPPED | BEHIND
    left = set(before.state_dict()) - gone
    for names in (set(fast.state_dict()), {n for n, _ in fast.named_parameters()}):
        assert {n for n in names if "folded_adapters" not in n} == left
        assert {n.split(".")[2] for n in names if "folded_adapters" in n} == {"layer_0", "layer_1"}
    state, own = model.state_dict(), dict(model.named_parameters())
    assert list(state) == list(before.state_dict())
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in state.items())
    assert all(parameter is own[name] for name, parameter in fast.named_parameters() if name in left)
    added = sum(p.nbytes for n, p in fast.named_parameters() if "folded_adapters" in n)
    assert added == sum(report.added_bytes for report in fast.fold_reports)
    inputs = inputs_of("tvvtt", ".tttt")
    assert_same(fast, Oracle(model, plan(*PARTS)), inputs)
    with torch.no_grad():
        ours, theirs = (m(inputs_embeds=inputs["inputs_embeds"]).logits for m in (model, before))
    assert torch.equal(ours, theirs)


@pytest.mark.traces
def test_freed_weights_are_gone_with_the_model(folding):
    model, _ = two_layers()
    references = {name: weakref.ref(p) for name, p in model.named_parameters()}
    fast, inputs = optimize(model, plan(*PARTS), compile=False), inputs_of("tvvtt")
    fast(**inputs)
    del model
    gc.collect()
    gone = {name for name, reference in references.items() if reference() is None}
    assert gone == {f"model.{name}" for name in SKIPPED | BEHIND}
    # And nothing was still to be read from them.
    fast(**inputs_of("t", seed=2), past_key_values=fast(**inputs).past_key_values)


@functools.cache
def training_free():
    """A skip without an adapter."""
    return optimize(lossless(), plan(SkippedAttention(1)))


def test_skips_without_adapters_free_too():
    fast = training_free()
    # The block keeps the norm in front of its FFN, and loses the one in front of its attention.
    attention = {f"layers.1.self_attn.{n}_proj.weight" for n in "qkvo"}
    assert set(fast._vte_spec.freed) == attention | {"layers.1.input_layernorm.weight"}
    assert not hasattr(fast.model, "folded_adapters")
    assert_same(fast, Oracle(shared(), plan(SkippedAttention(1))), inputs_of("tvvtt"))
    assert "(q_proj): Linear(freed)" in repr(fast.model.layers[1])
    assert "(q_proj): Linear(in_features" in repr(fast)


def test_exits_free_nothing():
    fast = optimize(lossless(), plan(StaticExit(0)))
    assert not fast._vte_spec.freed
    assert list(fast.state_dict()) == list(shared().state_dict())


def test_unfolded_adapters_keep_what_is_behind_them():
    fast = optimize(lossless(), plan(*PARTS), fold=False)
    assert set(fast._vte_spec.freed) == SKIPPED
    assert [(r.layer, r.kind, r.one_prompt.reason) for r in fast.fold_reports] == [
        (0, "PIA", "fold=False"),
        (1, "PlainAdapter", "fold=False"),
    ]


def test_tied_weights(folding):
    """Layers that share modules: only the planned layers change, and weights go if none of their names is read."""
    model = tiny_decoder(num_hidden_layers=3)
    first, second, third = model.model.layers
    second.mlp = first.mlp
    third.self_attn.q_proj = first.self_attn.q_proj
    third.self_attn.k_proj.weight = second.self_attn.k_proj.weight
    second.self_attn.v_proj = first.self_attn.v_proj
    fast, oracle = optimize(model, plan(*PARTS), compile=False), Oracle(model, plan(*PARTS))
    # The FFN is read by layer 1, the query of layer 0 and the key of layer 1 by layer 2; the value by nobody.
    read = {f"layers.0.mlp.{n}_proj.weight" for n in ("gate", "up")}
    read |= {"layers.0.self_attn.q_proj.weight", "layers.1.self_attn.k_proj.weight"}
    assert set(fast._vte_spec.freed) == (SKIPPED | BEHIND) - read
    caches = assert_same(fast, oracle, inputs_of("tvvtt"))
    assert_same(fast, oracle, inputs_of("t", seed=1), *caches)


def test_save_pretrained_refuses_before_it_writes(tmp_path):
    with pytest.raises(InputError, match=r"save_pretrained: \d+ weights were freed or folded .*original model"):
        main().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# ---------------------------------------------------------------- another plan


def test_other_skips_or_adapters_are_refused():
    fast = main()
    for other in (
        Plan(),
        plan(SkippedAttention(0), PARTS[1]),
        plan(skip(0), kept(1)),
        plan(*PARTS, SkippedAttention(2)),
        plan(PARTS[0]),
    ):
        with pytest.raises(PlanError, match=r"^skips, adapters: .*optimize the original model"):
            optimize(fast, other)
    with pytest.raises(PlanError, match="optimize the original model"):
        optimize(fast, plan(*PARTS), fold=False)
    with pytest.raises(PlanError, match="optimize the original model"):
        optimize(training_free(), Plan())


def test_other_exits_share_what_was_traced_and_folded(monkeypatch):
    fast = main()
    inputs = inputs_of("tvvtt")
    fast(**inputs)
    monkeypatch.setattr(
        "vte_compile.runtime.decoder_runner.capture", lambda *args, **kwargs: pytest.fail("traced again")
    )
    monkeypatch.setattr("vte_compile.folded_weights.fold_linear", lambda *args: pytest.fail("folded again"))
    for layer in (0, 1):
        other = optimize(fast, plan(StaticExit(layer), *PARTS))
        assert other._vte_runner.folded is fast._vte_runner.folded
        out = other(**inputs)
        want = Oracle(shared(), plan(StaticExit(layer), *PARTS)).forward(*inputs.values())
        assert out.exit_layer.tolist() == [layer]
        assert_relative(out.logits, want.logits)
    assert fast(**inputs).exit_layer.tolist() == [-1]


def test_from_no_adapters_to_some_and_back_to_the_first():
    """The lossless model is as it was, and may take yet another plan."""
    base = lossless()
    names = list(base.state_dict())
    inputs = inputs_of("tvvtt")
    before = base(**inputs).logits
    assert_same(main(), Oracle(shared(), plan(*PARTS)), inputs)
    assert list(base.state_dict()) == names == list(shared().state_dict())
    assert torch.equal(base(**inputs).logits, before)
    assert main().plan.skips == (PARTS[0],)
    assert base.plan.skips == ()


def test_fingerprint_of_a_model_with_freed_weights():
    """What is left still tells this model from another."""
    made_for = Fingerprint.of(shared())
    probed = {probe.name for probe in made_for.probe}
    assert probed & set(main()._vte_spec.freed)
    exits = [StaticExit(1)]
    again = optimize(main(), Plan(exits, made_for, skips=PARTS[:1], adapters=PARTS[1:]))
    assert again(**inputs_of("tvvtt")).exit_layer.tolist() == [1]
    torch.manual_seed(1)
    other = LlamaForCausalLM(shared().config)
    with pytest.raises(PlanMismatchError, match="another model"):
        optimize(main(), Plan(exits, Fingerprint.of(other), skips=PARTS[:1], adapters=PARTS[1:]))


def test_refused_adapters_are_an_error():
    """Not a model that computes something else than was planned."""
    model, _ = two_layers()
    model.model.layers[0].post_attention_layernorm = nn.LayerNorm(C)
    with pytest.raises(UnsupportedModelError, match=r"^layer 0: its adapter cannot apply: .* is no RMSNorm"):
        optimize(model, plan(*PARTS), compile=False)


def test_pickle_of_the_model_itself():
    fast = optimize(shared_model("llama"), plan(SkippedAttention(1, random_adapter(PIA)), StaticExit(1)), compile=False)
    again = pickle.loads(pickle.dumps(fast))
    args = chunk("ttvvtt")
    inputs = {"inputs_embeds": args[0], "visual_mask": args[1]}
    assert torch.equal(again(**inputs).logits, fast(**inputs).logits)
    assert again.plan.skips[0].layer == 1


def test_a_new_plan_keeps_fold():
    fast = optimize(shared_model("llama"), plan(SkippedAttention(1, random_adapter(PIA))), compile=False, fold=False)
    other = optimize(fast, plan(StaticExit(0), *fast.plan.skips))
    assert [report.one_prompt.step for report in other.fold_reports] == ["unfolded"]


@pytest.mark.parametrize(
    "part", [SkippedAttention(1, random_adapter(PIA)), KeptAdapter(1, random_adapter(PlainAdapter))]
)
def test_blocks_that_scale_their_residuals_are_refused(part):
    torch.manual_seed(0)
    granite = GraniteForCausalLM(GraniteConfig(**TINY, head_dim=8, residual_multiplier=0.98)).eval()
    with pytest.raises(UnsupportedModelError, match=r"layer 1: its adapter cannot apply.*an extra norm, or a scale"):
        optimize(granite, plan(part), compile=False)
    # Without an adapter it is what it says: nothing is added.
    fast = optimize(granite, plan(SkippedAttention(1)), compile=False)
    silent = copy.deepcopy(granite)
    silent.model.layers[1].self_attn.o_proj.weight.data.zero_()
    embeds = chunk("tttt")[0]
    with torch.no_grad():
        assert_relative(fast(inputs_embeds=embeds).logits, silent(inputs_embeds=embeds).logits)
