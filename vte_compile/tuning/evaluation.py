"""What an evaluation found: each configuration's measures with intervals, as plain data, JSON and a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table

from vte_compile.tuning.bootstrap import Interval

Kind = Literal["full", "plan", "static", "random", "attention", "oracle"]
Measure = Literal["agreement", "accuracy", "cost", "prefill_flops", "total_flops", "kv_bytes"]


@dataclass(frozen=True)
class Configuration:
    """One way of running the model."""

    name: str
    kind: Kind
    layer: int | None
    """Of a baseline: behind which visual tokens leave."""
    share: float | None
    """Of a baseline: how much of them stays."""
    measures: Mapping[Measure, Interval]
    """Means over the samples. `agreement`: token for token the full model's greedy answer. `accuracy`, where samples
    have answers: the same text. `cost`: layers that see the visual tokens, those that see a share of them by that
    share. `total_flops`: of the prefill and of decoding as many tokens as the full model's answer has. `kv_bytes`: of
    keys and values after the prefill."""
    differences: Mapping[Measure, Interval]
    """To the plan that the baselines are matched to: this minus that, sample by sample."""
    exit_layers: Mapping[int, int]
    """How many samples' visual tokens left behind each layer; -1: never, or not all of them."""


@dataclass(frozen=True)
class StaticPoint:
    """All visual tokens leave behind `layer`; means over the samples, from one pass per sample (examine.py)."""

    layer: int
    agreement: float
    total_flops: float


@dataclass(frozen=True)
class Evaluation:
    """What :func:`vte_compile.tuning.evaluate.evaluate` found."""

    samples: int
    answered: int
    """How many of them have an answer to compare with."""
    matched: str
    """The plan whose FLOPs the baselines may have."""
    settings: Mapping[str, Any]
    configurations: tuple[Configuration, ...]
    static_exits: tuple[StaticPoint, ...]
    """Of every layer, if there are baselines. Behind the last one nothing is saved: that is the full model."""

    def __getitem__(self, name: str) -> Configuration:
        return next(c for c in self.configurations if c.name == name)

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def __rich__(self) -> RenderableType:
        matched = f"[bold]{_escaped(self.matched)}[/]"
        note = (
            "agrees: token for token the full model's answer. layers: that see the visual tokens, on average. FLOPs: "
            f"over the full model's. Differences to {matched}, sample by sample; {self.settings['confidence']:.0%} "
            "bootstrap intervals."
        )
        return Group(self._table(), note)

    def _table(self) -> Table:
        title = f"{self.samples} samples, {self.answered} of them with answers"
        table = Table(title=title, title_justify="left")
        right = self.answered > 0
        headings = ["", "agrees", *(["right"] if right else []), "layers", "prefill", "FLOPs", "KV KiB", "difference"]
        for heading in headings:
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
        full = self.configurations[0].measures
        for case in self.configurations:
            found = case.measures
            table.add_row(
                _escaped(case.name),
                _share(found["agreement"]),
                *([_share(found["accuracy"])] if right else []),
                f"{found['cost'].value:.2f}",
                f"{found['prefill_flops'].value / full['prefill_flops'].value:.1%}",
                f"{found['total_flops'].value / full['total_flops'].value:.1%}",
                f"{found['kv_bytes'].value / 1024:.0f}",
                "" if case.name == self.matched else _share(case.differences["agreement"], "+"),
                style="bold" if case.name == self.matched else None,
            )
        return table


def _share(interval: Interval, sign: str = "") -> str:
    return f"{interval.value:{sign}.1%} ({interval.low:{sign}.1%} .. {interval.high:{sign}.1%})"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
