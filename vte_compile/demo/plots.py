"""The demo's plots, from its report alone: accuracy and agreement over cost, and where samples exit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vte_compile.plotting import GRID, INK, MUTED, drawn

_STATIC, _LEARNED, _ORACLE = "#7a8da3", "#d9480f", "#2b8a3e"
_COST = "decoder layers that see the visual tokens (mean)"


def draw(report: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Draw all plots into PNG files: name -> file."""
    files = {}
    for name, plot, size in (
        ("agreement_over_cost", _agreement, (6.6, 4.2)),
        ("accuracy_over_cost", _accuracy, (6.6, 4.2)),
        ("exit_layers", _exit_layers, (6.6, 3.4)),
        ("exit_layers_by_type", _exit_layers_by_type, (6.6, 3.9)),
    ):
        files[name] = folder / f"{name}.png"
        with drawn(files[name], size) as axes:
            plot(axes, report)
    return files


def _agreement(axes: Any, report: dict[str, Any]) -> None:
    _curve(axes, report, "agreement")
    oracle = report["comparison"]["oracle"]
    axes.plot(
        oracle["cost"], oracle["agreement"], "D", ms=7, mfc="white", mec=_ORACLE, mew=1.6, label="oracle exit", zorder=3
    )
    axes.set_title("Answers equal to the full model's")
    axes.legend(loc="lower right")


def _accuracy(axes: Any, report: dict[str, Any]) -> None:
    _curve(axes, report, "accuracy")
    full = next(c for c in report["configurations"] if c["kind"] == "original")["accuracy"]["value"]
    axes.axhline(full, color=MUTED, lw=1, ls=(0, (4, 3)), label=f"full model, {full:.1%}", zorder=1)
    axes.set_title("Right answers")
    axes.legend(loc="lower right")


def _curve(axes: Any, report: dict[str, Any], measure: str) -> None:
    """The static exits as a curve, which the full model ends, and the learned exit as a point."""
    layers = report["model"]["layers"]
    cases = report["configurations"]
    static = [c for c in cases if c["kind"] == "static"]
    full = next(c for c in cases if c["kind"] == "original")
    x = [c["exit_layer"] + 1 for c in static] + [layers]
    y = [c[measure]["value"] for c in (*static, full)]
    axes.plot(x, y, "-o", color=_STATIC, lw=1.8, ms=5, label="static exit, same for all", zorder=2)
    learned = next(c for c in cases if c["kind"] == "learned")
    value = learned[measure]
    spread = [[value["value"] - value["low"]], [value["high"] - value["value"]]]
    axes.errorbar(
        learned["mean_cost"], value["value"], yerr=spread, color=_LEARNED, fmt="*", ms=15, capsize=3, elinewidth=1.2,
        label="learned exit (95% interval)", zorder=4,
    )  # fmt: skip
    axes.annotate(
        f"{value['value']:.1%} at {learned['mean_cost']:.2f} of {layers}",
        (learned["mean_cost"], value["value"]),
        xytext=(-8, -9), textcoords="offset points", ha="right", va="top", color=_LEARNED, fontweight="bold",
    )  # fmt: skip
    axes.set(xlabel=_COST, xticks=range(1, layers + 1), xlim=(0.6, layers + 0.4), ylim=(0, 1.06))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)


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
