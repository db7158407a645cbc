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
    """query, caches (NaN where nothing is), starts, ends, block table."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    query = torch.randn(batch, heads, size, generator=generator, dtype=torch.float64).to(dtype)
    starts = torch.randint(0, 4, (batch,), generator=generator, dtype=torch.int32)
    ends = starts + torch.tensor(lengths, dtype=torch.int32)
    columns = -(-(int(ends.max()) + 2) // PAGE) * PAGE
    caches = [torch.full((batch, kv_heads, columns, size), math.nan, dtype=dtype) for _ in range(2)]
    for b, length in enumerate(lengths):
        held = slice(int(starts[b]), int(ends[b]))
        for cache in caches:
            filled = torch.randn(kv_heads, length, size, generator=generator, dtype=torch.float64)
            cache[b, :, held] = filled.to(dtype)
    if not paged:
        return [query, *caches, starts, ends, None]
    pages = columns // PAGE
    order = torch.randperm(batch * pages, generator=generator)
    table = order.view(batch, pages).int()
    pools = [torch.empty(batch * pages, kv_heads, PAGE, size, dtype=dtype) for _ in range(2)]
    for pool, cache in zip(pools, caches, strict=True):
        pool[order] = cache.unflatten(2, (pages, PAGE)).transpose(1, 2).flatten(0, 1)
    return [query, *pools, starts, ends, table]


def with_new_token(lengths, dtype=torch.float64, paged=False, rotated=False, **options):
    """A cache without each row's last column, that token's key and value, its tables, and what the op should see."""
    whole = case(lengths, dtype=dtype, paged=paged, **options)
    query, keys, values, _, ends, table = whole
    generator = torch.Generator().manual_seed(3)
    size, batch = query.shape[-1], len(query)
    new = [torch.randn(batch, keys.shape[1], size, generator=generator, dtype=torch.float64).to(dtype) for _ in "kv"]
    angles = torch.rand(batch, 1, size // 2, generator=generator, dtype=torch.float64) * 6
    halves = [angles.cos(), angles.sin()]
    tables = [torch.cat([half, half], -1)[:, 0].to(dtype) for half in halves]
    for b, end in enumerate(ends.tolist()):
        block, column = (b, end - 1) if table is None else (int(table[b, (end - 1) // PAGE]), (end - 1) % PAGE)
        for cache in (keys, values):
            cache[block, :, column] = math.nan
    return whole, [*new, *(tables if rotated else (None, None))]


def turned(x, cos, sin):
    """x [B, heads, D] rotated as models do."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def placed(arguments):
    return [None if x is None else x.to(DEVICE) for x in arguments]


def wider(arguments):
    return [x.double() if x is not None and x.is_floating_point() else x for x in arguments]


def check(lengths, dtype, window=0, softcap=0.0, processors=None, **options):
    from vte_compile.kernels.triton_decode_attention import launch

    arguments = placed(case(lengths, dtype=dtype, **options))
    scale = arguments[0].shape[-1] ** -0.5
    expected = reference(*wider(arguments), max(lengths), scale, window, softcap)
    output = launch(*arguments, max(lengths), scale, window, softcap, processors=processors)
    assert output.dtype == dtype
    assert not output.isnan().any()
    error = (output.double() - expected).abs().max() / expected.abs().max()
    assert float(error) < TOLERANCE[dtype]


def test_the_reference_is_attention_to_each_rows_columns():
    query, keys, values, starts, ends, _ = arguments = case([5, 9])
    output = reference(*arguments, 9, 0.125, 0, 0.0)
    for b in range(2):
        held = slice(int(starts[b]), int(ends[b]))
        k, v = (x[b, :, held].repeat_interleave(2, 0) for x in (keys, values))
        want = torch.nn.functional.scaled_dot_product_attention(query[b, :, None], k, v, scale=0.125)[:, 0]
        assert_close(output[b], want, 1e-12)


def test_a_window_is_a_later_start():
    query, keys, values, starts, ends, _ = arguments = case([5, 9, 3])
    later = torch.maximum(starts, ends - 4)
    want = reference(query, keys, values, later, ends, None, 9, 0.125, 0, 0.0)
    assert_close(reference(*arguments, 9, 0.125, 4, 0.0), want, 1e-12)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (6, 0.0), (0, 0.8)])
