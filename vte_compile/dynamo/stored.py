"""Keys and values in a Dynamo graph: what a layer's attention reads of them, and what its cache keeps.

A DynamicLayer keeps what the attention reads, a DynamicSlidingWindowLayer the last tokens of it, and a StaticLayer has
buffers that are written in place.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from vte_compile.dynamo.handles import HandleShape
from vte_compile.errors import UnsupportedModelError


@dataclass(frozen=True)
class Stored:
    """Keys or values of one layer."""

    read: fx.Node
    """What the attention reads, repeated heads undone."""
    past: fx.Node | None
    """The input of the graph that held the earlier ones."""
    kept: fx.Node | None
    """What the graph returns of them; None: nothing, or a buffer that is written in place."""
    most: int | None
    """Of how many tokens `kept` is at most."""

    @property
    def is_buffer(self) -> bool:
        """Whether it is a StaticCache's."""
        return self.read.op == "placeholder" or self._begins_as_buffer

    @property
    def shape(self) -> HandleShape | None:
        """Of `kept`."""
        if self.kept is None:
            return None
        _, heads, tokens, size = self.kept.meta["example_value"].shape
        return HandleShape(int(heads), int(tokens) if self._begins_as_buffer else None, self.most, int(size))

    @property
    def _begins_as_buffer(self) -> bool:
        return _name(self.read) == "zeros"


def find_stored(read: fx.Node, layer: int, returned: Collection[fx.Node]) -> Stored:
    """What a cache layer keeps of the keys or values that an attention reads.

    Args:
        read: The keys or values.
        layer: Its number, for messages.
        returned: What the graph returns.

    Raises:
        UnsupportedModelError: The attention does not read what a cache holds, or what that keeps of it is not known.
    """
    node: Any = read
    while isinstance(node, fx.Node):
        if node.op == "placeholder":
            return Stored(node, node, None, None)
        if _name(node) in ("cat", "zeros"):
            return Stored(node, _past(node), *_kept(node, layer, returned))
        if not node.args:
            break
        node = node.args[0]
    raise UnsupportedModelError(f"layer {layer}: its attention does not read keys and values that a cache holds.")


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _past(read: fx.Node) -> fx.Node | None:
    if _name(read) == "zeros":
        return None  # a StaticCache that begins in this graph
    earlier: Any = read.args[0]
    return earlier[0] if isinstance(earlier[0], fx.Node) and earlier[0].op == "placeholder" else None


def _kept(read: fx.Node, layer: int, returned: Collection[fx.Node]) -> tuple[fx.Node | None, int | None]:
    """What is returned of concatenated keys or values, and how many tokens it has at most."""
    if read in returned:
        return read, None
    parts = [user for user in read.users if user in returned]
    if not parts:
        return None, None
    everything = slice(None)
    index: Any = parts[0].args[1] if parts[0].target is operator.getitem else None
    start = index[2].start if isinstance(index, tuple) and len(index) == 4 and isinstance(index[2], slice) else None
    known = index == (everything, everything, slice(start, None), everything)
    kept = start.meta.get("example_value") if isinstance(start, fx.Node) else start
    if len(parts) == 1 and known and isinstance(kept, int | torch.SymInt) and kept < 0:
        return parts[0], -int(kept)  # a constant, where dynamic=True has a symbol too
    raise UnsupportedModelError(f"layer {layer}: what its cache keeps of {read.name} is not known.")
