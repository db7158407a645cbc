"""Prompts of a batch are packed: rows that differ run as one, and each is what it is alone; or row by row, aloud."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_models import (
    assert_close,
    assert_relative,
    chunk,
    gate,
    one_thread,  # noqa: F401
    optimized,
    plan,
    random_adapter,
    shared_model,
    tiny,
)
from torch import nn

from vte_compile import Oracle, Plan, StaticExit, optimize
from vte_compile.adapters import PIA
from vte_compile.plan import SkippedAttention
from vte_compile.runtime.steps import ExitStep
from vte_compile.runtime.visual_tokens import PackedRows, VisualTokens

EXITS = (gate(0, 0.5), gate(1, 0.5), StaticExit(2))
ROWS = ("..ttvvvvtt", ".....tvvtt", "tttttttttt", ".tvvvvvvvv", "tvvttvvttt")


def phases(fast) -> set[str]:
    """Of which programs were built so far."""
    return {key[0] for key in fast._vte_runner._programs}


@pytest.mark.parametrize("last", [False, True])
def test_a_batch_is_packed(last):
    fast = optimized("llama", *EXITS)
    embeds, visual, real = chunk(*ROWS)
    got = fast(inputs_embeds=embeds, visual_mask=visual, attention_mask=real, logits_to_keep=int(last))
    want = Oracle(shared_model("llama"), Plan(EXITS)).forward(embeds, visual, attention_mask=real)
    assert_relative(got.logits, want.logits[:, -1:] if last else want.logits)
    assert got.exit_layer.tolist() == want.exit_layer.tolist()
    assert len(set(got.exit_layer.tolist())) >= 2
    assert got.cache.lengths.T.tolist() == want.cache.lengths()
    assert "packed" in phases(fast)
    assert "prefill" not in phases(fast)


def test_a_static_exit_is_no_question_to_the_device():
    """Tensors without numbers, as if of a GPU that has not come so far: what rows hold the host knows."""
    row = VisualTokens.find(torch.tensor([False, True, True, False]))
    rows, stream = PackedRows([4, 3], [row, None]), torch.empty(1, 7, 8, device="meta")
    step = ExitStep([0, 1], [2, 3], layer=5, stream=0, dims=[[1], []], gate=None)
    kept, bounds = rows.at_exit(step, stream, [stream, torch.empty(3, dtype=torch.int32, device="meta")])
    assert (kept.shape, bounds.shape) == ((1, 5, 8), (3,))
    assert (rows.lengths, rows.exit_layers) == ([2, 3], [5, -1])


def test_one_prompt_is_not():
    """Nor its copies, as beams are, which run once."""
    fast = optimized("llama", *EXITS)
    embeds, visual, _ = chunk("tvvttvvttt")
    fast(inputs_embeds=embeds.repeat(3, 1, 1), visual_mask=visual.repeat(3, 1))
    assert phases(fast) == {"prefill"}


def test_copies_of_different_prompts():
    """Beams of two prompts: each runs once."""
    fast = optimized("llama", *EXITS)
    embeds, visual, real = (x.repeat_interleave(3, 0) for x in chunk(*ROWS[:2]))
    seen = []
    program = fast._vte_runner.packed_program(True)
    run = program.run
    program.run = lambda inputs, rows: seen.append(list(rows.lengths)) or run(inputs, rows)
    got = fast(inputs_embeds=embeds, visual_mask=visual, attention_mask=real, logits_to_keep=1)
    assert seen == [[8, 5]]
    alone = fast(inputs_embeds=embeds[::3], visual_mask=visual[::3], attention_mask=real[::3], logits_to_keep=1)
    assert torch.equal(got.logits, alone.logits.repeat_interleave(3, 0))
    assert got.cache.lengths.T.tolist() == [row for row in alone.cache.lengths.T.tolist() for _ in range(3)]


def test_decode_and_a_second_turn_behind_it():
    fast = optimized("llama", *EXITS)
    first, second, token = chunk(*ROWS), chunk(*(row[::-1] for row in ROWS), seed=2), chunk(*"ttttt", seed=1)
    oracle = Oracle(shared_model("llama"), Plan(EXITS))
    cache = want = None
    for embeds, visual, real in (first, token, second, token):
        got = fast(inputs_embeds=embeds, visual_mask=visual, attention_mask=_mask(cache, real), cache=cache)
        want = oracle.forward(embeds, visual, attention_mask=real, cache=None if want is None else want.cache)
        cache = got.cache
        assert_relative(got.logits, want.logits)
    assert cache.lengths.T.tolist() == want.cache.lengths()


def _mask(cache, real):
    """Of all columns so far; what was padding before stays so by itself."""
    return real if cache is None else torch.cat([torch.ones(len(real), cache.get_seq_length()).bool(), real], 1)


def test_adapters_know_their_row_and_run_row_by_row(caplog):
    """What they do depends on the row's prompt."""
    model, skip = tiny(), SkippedAttention(1, random_adapter(PIA))
    adapted = Plan(skips=[skip], exits=[StaticExit(2)])
    with caplog.at_level(logging.INFO, logger="vte_compile"):
        fast = optimize(model, adapted, compile=False)
        embeds, visual, real = chunk(*ROWS)
        got = fast(inputs_embeds=embeds, visual_mask=visual, attention_mask=real)
    want = Oracle(model, adapted).forward(embeds, visual, attention_mask=real)
    assert_relative(got.logits, want.logits)
    assert "prompts of a batch run one by one: adapters take means over the tokens of a row" in caplog.text
    assert "packed" not in phases(fast)


