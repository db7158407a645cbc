"""Does a batch's prefill cost what its rows cost? Rows that leave at different layers, against torch.compile.

    python benchmarks/batch.py --json benchmarks/results/batch.json

Predicted is the sum of the rows' FLOPs, each with its own exit, over those of the same batch without an exit. Times are
medians of rounds in which all cases of a batch size take turns, and ratios are of medians, to the model without an exit
through torch.compile, which runs the batch as one tensor. In the mixed case rows leave where gates say; thresholds are
set such that at each candidate half of the rows that are left fire, and one row has no image.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from common import (
    BASELINE,
    DtypeOption,
    HiddenOption,
    JsonOption,
    SeqOption,
    ThreadsOption,
    VisualOption,
    build_model,
    build_prompt,
    exit_candidates,
    mixed_exits,
    write_report,
)
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from vte_compile import Plan, StaticExit, optimize
from vte_compile.flops import prefill_flops
from vte_compile.timing import interleaved

MIXED = "mixed exits"


def main(
    hidden: HiddenOption = 1024,
    layers: int = 8,
    seq: SeqOption = 700,
    visual: VisualOption = 576,
    dtype: DtypeOption = "float32",
    threads: ThreadsOption = 0,
    runs: int = 5,
    batches: Annotated[str, typer.Option(help="Rows of a batch, separated by commas.")] = "1,4,8",
    json_file: JsonOption = None,
) -> None:
    """Time prefill of batches without, with equal and with mixed exits, side by side with torch.compile."""
    logging.basicConfig(level=logging.ERROR)
    model = build_model(hidden, layers, visual, dtype, threads)
    compiled = torch.compile(model, dynamic=False)
    without = optimize(model, Plan())
    rows: list[dict[str, Any]] = []
    for batch in map(int, batches.split(",")):
        rows += time_batch(model, compiled, without, batch, seq, visual, runs)
    settings = {"hidden": hidden, "layers": layers, "seq": seq, "visual": visual, "dtype": dtype, "runs": runs}
    show(rows, settings)
    if json_file is not None:
        write_report(json_file, "batch.py", settings, rows)


def time_batch(
    model: Any, compiled: Any, without: Any, batch: int, seq: int, visual: int, runs: int
) -> list[dict[str, Any]]:
    """All cases of one batch size."""
    torch.manual_seed(batch)
    prompts = [build_prompt(model, seq, visual) for _ in range(batch)]
    embeds, visual_mask = (torch.cat(parts) for parts in zip(*prompts, strict=True))
    if batch > 1:
        visual_mask[-1] = False  # a row of text alone, as long as the others
    layers = model.config.text_config.num_hidden_layers
    candidates = exit_candidates(layers)
    plans = {"no exit": Plan(), **{f"exit after {k}": Plan([StaticExit(k)]) for k in candidates}}
    if batch > 1:
        plans[MIXED] = Plan(mixed_exits(model, embeds, visual_mask, candidates))
    calls: dict[str, Callable[[], Any]] = {BASELINE: prefill(compiled, embeds, None)}
    calls |= {name: prefill(optimize(without, plan), embeds, visual_mask) for name, plan in plans.items()}
    exits = {name: [-1] * batch if name == BASELINE else call().exit_layer.tolist() for name, call in calls.items()}
    with tqdm(total=len(calls) * (runs + 1), desc=f"batch {batch}", unit="run") as bar:
        times = interleaved(calls, runs, device=model.device, after_each=bar.update)
    shown = [int(row.sum()) for row in visual_mask]
    full = batch * prefill_flops(model.config, seq, visual, -1)
    rows = []
    for name, leaving in exits.items():
        plan = plans.get(name)
        flops = sum(prefill_flops(model.config, seq, v, e, plan) for v, e in zip(shown, leaving, strict=True))
        summary = times[name]
        ratio, share = summary.median_s / times[BASELINE].median_s, flops / full
        row = {"batch": batch, "case": name, "exit_layers": leaving, "median_s": summary.median_s}
        row |= {"min_s": summary.min_s, "max_s": summary.max_s, "time_ratio": ratio, "flop_ratio": share}
        to_own = summary.median_s / times["no exit"].median_s / share
        rows.append(row | {"quotient": ratio / share, "to_no_exit": to_own})
    return rows


def prefill(model: Any, embeds: Tensor, visual_mask: Tensor | None) -> Callable[[], Any]:
    """A prefill of the batch, up to the logits of the last tokens."""
    inputs = {"inputs_embeds": embeds, "logits_to_keep": 1, "use_cache": True}
    if visual_mask is not None:
        inputs["visual_mask"] = visual_mask

    @torch.no_grad()
    def run() -> Any:
        return model(**inputs)

    return run


def show(rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    Console().print("prefill of batches: " + ", ".join(f"{k} {v}" for k, v in settings.items()))
    table = Table(box=box.SIMPLE, pad_edge=False)
    columns = ("rows", "case", "median\ns", "min, max\ns", "time\nratio", "FLOPs", "quo-\ntient", "to no\nexit")
    for column in columns:
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for row in rows:
        median, least, most = (f"{row[key]:.2f}" for key in ("median_s", "min_s", "max_s"))
        ratios = [f"{row[key]:.3f}" for key in ("time_ratio", "flop_ratio", "quotient", "to_no_exit")]
        table.add_row(str(row["batch"]), row["case"], median, f"{least}, {most}", *ratios)
    Console().print(table)
    for row in rows:
        if row["case"] == MIXED:
            Console().print(f"{row['batch']} rows, {MIXED}: {row['exit_layers']}")


if __name__ == "__main__":
    typer.run(main)
