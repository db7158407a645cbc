"""The demo's plots: agreement over FLOPs, and where samples exit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vte_compile.plotting import GRID, INK, drawn
from vte_compile.tuning.evaluation import Evaluation
from vte_compile.tuning.evaluation_plot import draw_evaluation

_STATIC, _LEARNED = "#7a8da3", "#d9480f"


def draw(report: dict[str, Any], comparison: Evaluation, folder: Path) -> dict[str, Path]:
    """Draw all plots into PNG files: name -> file."""
    files = {name: folder / f"{name}.png" for name in ("agreement_over_flops", "exit_layers", "exit_layers_by_type")}
    draw_evaluation(comparison, files["agreement_over_flops"])
    with drawn(files["exit_layers"], (6.6, 3.4)) as axes:
        _exit_layers(axes, report)
    with drawn(files["exit_layers_by_type"], (6.6, 3.9)) as axes:
        _exit_layers_by_type(axes, report)
    return files


def _exit_layers(axes: Any, report: dict[str, Any]) -> None:
    learned = next(c for c in report["configurations"] if c["kind"] == "learned")
    counts = list(learned["exit_histogram"].values())
    bars = axes.bar(range(len(counts)), counts, color=[_LEARNED] * (len(counts) - 1) + [_STATIC], width=0.78)
    axes.bar_label(bars, [str(n) if n else "" for n in counts], padding=2, color=INK, fontsize=9.5)
    axes.set(xlabel="the visual tokens leave after layer", ylabel="questions", ylim=(0, max(counts) * 1.13))
    axes.set_xticks(range(len(counts)), _layer_names(learned))
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.set_title("Where the learned exit fires")


def _exit_layers_by_type(axes: Any, report: dict[str, Any]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    learned = next(c for c in report["configurations"] if c["kind"] == "learned")
    types = sorted(learned["by_type"].items(), key=lambda item: item[1]["mean_cost"])
    shares = [[n / case["accuracy"]["n"] for n in case["exit_histogram"].values()] for _, case in types]
    colors = LinearSegmentedColormap.from_list("exits", ["#ffffff", "#ffd8b8", _LEARNED])
    axes.imshow(shares, cmap=colors, vmin=0, vmax=1, aspect="auto")
    for row, values in enumerate(shares):
        for column, share in enumerate(values):
            if share >= 0.005:
                color = "white" if share > 0.8 else INK
                axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=8.5, color=color)
    axes.set_xticks(range(len(shares[0])), _layer_names(learned))
    axes.set_yticks(range(len(types)), [f"{name}  ({case['mean_cost']:.1f} layers)" for name, case in types])
    axes.set_xticks([i + 0.5 for i in range(len(shares[0]) - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(types) - 1)], minor=True)
    axes.grid(which="minor", color=GRID, lw=0.8)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("the visual tokens leave after layer")
    axes.set_title("Exits by type of question (share of its questions)")


def _layer_names(case: dict[str, Any]) -> list[str]:
    return ["never" if layer == "-1" else layer for layer in case["exit_histogram"]]
