"""A calibration's plot: by layer, how many samples may exit there, and how many do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vte_compile.plotting import drawn
from vte_compile.tuning.report import CalibrationReport

_MAY, _DOES, _NEVER = "#c9d3de", "#d9480f", "#7a8da3"


def draw_calibration(report: CalibrationReport, file: Path) -> None:
    """Draw the report into a PNG file; its folder is created where missing.

    Raises:
        InputError: matplotlib is missing.
    """
    with drawn(file, (6.6, 3.6)) as axes:
        _shares(axes, report)


def _shares(axes: Any, report: CalibrationReport) -> None:
    layers = [row.layer for row in report.layers]
    axes.bar(layers, [row.may_exit for row in report.layers], color=_MAY, width=0.78, label="may exit (training)")
    axes.bar(layers, [row.exits for row in report.layers], color=_DOES, width=0.5, label="exit (certification)")
    axes.bar(len(layers), [report.never], color=_NEVER, width=0.5)
    names = [str(layer) if len(layers) <= 16 or layer % 4 == 0 else "" for layer in layers]
    axes.set_xticks([*layers, len(layers)], [*names, "never"])
    axes.set(xlabel="the visual tokens leave after layer", ylabel="share of samples", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.tick_params(axis="x", length=0)
    axes.legend(loc="upper left")
    found = report.certificate
    axes.set_title(f"Prefill 1/{report.speedup:.2f}, {found.risk:.1%} of {found.samples} answers differ")
