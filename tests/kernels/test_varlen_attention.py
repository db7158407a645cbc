"""vte::varlen_attention: the reference against plain attention, and the Triton kernels against it in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close
from torch.library import opcheck

from vte_compile.kernels.varlen_attention import reference, varlen_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ROWS = {
    "one": ([7], [0]),
    "single tokens behind a past": ([1, 1, 1], [0, 5, 33]),
    "unequal, one empty": ([19, 0, 3, 34], [0, 4, 17, 1]),
}


def case(lengths, past, heads=4, kv_heads=2, size=64, dtype=torch.float64, seed=0, gaps=True):
    """The arguments of the op up to the caches, which are NaN where nothing was cached."""
    generator = torch.Generator().manual_seed(seed)
    tokens, batch = sum(lengths), len(lengths)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    starts = torch.randint(0, 4, (batch,), generator=generator, dtype=torch.int32)
    columns = max(n + p for n, p in zip(lengths, past, strict=True)) + 5
    caches = [torch.full((batch, kv_heads, columns, size), math.nan, dtype=dtype) for _ in range(2)]
    positions = []
    for b, (n, p) in enumerate(zip(lengths, past, strict=True)):
        steps = torch.randint(1, 4 if gaps else 2, (n + p,), generator=generator)
        of_row = steps.cumsum(0) - 1
        held = slice(int(starts[b]), int(starts[b]) + p)
        for cache in caches:
            cache[b, :, held] = random(kv_heads, p, size)
        positions.append(of_row[p:])
    at = torch.cat(positions)
    angles = at[:, None] * 100.0 ** (-torch.arange(size // 2, dtype=torch.float64) / (size // 2))
    query, key, value = random(tokens, heads, size), random(tokens, kv_heads, size), random(tokens, kv_heads, size)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    past_lengths = torch.tensor(past, dtype=torch.int32)
    return [query, key, value, *tables, cu_seqlens, past_lengths, starts, *caches]


def by_kernel(arguments, longest, *rest):
    """What the Triton kernels give; the caches are written."""
    from vte_compile.kernels.triton_varlen_attention import launch

    return launch(*arguments, longest, *rest)


def wider(arguments):
    return [x.double() if x.is_floating_point() else x.clone() for x in arguments]


def relative_error(actual, expected):
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def check(lengths, past, dtype, window=0, softcap=0.0, **options):
    """The kernels against the reference in float64, on the same numbers; what they must not write stays."""
    size = options.get("size", 64)
    arguments = [x.to(DEVICE) for x in case(lengths, past, dtype=dtype, **options)]
    expected_arguments = wider(arguments)
    untouched = arguments[8].isnan().clone()
    scale = size**-0.5
    expected = reference(*expected_arguments, scale, window, softcap)
    output = by_kernel(arguments, max(lengths), scale, window, softcap)
    assert output.dtype == dtype
    assert not output.isnan().any()  # all of it was written
    assert relative_error(output, expected) < TOLERANCE[dtype]
    for ours, theirs in zip(arguments[8:10], expected_arguments[8:10], strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())  # written where it is to be, and nowhere else
        assert relative_error(ours.nan_to_num(), theirs.nan_to_num()) < TOLERANCE[dtype]
    assert untouched.any()


# ---------------------------------------------------------------- the reference


def test_the_reference_is_causal_attention_of_each_row():
    arguments = case([5, 3], [0, 4], gaps=False)
    query, key, value, cos, sin, cu_seqlens, _, starts, keys, values = arguments
    before = int(starts[1])
    past = [cache[1, :, before : before + 4].clone() for cache in (keys, values)]
    output = reference(*arguments, 0.125, 0, 0.0)

    def turned(x):
        first, second = x.chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    for b, held in ((0, [x[:, :0] for x in past]), (1, past)):
        row = slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
        k, v = (torch.cat([p, x[row].transpose(0, 1)], 1) for p, x in zip(held, (turned(key), value), strict=True))
        k, v = (x.repeat_interleave(2, 0) for x in (k, v))
        tokens, columns = row.stop - row.start, k.shape[1]
        mask = torch.ones(tokens, columns, dtype=torch.bool).tril(columns - tokens)
        want = torch.nn.functional.scaled_dot_product_attention(
            turned(query)[row].transpose(0, 1), k, v, attn_mask=mask, scale=0.125
        )
        assert_close(output[row], want.transpose(0, 1), 1e-12)


def test_a_window_counts_columns_and_softcap_bends_scores():
    """Of what the row holds, whatever the positions are: each token as if its row began three columns before it."""
    arguments = case([6], [2])
    written = [x.clone() for x in arguments]
    near = reference(*written, 1.0, 4, 0.0)
    one = torch.tensor([0, 1], dtype=torch.int32)
    for i in range(6):
        seen = min(2 + i, 3)
        token, past = [x[i : i + 1] for x in arguments[:5]], torch.tensor([seen])
        begin = arguments[7] + 2 + i - seen
        assert_close(near[i : i + 1], reference(*token, one, past, begin, *written[8:], 1.0, 0, 0.0), 1e-12)
    plain, bent = (reference(*[x.clone() for x in arguments], 1.0, 0, cap) for cap in (0.0, 0.5))
    assert float((plain - bent).abs().max()) > 0.1


def last_only(arguments):
    """The same with a query of each row's last token alone, and whole tables of two equal halves."""
    query, key, value, cos, sin, cu_seqlens, past, *caches = [x.clone() for x in arguments]
    queries = query[cu_seqlens[1:].long() - 1]
    tables = [torch.cat([table, table], -1) for table in (cos, sin)]
    return [queries, key, value, *tables, cu_seqlens, past, *caches]


