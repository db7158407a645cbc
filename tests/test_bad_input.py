"""Wrong plans, models and arguments: each a clear error that says what and where."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from tiny_families import tiny_family
from tiny_models import (
    LAYERS,
    TINY,
    chunk,
    image_prompt,
    one_thread,  # noqa: F401
    optimized,
    plan,
    shared_model,
    tiny,
    tiny_llava,
)
from torch import nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    StaticCache,
)

from vte_compile import GateExit, Oracle, Plan, StaticExit, optimize
from vte_compile.errors import CaptureError, InputError, PlanError, PlanMismatchError, UnsupportedModelError
from vte_compile.families.cache_name import CACHE, CACHE_NAMES
from vte_compile.fingerprint import Fingerprint

IDS = torch.tensor([[5, 6, 7], [8, 9, 3]])


@pytest.fixture(scope="module")
def fast():
    return optimized("llama", StaticExit(1))


@pytest.fixture(scope="module")
def llava():
    return optimized("llava", StaticExit(1))


# ---------------------------------------------------------------- plans


def test_plan_for_another_model():
    other = LlamaForCausalLM(LlamaConfig(**TINY))  # the same sizes, other weights
    for_other = Plan([StaticExit(1)], Fingerprint.of(other))
    for model in (tiny(), optimized("llama")):
        with pytest.raises(PlanMismatchError, match=r"another model \(weights: layers\.0"):
            optimize(model, for_other, compile=False)


def test_layer_out_of_range_and_gates_of_the_wrong_width():
    for model in (shared_model("llava"), optimized("llava")):
        with pytest.raises(PlanMismatchError, match=r"exits\[0\]\.layer: 4 .*0\.\.3"):
            optimize(model, plan(StaticExit(LAYERS)))
        with pytest.raises(PlanMismatchError, match=r"exits\[0\]\.w1: is for hidden size 4, .* 32"):
            optimize(model, plan(GateExit(0, torch.ones(4, 8), torch.ones(2, 4))))


def test_corrupt_plan_beside_the_checkpoint(tmp_path):
    tiny().save_pretrained(tmp_path)
    plan(StaticExit(1)).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "vte_plan.json").write_text((tmp_path / "vte_plan.json").read_text()[:40])
    with pytest.raises(PlanError, match=r"vte_plan\.json"):
        optimize(model, compile=False)


# ---------------------------------------------------------------- models


def test_no_decoder():
    with pytest.raises(UnsupportedModelError, match=r"Linear: no decoder found.*get_decoder"):
        optimize(nn.Linear(2, 2), Plan())
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8, n_positions=16))
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel: no decoder found.*layers, norm, rotary_emb"):
        optimize(gpt2, Plan())
    with pytest.raises(UnsupportedModelError, match="no language-modelling head"):
        optimize(LlamaModel(LlamaConfig(**TINY)), Plan())


def test_positions_the_graph_would_get_wrong():
    """A check on a short text would not notice these."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="dynamic rotary"):
        optimize(tiny(rope_parameters=rope), Plan())
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    with pytest.raises(UnsupportedModelError, match=r"3-D.* of which its LlamaRotaryEmbedding knows nothing"):
        optimize(tiny(rope_parameters=rope), Plan())


def test_multimodal_positions_with_more_than_embeddings():
    """What a decoder takes besides is not known."""
    model = tiny_family("qwen2_vl")
    decoder = model.model.language_model

    class Other(type(decoder)):
        def forward(self, inputs_embeds=None, position_ids=None, audio_embeds=None, **kwargs):
            raise NotImplementedError

    decoder.__class__ = Other
    for use in (Oracle, lambda model, plan: optimize(model, plan, compile=False)):
        with pytest.raises(UnsupportedModelError, match="rotary positions and takes audio_embeds besides embeddings"):
            use(model, Plan())


def test_placement(caplog):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**TINY))
    with pytest.raises(UnsupportedModelError, match="spread over meta"):
        optimize(model, Plan())
    model = tiny()
    model.model.layers[1].to("meta")
    with pytest.raises(UnsupportedModelError, match="cpu, meta"):
        optimize(model, Plan())


