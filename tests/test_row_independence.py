"""Each row of a batch gets what it would get alone: its exit, its logits, its tokens.

Prompts are drawn: how many rows, where images and padding stand, which gates fire. The gates' thresholds are so that
rows of one batch leave at different layers, or never.
"""

from __future__ import annotations

import functools

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import (
    C,
    assert_relative,
    gate,
    image_prompt,
    one_thread,  # noqa: F401
    optimized,
)

from vte_compile import StaticExit

TOKENS = 4
SETTINGS = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
# Random gates with thresholds about which the margins of random prompts scatter: exits at 0, 1, 2, and never.
EXITS = {
    "gates": (gate(0, 0.5), gate(1, 0.5), gate(2, 0.5)),
    "gates, then static": (gate(0, 0.5), gate(1, 0.5), StaticExit(2)),
    "static": (StaticExit(1),),
}
cached_optimized = functools.cache(lambda name, exits: optimized(name, *EXITS[exits]))


def pad(row: str, width: int, side: str) -> str:
    missing = width - len(row)
    left = {"left": missing, "right": 0, "both": missing // 2}[side]
    return "." * left + row + "." * (missing - left)


def check(fast, prompt, mask):
    """Batch against solo runs. ``prompt(rows)`` gives the inputs of some rows, ``mask`` [B, S] says what is real."""

    def generate(rows, columns):
        with torch.no_grad():
            return fast.generate(
                **prompt(rows, columns),
                attention_mask=mask[rows][:, columns],
                do_sample=False,
                max_new_tokens=TOKENS,
                pad_token_id=0,
            )

    everything = slice(None)
    batch = list(range(len(mask)))
    together = fast(**prompt(batch, everything), attention_mask=mask)
    tokens = generate(batch, everything)
    assert tokens.exit_layer.tolist() == together.exit_layer.tolist()
    for b in batch:
        columns = mask[b].nonzero()[:, 0]
        alone = fast(**prompt([b], columns))
        assert alone.exit_layer.tolist() == [together.exit_layer[b]]
        assert_relative(together.logits[b, columns], alone.logits[0])
        assert not together.logits[b, ~mask[b].bool()].any()
        lengths = alone.past_key_values.lengths[:, 0].tolist()
        assert together.past_key_values.lengths[:, b].tolist() == lengths
        solo = generate([b], columns)
        assert tokens[b, -TOKENS:].tolist() == solo[0, -TOKENS:].tolist()
        assert solo.exit_layer.tolist() == [together.exit_layer[b]]
    return together.exit_layer.tolist()


# Always a token or two of a question, except where the alphabet ends a prompt in an image.
rows = st.lists(st.text("tv", min_size=1, max_size=8), min_size=1, max_size=4)
side = st.sampled_from(["left", "right", "both"])


@SETTINGS
@given(
    layouts=rows,
    sides=st.lists(side, min_size=4, max_size=4),
    exits=st.sampled_from(list(EXITS)),
    seed=st.integers(0, 99),
)
def test_language_model(layouts, sides, exits, seed):
    """Visual tokens anywhere, none, only, or last."""
    width = max(map(len, layouts))
    padded = [pad(layout, width, s) for layout, s in zip(layouts, sides, strict=False)]
    embeds = torch.randn(len(padded), width, C, generator=torch.Generator().manual_seed(seed))
    visual = torch.tensor([[c == "v" for c in layout] for layout in padded])
    mask = torch.tensor([[int(c != ".") for c in layout] for layout in padded])

    def prompt(rows, columns):
        return {"inputs_embeds": embeds[rows][:, columns], "visual_mask": visual[rows][:, columns]}

    check(cached_optimized("llama", exits), prompt, mask)


@SETTINGS
@given(
    layouts=st.lists(st.text("ti", min_size=1, max_size=4).map(lambda s: "t" + s), min_size=1, max_size=3),
    sides=st.lists(side, min_size=3, max_size=3),
    exits=st.sampled_from(list(EXITS)),
    seed=st.integers(0, 99),
)
def test_llava(layouts, sides, exits, seed):
    """Images anywhere: none, several, in a row, at the end."""
    layouts = [layout.replace("i", "vvvv") for layout in layouts]
    width = max(map(len, layouts))
    padded = [pad(layout, width, s) for layout, s in zip(layouts, sides, strict=False)]
    ids, pixels, mask = image_prompt(*padded, seed=seed)
    counts = [layout.count("v") // 4 for layout in padded]

    def prompt(rows, columns):
        own = [i for b in rows for i in range(sum(counts[:b]), sum(counts[: b + 1]))]
        images = {"pixel_values": pixels[own]} if own else {}
        return {"input_ids": ids[rows][:, columns], **images}

    check(cached_optimized("llava", exits), prompt, mask)


def test_the_drawn_plans_make_rows_leave_at_different_layers():
    """Or the two tests above would show little."""
    embeds = torch.randn(24, 9, C, generator=torch.Generator().manual_seed(0))
    visual = torch.zeros(24, 9, dtype=torch.bool)
    visual[:, 1:5] = True
    exits = cached_optimized("llama", "gates")(inputs_embeds=embeds, visual_mask=visual).exit_layer.tolist()
    assert set(exits) == {-1, 0, 1, 2}
