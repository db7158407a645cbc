"""What serving.py makes of what it measured: ratios to torch.compile, tables and a plot."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

from common import BASELINE
from rich import box
from rich.console import Console
from rich.table import Table

from vte_compile.plotting import GRID, MUTED, drawn

_COLORS = ("#1971c2", "#d9480f", "#2b8a3e", "#9c36b5", "#e8a33d", "#0b7285")
_MARKERS = {"never": "s", "1/4": "v", "1/2": "o", "3/4": "^", "mixed": "*"}


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each case, where torch.compile was timed too: ratios of times, of what was predicted, and quotients."""
    baselines = {(row["preset"], row["batch"]): row for row in rows if row["case"] == BASELINE}
    for row, (phase, cost) in itertools.product(rows, (("ttft", "prefill_flops"), ("tpot", "decode_bytes"))):
        base = baselines.get((row["preset"], row["batch"]), {})
        if phase in row and phase in base:
            ratio, predicted = row[phase]["median_s"] / base[phase]["median_s"], row[cost] / base[cost]
            row[phase] |= {"time_ratio": ratio, "predicted_ratio": predicted, "quotient": ratio / predicted}


def show(rows: list[dict[str, Any]], ceilings: dict[str, dict[str, float]]) -> None:
    """Tables of prefill and of decode, of each preset and batch size."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    for dtype, reached in ceilings.items():
        card = f"{reached['flops_per_s'] / 1e12:.3g} TFLOP/s, {reached['bytes_per_s'] / 1e12:.3g} TB/s"
        console.print(f"measured here, {dtype}: {card}")
    for preset, batch in dict.fromkeys((row["preset"], row["batch"]) for row in rows):
        own = [row for row in rows if (row["preset"], row["batch"]) == (preset, batch)]
        title = f"{preset}, {batch} row" + "s" * (batch > 1)
        console.print(_table(f"{title}: time to first token", own, "ttft", "prefill", "TFLOP/s", "FLOPs"))
        console.print(_table(f"{title}: time per output token", own, "tpot", "decode", "TB/s", "bytes"))


def _table(title: str, rows: list[dict[str, Any]], clock: str, phase: str, unit: str, cost: str) -> Table:
    rate, tokens = ("flops_per_s", "prompt_tokens_per_s") if clock == "ttft" else ("bytes_per_s", "tokens_per_s")
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    columns = ("median\nms", "p10, p90\nms", "tokens\nper s", unit, "of\nit", "time\nratio", cost, "quo-\ntient")
    for column in ("case", *columns, "peak\nGiB"):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for row in rows:
        if clock not in row:
            table.add_row(row["case"], row["reason"].split(":")[0])
            continue
        times = row[clock]
        median, low, high = (f"{1e3 * times[key]:.4g}" for key in ("median_s", "p10_s", "p90_s"))
        per_second = f"{row[f'{phase}_{rate}'] / 1e12:.3g}", f"{row[f'{phase}_of_ceiling']:.2f}"
        ratios = [f"{times[key]:.3f}" if key in times else "" for key in ("time_ratio", "predicted_ratio", "quotient")]
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
        table.add_row(row["case"], median, f"{low}, {high}", f"{row[tokens]:.4g}", *per_second, *ratios, peak)
    return table


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw prefill times over predicted FLOPs, both over torch.compile's, into a PNG file.

    Raises:
        InputError: matplotlib is missing.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["case"] in _MARKERS and "time_ratio" in row.get("ttft", {}):
            groups.setdefault((row["preset"], row["batch"]), []).append(row)
    with drawn(file, (6.6, 4.4)) as axes:
        axes.plot([0, 1.05], [0, 1.05], "--", color=MUTED, lw=1, label="as FLOPs", zorder=1)
        for ((preset, batch), own), color in zip(groups.items(), itertools.cycle(_COLORS)):
            own = sorted(own, key=lambda row: row["ttft"]["predicted_ratio"])
            x, y = ([row["ttft"][key] for row in own] for key in ("predicted_ratio", "time_ratio"))
            label = f"{preset}, {batch} row" + "s" * (batch > 1)
            axes.plot(x, y, "-", color=color, lw=1.4, label=label, zorder=2)
            for row, *at in zip(own, x, y, strict=True):
                axes.plot(*at, _MARKERS[row["case"]], color=color, ms=10 if row["case"] == "mixed" else 6, zorder=3)
        for case, marker in _MARKERS.items():
            axes.plot([], [], marker, color=MUTED, ms=6, label={"never": "no exit"}.get(case, f"exit {case}"))
        axes.set(xlabel="FLOPs of prefill, over torch.compile's", ylabel="time to first token, over torch.compile's")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.grid(color=GRID, lw=0.8)
        axes.set_axisbelow(True)
        axes.legend(loc="upper left", fontsize=8.5, ncols=2)
        axes.set_title("Time to first token over FLOPs")
