"""The part of a plan that is about one co-attention layer, as METER and BridgeTower have them (EAS, arXiv 2403.15226).

Each level of such a model has two layers, one of the text side and one of the image side. A layer is post-norm, with
self attention, cross attention to the other side, and an FFN; h is its input, e the other side's tokens::

    self  kept: a = LN_self(MHA(AD(h)) + h)                 self  skipped: a = LN_self(h + PIA(h, h))
    cross kept: c = LN_cross(MHA(q=AD(a), kv=e) + a)        cross skipped: c = LN_cross(a + PIA(h, e))
    out = LN_out(FFN(AD(c)) + c)

    PIA(u, v) = s * (GB (0.5 * (C u + bC + mean over tokens of (A v + bA))) + bB)      no residual of its own

The mean is over all tokens, padding included, as in the authors' code (DoubtedSteam/EAS, METER-EAS).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from vte_compile.adapters import PIA, Adapter, PlainAdapter, StaticRouter
from vte_compile.errors import PlanError
from vte_compile.field_checks import integer

Side = Literal["text", "image"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True, eq=False)
class CoAttention:
    """Which attentions of one co-attention layer are skipped, and its adapters (the formulas are in this file's head).

    Args:
        side: "text" or "image": which of the level's two layers.
        level: counted from 0.
        skip_self: whether the self attention is not computed.
        skip_cross: likewise, the cross attention.
        self_adapter: a PIA in place of the skipped self attention, or a plain adapter in front of q, k and v of the
            kept one; None: nothing. A training-free skip (None) leaves LN_self(h).
        cross_adapter: likewise, of the cross attention; the plain adapter is in front of q alone.
        ffn_adapter: in front of the FFN.

    Raises:
        PlanError: a field is of the wrong type; an adapter does not go with its attention, or has a router.
    """

    side: Side
    level: int
    skip_self: bool = False
    skip_cross: bool = False
    self_adapter: Adapter | None = None
    cross_adapter: Adapter | None = None
    ffn_adapter: PlainAdapter | None = None

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise PlanError(f"side: expected 'text' or 'image', got {self.side!r:.60}")
        object.__setattr__(self, "level", integer("level", self.level, 0))
        for name in ("skip_self", "skip_cross"):
            if not isinstance(getattr(self, name), bool):
                raise PlanError(f"{name}: expected a boolean, got {type(getattr(self, name)).__name__}")
        for name, skipped in (("self_adapter", self.skip_self), ("cross_adapter", self.skip_cross)):
            _check_adapter(name, getattr(self, name), PIA if skipped else PlainAdapter)
        _check_adapter("ffn_adapter", self.ffn_adapter, PlainAdapter)

    @property
    def place(self) -> tuple[int, int]:
        """Where the layer is among all: text levels first, then image levels."""
        return SIDES.index(self.side), self.level

    def adapters(self) -> Iterator[tuple[str, Adapter]]:
        """The adapters there are, by field name."""
        for name in ("self_adapter", "cross_adapter", "ffn_adapter"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    def describe(self) -> list[tuple[str, int | None]]:
        """What happens to the self attention, the cross attention and the FFN: kind, and the adapter's width."""
        rows = []
        for sublayer, skipped, adapter in (
            ("self", self.skip_self, self.self_adapter),
            ("cross", self.skip_cross, self.cross_adapter),
            ("ffn", False, self.ffn_adapter),
        ):
            if skipped or adapter is not None:
                kind = f"{self.side} {sublayer} {'skip' if skipped else 'adapter'}"
                rows.append((kind, None if adapter is None else adapter.width))
        return rows


def _check_adapter(name: str, adapter: object, kind: type[Adapter]) -> None:
    if adapter is None:
        return
    if not isinstance(adapter, kind):
        skipped = {PIA: "a skipped attention takes", PlainAdapter: "what is kept takes"}[kind]
        raise PlanError(f"{name}: {skipped} a {kind.__name__} or None, got {type(adapter).__name__}")
    if not isinstance(adapter.router, StaticRouter):
        raise PlanError(f"{name}.router: expected a StaticRouter (METER's adapters have no router), got a Router")
