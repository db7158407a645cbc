"""Which tokens are visual in embeddings that the authors' own code makes: what knows it tells, what runs them asks.

Such code hands embeddings to a language model, often through functions that have no place for a mask. So the mask goes
beside them, for as long as one call of forward() or generate() lasts.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Call:
    """One call, and what became known of it; masks are [B, T] bool, of the tokens as the language model gets them."""

    given: Tensor | None = None
    """By the caller, who knows best."""
    found: Tensor | None = None
    exit_layer: Tensor | None = None
    """[B] int64 of the first chunk that the language model ran; None: it ran none."""


_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar("vte_call", default=None)


@contextmanager
def told_within(visual_mask: Tensor | None = None) -> Iterator[Call]:
    """A call in which something will be told; calls within it are of their own.

    Args:
        visual_mask: [B, T] bool, if the caller gave one.
    """
    call = Call(visual_mask)
    token = _call.set(call)
    try:
        yield call
    finally:
        _call.reset(token)


def tell(visual_mask: Tensor) -> None:
    """Say which of the embeddings that come next are visual, [B, T] bool; of no call, it is forgotten."""
    if (call := _call.get()) is not None:
        call.found = visual_mask


def told(embeds: Tensor) -> Tensor | None:
    """The mask [B, T] of embeddings [B, T, C], whose rows may be several of each that was told of (beams, samples).

    None if nothing was told. Nobody has compared its shape with theirs.
    """
    call = _call.get()
    mask = None if call is None else call.found if call.given is None else call.given
    if mask is None:
        return None
    times, rest = divmod(len(embeds), max(len(mask), 1))
    return mask if rest or times <= 1 else mask.repeat_interleave(times, 0)


def report_exits(exit_layer: Tensor) -> None:
    """Say where the rows of a chunk left, [B] int64; that of a call's first chunk is kept."""
    call = _call.get()
    if call is not None and call.exit_layer is None:
        call.exit_layer = exit_layer
