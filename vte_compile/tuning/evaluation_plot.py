"""An evaluation's plot: agreement with the full model over FLOPs, with intervals."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from vte_compile.plotting import GRID, drawn
from vte_compile.tuning.evaluation import Evaluation, Kind

_CURVE = "#7a8da3"
_MARKERS: dict[Kind, tuple[str, str]] = {
    "full": ("s", "#1d2733"),
    "static": ("o", "#7a8da3"),
    "random": ("^", "#9c36b5"),
    "attention": ("v", "#1971c2"),
    "oracle": ("D", "#2b8a3e"),
}

# Of plans, each of which has its own; a fifth looks as the first.
_PLAN_MARKERS = (("*", "#d9480f"), ("P", "#862e9c"), ("X", "#0b7285"), ("p", "#5c940d"))


def draw_evaluation(evaluation: Evaluation, file: Path) -> None:
    """Draw the evaluation into a PNG file; its folder is created where missing.

    Raises:
        InputError: matplotlib is missing.
    """
    with drawn(file, (6.6, 4.2)) as axes:
        _agreement(axes, evaluation)


def _agreement(axes: Any, evaluation: Evaluation) -> None:
    full = evaluation.configurations[0].measures["total_flops"].value
    if evaluation.static_exits:
        x = [point.total_flops / full for point in evaluation.static_exits]
        y = [point.agreement for point in evaluation.static_exits]
        axes.plot(x, y, "-", color=_CURVE, lw=1.4, label="static exits, by layer", zorder=1)
    plans = cycle(_PLAN_MARKERS)
    for case in evaluation.configurations:
        agreement, work = case.measures["agreement"], case.measures["total_flops"]
        marker, color = next(plans) if case.kind == "plan" else _MARKERS[case.kind]
        axes.errorbar(
            work.value / full,
            agreement.value,
            xerr=[[(work.value - work.low) / full], [(work.high - work.value) / full]],
            yerr=[[agreement.value - agreement.low], [agreement.high - agreement.value]],
            fmt="none", ecolor=color, capsize=3, elinewidth=1.2, zorder=2,
        )  # fmt: skip
        size, order = (13, 4) if case.kind == "plan" else (7, 3)
        axes.plot(work.value / full, agreement.value, marker, color=color, ms=size, label=case.name, zorder=order)
    axes.set(xlabel="FLOPs of prefill and decode, over the full model's", ylim=(0, 1.06))
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right")
    axes.set_title(f"Answers equal to the full model's, {evaluation.settings['confidence']:.0%} intervals")