def test_the_reference_with_queries_of_last_tokens():
    arguments = case([5, 1, 3], [0, 2, 4])
    short = last_only(arguments)
    ones = torch.arange(4, dtype=torch.int32)
    ends = arguments[5][1:].long() - 1
    output = reference(*short, 0.125, 0, 0.0, ones)
    assert_close(output, reference(*arguments, 0.125, 0, 0.0)[ends], 1e-12)
    for ours, theirs in zip(short[8:10], arguments[8:10], strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("rows", ROWS)
def test_op(rows):
    lengths, past = ROWS[rows]
    opcheck(varlen_attention, (*case(lengths, past, dtype=torch.float32), max(lengths), 0.125, 0, 0.0))


def test_op_with_queries_of_last_tokens():
    ones = torch.arange(3, dtype=torch.int32)
    opcheck(varlen_attention, (*last_only(case([5, 2], [0, 3], dtype=torch.float32)), 5, 0.125, 0, 0.0, ones))


# ---------------------------------------------------------------- the kernels (interpreted, where there is no GPU)

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot run")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_kernel(rows, dtype):
    check(*ROWS[rows], dtype)


@pytest.mark.parametrize("size", [80, 96, 128, 256])
def test_head_sizes(size):
    check([5, 18], [3, 0], torch.float16, size=size)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 1), (8, 2)])
def test_heads(heads, kv_heads):
    check([17, 2], [0, 9], torch.float32, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize(("window", "softcap"), [(1, 0.0), (5, 0.0), (40, 0.0), (0, 2.0), (7, 0.7)])
def test_window_and_softcap(window, softcap):
    check([33, 4], [0, 21], torch.float32, window=window, softcap=softcap)


@pytest.mark.parametrize("past", [[0, 0, 0], [3, 0, 40]])
def test_queries_of_last_tokens(past):
    arguments = last_only(case([19, 1, 34], past, dtype=torch.float32))
    if not any(past):
        arguments[6] = None
    expected_arguments = [None if x is None else x.clone() for x in arguments]
    ones = torch.arange(4, dtype=torch.int32)
    expected = reference(*expected_arguments, 0.125, 0, 0.0, ones)
    arguments = [None if x is None else x.to(DEVICE) for x in arguments]
    output = by_kernel(arguments, 34, 0.125, 0, 0.0, ones.to(DEVICE))
    assert relative_error(output.cpu(), expected.double()) < 1e-5
    for ours, theirs in zip(arguments[8:10], expected_arguments[8:10], strict=True):
        assert relative_error(ours.cpu().nan_to_num(), theirs.double().nan_to_num()) < 1e-5


def test_inputs_that_are_views():
    """q, k and v as slices of one tensor, as a packed linear layer gives them."""
    arguments = case([9, 4], [0, 2], dtype=torch.float32)
    whole = torch.cat(arguments[:3], 1)
    views = [whole[:, :4], whole[:, 4:6], whole[:, 6:], *[x.clone() for x in arguments[3:]]]
    output = by_kernel([x.to(DEVICE) for x in views], 9, 0.125, 0, 0.0)
    assert_close(output.cpu(), reference(*arguments, 0.125, 0, 0.0), 1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="head size 48: expected one of 64, 80"):
        by_kernel(case([3], [0], size=48, dtype=torch.float32), 3, 1.0, 0, 0.0)
    with pytest.raises(ValueError, match="float64: expected float16"):
        by_kernel(case([3], [0]), 3, 1.0, 0, 0.0)
    arguments = case([3], [0], dtype=torch.float32)
    arguments[0] = arguments[0].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="last dim must be contiguous"):
        by_kernel(arguments, 3, 1.0, 0, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (200, 0.0), (0, 2.0), (200, 2.0)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_op_on_a_gpu(dtype, window, softcap):
    arguments = [x.cuda() for x in case([700, 124, 1], [0, 576, 699], dtype=dtype, heads=8, kv_heads=2, size=128)]
    expected = reference(*wider(arguments), 0.1, window, softcap)
    assert relative_error(varlen_attention(*arguments, 700, 0.1, window, softcap), expected) < TOLERANCE[dtype]
