"""Does prefill time follow FLOPs? A random-weight LLaVA with an exit forced after some layer, against torch.compile.

    python benchmarks/prefill.py --json benchmarks/results/prefill.json

All cases take the same embedded prompt and run in turns in one process; ratios are of medians, to the same model
through torch.compile (Inductor, static shapes, logits of the last token only). The forced exit is decided by gates:
those below it are asked and keep, the one at its layer fires. A quotient of 1: time falls exactly as FLOPs do.

Matrix products of few rows run at fewer FLOP/s than those of many, with or without this package. So the baseline also
runs the text alone, and `parts_quotient` compares an exit with as many layers of each of the two baselines.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import typer
from common import (
    BASELINE,
    GATE_WIDTH,
    DtypeOption,
    HiddenOption,
    JsonOption,
    SeqOption,
    ThreadsOption,
    VisualOption,
    build_model,
    build_prompt,
    exit_candidates,
    write_report,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from vte_compile import GateExit, Plan, optimize
from vte_compile.flops import prefill_flops
from vte_compile.timing import Phases, Summary, interleaved, phases

NEVER, ALWAYS = 1e9, -1e9
TEXT_ONLY = "same, text alone"


def main(
    hidden: HiddenOption = 1024,
    layers: int = 16,
    seq: SeqOption = 700,
    visual: VisualOption = 576,
    dtype: DtypeOption = "float32",
    threads: ThreadsOption = 0,
    runs: int = 15,
    json_file: JsonOption = None,
) -> None:
    """Time prefill without and with a forced exit, side by side with torch.compile and eager."""
    logging.basicConfig(level=logging.WARNING)
    model = build_model(hidden, layers, visual, dtype, threads)
    cases, plans = build_cases(model, *build_prompt(model, seq, visual))
    with tqdm(total=len(cases) * (runs + 2), desc="prefill", unit="run") as bar:
        times = interleaved(
            {name: case.prefill for name, case in cases.items()},
            runs,
            warmup=2,
            device=model.device,
            after_each=bar.update,
        )
    rows = []
    for name, case in cases.items():
        shown, left = (seq - visual, 0) if name == TEXT_ONLY else (seq, visual)
        flops = prefill_flops(model.config, shown, left, case.exit_layer, plans.get(name))
        rows.append(_row(name, case.exit_layer, times, flops))
    full = prefill_flops(model.config, seq, visual, -1)
    with_image, text_only = (times[name].median_s / layers for name in (BASELINE, TEXT_ONLY))
    for row in rows:
        row["flop_ratio"] = row.pop("flops") / full
        row["quotient"] = row["time_ratio"] / row["flop_ratio"]
        if row["exit_layer"] >= 0:
            before = row["exit_layer"] + 1
            row["parts_quotient"] = row["median_s"] / (before * with_image + (layers - before) * text_only)
    settings = {"hidden": hidden, "layers": layers, "seq": seq, "visual": visual, "dtype": dtype, "runs": runs}
    show(rows, settings)
    if json_file is not None:
        write_report(json_file, "prefill.py", settings, rows)


def build_cases(model: Any, embeds: Tensor, visual_mask: Tensor) -> tuple[dict[str, Phases], dict[str, Plan]]:
    """What is timed, by name, and the plans of the optimized ones. Compiles everything."""
    layers = model.config.text_config.num_hidden_layers
    without = optimize(model, Plan())
    plans = {f"exit after {k}": forced(model, k) for k in exit_candidates(layers)}
    models = {
        BASELINE: torch.compile(model, dynamic=False),
        "eager": model,
        "no exit": without,
        "gates never fire": optimize(without, forced(model, None)),
        **{name: optimize(without, plan) for name, plan in plans.items()},
    }
    plans["gates never fire"] = forced(model, None)
    cases = {name: phases(m, embeds, visual_mask, 1) for name, m in models.items()}
    text_only = embeds[:, ~visual_mask[0]], visual_mask[:, ~visual_mask[0]]
    cases[TEXT_ONLY] = phases(models[BASELINE], *text_only, 1)
    return cases, plans


def forced(model: Any, layer: int | None) -> Plan:
    """Gates after layers 0 .. ``layer``, the last of which fires; None: after all but the last layer, none fires."""
    text = model.config.text_config
    last = text.num_hidden_layers - 2 if layer is None else layer
    generator = torch.Generator().manual_seed(0)
    w1 = 0.01 * torch.randn(GATE_WIDTH, 2 * text.hidden_size, generator=generator)
    w2 = 0.01 * torch.randn(2, GATE_WIDTH, generator=generator)
    return Plan(exits=[GateExit(k, w1, w2, ALWAYS if k == layer else NEVER) for k in range(last + 1)])


def _row(name: str, exit_layer: int, times: dict[str, Summary], flops: int) -> dict[str, Any]:
    summary = times[name]
    return {
        "case": name,
        "exit_layer": exit_layer,
        "median_s": summary.median_s,
        "min_s": summary.min_s,
        "max_s": summary.max_s,
        "time_ratio": summary.median_s / times[BASELINE].median_s,
        "flops": flops,
    }


def show(rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    table = Table(title="prefill: " + ", ".join(f"{k} {v}" for k, v in settings.items()))
    for column in (
        "case",
        "median\nms",
        "min\nms",
        "max\nms",
        "time\nratio",
        "FLOP\nratio",
        "quotient",
        "to the\nparts",
    ):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for row in rows:
        milliseconds = [f"{1e3 * row[key]:.1f}" for key in ("median_s", "min_s", "max_s")]
        ratios = [f"{row[key]:.3f}" for key in ("time_ratio", "flop_ratio", "quotient")]
        parts = f"{row['parts_quotient']:.3f}" if "parts_quotient" in row else ""
        table.add_row(row["case"], *milliseconds, *ratios, parts)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
