"""The parts of the runtime: the cache with its lengths per layer and row, the runner, and programs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import (
    LAYERS,
    NEVER,
    assert_relative,
    chunk,
    gate,
    one_thread,  # noqa: F401
    optimized,
    plan,
    shared_model,
)
from transformers import DynamicCache

from vte_compile import Oracle, Plan, StaticExit
from vte_compile.errors import CaptureError, InputError
from vte_compile.passes.lower_piecewise import Piece
from vte_compile.runtime.decoder_runner import DecoderRunner
from vte_compile.runtime.exit_cache import ExitCache
from vte_compile.runtime.visual_tokens import VisualTokens


@pytest.fixture
def filled():
    """A cache after "..vvtt" and "tttttt", exit after layer 0 in the first row, and a decode step."""
    fast = optimized("llama", StaticExit(0))
    embeds, visual, real = chunk("..vvtt", "tttttt")
    cache = fast(inputs_embeds=embeds, visual_mask=visual, attention_mask=real).past_key_values
    fast(inputs_embeds=chunk("t", "t", seed=1)[0], past_key_values=cache)
    return cache


# ---------------------------------------------------------------- cache


def test_lengths(filled):
    assert filled.lengths.tolist() == [[5, 7], [3, 7], [3, 7], [3, 7]]
    assert filled.starts.tolist() == [[2, 0], [4, 0], [4, 0], [4, 0]]
    assert filled.get_seq_length() == filled.get_seq_length(3) == 7
    assert filled.next_positions.tolist() == [5, 7]
    assert filled.exit_layer.tolist() == [0, -1]
    assert [kv[0].shape[2] for kv in filled.row(0)] == [5, 3, 3, 3]
    assert len(filled) == LAYERS
    assert filled.layers[1].keys.shape == (2, 2, 7, 8)
    assert not filled.layers[1].keys[0, :, :4].any()


def test_adopt_in_place():
    mine = DynamicCache(config=shared_model("llama").config)
    assert ExitCache.adopt(mine) is mine
    assert isinstance(mine, ExitCache)
    assert mine.is_empty
    assert mine.get_seq_length() == 0
    assert ExitCache.adopt(mine) is mine


def test_select_reorder_and_repeat(filled):
    rows = [filled.row(b) for b in range(2)]
    filled.batch_repeat_interleave(2)
    assert filled.lengths[1].tolist() == [3, 3, 7, 7]
    filled.reorder_cache(torch.tensor([3, 0, 0]))
    assert filled.lengths[1].tolist() == [7, 3, 3]
    assert filled.next_positions.tolist() == [7, 5, 5]
    assert filled.exit_layer.tolist() == [-1, 0, 0]
    for b, want in enumerate([rows[1], rows[0], rows[0]]):
        for ours, theirs in zip(filled.row(b), want, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])


def test_crop_only_what_was_decoded(filled):
    fast = optimized("llama", StaticExit(0))
    again = copy.deepcopy(filled)
    tokens = [chunk("t", "t", seed=s)[0] for s in (2, 3)]
    out = fast(inputs_embeds=tokens[0], past_key_values=filled)
    fast(inputs_embeds=tokens[1], past_key_values=filled)
    filled.crop(-2)
    assert filled.lengths.tolist() == again.lengths.tolist()
    assert torch.equal(fast(inputs_embeds=tokens[0], past_key_values=filled).logits, out.logits)
    filled.crop(0)
    assert filled.get_seq_length() == 8
    filled.crop(7)
    assert filled.next_positions.tolist() == [5, 7]
    with pytest.raises(InputError, match="cannot remove 2 tokens, only the 1 decoded"):
        filled.crop(-2)


def test_the_original_model_cannot_continue_it(filled):
    """Its layers differ in length, which no mask of the original's says."""
    before = filled.lengths.tolist()
    with pytest.raises(InputError, match="filled by an optimized model"):
        shared_model("llama")(inputs_embeds=chunk("t", "t")[0], past_key_values=filled)
    assert filled.lengths.tolist() == before


