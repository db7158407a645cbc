"""Blocks of tokens that attend to each other in both directions: read off a model's own masks, in graphs and oracle."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from test_families import GREEDY, assert_same, handed_over, optimized, oracle_of
from tiny_families import PREFIX, family_inputs, shared_family
from tiny_models import assert_relative, plan
from transformers import Gemma3ForConditionalGeneration

from vte_compile import StaticExit, optimize
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.cache_name import CACHE, cache_of
from vte_compile.families.token_blocks import allowed, blocks_of, continued_inputs, masks_of

CPU = torch.device("cpu")


def expected_mask(blocks, past):
    """Written out: which of past and own tokens each token attends to."""
    return [
        [j < past or j - past <= i or (b >= 0 and blocks[j - past] == b) for j in range(past + len(blocks))]
        for i, b in enumerate(blocks)
    ]


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("blocks", [[-1, 0, 0, -1, 1, 1, 1, -1], [0, 0, 0], [-1, -1], [2, -1, 2], [5]])
def test_mask_of_blocks_and_back(blocks, past):
    ids = torch.tensor([blocks])
    mask = allowed(ids, past + len(blocks))
    assert mask[0, 0].tolist() == expected_mask(blocks, past)
    found = blocks_of(mask, 1, len(blocks), -1, CPU)
    assert torch.equal(allowed(found, past + len(blocks)), mask)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert torch.equal(blocks_of({"full_attention": additive}, 2, len(blocks), -1, CPU), found.expand(2, -1))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_as_decoders_take_them(implementation):
    """A window limits what is before a token, not its block; eager attention adds masks to scores."""
    config = SimpleNamespace(_attn_implementation=implementation, sliding_window=2)
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1]])
    whole = masks_of(blocks, config)
    config.layer_types = ["sliding_attention", "full_attention"]
    masks = masks_of(blocks, config)
    assert torch.equal(masks["full_attention"], whole)
    assert whole.dtype == (torch.bool if implementation == "sdpa" else torch.float32)
    for mask, window in ((whole, 6), (masks["sliding_attention"], 2)):
        seen = mask if implementation == "sdpa" else mask == 0
        assert seen.shape == (1, 1, 6, 6)
        assert seen[0, 0].tolist() == [
            [i - window < j <= i or (i in (1, 2, 3) and j in (1, 2, 3)) for j in range(6)] for i in range(6)
        ]
    assert implementation == "sdpa" or (whole[0, 0, 0, 1] == -torch.inf)


def test_masks_of_no_blocks():
    assert blocks_of(None, 2, 3, 0, CPU).tolist() == [[0, 0, 0]] * 2
    ahead = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    ahead[..., 0, 2] = True  # the first token sees the last, and not the other way round
    ahead[..., 2, 0] = False
    window = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril().triu(-1)
    for mask in (ahead, window):
        with pytest.raises(UnsupportedModelError, match="attend to later ones, but not as blocks do"):
            blocks_of(mask, 1, mask.shape[2], -1, CPU)
    with pytest.raises(UnsupportedModelError, match="a mask of another form \\(str\\)"):
        blocks_of("mask", 1, 3, -1, CPU)
    with pytest.raises(InputError, match=r"token_type_ids: expected shape \[1, 5\], got \[1, 4\]"):
        continued_inputs({"token_type_ids": torch.zeros(1, 4)}, 1, 5, False)


@pytest.mark.parametrize("images", [0, 1], ids=["text", "image"])
@pytest.mark.shows("second turn")
@pytest.mark.parametrize("name", PREFIX)
def test_second_turn_of_a_prefix(name, images):
    """Text of a later turn is causal, one with an image sees itself in both directions: the model's own doing."""
    model, fast = shared_family(name), optimized(name)
    first, second = family_inputs(name, images=1), family_inputs(name, images=images, seed=1)
    length = first["input_ids"].shape[1]
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    # The model reads types by position, those of earlier tokens first.
    types = torch.zeros_like(mask)
    # An earlier prompt is no part of a later one's block, which a window would show.
    types[:, :length] = 1
    positions = torch.arange(length, mask.shape[1])[None]
    with torch.no_grad():
        cache = cache_of(model(**first, use_cache=True))
        whole = second | {"attention_mask": mask, "token_type_ids": types, "position_ids": positions + 1}
        want = model(**whole, **{CACHE: cache}).logits
    out = fast(**second, **{CACHE: cache_of(fast(**first))})
    assert_relative(out.logits, want)

    fast, oracle = optimized(name, "middle"), oracle_of(name, "middle")
    out = fast(**second, **{CACHE: cache_of(fast(**first))})
    turn = handed_over(name, second)
    if not images:
        turn["block_ids"] = torch.full_like(turn["block_ids"], -1)
    assert_same(out, oracle.forward(**turn, cache=oracle.forward(**handed_over(name, first)).cache))


@pytest.mark.parametrize(("name", "kind"), [("paligemma", "none"), ("paligemma2", "none"), ("paligemma", "suffix")])
def test_types_of_tokens(name, kind):
    """Without types, which is causal where attention is eager, and with those of a causal answer behind the prompt."""
    inputs = family_inputs(name, images=1)
    if kind == "none":
        del inputs["token_type_ids"]
        del inputs["attention_mask"]
    else:
        inputs["token_type_ids"][:, -3:] = 1
    with torch.no_grad():
        want = shared_family(name)(**inputs).logits
    assert_relative(optimized(name)(**inputs).logits, want)
    # (Such a model decodes what it is given types of.)
    ours = optimized(name).generate(**inputs, **GREEDY)
    assert torch.equal(ours, shared_family(name).generate(**inputs, **GREEDY))


def test_rows_run_one_by_one(caplog):
    """Packed attention is causal; the log says so. Rows are what they are alone."""
    name = "paligemma"
    inputs = family_inputs(name, images=[1, 0])
    with caplog.at_level(logging.INFO, logger="vte_compile.runtime.decoder_runner"):
        optimized(name)._vte_runner._unpacked.clear()
        optimized(name)(**inputs)
    assert "prompts of a batch run one by one: tokens attend to later ones of their block" in caplog.text


@pytest.mark.thorough
def test_compiled():
    """Through Inductor: images and windows, prefill with an exit, a second turn. (Decode steps attend uncompiled.)"""
    config = copy.deepcopy(shared_family("gemma3").config)
    config.text_config.num_hidden_layers, config.text_config.layer_types = 2, config.text_config.layer_types[:2]
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros by itself
    turns = [family_inputs("gemma3", images=1), family_inputs("gemma3", images=2, seed=1)]
    runs = []
    for compiled in (True, False):
        fast = optimize(model, plan(StaticExit(0)), compile=compiled)
        out = fast(**turns[0])
        runs.append((out, fast(**turns[1], **{CACHE: cache_of(out)})))
    for ours, theirs in zip(*runs, strict=True):
        assert ours.exit_layer.tolist() == theirs.exit_layer.tolist() == [0]
        assert_relative(ours.logits, theirs.logits)