class MixingNorm(nn.Module):
    """A norm that looks at the token before."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.norm = norm.weight, norm

    def forward(self, x):
        return self.norm(x + 0.5 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


def test_what_mixes_tokens_by_itself_runs_row_by_row(caplog):
    """Found by its numbers: nothing in the graph's structure says so."""
    model = tiny()
    model.model.layers[1].post_attention_layernorm = MixingNorm(model.model.layers[1].post_attention_layernorm)
    with caplog.at_level(logging.INFO, logger="vte_compile"):
        fast = optimize(model, Plan(), compile=False)
        embeds, _, real = chunk("..tttttt", "tttttttt")
        got = fast(inputs_embeds=embeds, attention_mask=real)
    assert "packed rows differ from rows alone by" in caplog.text
    for b, start in enumerate((2, 0)):
        with torch.no_grad():
            assert_close(got.logits[b, start:], model(inputs_embeds=embeds[b : b + 1, start:]).logits[0], 1e-4)
    assert "packed" not in phases(fast)


def test_half_precision():
    model = tiny().to(torch.bfloat16)
    fast = optimize(model, plan(*EXITS), compile=False)
    embeds, visual, real = chunk(*ROWS)
    embeds = embeds.to(torch.bfloat16)
    together = fast(inputs_embeds=embeds, visual_mask=visual, attention_mask=real)
    assert "packed" in phases(fast)
    for b in range(len(ROWS)):
        alone = fast(inputs_embeds=embeds[b : b + 1, real[b]], visual_mask=visual[b : b + 1, real[b]])
        assert alone.exit_layer.tolist() == [int(together.exit_layer[b])]
        assert_relative(together.logits[b, real[b]].float(), alone.logits[0].float(), 3e-2)


def test_the_model_can_be_moved_to_another_dtype():
    fast = optimize(tiny(), plan(StaticExit(1)), compile=False)
    embeds, visual, real = chunk(*ROWS)
    inputs = {"visual_mask": visual, "attention_mask": real}
    single = fast(inputs_embeds=embeds, **inputs).logits
    double = fast.double()(inputs_embeds=embeds.double(), **inputs).logits
    assert double.dtype == torch.float64
    assert_relative(single.double(), double)
