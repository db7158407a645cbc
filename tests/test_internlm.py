"""InternLM-type blocks: other names, and one packed layer for q, k and v."""

from __future__ import annotations

import pytest
import torch
from internlm import with_intern_blocks
from marks import thorough
from tiny_models import (
    assert_relative,
    chunk,
    one_thread,  # noqa: F401
    plan,
    random_adapter,
    tiny,
)

from vte_compile import KeptAdapter, Oracle, SkippedAttention, StaticExit, optimize
from vte_compile.adapters import PIA, PlainAdapter
from vte_compile.families.blocks import block_parts

PARTS = [
    SkippedAttention(0, random_adapter(PIA)),
    KeptAdapter(1, random_adapter(PlainAdapter, 1)),
    SkippedAttention(3),
    StaticExit(1),
]


def internlm2():
    return with_intern_blocks(tiny())


@pytest.mark.parametrize("fold", [True, thorough(False)])
def test_skips_adapters_and_exits(fold):
    model = internlm2()
    fast, oracle = optimize(model, plan(*PARTS), compile=False, fold=fold), Oracle(model, plan(*PARTS))
    prompt, token = chunk("ttvvvt.", ".tvvttt"), chunk("t", "t", seed=1)[0]
    names = ("inputs_embeds", "visual_mask", "attention_mask")
    out, want = fast(**dict(zip(names, prompt, strict=True))), oracle.forward(*prompt)
    assert_relative(out.logits, want.logits)
    assert out.past_key_values.lengths.T.tolist() == want.cache.lengths()
    out = fast(inputs_embeds=token, past_key_values=out.past_key_values)
    assert_relative(out.logits, oracle.forward(token, cache=want.cache).logits)
    left = {name for name, _ in fast.named_parameters()}
    assert not any(name.startswith("model.layers.0.attention.") for name in left)
    assert {"model.layers.2.attention.wqkv.weight", "model.layers.0.feed_forward.w2.weight"} <= left


def test_the_packed_model_is_the_same_model():
    embeds = chunk("ttttt")[0]
    with torch.no_grad():
        assert_relative(internlm2()(inputs_embeds=embeds).logits, tiny()(inputs_embeds=embeds).logits)


def test_parts_by_internlm2_names():
    layer = internlm2().model.layers[0]
    parts = block_parts(layer)
    assert (parts.input_norm, parts.attention) == (layer.attention_norm, layer.attention)
    assert (parts.post_norm, parts.mlp) == (layer.ffn_norm, layer.feed_forward)
