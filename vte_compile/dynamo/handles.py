"""What Dynamo sees of keys and values: tensors of the shapes it traced, of which only the first element exists.

After an exit the layers' keys and values differ in length, but a model's forward makes one mask for all layers and
counts positions by the first layer's, so it would not trace. So the compiled function hands out handles: tensors of the
full length (or of the window, where a layer has one), with stride 0, that take no memory, and carry the ExitCache that
holds the real ones. All that transformers asks of them, shapes, is then as without exits, and nothing is compiled again
because of an exit. Whatever copies or slices a handle loses the cache, and the next call says so instead of reading the
numbers.

Buffers of a StaticCache that exist before the decoder runs are given the cache likewise, and stay as they are.

Only compiled code may go on from a handle. When Dynamo gives up compiling a model (recompile_limit), the model's own
code runs, and would attend to NaN or to empty buffers. It appends to the cache first, so that is where it is refused:
``refuse_uncompiled_use`` gives transformers' layers an ``update`` that looks for handles where nothing is compiling.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from vte_compile.errors import InputError
from vte_compile.runtime.exit_cache import ExitCache

_ATTRIBUTE, _COLUMNS = "_vte_cache", "_vte_columns"


@dataclass(frozen=True)
class HandleShape:
    """The shape [B, heads, tokens, size] of a handle, as the graph it leaves wants it."""

    heads: int
    tokens: int | None
    """Of a StaticCache's buffer; None: those seen so far."""
    most: int | None
    """Not more tokens than these: a sliding window."""
    size: int

    def of(self, batch: int, columns: int) -> tuple[int, int, int, int]:
        """Behind so many tokens."""
        tokens = columns if self.tokens is None else self.tokens
        return batch, self.heads, tokens if self.most is None else min(tokens, self.most), self.size


def make_handle(shape: HandleShape, columns: int, like: Tensor, cache: ExitCache) -> Tensor:
    """A tensor, NaN all over, that carries a cache.

    Args:
        shape: Of it.
        columns: How many tokens were seen so far, which a window's shape does not tell.
        like: Hidden states [B, ...].
        cache: What it carries.
    """
    sizes = shape.of(len(like), columns)
    handle = torch.empty_strided(sizes, (0,) * len(sizes), dtype=like.dtype, device=like.device)
    torch.as_strided(handle, (1,), (1,)).fill_(math.nan)
    # Else Dynamo would take the length of the first decode step for a constant, and trace all layers once more.
    torch._dynamo.maybe_mark_dynamic(handle, 2)
    attach(handle, cache)
    setattr(handle, _COLUMNS, columns)
    return handle


def columns_of(handle: Tensor) -> int:
    """How many tokens were seen when a handle was made."""
    return int(getattr(handle, _COLUMNS, handle.shape[2]))


def attach(tensor: Tensor, cache: ExitCache) -> None:
    """Let a tensor of transformers' cache carry the cache with the real keys and values."""
    setattr(tensor, _ATTRIBUTE, cache)


def cache_behind(tensors: Sequence[Tensor]) -> ExitCache:
    """The cache behind the handles of all layers, or behind the buffers of a StaticCache.

    Raises:
        InputError: They are not handles of one cache.
    """
    caches = [getattr(tensor, _ATTRIBUTE, None) for tensor in tensors]
    first = caches[0]
    if first is None or any(cache is not first for cache in caches):
        raise InputError(
            "past_key_values: its keys and values are not those that this compiled model returned. Beam search, crop() "
            "and other ways to copy or slice a cache are not supported by backend='vte' (vte_compile.optimize(model, "
            "plan).generate() does them), nor is a cache that the uncompiled model filled."
        )
    return first


def cache_of(tensors: Sequence[Tensor], columns: int) -> ExitCache:
    """The same, if nothing was added to it since.

    Args:
        tensors: Handles, or buffers of a StaticCache.
        columns: How many tokens the caller has seen.

    Raises:
        InputError: They are not handles of one cache in its present state.
    """
    cache = cache_behind(tensors)
    if cache.get_seq_length() != columns:
        raise InputError(
            f"past_key_values: holds {columns} tokens, but {cache.get_seq_length()} were seen since: a cache cannot go "
            "back to an earlier state; start from the prompt."
        )
    return cache


def refuse_uncompiled_use() -> None:
    """Let layers of a cache refuse to append to handles in code that is not compiled; once is enough."""
    for layer_class in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer):
        if not hasattr(layer_class.update, "_vte_refuses"):
            layer_class.update = _refusing(layer_class.update)  # type: ignore[method-assign]


def _refusing(update: Any) -> Any:
    @functools.wraps(update)
    def checked(layer: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # To Dynamo this condition is a constant: it traces what it traced before.
        if not torch.compiler.is_compiling() and hasattr(layer.keys, _ATTRIBUTE):
            raise InputError(
                "past_key_values was filled by a model that backend='vte' compiled, and now uncompiled code appends to "
                "it: Dynamo stopped compiling the model (as it warned, at torch._dynamo.config.recompile_limit), or "
                "another model was given this cache. Raise that limit above the number of kinds of prompts you serve, "
                "and start from the prompt."
            )
        return update(layer, key_states, value_states, *args, **kwargs)

    checked._vte_refuses = True  # type: ignore[attr-defined]
    return checked
