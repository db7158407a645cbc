"""vte::exit_decisions and vte::compact_rows: against the ops of one row, and the Triton kernels against both."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from vte_compile.kernels.exit_gate import exit_gate
from vte_compile.kernels.packed_exit import compact_rows, exit_decisions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ["ttvvttt", "ttttt", "vvt", "tvtvtt", "tvv", "v" + "t" * 40]
"""t text, v visual. The third has a question of one token, the fifth none."""


def gates(width=24, middle=40, dtype=torch.float32, seed=0):
    """hidden states, cu_seqlens, question starts, w1, w2; and the visual mask."""
    generator = torch.Generator().manual_seed(seed)
    visual = torch.tensor([cell == "v" for row in LAYOUTS for cell in row])
    bounds = torch.tensor([0, *map(len, LAYOUTS)]).cumsum(0).int()
    starts = []
    for row, begin, end in zip(LAYOUTS, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        starts.append(begin + row.rindex("v") + 1 if "v" in row else end)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    hidden, w1, w2 = random(len(visual), width), random(middle, 2 * width), random(2, middle)
    return [hidden, bounds, torch.tensor(starts, dtype=torch.int32), w1, w2], visual


def tokens(dtype=torch.float32, width=70, half=20, seed=0, share=0.6):
    """The arguments of compact_rows."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [7, 0, 21, 1, 14]
    count = sum(lengths)
    keep = torch.rand(count, generator=generator) < share
    hidden = torch.randn(count, width, generator=generator).to(dtype)
    tables = [torch.randn(count, half, generator=generator).to(dtype) for _ in range(2)]
    positions = torch.arange(count, dtype=torch.int32) * 3
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return [hidden, positions, *tables, cu_seqlens, keep, int(keep.sum())]


@pytest.mark.parametrize("seed", range(3))
def test_each_row_decides_as_it_would_alone(seed):
    arguments, visual = gates(seed=seed)
    hidden, bounds, _, w1, w2 = arguments
    alone = [
        bool(exit_gate(hidden[None, begin:end], visual[None, begin:end], w1, w2, 0.1))
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    ]
    assert exit_decisions(*arguments, 0.1).tolist() == alone
    assert exit_decisions(*arguments, -1e9).tolist() == [True, False, False, True, False, True]
    assert not exit_decisions(*arguments, 1e9).any()


def test_tokens_that_stay_close_the_gaps():
    hidden, positions, cos, sin, bounds, keep, kept = arguments = tokens()
    results = compact_rows(*arguments)
    for before, after in zip((hidden, positions, cos, sin), results, strict=False):
        assert torch.equal(after, before[keep])
    counts = [int(keep[a:b].sum()) for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    assert results[4].diff().tolist() == counts
    with pytest.raises(ValueError, match=f"{kept} tokens stay, not 3"):
        compact_rows(*arguments[:-1], 3)


def test_ops():
    opcheck(exit_decisions, (*gates()[0], 0.0))
    opcheck(compact_rows, tuple(tokens()))


# ---------------------------------------------------------------- the kernels (interpreted, where there is no GPU)

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot run")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "middle"), [(24, 40), (150, 33), (128, 64)])
def test_decisions_of_the_kernel(width, middle, dtype):
    from vte_compile.kernels.triton_packed_exit import decide

    arguments = [x.to(DEVICE) for x in gates(width, middle, dtype)[0]]
    wide = [x.float() if x.is_floating_point() else x for x in arguments]
    for threshold in (-1e9, -3.0, 0.0, 3.0, 1e9):
        assert decide(*arguments, threshold).tolist() == exit_decisions(*[x.cpu() for x in wide], threshold).tolist()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compaction_of_the_kernel(dtype, share):
    from vte_compile.kernels.triton_packed_exit import compact

    arguments = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in tokens(dtype, share=share)]
    on_cpu = [x.cpu() if isinstance(x, torch.Tensor) else x for x in arguments]
    for ours, theirs in zip(compact(*arguments), compact_rows(*on_cpu), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_compaction_of_many_tokens():
    """More than the kernel counts in one go."""
    from vte_compile.kernels.triton_packed_exit import compact

    count = 1300
    keep = torch.arange(count) % 3 != 0
    positions = torch.arange(count, dtype=torch.int32)
    bounds = torch.tensor([0, 1100, count], dtype=torch.int32)
    table = torch.zeros(count, 1)
    arguments = [x.to(DEVICE) for x in (positions[:, None].float(), positions, table, table, bounds, keep)]
    results = compact(*arguments, int(keep.sum()))
    assert torch.equal(results[1].cpu(), positions[keep])
    assert results[4].tolist() == [0, int(keep[:1100].sum()), int(keep.sum())]


def test_layouts_that_the_kernels_do_not_take():
    from vte_compile.kernels.triton_packed_exit import compact, decide

    arguments = gates()[0]
    arguments[3] = arguments[3].mT.contiguous().mT
    with pytest.raises(ValueError, match="w1 and w2"):
        decide(*arguments, 0.0)
    moved = tokens()
    moved[0] = moved[0].mT.contiguous().mT
    with pytest.raises(ValueError, match="hidden states must be contiguous"):
        compact(*moved)