def test_more_than_decoder_and_head():
    """Granite divides its logits outside of both; dropped silently, tokens would be sampled wrongly."""
    model = GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=8.0)).eval()
    with pytest.raises(CaptureError, match="GraniteForCausalLM does not give the model's logits"):
        optimize(model, Plan(), compile=False)


# ---------------------------------------------------------------- visual tokens


def test_no_visual_token_id_known():
    model = tiny_llava()
    model.config.image_token_id = None
    fast = optimize(model, plan(StaticExit(1)), compile=False)
    with pytest.raises(InputError, match=r"no visual token id is known.*image_token_id"):
        fast(input_ids=torch.tensor([[3, 4, 5]]))
    with pytest.raises(InputError, match="no visual token id is known"):
        fast.generate(input_ids=torch.tensor([[3, 4, 5]]), max_new_tokens=2)
    told = fast(input_ids=torch.tensor([[3, 4, 5]]), visual_mask=torch.zeros(1, 3, dtype=torch.bool))
    assert told.exit_layer.tolist() == [-1]
    assert optimize(fast, Plan())(input_ids=torch.tensor([[3, 4, 5]])).exit_layer.tolist() == [-1]


def test_embeddings_do_not_say_what_is_visual(fast, llava):
    embeds = chunk("tvvtt")[0]
    for model in (fast, llava):
        with pytest.raises(InputError, match="visual_mask"):
            model(inputs_embeds=embeds)
        with pytest.raises(InputError, match="visual_mask"):
            model.generate(inputs_embeds=embeds, max_new_tokens=2)
    assert optimized("llama")(inputs_embeds=embeds).exit_layer.tolist() == [-1]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 4, dtype=torch.bool), r"bool tensor of shape \[2, 3\].*got bool of shape \[2, 4\]"),
        (torch.ones(1, 3, dtype=torch.bool), r"got bool of shape \[1, 3\]"),
        (torch.ones(3, dtype=torch.bool), r"got bool of shape \[3\]"),
        (torch.ones(2, 3, dtype=torch.long), r"got int64 of shape \[2, 3\]"),
    ],
)
def test_visual_mask(fast, mask, message):
    with pytest.raises(InputError, match=message):
        fast(input_ids=IDS, visual_mask=mask)
    with pytest.raises(InputError, match=message):
        fast.generate(input_ids=IDS, visual_mask=mask, max_new_tokens=2)


def test_visual_mask_of_turn_two(fast):
    cache = DynamicCache()
    first = fast.generate(input_ids=IDS, max_new_tokens=2, pad_token_id=0, past_key_values=cache)
    ids = torch.cat([first, IDS], 1)
    with pytest.raises(InputError, match=r"visual_mask: expected a bool tensor of shape \[2, 4\]"):
        fast.generate(input_ids=ids, past_key_values=cache, visual_mask=torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("exits", [(), (StaticExit(1),)], ids=["lossless", "exits"])
def test_pixel_values_without_placeholders(exits):
    model = optimized("llava", *exits)
    pixels = image_prompt("titt")[1]
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(
        InputError, match=r"pixel_values was given, but input_ids holds no image placeholder \(ids \[60"
    ):
        model(input_ids=ids, pixel_values=pixels)
    with pytest.raises(InputError, match="pixel_values was given, but"):
        model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=2)


def test_placeholders_and_images_of_different_number(llava):
    ids, pixels, _ = image_prompt("tiitt")
    with pytest.raises(ValueError, match=r"(?i)image features and image tokens do not match"):
        llava(input_ids=ids, pixel_values=pixels[:1])


def test_language_model_takes_no_images(fast):
    with pytest.raises((InputError, TypeError), match="pixel_values"):
        fast(input_ids=IDS, pixel_values=image_prompt("titt")[1])


# ---------------------------------------------------------------- the forward's other arguments


