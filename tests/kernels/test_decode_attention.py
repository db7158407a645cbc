"""vte::decode_attention: the reference against plain attention, and the Triton kernels against it in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close
from torch.library import opcheck

from vte_compile.kernels.decode_attention import decode_attention, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
PAGE = 8


def case(lengths, heads=4, kv_heads=2, size=64, dtype=torch.float64, paged=False, seed=0):
    """query, caches (NaN where nothing is), starts, ends, block table, positions."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    query = torch.randn(batch, heads, size, generator=generator, dtype=torch.float64).to(dtype)
    starts = torch.randint(0, 4, (batch,), generator=generator, dtype=torch.int32)
    ends = starts + torch.tensor(lengths, dtype=torch.int32)
    columns = -(-(int(ends.max()) + 2) // PAGE) * PAGE
    caches = [torch.full((batch, kv_heads, columns, size), math.nan, dtype=dtype) for _ in range(2)]
    positions = torch.zeros(batch, columns, dtype=torch.int32)
    for b, length in enumerate(lengths):
        held = slice(int(starts[b]), int(ends[b]))
        for cache in caches:
            filled = torch.randn(kv_heads, length, size, generator=generator, dtype=torch.float64)
            cache[b, :, held] = filled.to(dtype)
        positions[b, held] = torch.randint(1, 4, (length,), generator=generator).cumsum(0).int()
    if not paged:
        return [query, *caches, starts, ends, None, positions]
    pages = columns // PAGE
    order = torch.randperm(batch * pages, generator=generator)
    table = order.view(batch, pages).int()
    pools = [torch.empty(batch * pages, kv_heads, PAGE, size, dtype=dtype) for _ in range(2)]
    pool_positions = torch.empty(batch * pages, PAGE, dtype=torch.int32)
    for pool, cache in zip(pools, caches, strict=True):
        pool[order] = cache.unflatten(2, (pages, PAGE)).transpose(1, 2).flatten(0, 1)
    pool_positions[order] = positions.view(batch * pages, PAGE)
    return [query, *pools, starts, ends, table, pool_positions]


def placed(arguments):
    return [None if x is None else x.to(DEVICE) for x in arguments]


def wider(arguments):
    return [x.double() if x is not None and x.is_floating_point() else x for x in arguments]


def check(lengths, dtype, window=0, softcap=0.0, processors=None, **options):
    from vte_compile.kernels.triton_decode_attention import launch

    arguments = placed(case(lengths, dtype=dtype, **options))
    scale = arguments[0].shape[-1] ** -0.5
    expected = reference(*wider(arguments), scale, window, softcap)
    output = launch(*arguments, max(lengths), scale, window, softcap, processors)
    assert output.dtype == dtype
    assert not output.isnan().any()
    error = (output.double() - expected).abs().max() / expected.abs().max()
    assert float(error) < TOLERANCE[dtype]


def test_the_reference_is_attention_to_each_rows_columns():
    query, keys, values, starts, ends, _, _ = arguments = case([5, 9])
    output = reference(*arguments, 0.125, 0, 0.0)
    for b in range(2):
        held = slice(int(starts[b]), int(ends[b]))
        k, v = (x[b, :, held].repeat_interleave(2, 0) for x in (keys, values))
        want = torch.nn.functional.scaled_dot_product_attention(query[b, :, None], k, v, scale=0.125)[:, 0]
        assert_close(output[b], want, 1e-12)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (6, 0.0), (0, 0.8)])
def test_pages_in_order_are_a_cache(window, softcap):
    plain, paged = case([5, 19, 1]), case([5, 19, 1], paged=True)
    assert_close(reference(*paged, 0.125, window, softcap), reference(*plain, 0.125, window, softcap), 1e-12)


@pytest.mark.parametrize("paged", [False, True])
def test_op(paged):
    opcheck(decode_attention, (*case([5, 9], dtype=torch.float32, paged=paged), 9, 0.125, 0, 0.0))


# ---------------------------------------------------------------- the kernels (interpreted, where there is no GPU)

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot run")


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_kernel(dtype, paged):
    check([1, 7, 33], dtype, paged=paged)


@pytest.mark.parametrize("size", [80, 96, 128, 256])
def test_head_sizes(size):
    check([20, 3], torch.float16, size=size)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (20, 1), (6, 2)])
def test_heads(heads, kv_heads):
    check([17, 2], torch.float32, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(1, 0.0), (30, 0.0), (0, 2.0), (7, 0.7)])
def test_window_and_softcap(window, softcap, paged):
    check([33, 4], torch.float32, window=window, softcap=softcap, paged=paged)


def test_splits_of_rows_that_differ():
    """The short row has splits without columns, and with a window most splits of the long one see nothing."""
    check([400, 3], torch.float32, processors=32)
    check([400, 3], torch.float32, processors=32, window=9)


def test_how_columns_are_split():
    from vte_compile.kernels.triton_decode_attention import split_columns

    for longest in (1, 127, 640, 3000):
        for programs in (1, 32, 1024):
            splits, per_split = split_columns(longest, programs, 132, 64)
            assert per_split % 64 == 0
            assert (splits - 1) * per_split < longest <= splits * per_split
            assert splits == 1 or per_split >= 128
    assert split_columns(4096, 32, 132, 64)[0] == 16  # fills the chip once over
    assert split_columns(4096, 1024, 132, 64)[0] == 1  # which is full


def test_refusals():
    from vte_compile.kernels.triton_decode_attention import launch

    arguments = case([3], dtype=torch.float32)
    with pytest.raises(ValueError, match="pass cache_positions"):
        launch(*arguments[:6], None, 3, 1.0, 4, 0.0)
    arguments[1] = arguments[1].mT.contiguous().mT
    with pytest.raises(ValueError, match="must be contiguous"):
        launch(*arguments, 3, 1.0, 0, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_op_on_a_gpu(dtype):
    arguments = placed(case([3000, 124, 1, 641], dtype=dtype, heads=8, size=128))
    expected = reference(*wider(arguments), 0.1, 0, 0.0)
    error = (decode_attention(*arguments, 3000, 0.1, 0, 0.0).double() - expected).abs().max() / expected.abs().max()
    assert float(error) < TOLERANCE[dtype]
