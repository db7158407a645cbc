"""Exits of packed rows: which rows' visual tokens leave, decided for all rows at once, and what is then left of them.

``vte::exit_decisions`` is the gate of kernels/exit_gate.py for every row of a packed chunk; ``vte::compact_rows`` drops
tokens and closes the gaps. On CPUs they are the naive references, on CUDA one kernel each
(kernels/triton_packed_exit.py). Rows stand one behind the other, row b in ``cu_seqlens[b] .. cu_seqlens[b + 1] - 1``.

Graphs of the phase "packed" hold ``vte::packed_gate``, ``vte::packed_static_exit`` and ``vte::packed_exit``, which find
out by themselves what the host knows when pieces run.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from vte_compile.kernels.exit_gate import exit_logits
from vte_compile.kernels.token_exit import compact, unpack_dims


@torch.library.custom_op("vte::exit_decisions", mutates_args=(), device_types="cpu")
def exit_decisions(
    hidden_states: Tensor, cu_seqlens: Tensor, question_starts: Tensor, w1: Tensor, w2: Tensor, threshold: float
) -> Tensor:
    """Whether each row's gate fires (DyVTE, arXiv 2411.19628, section 4).

    Args:
        hidden_states: [T, C], behind the layer.
        cu_seqlens: [B + 1] int32.
        question_starts: [B] int32: index in the chunk of each row's first token behind its last visual one; that of the
            row's end where there is no question, or nothing that could leave: such a row never fires.
        w1: [M, 2C], of the features [mean of the question but its last token; last token].
        w2: [2, M].
        threshold: Of exit over keep.

    Returns:
        [B] bool. A question of one token has no mean, and keeps.
    """
    fires = torch.zeros(len(question_starts), dtype=torch.bool, device=hidden_states.device)
    for b, (start, end) in enumerate(zip(question_starts.tolist(), cu_seqlens[1:].tolist(), strict=True)):
        if start < end:
            logits = exit_logits(hidden_states[start:end], w1, w2)
            fires[b] = logits[1] - logits[0] > threshold
    return fires


@exit_decisions.register_kernel("cuda")
def _(first: Tensor, *args: object) -> Tensor:
    from vte_compile.kernels.triton_packed_exit import decide

    with torch.cuda.device(first.device):  # Triton launches on the current one
        return decide(first, *args)  # type: ignore[arg-type]


@exit_decisions.register_fake
def _(hidden_states: Tensor, cu_seqlens: Tensor, question_starts: Tensor, *args: object) -> Tensor:
    return question_starts.new_empty(question_starts.shape, dtype=torch.bool)


@torch.library.custom_op("vte::compact_rows", mutates_args=(), device_types="cpu")
def compact_rows(
    hidden_states: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, keep: Tensor, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Keep some tokens, in their order.

    Args:
        hidden_states: [T, C].
        positions: [T] int32.
        cos: [T, D / 2], and ``sin``: the tables of rotary positions.
        cu_seqlens: [B + 1] int32.
        keep: [T] bool.
        kept: How many of them are true, which whoever knows the decisions knows without asking the GPU.

    Returns:
        The same of the kept tokens, [kept, ...], and the new ``cu_seqlens``.
    """
    before = torch.cat([cu_seqlens.new_zeros(1), keep.cumsum(0).int()])
    values = (hidden_states, positions, cos, sin)
    # (No boolean index: that would be as long as its values say, not as `kept` does.)
    index = keep.nonzero()[:, 0]
    if len(index) != kept:
        raise ValueError(f"compact_rows: {len(index)} tokens stay, not {kept}.")
    hidden, at, c, s = (x.index_select(0, index) for x in values)
    return hidden, at, c, s, before[cu_seqlens.long()]


@compact_rows.register_kernel("cuda")
def _(first: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from vte_compile.kernels.triton_packed_exit import compact

    with torch.cuda.device(first.device):  # Triton launches on the current one
        return compact(first, *args)  # type: ignore[arg-type]


@compact_rows.register_fake
def _(
    hidden_states: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, keep: Tensor, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, at, c, s = (x.new_empty(kept, *x.shape[1:]) for x in (hidden_states, positions, cos, sin))
    return hidden, at, c, s, torch.empty_like(cu_seqlens)


def _question_starts(visual_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    starts = []
    for begin, end in pairwise(cu_seqlens.tolist()):
        visual = visual_mask[0, begin:end].nonzero()[:, 0]
        starts.append(begin + int(visual[-1]) + 1 if len(visual) else end)
    return torch.tensor(starts, dtype=torch.int32, device=visual_mask.device)


@torch.library.custom_op("vte::packed_gate", mutates_args=())
def packed_gate(
    hidden_states: Tensor, visual_mask: Tensor, cu_seqlens: Tensor, w1: Tensor, w2: Tensor, threshold: float
) -> Tensor:
    """[1, T, C], [1, T] bool, [B + 1] int32 -> [B] bool: of each row, what ``vte::exit_gate`` says of it."""
    starts = _question_starts(visual_mask, cu_seqlens)
    return exit_decisions(hidden_states[0], cu_seqlens, starts, w1, w2, threshold)


@packed_gate.register_fake
def _(hidden_states: Tensor, visual_mask: Tensor, cu_seqlens: Tensor, *args: object) -> Tensor:
    return cu_seqlens.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.bool)


@torch.library.custom_op("vte::packed_static_exit", mutates_args=())
def packed_static_exit(visual_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[1, T] bool, [B + 1] int32 -> [B] bool: which rows have visual tokens, and text behind the last of them."""
    return _question_starts(visual_mask, cu_seqlens) < cu_seqlens[1:]


@packed_static_exit.register_fake
def _(visual_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.bool)


@torch.library.custom_op("vte::packed_exit", mutates_args=())
def packed_exit(
    fires: Tensor, visual_mask: Tensor, cu_seqlens: Tensor, values: list[Tensor], dim_counts: list[int], dims: list[int]
) -> list[Tensor]:
    """Of the rows that fire ([B] bool), ``values`` without the tokens that ``visual_mask`` [1, T] names.

    A value without a dim that is as long as the sequence is ``cu_seqlens``: it becomes what it is of the rest.
    """
    leaves = visual_mask[0] & fires.repeat_interleave(cu_seqlens.diff())
    keep = (~leaves).nonzero()[:, 0]
    left = torch.cat([cu_seqlens.new_zeros(1), leaves.cumsum(0).int()])[cu_seqlens.long()]
    return [
        compact([value], [own], keep)[0] if own else cu_seqlens - left
        for value, own in zip(values, unpack_dims(dim_counts, dims), strict=True)
    ]


@packed_exit.register_fake
def _(
    fires: Tensor, visual_mask: Tensor, cu_seqlens: Tensor, values: list[Tensor], dim_counts: list[int], dims: list[int]
) -> list[Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size(min=1)
    return [
        value.new_empty([kept if i in own else size for i, size in enumerate(value.shape)])
        for value, own in zip(values, unpack_dims(dim_counts, dims), strict=True)
    ]
