"""TensorRT engines: their graphs, run by ONNX Runtime, give what the optimized model gives; and what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorrt_cpu import load_on_cpu
from tiny_models import (
    chunk,
    gate,
    image_prompt,
    one_thread,  # noqa: F401
    plan,
    random_adapter,
    tiny,
    tiny_llava,
)

import vte_compile
from vte_compile import SkippedAttention, StaticExit, optimize
from vte_compile.adapters import PIA

GREEDY = dict(do_sample=False, max_new_tokens=5, pad_token_id=0, eos_token_id=None)
OURS = dict(max_new_tokens=5, eos_token_ids=[], do_sample=False)
SIZES = {"batch": (1, 2, 4), "prompt": (1, 16, 64), "visual": (1, 8, 32), "columns": (1, 32, 128)}


def exported(fast, folder: Path, **options):
    vte_compile.export(fast, folder, target="tensorrt", build=False, profiles=SIZES, **options)
    return load_on_cpu(folder)[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A gate behind 0, an exit behind 1; attentions skipped with a folded adapter that is routed, and without."""
    parts = plan(gate(0, 0.5), StaticExit(1), SkippedAttention(1, random_adapter(PIA)), SkippedAttention(2))
    fast = optimize(tiny(num_hidden_layers=3), parts, compile=False)
    return fast, exported(fast, tmp_path_factory.mktemp("llama") / "engine")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Exits behind 0, 2 and the last layer; two query heads share a key."""
    fast = optimize(tiny_llava(), plan(gate(0), gate(2), gate(3)), compile=False)
    return fast, exported(fast, tmp_path_factory.mktemp("llava") / "engine")


def close(ours, theirs) -> None:
    torch.testing.assert_close(torch.as_tensor(ours), theirs, rtol=1e-4, atol=1e-4)


def test_llava_prompts_and_answers(llava) -> None:
    """Rows of a batch leave behind different layers; text alone, padding, one token, several images."""
    fast, engine = llava
    seen = set()
    batches = [("titt", "ittt"), ("..ittt", "titttt"), ("tttt",), ("t",), ("it",), ("ti",), ("tiittit",)]
    for seed, layouts in enumerate([*[("titt", "ittt")] * 4, *batches]):
        ids, pixels, mask = image_prompt(*layouts, seed=seed)
        images = {} if pixels is None else {"pixel_values": pixels}
        want = fast(input_ids=ids, attention_mask=mask, **images, logits_to_keep=1)
        got = engine.prefill(ids, attention_mask=mask, **images)
        close(got.logits, want.logits[:, -1])
        assert got.exit_layer.tolist() == want.exit_layer.tolist()
        answer = engine.generate(ids, attention_mask=mask, **images, **OURS)
        known = fast.generate(input_ids=ids, attention_mask=mask, **images, **GREEDY)
        assert answer.tokens.tolist() == known[:, ids.shape[1] :].tolist()
        seen.update(answer.exit_layer.tolist())
    assert seen == {-1, 0, 2, 3}


def test_llava_two_turns(llava) -> None:
    """The second turn brings an image of its own."""
    fast, engine = llava
    for seed in range(3):
        ids, pixels, _ = image_prompt("titt", seed=seed)
        more, others, _ = image_prompt("ttitt", seed=seed + 10)
        want = fast(input_ids=ids, pixel_values=pixels)
        want = fast(input_ids=more, pixel_values=others, past_key_values=want.past_key_values)
        got = engine.prefill(ids, pixel_values=pixels)
        got = engine.prefill(more, pixel_values=others, cache=got.cache)
        close(got.logits, want.logits[:, -1])
        assert got.exit_layer.tolist() == want.exit_layer.tolist()
        step = engine.decode(got.logits.argmax(-1), got.cache)
        theirs = fast(input_ids=want.logits[:, -1:].argmax(-1), past_key_values=want.past_key_values)
        close(step.logits, theirs.logits[:, -1])


def test_llama_with_skips_and_adapters(llama) -> None:
    fast, engine = llama
    seen = set()
    batches = [("tvvtt",), ("t",), ("vvt", "ttt"), ("ttvv",), ("tvvttt", "vvtttt", "tttttt")]
    for seed, layouts in enumerate([*batches, ("..tvvtt", "vvvtttt", ".tttttt")]):
        embeds, visual, mask = chunk(*layouts, seed=seed)
        inputs = {"inputs_embeds": embeds, "visual_mask": visual, "attention_mask": mask.long()}
        want = fast(**inputs, logits_to_keep=1)
        got = engine.prefill(**inputs)
        close(got.logits, want.logits[:, -1])
        assert got.exit_layer.tolist() == want.exit_layer.tolist()
        more, visual_too, _ = chunk(*["ttvt"] * len(layouts), seed=seed + 20)
        second = {"inputs_embeds": more, "visual_mask": visual_too}
        want = fast(**second, past_key_values=want.past_key_values, logits_to_keep=1)
        close(engine.prefill(**second, cache=got.cache).logits, want.logits[:, -1])
        answer = engine.generate(**inputs, **OURS)
        assert answer.tokens.tolist() == fast.generate(**inputs, **GREEDY).tolist()
        seen.update(answer.exit_layer.tolist())
    assert seen == {-1, 0, 1}
