"""Sliding windows: after an exit they count what is left, in graphs as in the oracle."""

from __future__ import annotations

import pytest
import torch
from tiny_models import assert_relative, chunk, plan, tiny

from vte_compile import Oracle, Plan, StaticExit, optimize
from vte_compile.families.cache_name import CACHE, cache_of
from vte_compile.kernels.append_attention import append_and_attend, append_attention

WINDOWS = {
    "mistral": dict(num_hidden_layers=2, sliding_window=3),
    "qwen2": dict(num_hidden_layers=2, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "gemma2": dict(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"]),
}
"""In both layers, in the last, and there with scores that are capped."""


@pytest.mark.shows("exits")
@pytest.mark.parametrize("name", list(WINDOWS))
@pytest.mark.shows("second turn")
def test_equals_the_oracle(name):
    """Rows that exit and one of text, padded; a further turn with an image, and a decode step."""
    model = tiny(name, **WINDOWS[name])
    whole = optimize(model, Plan(), compile=False)
    for exits in ([], [StaticExit(0)]):
        fast, oracle = optimize(whole, plan(*exits)), Oracle(model, plan(*exits))
        cache, seen = None, None
        for turn, layouts in enumerate((("ttvvvvttt", "..ttttttt"), ("tvvtt", "ttttt"), ("t", "t"))):
            embeds, visual, real = chunk(*layouts, seed=turn)
            given = {} if cache is None else {CACHE: cache}
            mask = real if seen is None else torch.cat([seen, real], 1)
            out = fast(inputs_embeds=embeds, visual_mask=visual, attention_mask=mask.long(), **given)
            want = oracle.forward(embeds, visual, real, cache=None if turn == 0 else want.cache)  # noqa: F821
            assert out.exit_layer.tolist() == want.exit_layer.tolist()
            assert_relative(out.logits, want.logits)
            cache, seen = cache_of(out), mask
        assert "packed" in {key[0] for key in fast._vte_runner._programs}
        assert cache.lengths.T.tolist() == want.cache.lengths()


@pytest.mark.parametrize("window", [1, 3, 9, 10, 11])
def test_a_token_sees_the_last_columns(window):
    """As if the others were not there; rows that begin within the window, before and behind it."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    query, key, value = random(3, 4, 1, 8), random(3, 2, 1, 8), random(3, 2, 1, 5)
    keys, values = random(3, 2, 9, 8), random(3, 2, 9, 5)
    starts = torch.tensor([0, 4, 9])
    for rows in (starts, None):
        output, *grown = append_attention(query, key, value, keys, values, rows, None, window)
        for b in range(3):
            first = max(10 - window, 0 if rows is None else int(rows[b]))
            new, past = (query, key, value), (keys, values)
            row = [*(x[b : b + 1] for x in new), *(x[b : b + 1, :, first:] for x in past)]
            alone = append_attention(*row, None, None)
            torch.testing.assert_close(output[b : b + 1], alone[0])
        room = [torch.cat([past, torch.zeros_like(past[:, :, :1])], 2) for past in (keys, values)]
        assert torch.equal(append_and_attend(query, key, value, *room, rows, None, window), output)
        assert all(map(torch.equal, room, grown))
    torch.library.opcheck(append_attention, (query, key, value, keys, values, starts, None, window))