def test_reset_and_use_again(filled):
    fast = optimized("llama", StaticExit(0))
    filled.reset()
    assert filled.is_empty
    embeds, visual, _ = chunk("tvvtt")
    out = fast(inputs_embeds=embeds, visual_mask=visual, past_key_values=filled)
    assert out.past_key_values is filled
    assert filled.lengths[:, 0].tolist() == [5, 3, 3, 3]


def test_copies_of_a_cache_are_independent(filled):
    fast = optimized("llama", StaticExit(0))
    twin = copy.deepcopy(filled)
    token = chunk("t", "t", seed=4)[0]
    first = fast(inputs_embeds=token, past_key_values=filled)
    assert twin.get_seq_length() == 7
    assert torch.equal(fast(inputs_embeds=token, past_key_values=twin).logits, first.logits)


# ---------------------------------------------------------------- visual tokens, programs


@pytest.mark.parametrize(
    ("layout", "keep", "start"),
    [("tvvtt", [0, 3, 4], 3), ("vtvt", [1, 3], 3), ("tttt", None, 0), ("ttvv", None, 0), ("vv", None, 0)],
)
def test_visual_tokens(layout, keep, start):
    found = VisualTokens.find(torch.tensor([c == "v" for c in layout]))
    if keep is None:
        assert found is None
    else:
        assert (found.keep.tolist(), found.question_start) == (keep, start)


def lowered(*exits, phase="prefill", batched=False, last=True):
    runner = optimized("llama", *exits)._vte_runner
    weight = runner.spec.lm_head.weight
    return runner, runner._lowered((phase, batched, last, True, weight.dtype, weight.device), False)[0]


@pytest.mark.parametrize(
    ("phase", "batched"), [("prefill", False), ("extend", False), ("decode", False), ("decode", True)]
)
def test_equal_layers_are_equal_pieces(phase, batched):
    """So they compile once: a piece for all layers, one before, one behind, and exits do not add any.

    In prefill and extend the last layer, which asks for one token, is a piece of its own.
    """
    _, plain = lowered(phase=phase, batched=batched)
    _, exits = lowered(gate(0, 0.5), gate(1, 0.5), phase=phase, batched=batched)
    keys = [step.key for step in plain.steps if isinstance(step, Piece)]
    # In decode a piece is what lies between the attentions of two layers.
    assert len(keys) == LAYERS + (1 if phase == "decode" else 2)
    assert len(set(keys)) == (3 if phase == "decode" else 4)
    assert {step.key for step in exits.steps if isinstance(step, Piece)} == set(keys)
    assert len(exits.steps) - len(plain.steps) == (0 if phase == "decode" else 2)


def test_last_token_logits_change_only_the_last_layer_and_the_tail():
    _, last = lowered(last=True)
    _, every = lowered(last=False)
    different = [a.key != b.key for a, b in zip(last.steps, every.steps, strict=True)]
    assert different == [False] * LAYERS + [True, True]


def test_program_frees_what_it_no_longer_needs():
    """Every value but the results, and none before its last use."""
    runner, _ = lowered(gate(1, NEVER))
    program = runner.program("prefill")
    freed = [slot for step in program._last_use for slot in step]
    assert len(freed) == len(set(freed))
    assert set(freed) | set(program._outputs) == set(range(program._slots))


def test_programs_are_made_once_per_dtype(monkeypatch):
    fast = optimized("llama", StaticExit(1))
    runner = fast._vte_runner
    assert runner.program("prefill") is runner.program("prefill")
    assert runner.program("decode", last=True) is runner.program("decode", last=False)
    assert runner.program("decode", batched=True) is not runner.program("decode")


def test_passes_report_in_the_program():
    runner, _ = lowered(gate(0, 0.5), StaticExit(2))
    applied = {result.name: result.applied for result in runner.program("prefill").passes}
    assert applied["insert_exits"] == 2
    assert applied["plain_causal"] == LAYERS
    assert applied["last_token_logits"] == 1
    assert not [r for result in runner.program("prefill").passes for r in result.refusals]


