"""Exits of packed rows: which rows' visual tokens leave, decided for all rows at once, and what is then left of them.

``vte::exit_decisions`` is the gate of kernels/exit_gate.py for every row of a packed chunk; ``vte::compact_rows`` drops
tokens and closes the gaps. On CPUs they are the naive references, on CUDA one kernel each
(kernels/triton_packed_exit.py). Rows stand one behind the other, row b in ``cu_seqlens[b] .. cu_seqlens[b + 1] - 1``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vte_compile.kernels.exit_gate import exit_logits


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
def _(*args: object) -> Tensor:
    from vte_compile.kernels.triton_packed_exit import decide

    return decide(*args)  # type: ignore[arg-type]


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
def _(*args: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from vte_compile.kernels.triton_packed_exit import compact

    return compact(*args)  # type: ignore[arg-type]


@compact_rows.register_fake
def _(
    hidden_states: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, keep: Tensor, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, at, c, s = (x.new_empty(kept, *x.shape[1:]) for x in (hidden_states, positions, cos, sin))
    return hidden, at, c, s, torch.empty_like(cu_seqlens)