def test_both_or_neither(fast):
    embeds = torch.zeros(2, 3, 32)
    for inputs in ({}, {"input_ids": IDS, "inputs_embeds": embeds}):
        with pytest.raises(InputError, match="exactly one of input_ids and inputs_embeds"):
            fast(**inputs)


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (3,), (2, 1, 3, 3)], ids=str)
def test_attention_mask(fast, shape):
    with pytest.raises(InputError, match=r"attention_mask: expected shape \[2, 3\]"):
        fast(input_ids=IDS, attention_mask=torch.ones(shape))


def test_row_without_a_token(fast):
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(InputError, match="attention_mask: row 1 has no token"):
        fast(input_ids=IDS, attention_mask=mask)
    cache = fast(input_ids=IDS).past_key_values
    with pytest.raises(InputError, match="attention_mask: no row has a token"):
        fast(input_ids=IDS, attention_mask=torch.zeros(2, 3), past_key_values=cache)


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (3,), (3, 2, 3)], ids=str)
def test_position_ids(fast, shape):
    with pytest.raises(InputError, match=r"position_ids: expected shape \[2, 3\]"):
        fast(input_ids=IDS, position_ids=torch.ones(shape, dtype=torch.long))


def test_a_cache_has_two_names(fast):
    """transformers 5.24 calls it cache; the older name is taken as well, and never both."""
    first = fast(input_ids=IDS)
    outputs = [fast(input_ids=IDS[:, :1], **{name: copy.copy(first[CACHE])}) for name in CACHE_NAMES]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert outputs[0][CACHE].get_seq_length() == IDS.shape[1] + 1
    with pytest.raises(InputError, match="Pass the cache once"):
        fast(input_ids=IDS[:, :1], **dict.fromkeys(CACHE_NAMES, first[CACHE]))


def test_caches(fast):
    model = shared_model("llama")
    with pytest.raises(InputError, match="past_key_values: a StaticCache cannot hold"):
        fast(input_ids=IDS, past_key_values=StaticCache(config=model.config, max_cache_len=8))
    with torch.no_grad():
        filled = model(input_ids=IDS).past_key_values
    with pytest.raises(InputError, match="another model cached"):
        fast(input_ids=IDS, past_key_values=filled)
    with pytest.raises(InputError, match="another model cached"):
        fast.generate(input_ids=torch.cat([IDS, IDS], 1), past_key_values=filled, max_new_tokens=2)
    with pytest.raises(InputError, match="past_key_values: a tuple"):
        fast(input_ids=IDS, past_key_values=((torch.zeros(1), torch.zeros(1)),))
    ours = fast(input_ids=IDS).past_key_values
    for ids in (IDS[:1], IDS[:1, :1], torch.cat([IDS, IDS])):
        with pytest.raises(InputError, match=rf"cache holds 2 rows, the inputs {len(ids)}"):
            fast(input_ids=ids, past_key_values=ours)


def test_failed_call_leaves_the_cache_as_it_was(fast):
    cache = fast(input_ids=IDS).past_key_values
    lengths = cache.lengths.tolist()
    with pytest.raises(InputError):
        fast(input_ids=IDS, past_key_values=cache, attention_mask=torch.ones(2, 5))
    assert cache.lengths.tolist() == lengths
    assert fast(input_ids=IDS, past_key_values=cache).past_key_values.lengths.tolist() == [[6, 6]] * LAYERS


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_inner_outputs(fast, name):
    with pytest.raises(InputError, match=rf"{name}: .*original model, or Oracle"):
        fast(input_ids=IDS, **{name: True})
    with pytest.raises(InputError, match=name):
        fast.generate(input_ids=IDS, max_new_tokens=2, return_dict_in_generate=True, **{name: True})


def test_unknown_argument(fast):
    with pytest.raises(InputError, match="takes no image_sizs"):
        fast(input_ids=IDS, image_sizs=3)
    with pytest.raises(ValueError, match="visual_msk"):
        fast.generate(input_ids=IDS, visual_msk=IDS > 6, max_new_tokens=2)


def test_messages_are_logged_not_printed(capsys, caplog):
    with caplog.at_level(logging.INFO, "vte_compile"):
        optimized("llama")(input_ids=IDS)
    assert capsys.readouterr().out == ""