def test_runner_survives_copying():
    """As a plan and a decoder: what is bound to the weights is made again."""
    runner = optimized("llama", StaticExit(1))._vte_runner
    twin = copy.deepcopy(runner)
    assert isinstance(twin, DecoderRunner)
    assert twin.plan.exits == runner.plan.exits
    assert twin.spec.lm_head.weight is not runner.spec.lm_head.weight
    assert not twin._captures
    restored = pickle.loads(pickle.dumps(runner))
    assert restored.plan.exits == (StaticExit(1),)


@pytest.mark.traces
def test_capture_error_names_the_phase(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(torch.export, "export", broken)
    runner = optimized("llama")._vte_runner
    fresh = DecoderRunner(runner.spec, Plan(), None)
    with pytest.raises(CaptureError, match="prefill of LlamaModel: no such thing"):
        fresh.program("prefill")


# ---------------------------------------------------------------- runner


def test_decode_steps_are_batched_and_gates_do_not_run(monkeypatch):
    fast = optimized("llama", gate(0, -NEVER))
    embeds, visual, _ = chunk("tvvtt", "ttttt")
    cache = fast(inputs_embeds=embeds, visual_mask=visual).past_key_values
    monkeypatch.setattr("vte_compile.runtime.steps.exit_logits", lambda *args: pytest.fail("a gate ran in decode"))
    monkeypatch.setattr(DecoderRunner, "_row", lambda *args: pytest.fail("decoded row by row"))
    out = fast(inputs_embeds=chunk("t", "t", seed=1)[0], past_key_values=cache)
    assert out.exit_layer.tolist() == [-1, -1]
    assert cache.exit_layer.tolist() == [0, -1]  # where the prompt's tokens left
    assert cache.lengths[1].tolist() == [4, 6]


def test_gates_run_only_until_the_first_exit_and_only_with_a_question(monkeypatch):
    from vte_compile.runtime import steps

    calls = []
    logits = steps.exit_logits
    monkeypatch.setattr(steps, "exit_logits", lambda *args: calls.append(len(args[0])) or logits(*args))
    fast = optimized("llama", gate(0, NEVER), gate(1, -NEVER), gate(2, -NEVER))
    embeds, visual, _ = chunk("vtvttt")
    assert fast(inputs_embeds=embeds, visual_mask=visual).exit_layer.tolist() == [1]
    assert calls == [3, 3]
    calls.clear()
    for layout in ("ttvv", "tttt"):
        embeds, visual, _ = chunk(layout)
        fast(inputs_embeds=embeds, visual_mask=visual)
    assert not calls


def test_steps_with_padding_and_one_token(filled):
    """A row that pauses during decoding: it neither computes nor caches anything."""
    fast = optimized("llama", StaticExit(0))
    token = chunk("t", "t", seed=5)[0]
    before = filled.row(0)
    alone = fast(inputs_embeds=token, past_key_values=copy.deepcopy(filled))
    out = fast(inputs_embeds=token, attention_mask=torch.tensor([[0], [1]]), past_key_values=filled)
    assert_relative(out.logits[1], alone.logits[1])
    assert not out.logits[0].any()
    assert filled.next_positions.tolist() == [5, 8]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(filled.row(0), before, strict=True))


def test_nothing_is_remembered_between_calls():
    fast, oracle = (
        optimized("llama", gate(0, 0.5), StaticExit(2)),
        Oracle(shared_model("llama"), plan(gate(0, 0.5), StaticExit(2))),
    )
    a, b = chunk("tvvtt", seed=1), chunk("vvvvtttt", seed=2)
    names = ("inputs_embeds", "visual_mask", "attention_mask")
    for args in (a, b, a):
        assert_relative(fast(**dict(zip(names, args, strict=True))).logits, oracle.forward(*args).logits)
