"""Through Inductor: the same numbers, few compilations, and none after warm-up."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_models import (
    NEVER,
    C,
    assert_relative,
    chunk,
    gate,
    one_thread,  # noqa: F401
    plan,
    tiny,
)

from vte_compile import Oracle, StaticExit, optimize
from vte_compile.errors import CaptureError
from vte_compile.runtime import inductor
from vte_compile.runtime.inductor import find_backend

GREEDY = dict(do_sample=False, max_new_tokens=4, pad_token_id=0, eos_token_id=None)
NAMES = ("inputs_embeds", "visual_mask", "attention_mask")
LAYERS = 3


@pytest.fixture(scope="module")
def models():
    """The compiled and the uncompiled one, which leave after layer 0, 1, or never, depending on the row."""
    model = tiny(num_hidden_layers=LAYERS)
    exits = plan(gate(0, 0.5), StaticExit(1))
    fast = optimize(model, exits, compile=True)
    # Warm-up: the prompt of a row, a decode step alone, and of a batch.
    fast.generate(**inputs_of("tvvtt"), **GREEDY)
    fast.generate(**inputs_of("tvvtt", "ttttt"), **GREEDY)
    return fast, optimize(model, exits, compile=False), Oracle(model, exits)


def inputs_of(*layouts, seed=0):
    embeds, visual, real = chunk(*layouts, seed=seed)
    return {"inputs_embeds": embeds, "visual_mask": visual, "attention_mask": real.long()}


def compilations(fast) -> int:
    return fast._vte_runner.compiler.compilations


def test_equal_layers_compile_once(models):
    """Before, in and behind the layers, of prefill (and its last layer), packed prefill (before: the same), decode, and
    decode of a batch."""
    assert compilations(models[0]) <= 13
    deeper = optimize(tiny(num_hidden_layers=LAYERS), plan(gate(0, NEVER)), compile=False)
    keys = {step.piece.key for step in deeper._vte_runner.program("prefill")._steps if hasattr(step, "piece")}
    assert len(keys) == 4


def test_no_compilation_after_warm_up(models):
    """Any length, exit, batch size, text alone, one token: the same numbers from what is there."""
    fast, plain, oracle = models
    before = compilations(fast)
    torch._dynamo.utils.counters.clear()
    seen = set()
    batches = [["tvvtt"], ["t"], ["tt"], ["ttttttt"], ["vvvvvvtttttt"], ["tvtvtvttt"], ["ttvv"], ["v" * 40 + "t" * 9]]
    batches += [["..tvvtt", "vvvtttt", ".tttttt"], ["tvvtt..", "t......", "vvttt.."], ["vtt", "ttt", "tvt", "..t"]]
    for seed, layouts in enumerate(batches):
        inputs = inputs_of(*layouts, seed=seed)
        want = oracle.generate(*[inputs[n] for n in NAMES], max_new_tokens=4)
        tokens = fast.generate(**inputs, **GREEDY)
        assert tokens.tolist() == want.tokens
        assert tokens.exit_layer.tolist() == want.exit_layer.tolist()
        last = fast(**inputs, logits_to_keep=1)
        assert_relative(last.logits, plain(**inputs, logits_to_keep=1).logits)
        seen.update(tokens.exit_layer.tolist())
    assert seen == {-1, 0, 1}
    assert compilations(fast) == before
    assert not torch._dynamo.utils.counters["inductor"]
    assert not torch._dynamo.utils.counters["stats"]


def test_another_plan_compiles_nothing_new(models):
    fast, _, oracle = models
    before = compilations(fast)
    for exits in [[StaticExit(0)], [gate(0, NEVER), StaticExit(1)], [gate(1, -NEVER)], []]:
        inputs = inputs_of("tvvttt", "vttvtt")
        want = Oracle(oracle.model, plan(*exits)).generate(*[inputs[n] for n in NAMES], max_new_tokens=4)
        tokens = optimize(fast, plan(*exits)).generate(**inputs, **GREEDY)
        assert tokens.tolist() == want.tokens
        assert tokens.exit_layer.tolist() == want.exit_layer.tolist()
    assert compilations(fast) == before


def test_second_turn_and_all_logits(models):
    """The tail for all logits, and the pieces that extend a cache, compile once more; then nothing does."""
    fast, _, oracle = models
    before = compilations(fast)
    counts = []
    for seed, (first, second) in enumerate([("tvvtt", "vvttt"), ("vvvtttt", "tt"), ("ttt", "tvtvtttt")]):
        a, b = inputs_of(first, seed=seed), inputs_of(second, seed=seed + 10)
        known, ours = oracle.forward(*[a[n] for n in NAMES]), fast(**a)
        assert_relative(ours.logits, known.logits)
        want, out = (
            oracle.forward(*[b[n] for n in NAMES], cache=known.cache),
            fast(**b, past_key_values=ours.past_key_values),
        )
        assert_relative(out.logits, want.logits)
        assert out.exit_layer.tolist() == want.exit_layer.tolist()
        assert out.past_key_values.lengths.T.tolist() == want.cache.lengths()
        counts.append(compilations(fast))
    assert counts[0] == counts[1] == counts[2] <= before + 4


def test_find_backend(monkeypatch, caplog):
    cpu = torch.device("cpu")
    assert find_backend(cpu, True) is True
    assert find_backend(cpu, None) is True
    assert find_backend(cpu, False) is False

    def missing():
        raise RuntimeError("no g++ here")

    monkeypatch.setattr(inductor, "get_cpp_compiler", missing)
    assert find_backend(cpu, False) is False
    with caplog.at_level(logging.WARNING, "vte_compile"):
        assert find_backend(cpu, None) is False
    assert "no g++ here" in caplog.text
    with pytest.raises(CaptureError, match=r"compile=True, but Inductor finds no C\+\+ compiler \(no g\+\+ here\)"):
        find_backend(cpu, True)
    monkeypatch.setattr(inductor, "has_triton", lambda: False)
    with pytest.raises(CaptureError, match="Triton"):
        find_backend(torch.device("cuda"), True)


def test_optimize_falls_back_or_refuses_without_a_compiler(monkeypatch, caplog):
    def missing():
        raise RuntimeError("no g++ here")

    monkeypatch.setattr(inductor, "get_cpp_compiler", missing)
    model = tiny(num_hidden_layers=1)
    with pytest.raises(CaptureError, match="compile=True"):
        optimize(model, plan(), compile=True)
    with caplog.at_level(logging.WARNING, "vte_compile"):
        fast = optimize(model, plan())
    assert "uncompiled" in caplog.text
    assert fast._vte_runner.compiler is None
    assert fast(inputs_embeds=torch.zeros(1, 3, C)).exit_layer.tolist() == [-1]
