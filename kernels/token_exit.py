"""Token exit: drop the visual tokens from every value that is as long as the sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def compact(values: Sequence[Tensor], dims: Sequence[Sequence[int]], keep: Tensor) -> list[Tensor]:
    """Keep only some positions.

    Args:
        values: Tensors with one or more dims as long as the sequence.
        dims: For each value, which dims those are: at least one (a mask has two).
        keep: [n] int64, the positions that stay, ascending.
    """
    kept = []
    for value, value_dims in zip(values, dims, strict=True):
        for dim in value_dims:
            value = value.index_select(dim, keep)
        kept.append(value)
    return kept


def pack_dims(dims: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Lists of dims as the two flat lists (count per value, all dims) that an op's schema can hold."""
    return [len(d) for d in dims], [i for d in dims for i in d]


def unpack_dims(counts: Sequence[int], flat: Sequence[int]) -> list[list[int]]:
    """The inverse of :func:`pack_dims`."""
    rest = iter(flat)
    return [[next(rest) for _ in range(count)] for count in counts]


@torch.library.custom_op("vte::token_exit", mutates_args=())
def token_exit(
    fire: Tensor, visual_mask: Tensor, values: list[Tensor], dim_counts: list[int], dims: list[int]
) -> list[Tensor]:
    """If ``fire`` ([] bool), ``values`` without the tokens that ``visual_mask`` [1, S] names; else copies of them."""
    keep = (~(visual_mask[0] & fire)).nonzero()[:, 0]
    return compact(values, unpack_dims(dim_counts, dims), keep)


@token_exit.register_fake
def _(fire: Tensor, visual_mask: Tensor, values: list[Tensor], dim_counts: list[int], dims: list[int]) -> list[Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size(min=1)
    outputs = []
    for value, value_dims in zip(values, unpack_dims(dim_counts, dims), strict=True):
        shape = [kept if i in value_dims else size for i, size in enumerate(value.shape)]
        outputs.append(value.new_empty(shape))
    return outputs