def test_pages_in_order_are_a_cache(window, softcap):
    plain, paged = case([5, 19, 1]), case([5, 19, 1], paged=True)
    assert_close(reference(*paged, 19, 0.125, window, softcap), reference(*plain, 19, 0.125, window, softcap), 1e-12)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_the_reference_appends(paged, rotated):
    whole, new = with_new_token([5, 9], paged=paged, rotated=rotated)
    by_hand = [None if x is None else x.clone() for x in whole]
    output = reference(*whole, 9, 0.125, 0, 0.0, *new)
    key, value, *tables = new
    if rotated:
        by_hand[0], key = (turned(x, *tables) for x in (by_hand[0], key))
    _, keys, values, _, ends, table = by_hand
    for b, end in enumerate(ends.tolist()):
        block, column = (b, end - 1) if table is None else (int(table[b, (end - 1) // PAGE]), (end - 1) % PAGE)
        keys[block, :, column], values[block, :, column] = key[b], value[b]
    assert_close(output, reference(*by_hand, 9, 0.125, 0, 0.0), 1e-12)
    for ours, theirs in zip(whole[1:3], (keys, values), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_op():
    opcheck(decode_attention, (*case([5, 9], dtype=torch.float32, paged=True), 9, 0.125, 0, 0.0))


def test_op_that_appends():
    whole, new = with_new_token([5, 9], dtype=torch.float32, rotated=True)
    opcheck(decode_attention, (*whole, 9, 0.125, 0, 0.0, *new))


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


@pytest.mark.parametrize(
    ("lengths", "dtype", "options"),
    [
        ([1, 7, 33], torch.float32, {}),
        ([1, 7, 33], torch.float16, {"paged": True}),
        ([1, 7, 33], torch.bfloat16, {"rotated": False, "size": 80}),
        ([9, 400], torch.float32, {"processors": 32, "heads": 6}),
        ([9, 4], torch.float32, {"window": 5, "softcap": 0.7}),
        ([400, 4], torch.float32, {"window": 300, "processors": 32}),
        ([9], torch.float32, {"window": 4, "ends": False}),
        ([9, 9], torch.float32, {"ends": False}),
        ([1], torch.float32, {"ends": False}),
    ],
)
def test_kernel_appends(lengths, dtype, options):
    """In the program of the last column; what is not the row's last column stays as it was."""
    from vte_compile.kernels.triton_decode_attention import launch

    options = dict(options)
    window, softcap = options.pop("window", 0), options.pop("softcap", 0.0)
    processors, given = options.pop("processors", None), options.pop("ends", True)
    whole, new = with_new_token(lengths, dtype=dtype, **{"rotated": True} | options)
    longest = max(lengths)
    if not given:  # caches whose rows begin at 0 and end together, as those of one row do
        caches = [x[:, :, :longest].nan_to_num() for x in whole[1:3]]
        whole = [whole[0], *caches, None, None, None]
    arguments, new = placed(whole), placed(new)
    expected_arguments, expected_new = [[None if x is None else x.clone() for x in wider(y)] for y in (arguments, new)]
    scale = arguments[0].shape[-1] ** -0.5
    expected = reference(*expected_arguments, longest, scale, window, softcap, *expected_new)
    output = launch(*arguments, longest, scale, window, softcap, *new, processors=processors)
    assert not output.isnan().any()
    assert float((output.double() - expected).abs().max() / expected.abs().max()) < TOLERANCE[dtype]
    for ours, theirs in zip(arguments[1:3], expected_arguments[1:3], strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert float((ours.double() - theirs).nan_to_num().abs().max()) < 4 * TOLERANCE[dtype]


def test_splits_of_rows_that_differ():
    """The short row has splits without columns; those of a window are of what it lets see."""
    check([400, 3], torch.float32, processors=32)
    check([400, 3], torch.float32, processors=32, window=9)
    check([600, 3, 300], torch.float32, processors=32, window=350)


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
    _, new = with_new_token([3, 3], dtype=torch.float32, rotated=True)
    with pytest.raises(ValueError, match="key and value together"):
        launch(*arguments, 3, 1.0, 0, 0.0, new[0])
    with pytest.raises(ValueError, match="laid out alike"):
        launch(*arguments, 3, 1.0, 0, 0.0, *new[:3], new[3][:, :32].contiguous())
    arguments[1] = arguments[1].mT.contiguous().mT
    with pytest.raises(ValueError, match="must be contiguous"):
        launch(*arguments, 3, 1.0, 0, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (700, 0.0), (0, 2.0), (700, 2.0)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_op_on_a_gpu(dtype, window, softcap):
    arguments = placed(case([3000, 124, 1, 641], dtype=dtype, heads=8, size=128))
    settings = (3000, 0.1, window, softcap)
    expected = reference(*wider(arguments), *settings)
    error = (decode_attention(*arguments, *settings).double() - expected).abs().max() / expected.abs().max()
    assert float(error) < TOLERANCE[dtype]
