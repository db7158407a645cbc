"""Fused attention through optimize(): Triton's kernels, interpreted, of rows that leave at different layers."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from tiny_families import family_inputs, shared_family
from tiny_models import (
    assert_relative,
    chunk,
    gate,
    image_prompt,
    one_thread,  # noqa: F401
    plan,
    shared_model,
    tiny,
)
from transformers import LlavaForConditionalGeneration

from vte_compile import Oracle, Plan, StaticExit, optimize
from vte_compile.families.cache_name import CACHE, cache_of
from vte_compile.oracle import embed
from vte_compile.passes.fuse_attention import fuse_attention
from vte_compile.plan import SkippedAttention
from vte_compile.runtime import fused_steps
from vte_compile.runtime.inductor import PieceCompiler

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot run")

PROMPTS = ("......titt", "tittitt", ".tttttttttttt", "titttttttt", "..tttitttt")
EXITS = Plan([gate(0, 0.5, seed=1)])
SKIP = Plan([gate(0, 0.5, seed=1)], skips=[SkippedAttention(1)])


@pytest.fixture(scope="module")
def llava():
    """Two layers, two query heads for each key/value head, of a size that there are kernels for."""
    config = copy.deepcopy(shared_model("llava").config)
    config.text_config.num_hidden_layers, config.text_config.head_dim = 2, 64
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def fast(llava):
    """The model, with its attentions fused on a CPU too."""
    fast = optimize(llava, EXITS, compile=False)
    fast._vte_runner.fuse_attention = True
    return fast


@pytest.fixture
def launches(monkeypatch):
    """The kernels in place of the references, and how often they were launched."""
    from vte_compile.kernels import triton_decode_attention, triton_varlen_attention

    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is not on where there is a GPU: test_on_a_gpu runs the kernels there")
    counts = {"varlen": 0, "decode": 0}

    def counted(name, launch):
        def run(*args):
            counts[name] += 1
            return launch(*args)

        return run

    monkeypatch.setattr(fused_steps, "varlen_attention", counted("varlen", triton_varlen_attention.launch))
    monkeypatch.setattr(fused_steps, "decode_attention", counted("decode", triton_decode_attention.launch))
    return counts


def prompt(model, *layouts):
    ids, pixels, mask = image_prompt(*layouts)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    return inputs, (*embed(model, ids, pixels), mask)


def compare(model, plan, fast, inputs, rows, steps=2):
    """Prefill and decode steps, against the oracle; the last outputs of both."""
    oracle = Oracle(model, plan)
    got, want = fast(**inputs, logits_to_keep=1), oracle.forward(*rows)
    assert_relative(got.logits, want.logits[:, -1:], 1e-4)
    assert got.exit_layer.tolist() == want.exit_layer.tolist()
    for step in range(steps):
        tokens = torch.full((len(rows[0]), 1), 5 + step)
        embeds, visual = embed(model, tokens, None)
        mask = torch.ones(len(tokens), got.cache.get_seq_length() + 1)
        mask[:, : rows[2].shape[1]] = rows[2]
        got = fast(input_ids=tokens, attention_mask=mask, cache=got.cache)
        want = oracle.forward(embeds, visual, cache=want.cache)
        assert_relative(got.logits, want.logits, 1e-4)
    assert got.cache.lengths.T.tolist() == want.cache.lengths()
    return got


def test_prefill_and_decode(llava, fast, launches):
    inputs, rows = prompt(llava, *PROMPTS)
    got = compare(llava, EXITS, fast, inputs, rows)
    # Graphs were compared before: fused ones with others, and packed rows with rows alone.
    assert launches == {"varlen": 2 + 2 + 2, "decode": 2 + 4}
    assert len(set(Oracle(llava, EXITS).forward(*rows).exit_layer.tolist())) == 2  # rows differ, or little is shown
    for phase in ("packed", "decode"):
        [result] = [r for r in fast._vte_runner.pass_results(phase) if r.name == "fuse_attention"]
        assert (result.applied, result.refusals) == (2, [])
    assert got.cache.lengths.unique().numel() > 2


def test_one_row(llava, fast, launches):
    """A prompt alone is not packed; its decode steps have no starts."""
    inputs, rows = prompt(llava, "titttt")
    compare(llava, EXITS, fast, inputs, rows, steps=1)
    assert launches == {"varlen": 0, "decode": 2 + 2}


def test_a_skipped_attention(llava, fast, launches):
    inputs, rows = prompt(llava, *PROMPTS[:3])
    compare(llava, SKIP, optimize(fast, SKIP), inputs, rows, steps=1)
    assert launches == {"varlen": 1 + 1 + 1, "decode": 1 + 1}


def test_windows_and_caps(launches):
    """Gemma 2: capped scores, and a window behind the exit, which reaches over what left."""
    types = ["full_attention", "sliding_attention"]
    model, exits = tiny("gemma2", num_hidden_layers=2, head_dim=64, layer_types=types), plan(StaticExit(0))
    fast = optimize(model, exits, compile=False)
    fast._vte_runner.fuse_attention = True
    oracle = Oracle(model, exits)
    rows = ("ttvvvvttt", "..ttttttt", "tttvvttvt")
    embeds, visual, real = chunk(*rows)
    out = fast(inputs_embeds=embeds, visual_mask=visual, attention_mask=real.long())
    want = oracle.forward(embeds, visual, real)
    assert out.exit_layer.tolist() == want.exit_layer.tolist() == [0, -1, 0]
    assert_relative(out.logits, want.logits, 1e-4)
    for step in range(2):
        token, text, _ = chunk("t", "t", "t", seed=5 + step)
        real = torch.cat([real, torch.ones(3, 1, dtype=torch.bool)], 1)
        out = fast(inputs_embeds=token, visual_mask=text, attention_mask=real.long(), **{CACHE: cache_of(out)})
        want = oracle.forward(token, text, cache=want.cache)
        assert_relative(out.logits, want.logits, 1e-4)
    assert launches == {"varlen": 2 + 2 + 2, "decode": 2 + 4}


def test_the_first_step_behind_a_prompt_copies_nothing(llava, fast):
    inputs, _ = prompt(llava, *PROMPTS)
    with torch.inference_mode():
        cache = fast(**inputs, logits_to_keep=1).cache
        held = [layer.keys.data_ptr() for layer in cache.layers]
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(PROMPTS), 1)], 1)
        fast(input_ids=torch.full((len(PROMPTS), 1), 7), attention_mask=mask, cache=cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == held


def _does_not_run(*args):
    raise RuntimeError("out of resources: shared memory")


@pytest.mark.parametrize(
    ("phase", "reason"), [("packed", "do not run: RuntimeError: out of"), ("decode", "differ from it by")]
)
def test_wrong_kernels_are_not_used(llava, fast, phase, reason, monkeypatch, caplog):
    name = {"packed": "varlen_attention", "decode": "decode_attention"}[phase]
    right = getattr(fused_steps, name)
    wrong = _does_not_run if phase == "packed" else lambda *args: right(*args).neg_()
    monkeypatch.setattr(fused_steps, name, wrong)
    inputs, rows = prompt(llava, *PROMPTS[:2])
    again = optimize(fast, EXITS)
    compare(llava, EXITS, again, inputs, rows, steps=1)
    assert f"{phase}: attention stays torch's own: the fused kernels {reason}" in caplog.text
    assert {key[0]: fused for key, fused in again._vte_runner._fused.items()} == {
        "packed": phase != "packed",
        "decode": phase != "decode",
    }


def test_generate(llava, fast):
    """By the references: copies of prompts, whose rows are not the cache's as it was made, and their decode steps."""
    inputs, _ = prompt(llava, *PROMPTS[:3])
    plain = optimize(fast, EXITS)
    plain._vte_runner.fuse_attention = False
    for options in ({}, {"num_beams": 2}):
        options |= {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
        assert torch.equal(fast.generate(**inputs, **options), plain.generate(**inputs, **options))


def test_positions_of_three_rows(monkeypatch):
    """Qwen2-VL, whose tables are made of three in each layer; by the references, since its heads are small."""
    monkeypatch.setattr(sys.modules[fuse_attention.__module__], "unsupported", lambda size, dtype: None)
    plain = optimize(shared_family("qwen2_vl"), EXITS, compile=False)
    fast = optimize(plain, EXITS)
    fast._vte_runner.fuse_attention = True
    inputs = family_inputs("qwen2_vl", batch=2)
    ours, theirs = (model(**inputs, logits_to_keep=1).logits for model in (fast, plain))
    assert_relative(ours, theirs, 1e-4)
    [result] = [r for r in fast._vte_runner.pass_results("packed") if r.name == "fuse_attention"]
    assert (result.applied, result.refusals) == (4, [])


def test_copies_stay_fused_and_engines_are_not(fast):
    runner = pickle.loads(pickle.dumps(fast._vte_runner))
    assert runner.fuse_attention
    assert fast._vte_runner.with_plan(Plan()).fuse_attention
    kinds = [getattr(step, "kind", None) for step in fast._vte_runner.lowered("decode", batched=True).steps]
    assert kinds.count("append") == 2
    assert "rotary_append" not in kinds


@pytest.mark.slow
def test_compiled(llava, fast):
    """Inductor's pieces between attentions, before and behind an exit."""
    fast = optimize(fast, EXITS)
    fast._vte_runner.compiler = PieceCompiler()
    inputs, rows = prompt(llava, *PROMPTS)
    compare(llava, EXITS, fast, inputs, rows, steps=1)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu(llava, compile):
    """By the device alone, in half precision: as the same model row by row, with torch's attention."""
    model = copy.deepcopy(llava).cuda().half()
    inputs, _ = prompt(llava, *PROMPTS)
    inputs = {name: x.cuda().half() if x.is_floating_point() else x.cuda() for name, x in inputs.items()}
    fast = optimize(model, EXITS, compile=compile)
    plain = optimize(model, EXITS, compile=False)
    plain._vte_runner.fuse_attention = False
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0, "output_logits": True}
    ours, theirs = (m.generate(**inputs, **options, return_dict_in_generate=True) for m in (fast, plain))
    for phase in ("packed", "decode"):
        [result] = [r for r in fast._vte_runner.pass_results(phase) if r.name == "fuse_attention"]
        assert (result.applied, result.refusals) == (2, [])
    assert_relative(ours.logits[0].float(), theirs.logits[0].float(), 2e-2)
