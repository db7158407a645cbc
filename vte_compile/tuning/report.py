"""What a calibration found: per layer and in sum, as plain data, JSON and a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from vte_compile.tuning.gates import WidthAccuracy
from vte_compile.tuning.guarantee import Certificate


@dataclass(frozen=True)
class LayerReport:
    """One candidate layer."""

    layer: int
    may_exit: float
    """The share of the training samples whose label is that they may exit here."""
    balanced_accuracy: float | None
    """Of its gate at threshold 0, on the selection split; None where all samples there have the same label."""
    auc: float | None
    """Likewise: the area under the ROC curve."""
    threshold: float | None
    """None: the plan has no gate here."""
    exits: float
    """The share of the certification split that leaves here."""
    changed: int
    """How many of these answers then differ from the full model's."""


@dataclass(frozen=True)
class CalibrationReport:
    """What :func:`vte_compile.calibrate` did and found."""

    samples: Mapping[str, int]
    """How many are in each split."""
    settings: Mapping[str, Any]
    layers: tuple[LayerReport, ...]
    """The candidates: all of the decoder's layers but the last."""
    certificate: Certificate
    cost_unit: str
    """Of the certificate's costs."""
    widths: tuple[WidthAccuracy, ...]
    """Gates of other widths, if they were asked for."""

    @property
    def speedup(self) -> float:
        """The mean cost without exits over that of the plan, gates included; of prefill, on the certification split."""
        return self.certificate.full_cost / self.certificate.expected_cost

    @property
    def never(self) -> float:
        """The share of the certification split that keeps its visual tokens."""
        return max(1.0 - sum(row.exits for row in self.layers), 0.0)

    def to_json(self) -> str:
        """All of it; a threshold is null where there is no gate."""
        content = asdict(self) | {"speedup": self.speedup}
        thresholds = self.certificate.thresholds
        content["certificate"] |= {"thresholds": [t if math.isfinite(t) else None for t in thresholds]}
        return json.dumps(content, indent=1) + "\n"

    def __rich__(self) -> RenderableType:
        return Group(self._layer_table(), *([self._width_table()] if self.widths else []), self._summary())

    def _layer_table(self) -> Table:
        counts = ", ".join(f"{count} for {part}" for part, count in self.samples.items())
        table = Table(title=f"Samples: {counts}", title_justify="left")
        for heading in ("layer", "may exit", "accuracy", "AUC", "threshold", "exits", "changed"):
            table.add_column(heading, justify="right")
        for row in self.layers:
            table.add_row(
                str(row.layer),
                f"{row.may_exit:.1%}",
                _or_blank(row.balanced_accuracy, ".1%"),
                _or_blank(row.auc, ".3f"),
                _or_blank(row.threshold, ".2f"),
                f"{row.exits:.1%}",
                str(row.changed) if row.exits else "",
                style=None if row.threshold is not None else "dim",
            )
        staying = self.certificate.changed - sum(row.changed for row in self.layers)  # by skips and adapters alone
        table.add_row("never", "", "", "", "", f"{self.never:.1%}", str(staying) if staying else "")
        return table

    def _width_table(self) -> Table:
        table = Table("width", "parameters", "accuracy", "AUC", title="Gates of other widths", title_justify="left")
        for row in self.widths:
            table.add_row(str(row.width), f"{row.parameters:,}", f"{row.balanced_accuracy:.1%}", f"{row.auc:.3f}")
        return table

    def _summary(self) -> str:
        found = self.certificate
        return (
            f"{found.changed} of {found.samples} answers differ from the full model's. P(an answer differs) <= "
            f"{found.max_disagreement:.2%} with confidence {1 - found.delta:.0%}.\n"
            f"Prefill costs 1/{self.speedup:.2f} of what it costs without exits ({self.cost_unit}, in the mean)."
        )


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
