"""token_exit against plain list indexing: any dims, any layout, any dtype, and copies where nothing leaves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vte_compile.kernels.token_exit import compact, pack_dims, token_exit, unpack_dims

DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
YES, NO = torch.tensor(True), torch.tensor(False)


def mask(cells: str) -> torch.Tensor:
    return torch.tensor([[cell == "v" for cell in cells]])


def naive(value: torch.Tensor, dims: list[int], kept: list[int]) -> torch.Tensor:
    """Slices put together again, one dim after the other."""
    for dim in dims:
        value = torch.stack([value.select(dim, i) for i in kept], dim)
    return value


def values_of_a_decoder(length: int, dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Hidden states, positions, a mask with both dims and an expanded one, and a transposed one."""
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> torch.Tensor:
        return torch.randint(-50, 50, shape, generator=generator).to(dtype)

    values = [
        random(1, length, 5),
        torch.arange(length)[None],
        random(1, 1, length, length),
        random(1, 1, 1, length).expand(1, 3, length, length),
        random(length, 3, 1).permute(2, 1, 0),
    ]
    return values, [[1], [1], [2, 3], [3, 2], [2]]


def exit_(fire: torch.Tensor, visual: torch.Tensor, values, dims) -> list[torch.Tensor]:
    return token_exit(fire, visual, values, *pack_dims(dims))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cells", ["vt", "tvt", "tvvtvtt", "t" * 3 + "v" * 31 + "t" * 13, "vvv", "ttttt"])
def test_visual_tokens_leave(cells, dtype):
    values, dims = values_of_a_decoder(len(cells), dtype)
    kept = [i for i, cell in enumerate(cells) if cell == "t"]
    got = exit_(YES, mask(cells), values, dims)
    assert len(got) == len(values)
    for after, before, d in zip(got, values, dims, strict=True):
        if kept:
            assert torch.equal(after, naive(before, d, kept))
        assert after.shape == tuple(len(kept) if i in d else size for i, size in enumerate(before.shape))
        assert after.dtype == before.dtype
        assert after.is_contiguous()


@pytest.mark.parametrize("cells", ["vt", "tvvtvtt", "vvv", "ttttt"])
def test_nothing_leaves_unless_fired(cells):
    values, dims = values_of_a_decoder(len(cells))
    got = exit_(NO, mask(cells), values, dims)
    for after, before in zip(got, values, strict=True):
        assert torch.equal(after, before)
        assert after.untyped_storage().data_ptr() != before.untyped_storage().data_ptr()  # ops must not alias inputs


def test_the_visual_mask_can_leave_with_the_others():
    """Then no later exit can fire."""
    visual = mask("tvvtvtt")
    (left,) = exit_(YES, visual, [visual], [[1]])
    assert left.tolist() == [[False] * 4]
    assert visual.tolist() == mask("tvvtvtt").tolist()
    assert torch.equal(exit_(NO, visual, [visual], [[1]])[0], visual)


def test_nan_and_infinity_pass_through_and_do_not_spread():
    values = torch.tensor([[[1.0], [torch.nan], [torch.inf], [2.0]]])
    assert exit_(YES, mask("tvvt"), [values], [[1]])[0].tolist() == [[[1.0], [2.0]]]
    assert exit_(YES, mask("vttv"), [values], [[1]])[0].isfinite().tolist() == [[[False], [False]]]


@settings(max_examples=60, deadline=None)
@given(
    st.text("tv", min_size=1, max_size=9), st.booleans(), st.lists(st.sets(st.integers(0, 3), min_size=1), max_size=3)
)
def test_any_dims(cells, fires, dims):
    dims = [sorted(d, reverse=i % 2 == 0) for i, d in enumerate(dims)]
    shapes = [[len(cells) if i in d else i + 1 for i in range(4)] for d in dims]
    values = [torch.arange(torch.Size(shape).numel()).reshape(shape) for shape in shapes]
    kept = [i for i, cell in enumerate(cells) if cell == "t" or not fires]
    got = exit_(torch.tensor(fires), mask(cells), values, dims)
    for after, before, d in zip(got, values, dims, strict=True):
        want = naive(before, d, kept) if kept else before.new_empty([0 if i in d else i + 1 for i in range(4)])
        assert torch.equal(after, want)
    for a, b in zip(got, compact(values, dims, torch.tensor(kept, dtype=torch.long)), strict=True):
        assert torch.equal(a, b)


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3)))
def test_dims_survive_packing(dims):
    counts, flat = pack_dims(dims)
    assert unpack_dims(counts, flat) == dims
    assert sum(counts) == len(flat)


@pytest.mark.parametrize("fire", [YES, NO], ids=["fires", "keeps"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(fire, dtype):
    values, dims = values_of_a_decoder(7, dtype)
    torch.library.opcheck(token_exit, (fire, mask("tvvtvtt"), values, *pack_dims(dims)))


def test_fake_gives_all_values_one_new_length():
    def rewritten(fire, visual, hidden, attention):
        return token_exit(fire, visual, [hidden, attention], [1, 2], [1, 2, 3])

    lengths = {1: torch.export.Dim.AUTO}
    program = torch.export.export(
        _Function(rewritten),
        (YES, mask("tvvtvtt"), torch.ones(1, 7, 4), torch.ones(1, 1, 7, 7)),
        dynamic_shapes=((None, lengths, lengths, {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}),),
    )
    hidden, attention = (node.meta["val"].shape for node in program.graph.output_node().args[0])
    length = program.graph.find_nodes(op="placeholder")[1].meta["val"].shape[1]
    assert hidden[1].node.expr == attention[2].node.expr == attention[3].node.expr
    assert hidden[1].node.expr != length.node.expr
    assert (hidden[0], hidden[2], attention[0], attention[1]) == (1, 4, 1, 1)
    states = torch.randn(1, 5, 4)
    got = program.module()(YES, mask("vvttt"), states, torch.ones(1, 1, 5, 5))
    assert torch.equal(got[0], states[:, 2:])
    assert got[1].shape == (1, 1, 3, 3)


class _Function(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)
