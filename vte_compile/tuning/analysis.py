"""What an analysis found by layer: attention between modalities, exits, deleted attentions; plain data and a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from vte_compile.tuning.bootstrap import Interval

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Share:
    """The attention of a group of queries on a group of keys, in one layer: of 1, mean over heads and queries."""

    mean: Interval
    """Over the samples."""
    low: float
    """The 10th percentile of the samples."""
    high: float
    """The 90th."""


@dataclass(frozen=True)
class LayerAnalysis:
    """One decoder layer. Losses are mean cross entropies of the full model's own greedy answer, in nats."""

    layer: int
    attention: Mapping[str, Mapping[str, Share]]
    """By group of queries, then of keys (`QUERIES`, `KEYS` in modality_attention.py)."""
    exit_agreement: Interval
    """Share of samples with the same answer if all visual tokens leave after this layer."""
    exit_loss_increase: Interval
    """By how much the loss then grows."""
    exit_accuracy: Interval | None
    """Share of the samples with an answer of their own that then get it, token for token; None if none has one."""
    oracle_exits: int
    """How many samples have their oracle exit after this layer."""
    may_exit: Interval
    """Share of samples whose oracle exit is after this layer or before."""
    deletion_agreement: Interval | None
    """Share of samples with the same answer without this layer's attention; None if it cannot be deleted."""
    deletion_loss_increase: Interval | None
    """By how much the loss then grows; None also if it is not finite for a sample."""


@dataclass(frozen=True)
class SampleAnalysis:
    """One sample."""

    name: str
    key: str
    visual: int
    tokens: int
    """Of the prompt, the visual ones among them."""
    oracle_exit: int
    """The earliest layer from which on no exit changes the full model's answer; -1: only the last, so no exit."""


@dataclass(frozen=True)
class Analysis:
    """What :func:`vte_compile.tuning.analyze.analyze` found."""

    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    answered: int
    """How many samples have an answer of their own."""
    uniform: Mapping[str, Mapping[str, float]]
    """The attention shares if each query attended equally to all it may see: by queries, then keys."""
    layers: tuple[LayerAnalysis, ...]
    samples: tuple[SampleAnalysis, ...]
    oracle_cost: Interval
    """Layers that see the visual tokens with the oracle exit, mean over the samples."""
    deletions_refused: str | None
    """Why this model's attentions cannot be deleted, if so."""

    def to_json(self) -> str:
        """All of it, with a schema version."""
        return json.dumps({"schema_version": SCHEMA_VERSION} | asdict(self), indent=1, allow_nan=False) + "\n"

    def __rich__(self) -> RenderableType:
        table = Table(
            title=f"{len(self.samples)} samples, {self.answered} of them with answers",
            title_justify="left",
            box=box.SIMPLE,
            padding=0,
        )
        right = self.answered > 0
        # Intervals are in the JSON and on the page: here all columns are to fit a terminal of 80.
        headings: tuple[str, ...] = ("layer", "question\nto image", "answer\nto image", "exit\nsame")
        headings += (*(("exit\nright",) if right else ()), "exit\nloss", "may\nexit")
        headings += ("deleted\nsame", "deleted\nloss") if self.deletions_refused is None else ()
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.layers:
            cells = [str(row.layer)]
            cells += [f"{row.attention[queries]['visual'].mean.value:.1%}" for queries in ("question", "answer")]
            cells.append(f"{row.exit_agreement.value:.1%}")
            cells += ["" if row.exit_accuracy is None else f"{row.exit_accuracy.value:.1%}"] if right else []
            cells += [f"{row.exit_loss_increase.value:+.3f}", f"{row.may_exit.value:.1%}"]
            if row.deletion_agreement is not None:
                loss = row.deletion_loss_increase
                cells += [f"{row.deletion_agreement.value:.1%}", "infinite" if loss is None else f"{loss.value:+.3f}"]
            table.add_row(*cells)
        cost = self.oracle_cost
        notes = (
            "to image: share of the attention on visual tokens. exit: all visual tokens leave after this layer. may "
            "exit: samples that no exit from here on changes. deleted: this attention alone goes. same: token for "
            "token the full model's answer. loss: of that answer, by how much it grows.\n"
            f"With an oracle exit {cost.value:.2f} ({cost.low:.2f} .. {cost.high:.2f}) of {len(self.layers)} layers "
            "see the visual tokens."
        )
        refused = () if self.deletions_refused is None else (f"No attention was deleted: {self.deletions_refused}",)
        return Group(table, notes, *refused)
