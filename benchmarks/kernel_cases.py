"""What kernel_times.py times: attention of a prompt and of a decode step, by our kernels and by PyTorch's.

All ways of one shape take the same numbers and give the same outputs, so one reference in float64 serves all of them.
PyTorch's are given rotated queries and keys, and their cache is written before; ours rotate and write in the time that
is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vte_compile.kernels.cached_attention import rotate
from vte_compile.kernels.decode_attention import decode_attention
from vte_compile.kernels.decode_attention import reference as decode_reference
from vte_compile.kernels.varlen_attention import reference as varlen_reference
from vte_compile.kernels.varlen_attention import varlen_attention
from vte_compile.runtime.growing import with_room

OURS = "vte"
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""Backends of scaled_dot_product_attention; a call may use no other one."""
FLEX, VARLEN = "flex", "varlen"
CASES = (OURS, *SDPA, FLEX, VARLEN)


@dataclass(frozen=True)
class Shape:
    """A decoder's attention, and the prompt it attends to."""

    tokens: int
    text: int
    """How many of the tokens are left when the visual ones leave."""
    heads: int
    size: int
    dtype: torch.dtype

    def lengths(self, batch: int, exits: bool) -> list[int]:
        """Tokens of each row; with ``exits`` every other row was left by its visual tokens."""
        return [self.text if exits and b % 2 else self.tokens for b in range(batch)]


SHAPES = {
    "LLaVA-1.5-7B": Shape(640, 64, 32, 128, torch.bfloat16),
    "LLaVA-NeXT": Shape(2944, 64, 32, 128, torch.bfloat16),
    "tiny": Shape(48, 8, 2, 64, torch.float32),
}
"""576 and 2,880 visual tokens and 64 of text; and one to try the script with."""


@dataclass(frozen=True)
class Work:
    """One attention, and the ways to compute it."""

    expected: Tensor
    """[T, heads, size] float64, packed rows."""
    ways: dict[str, Callable[[], Tensor]]
    packed: dict[str, Callable[[Tensor], Tensor]]
    """By way: what it gives -> [T, heads, size]."""
    amount: int
    """FLOPs of prefill, bytes of a decode step."""


def prefill(shape: Shape, lengths: Sequence[int], device: torch.device) -> Work:
    """Causal attention of a batch of prompts; 4 FLOPs for each number of a head and each pair of tokens."""
    batch, longest, options = len(lengths), max(lengths), {"device": device, "dtype": shape.dtype}
    query, key, value = (torch.randn(sum(lengths), shape.heads, shape.size, **options) for _ in range(3))
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    tables = _tables(positions, shape)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    starts = longest - bounds.diff()
    caches = [_nan(batch, shape.heads, with_room(longest), shape.size, **options) for _ in "kv"]
    scale = shape.size**-0.5
    wide = [x.double() if x.is_floating_point() else x for x in (query, key, value, *tables, bounds)]
    wide_caches = [cache.double() for cache in caches]
    expected = varlen_reference(*wide, None, starts, *wide_caches, scale, 0, 0.0)
    turned = [_rotated(x, *tables) for x in (query, key)]
    padded = [_padded(x, lengths) for x in (*turned, value)]

    def ours() -> Tensor:
        return varlen_attention(query, key, value, *tables, bounds, None, starts, *caches, longest, scale, 0, 0.0)

    ways = {OURS: ours}
    for name, backend in SDPA.items():
        ways[name] = _sdpa(backend, *padded, is_causal=True)
    ways[FLEX] = _once(lambda: _flex_prefill(padded, lengths))
    ways[VARLEN] = _once(lambda: _varlen(*turned, value, bounds, longest))
    packed = dict.fromkeys(ways, lambda output: _unpadded(output, lengths))
    packed[OURS] = packed[VARLEN] = lambda output: output
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    return Work(expected, ways, packed, 4 * pairs * shape.heads * shape.size)


