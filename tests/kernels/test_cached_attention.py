"""cached_attention against a loop over rows, tokens and heads; rotary against the model's own rotation."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vte_compile.kernels.cached_attention import cached_attention, rotary


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def inputs(new, past, columns, heads=4, kv_heads=2, size=8, value_size=8, dtype=torch.float32, **more):
    batch, tokens = len(new), max(new)
    query, key = random(batch, tokens, heads * size, dtype=dtype), random(batch, tokens, kv_heads * size, dtype=dtype)
    value = random(batch, tokens, kv_heads * value_size, dtype=dtype)
    caches = [random(batch, kv_heads, columns, s, dtype=dtype) for s in (size, value_size)]
    ids = torch.tensor(more["blocks"]) if "blocks" in more else None
    options = (0.3, more.get("window", 0), ids, more.get("softcap", 0.0))
    return [query, key, value, *caches, torch.tensor(past), torch.tensor(new), heads, kv_heads, *options]


def naive(query, key, value, past_key, past_value, past, new, heads, kv_heads, scale, window, blocks, softcap):
    """Of each real token and head, in float64."""
    batch, tokens, _ = query.shape
    outputs = torch.full((batch, tokens, heads, past_value.shape[3]), torch.nan, dtype=torch.float64)
    for b in range(batch):
        filled = int(past[b])
        for t in range(int(new[b])):
            for head in range(heads):
                kv_head = head * kv_heads // heads
                own = blocks is not None and int(blocks[b, t]) >= 0
                # A window does not limit a token's own block.
                first = max(0, filled + t + 1 - window) if window else 0
                before = range(max(0, first - filled), t + 1)
                seen = [s for s in range(int(new[b])) if s in before or (own and blocks[b, s] == blocks[b, t])]
                keys = key[b, seen].unflatten(-1, (kv_heads, -1))[:, kv_head]
                keys = torch.cat([past_key[b, kv_head, first:filled], keys]).double()
                values = value[b, seen].unflatten(-1, (kv_heads, -1))[:, kv_head]
                values = torch.cat([past_value[b, kv_head, first:filled], values]).double()
                scores = keys @ query[b, t].unflatten(-1, (heads, -1))[head].double() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                outputs[b, t, head] = scores.softmax(0) @ values
    return outputs.flatten(-2)


CASES = {
    "a prompt": dict(new=[5], past=[0], columns=0),
    "one token": dict(new=[1], past=[0], columns=0),
    "room that is free": dict(new=[5], past=[0], columns=7),
    "rows of unequal lengths": dict(new=[5, 3, 1], past=[0, 0, 0], columns=2),
    "decode": dict(new=[1, 1, 1], past=[7, 2, 0], columns=7),
    "a chunk behind a past": dict(new=[4, 3], past=[3, 9], columns=11),
    "heads alone": dict(new=[3], past=[2], columns=2, heads=3, kv_heads=3, size=5, value_size=7),
    "one head for all": dict(new=[3, 2], past=[1, 0], columns=3, heads=6, kv_heads=1),
    "a window": dict(new=[5, 3, 1], past=[0, 3, 4], columns=5, window=3),
    "a window of one": dict(new=[3], past=[2], columns=2, window=1),
    "blocks": dict(new=[5, 3], past=[0, 2], columns=3, blocks=[[-1, 0, 0, 1, 1], [0, -1, 0, -1, -1]]),
    "blocks and a window": dict(new=[5], past=[2], columns=2, window=2, blocks=[[-1, 0, 0, 0, -1]]),
    "capped scores": dict(new=[5, 3, 1], past=[0, 3, 4], columns=5, window=3, softcap=0.5),
    "capped scores of blocks": dict(new=[3], past=[2], columns=2, blocks=[[0, 0, -1]], softcap=0.5),
    "bfloat16": dict(new=[5, 3], past=[0, 2], columns=4, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_naive(case) -> None:
    given = inputs(**case)
    _, key, value, past_key, past_value, past, new, _, kv_heads, *_ = given
    output, *caches = cached_attention(*given)
    expected = naive(*given)
    real = ~expected.isnan()
    tolerance = 3e-2 if output.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output[real].double(), expected[real], rtol=tolerance, atol=tolerance)
    for b, (filled, count) in enumerate(zip(past.tolist(), new.tolist(), strict=True)):
        for cache, before, added in zip(caches, (past_key, past_value), (key, value), strict=True):
            assert torch.equal(cache[b, :, :filled], before[b, :, :filled])
            heads_first = added[b, :count].unflatten(-1, (kv_heads, -1)).transpose(0, 1)
            assert torch.equal(cache[b, :, filled : filled + count], heads_first)


def test_what_is_free_or_padding_is_never_read() -> None:
    given = inputs(new=[4, 2], past=[3, 1], columns=9)
    poisoned = [t.clone() if isinstance(t, torch.Tensor) else t for t in given]
    for b, filled in enumerate((3, 1)):
        poisoned[3][b, :, filled:] = poisoned[4][b, :, filled:] = torch.nan
    for tensor in poisoned[:3]:
        tensor[1, 2:] = torch.inf
    want, got = cached_attention(*given)[0], cached_attention(*poisoned)[0]
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1, :2], want[1, :2])


def test_rotary_is_the_models_rotation() -> None:
    x, angles = random(3, 5, 4 * 8), random(1, 5, 4).repeat(1, 1, 2)
    heads_second = x.unflatten(-1, (4, 8)).transpose(1, 2)
    want, _ = apply_rotary_pos_emb(heads_second, heads_second, angles.cos(), angles.sin())
    got = rotary(x, angles.cos()[..., :4], angles.sin()[..., :4], 4)
    torch.testing.assert_close(got, want.transpose(1, 2).flatten(-2))


def test_ops_are_sound() -> None:
    torch.library.opcheck(cached_attention, tuple(inputs(new=[4, 2], past=[3, 1], columns=9)))
    blocks = [[0, 0, -1, 1], [-1] * 4]
    torch.library.opcheck(cached_attention, tuple(inputs([4, 2], [3, 1], columns=9, window=2, blocks=blocks)))
    torch.library.opcheck(rotary, (random(3, 5, 32), random(3, 5, 4), random(3, 5, 4), 4))
