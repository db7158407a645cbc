"""Scores and logits that are capped (Gemma 2): as the model itself has them.

Gemma 2 behind exits is in tests/test_windows.py, PaliGemma 2 in tests/test_families.py. Engines of both are in
test_ort_decoders.py and test_engine_decoders.py, tuning in test_tuning_multimodal.py; backend="vte" is in
test_backend_windows.py and test_backend.py.
"""

from __future__ import annotations

import copy
import functools
import logging

import pytest
import torch
from test_families import WITHOUT_ADAPTERS
from tiny_models import VOCAB, assert_relative, chunk, plan, tiny
from transformers import Gemma2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from vte_compile import Oracle, Plan, StaticExit, optimize
from vte_compile.capture import capture_chunk
from vte_compile.errors import UnsupportedModelError
from vte_compile.families.cache_name import CACHE, cache_of
from vte_compile.families.decoder import describe
from vte_compile.plan import SkippedAttention

FULL = {"layer_types": ["full_attention"] * 2}


@functools.cache
def gemma2():
    model = tiny("gemma2", num_hidden_layers=2)
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def whole():
    return optimize(gemma2(), Plan(), compile=False)


def test_equals_the_model():
    """One row, without a mask, and padded ones; then decode steps."""
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    for rows, mask in ((ids[:1], torch.ones(1, 9).long()), (ids, torch.tensor([[0] * 3 + [1] * 6, [1] * 9]))):
        real, positions = mask.bool(), (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            want = gemma2()(rows, attention_mask=mask, position_ids=positions, use_cache=True)
            out = whole()(rows, attention_mask=mask)
            assert_relative(out.logits[real], want.logits[real])
            for token in (5, 9):
                step = torch.full((len(rows), 1), token)
                mask = torch.cat([mask, torch.ones_like(step)], 1)
                given = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
                want = gemma2()(step, **given, **{CACHE: cache_of(want)})
                out = whole()(step, attention_mask=mask, **{CACHE: cache_of(out)})
                assert_relative(out.logits, want.logits)


@pytest.mark.shows("generate", "gemma2")
def test_generate_equals_the_model():
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    options = dict(attention_mask=mask, do_sample=False, max_new_tokens=8, pad_token_id=0)
    assert torch.equal(whole().generate(ids, **options), gemma2().generate(ids, **options))


@pytest.mark.shows("skips", "gemma2")
def test_a_skipped_attention(record_property):
    """Of a block whose attention has a norm behind it: as if that gave nothing."""
    record_property("note", WITHOUT_ADAPTERS)
    fast = optimize(whole(), Plan([StaticExit(0)], skips=[SkippedAttention(1)]))
    without = copy.deepcopy(gemma2())
    without.model.layers[1].self_attn.o_proj.weight.data.zero_()
    embeds, visual, real = chunk("ttvvvvttt", "..ttttttt")
    out = fast(inputs_embeds=embeds, visual_mask=visual, attention_mask=real.long())
    want = Oracle(without, plan(StaticExit(0))).forward(embeds, visual, real)
    assert out.exit_layer.tolist() == want.exit_layer.tolist() == [0, -1]
    assert_relative(out.logits, want.logits)


def test_caps_show():
    """Or the tests above would show little."""
    embeds, *_ = chunk("tttttttt")
    with torch.no_grad():
        logits = [
            tiny("gemma2", num_hidden_layers=2, **without)(inputs_embeds=embeds).logits
            for without in ({}, {"attn_logit_softcapping": None}, {"final_logit_softcapping": None})
        ]
    for other in logits[1:]:
        assert float((other - logits[0]).abs().max() / logits[0].abs().max()) > 0.05


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_backend_refuses_other_caps_than_the_configs(softcap, caplog):
    """The model still gives what it gives uncompiled."""
    torch._dynamo.reset()
    model = tiny("gemma2", num_hidden_layers=2)
    model.model.layers[1].self_attn.attn_logit_softcapping = softcap
    ids = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING), torch.no_grad():
        want = model(ids).logits
        assert_relative(torch.compile(model, backend="vte", options={"compile": False})(ids).logits, want)
    assert "layer 1: what softmax_1 takes are not products of queries and keys, capped by 2.0 as the" in caplog.text


def test_the_backend_refuses_to_lose_attention_weights(caplog):
    torch._dynamo.reset()
    model = tiny("gemma2", num_hidden_layers=2)
    ids = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING), torch.no_grad():
        want = model(ids, output_attentions=True).attentions
        got = torch.compile(model, backend="vte", options={"compile": False})(ids, output_attentions=True).attentions
    for ours, theirs in zip(got, want, strict=True):
        assert_relative(ours, theirs)
    assert "are used for more than to weigh the values" in caplog.text


class Uncapped(Gemma2ForCausalLM):
    """As PaliGemma was in transformers 5.17: its config speaks of capped logits, its forward gives others."""

    def forward(self, input_ids=None, inputs_embeds=None, position_ids=None, use_cache=None, **kwargs):
        hidden = self.model(input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=use_cache)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden.last_hidden_state))


def test_a_model_that_does_not_do_as_its_config_says():
    model = copy.deepcopy(gemma2())
    model.__class__ = Uncapped
    embeds, visual, _ = chunk("ttvvvvttt")
    with torch.no_grad():
        want = model(inputs_embeds=embeds).logits
        assert float((gemma2()(inputs_embeds=embeds).logits - want).abs().max()) > 0.1
        assert_relative(optimize(model, Plan(), compile=False)(inputs_embeds=embeds).logits, want)
        assert_relative(Oracle(model, Plan()).forward(embeds, visual).logits, want)


def test_attention_that_caps_nothing_is_refused():
    model = tiny("gemma2", num_hidden_layers=1)
    model.config._attn_implementation = "sdpa"
    for use in (Oracle, lambda model, plan: optimize(model, plan, compile=False)):
        with pytest.raises(UnsupportedModelError, match=r"does not cap scores, .* attn_implementation='eager'"):
            use(model, Plan())


def test_capped_logits_alone_are_taken_by_engines():
    """Their graphs give them, too."""
    model = tiny("gemma2", num_hidden_layers=2, attn_logit_softcapping=None, **FULL)
    graph = capture_chunk(describe(model))
    embeds, *_ = chunk("tttttttt", "tttttttt")
    positions, lengths = torch.arange(8).expand(2, -1), torch.full((2,), 8)
    past = [torch.zeros(2, 2, 3, 8) for _ in range(4)]
    with torch.no_grad():
        logits, *_ = graph.module(embeds, positions, lengths, torch.zeros_like(lengths), *past)
        assert_relative(logits, model(inputs_embeds=embeds).logits)