def decode(shape: Shape, lengths: Sequence[int], device: torch.device) -> Work:
    """One token per row against its row, its own key and value included; bytes are those of all keys and values.

    Rows are aligned at the end, as in the cache of an optimized model, and so ours is called as a recorded decode step
    calls it: with the whole buffers, and their ends in a tensor.
    """
    batch, longest, options = len(lengths), max(lengths), {"device": device, "dtype": shape.dtype}
    room = with_room(longest)
    starts = torch.tensor([longest - n for n in lengths], device=device)
    ends = torch.full((batch,), longest, dtype=torch.int32, device=device)
    caches = [_nan(batch, shape.heads, room, shape.size, **options) for _ in "kv"]
    for cache in caches:
        for row, start in zip(cache, starts.tolist(), strict=True):
            row[:, start : longest - 1].normal_()
    query, key, value = (torch.randn(batch, shape.heads, shape.size, **options) for _ in range(3))
    tables = _tables(torch.full((batch,), longest - 1, device=device), shape)
    scale = shape.size**-0.5
    wide_caches = [cache.double() for cache in caches]
    wide = [x.double() for x in (key, value, *tables)]
    expected = decode_reference(query.double(), *wide_caches, starts, ends, None, room, scale, 0, 0.0, *wide)
    # PyTorch's masks add to scores, and multiply values by 0: what no row holds must be a number there.
    keys, values = (cache[:, :, :longest].nan_to_num() for cache in caches)
    turned = _rotated(query, *tables)
    keys[:, :, -1], values[:, :, -1] = _rotated(key, *tables), value
    equal = len(set(lengths)) == 1
    mask = None if equal else (torch.arange(longest, device=device) >= starts[:, None])[:, None, None]

    def ours() -> Tensor:
        return decode_attention(query, *caches, starts, ends, None, room, scale, 0, 0.0, key, value, *tables)

    ways = {OURS: ours}
    for name, backend in SDPA.items():
        ways[name] = _sdpa(backend, turned[:, :, None], keys, values, attn_mask=mask)
    ways[FLEX] = _once(lambda: _flex_decode(turned[:, :, None], keys, values, None if equal else starts))
    packed = dict.fromkeys(ways, lambda output: output[:, :, 0])
    packed[OURS] = lambda output: output
    return Work(expected, ways, packed, 2 * sum(lengths) * shape.heads * shape.size * shape.dtype.itemsize)


PHASES = {"prefill": prefill, "decode": decode}


def _sdpa(backend: SDPBackend, *tensors: Tensor, **options: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*tensors, **options)

    return run


def _once(make: Callable[[], Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """What makes a function at its first call, for those that take time to make, or are not there."""
    made: list[Callable[[], Tensor]] = []

    def run() -> Tensor:
        if not made:
            made.append(make())
        return made[0]()

    return run


def _flex_prefill(padded: Sequence[Tensor], lengths: Sequence[int]) -> Callable[[], Tensor]:
    """Compiled FlexAttention; blocks of padding are left out."""
    ends = torch.tensor(lengths, device=padded[0].device)
    equal = len(set(lengths)) == 1

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    def inside(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i < ends[b])

    return _flex(padded, causal if equal else inside, None if equal else len(lengths))


def _flex_decode(query: Tensor, keys: Tensor, values: Tensor, starts: Tensor | None) -> Callable[[], Tensor]:
    """Compiled FlexAttention of one query; ``starts``: [B], of rows that are not equally long."""
    if starts is None:
        return _flex((query, keys, values), None, None)

    def inside(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j >= starts[b]

    return _flex((query, keys, values), inside, len(starts))


def _flex(tensors: Sequence[Tensor], mask: Any, batch: int | None) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # each shape is compiled for itself; after some, Dynamo would run the next one uncompiled
    query, key, _ = tensors
    sizes = query.shape[2], key.shape[2]
    blocks = None if mask is None else create_block_mask(mask, batch, None, *sizes, device=query.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(*tensors, block_mask=blocks)


def _varlen(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int) -> Callable[[], Tensor]:
    """PyTorch's flash attention of packed rows."""
    from torch.nn.attention.varlen import varlen_attn

    places = bounds, bounds, longest, longest
    return lambda: varlen_attn(query, key, value, *places, window_size=(-1, 0))


def _tables(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, size / 2] of positions."""
    half = shape.size // 2
    angles = positions[:, None] * 1e4 ** (-torch.arange(half, device=positions.device) / half)
    return angles.cos().to(shape.dtype), angles.sin().to(shape.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads, size], computed in float32."""
    wide = (y.float()[None] for y in (x.flatten(1), cos, sin))
    return rotate(*wide, x.shape[1])[0].view_as(x).to(x.dtype)


def _nan(*shape: int, **options: Any) -> Tensor:
    return torch.full(shape, torch.nan, **options)


def _padded(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """[T, heads, size] of packed rows -> [B, heads, tokens, size], rows aligned at the start: causal as they are."""
    rows = torch.nn.utils.rnn.pad_sequence(list(x.split(list(lengths))), batch_first=True)
    return rows.transpose(1, 2)


def _unpadded(x: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.cat([row[:, :n].transpose(0, 1) for row, n in zip(x, lengths, strict=True)])
