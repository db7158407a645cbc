"""Does time follow what is skipped? A random-weight LLaVA without some of its attentions, against torch.compile.

    python benchmarks/skip.py --json benchmarks/results/skip.json

All cases take the same embedded prompt and run in turns in one process. Ratios are medians over the rounds: of a case's
time by that of the unmodified model through torch.compile in the same round (Inductor, logits of the last token only, a
DynamicCache; prefill at its one length, decode at any length, after Dynamo has seen what changes: that it compiles
nothing while times are taken is checked). The skipped attentions are spread evenly over the upper two thirds of the
layers, about where the published sets are, but without the last one: skipping that lets optimize() spare the layers
below it work that is not counted here. The exit is a static one at half depth.

Prefill is bound by arithmetic: a quotient of 1 says that its time falls exactly as FLOPs do; what optimize() spares the
last layer, and the baseline computes for all tokens, is left out of its FLOPs (vte_compile/flops.py counts it). Decode
is bound by memory: its time is compared with the bytes a step moves: the decoder's matrices and lm_head are read once,
keys and values of the prompt three times moved, since a cache that grows by torch.cat, the baseline's as well as ours,
is read and written to append a token, and then read by the attention.
`weight bytes` are those of all parameters the optimized model holds, the embedding and the vision tower among them;
`prompt bytes` are what the cache holds for adapters, such as weights blended for this prompt.

The adapters are PIAs of random weights, with a router per prompt or a static one, folded into the weights of the FFN or
computed as they are; the last column compares them with the same skips without adapters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
    spared_flops,
    write_report,
)
from rich import box
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters
from tqdm import tqdm

from vte_compile import Plan, SkippedAttention, StaticExit, optimize
from vte_compile.adapters import PIA, Projection, Router, StaticRouter
from vte_compile.families.cache_name import cache_of
from vte_compile.flops import decode_flops, prefill_flops, weight_bytes
from vte_compile.timing import Phases, Summary, phases, time_phases

SHARES = (0, 0.25, 0.375, 0.5)
ADAPTED_SHARE = 0.375  # 12 of 32, as published
ADAPTER_WIDTH, ADAPTER_GROUPS = 128, 2
# A decode step attends to keys and values; torch.compile's cache also appends by torch.cat: another read and a write.
CACHE_MOVES, BASELINE_CACHE_MOVES = 1, 3


@dataclass(frozen=True)
class Case:
    """What is timed beside the baseline."""

    name: str
    plan: Plan
    fold: bool = True
    without_adapters: str | None = None
    """The case that differs in nothing else."""


def main(
    hidden: HiddenOption = 1024,
    layers: int = 16,
    seq: SeqOption = 700,
    visual: VisualOption = 576,
    dtype: DtypeOption = "float32",
    threads: ThreadsOption = 0,
    runs: int = 7,
    decode_runs: Annotated[int, typer.Option(help="A run is short, and the machine is not quiet: many.")] = 40,
    decode_tokens: Annotated[int, typer.Option(help="Decode steps in each run.")] = 8,
    adapters: Annotated[bool, typer.Option(help="Also time skips with adapters.")] = True,
    json_file: JsonOption = None,
) -> None:
    """Time prefill and decode with skipped attentions, side by side with torch.compile."""
    logging.basicConfig(level=logging.WARNING)
    model = build_model(hidden, layers, visual, dtype, threads)
    embeds, visual_mask = build_prompt(model, seq, visual)
    cases = list(training_free(layers))
    if adapters:
        cases += with_adapters(layers, hidden, model.dtype)
    models: dict[str, Any] = {BASELINE: torch.compile(model)}
    without = optimize(model, Plan())
    # These share with the first one what was traced and compiled.
    models |= {case.name: optimize(without, case.plan, fold=case.fold) for case in cases}
    timed = {name: phases(candidate, embeds, visual_mask, decode_tokens) for name, candidate in models.items()}
    prefill, decode = measure(timed, runs, decode_runs, model.device)
    decode = {name: summary.scaled(1 / decode_tokens) for name, summary in decode.items()}

    where = (model.config, seq, visual)
    rows = []
    for case in [Case(BASELINE, Plan()), *cases]:
        exit_layer = timed[case.name].exit_layer
        kv, known = held_bytes(timed[case.name])
        moves = BASELINE_CACHE_MOVES if case.name == BASELINE else CACHE_MOVES
        rows.append(
            {
                "case": case.name,
                "exit_layer": exit_layer,
                "skipped": [skip.layer for skip in case.plan.skips],
                "prefill": asdict(prefill[case.name]),
                "decode": asdict(decode[case.name]),
                "kv_bytes": kv,
                "prompt_bytes": known,
                "weight_bytes": sum(p.nbytes for p in models[case.name].parameters()),
                "moved_bytes": weight_bytes(model.config, case.plan, model.dtype, case.fold) + moves * kv,
                "prefill_flops": prefill_flops(*where, exit_layer, case.plan, case.fold)
                - (0 if case.name == BASELINE else spared_flops(model, seq if exit_layer < 0 else seq - visual)),
                "decode_flops": decode_flops(*where, exit_layer, plan=case.plan, fold=case.fold),
            }
        )
    compare(rows, {case.name: case.without_adapters for case in cases})
    settings = {
        "hidden": hidden,
        "layers": layers,
        "seq": seq,
        "visual": visual,
        "dtype": dtype,
        "runs": runs,
        "decode_runs": decode_runs,
        "decode_tokens": decode_tokens,
    }
    show(rows, settings)
    if json_file is not None:
        write_report(json_file, "skip.py", settings, rows)


def spread(layers: int, count: int) -> list[int]:
    """``count`` layers, evenly over the upper two thirds without the last layer."""
    first, end = layers // 3, layers - 1
    return [first + (2 * i + 1) * (end - first) // (2 * count) for i in range(count)]


def training_free(layers: int) -> Iterator[Case]:
    """Skips without adapters, without and with an exit at half depth."""
    for exits in ([], [StaticExit(layers // 2 - 1)]):
        for count in sorted({round(share * layers) for share in SHARES}):
            name = f"skip {count}" + "".join(f", exit after {exit_.layer}" for exit_ in exits)
            yield Case(name, Plan(exits, skips=[SkippedAttention(layer) for layer in spread(layers, count)]))


def with_adapters(layers: int, hidden: int, dtype: torch.dtype) -> Iterator[Case]:
    """Skips with PIAs: a router per prompt or a static one, folded or not."""
    skipped = spread(layers, round(ADAPTED_SHARE * layers))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=generator)).to(dtype)

    def projection(out: int, in_: int) -> Projection:
        return Projection(random(out, in_), random(out))

    for name in ("routed", "static"):
        skips = []
        for layer in skipped:
            router = Router(random(2, hidden), random(2)) if name == "routed" else StaticRouter((0.5, 0.5))
            downs = [projection(ADAPTER_WIDTH, hidden) for _ in range(2)]
            ups = [projection(hidden, ADAPTER_WIDTH // ADAPTER_GROUPS) for _ in range(2)]
            skips.append(SkippedAttention(layer, PIA(*downs, *ups, router, groups=ADAPTER_GROUPS)))
        plain = f"skip {len(skipped)}"
        for fold in (True, False):
            yield Case(f"{plain}, {name}, {'' if fold else 'un'}folded", Plan(skips=skips), fold, plain)


def measure(
    timed: dict[str, Phases], runs: int, decode_runs: int, device: torch.device
) -> tuple[dict[str, Summary], dict[str, Summary]]:
    """Times of prefill and of decode, by case.

    Raises:
        RuntimeError: The baseline was compiled again while times were taken.
    """
    for phase in timed.values():
        # Once for the lengths that grow, which Dynamo takes for constants at first, and once for the cache that
        # cropping leaves, whose strides differ.
        for _ in range(2):
            phase.decode()
            phase.rewind()
    graphs = counters["stats"]["unique_graphs"]
    with tqdm(total=len(timed) * (runs + decode_runs + 2), desc="timing", unit="run") as bar:
        prefill, decode = time_phases(timed, runs, decode_runs, device=device, after_each=bar.update)
    if counters["stats"]["unique_graphs"] != graphs:
        raise RuntimeError("torch.compile compiled the baseline again while times were taken: they mean nothing.")
    return prefill, decode


def held_bytes(phase: Phases) -> tuple[int, int]:
    """What the cache holds after prefill: bytes of keys and values, and of what adapters know of the prompt."""
    output: Any = phase.prefill()
    cache = cache_of(output)
    layers = [layer for layer in cache.layers if layer.is_initialized]
    state = getattr(cache, "prompt_state", None)
    kv = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
    return kv, sum(value.nbytes for value in state.values) if state is not None else 0


def compare(rows: list[dict[str, Any]], without_adapters: dict[str, str | None]) -> None:
    """Add the ratios to the first row, the baseline, and to the case without adapters."""
    by_name = {row["case"]: row for row in rows}
    for row in rows:
        for phase, cost in (("prefill", "prefill_flops"), ("decode", "moved_bytes")):
            times = row[phase]
            runs = Summary.of(times["runs_s"])
            times["time_ratio"] = runs.ratio_to(Summary.of(rows[0][phase]["runs_s"]))
            times["cost_ratio"] = row[cost] / rows[0][cost]
            times["quotient"] = times["time_ratio"] / times["cost_ratio"]
            if (plain := without_adapters.get(row["case"])) is not None:
                times["to_no_adapter"] = runs.ratio_to(Summary.of(by_name[plain][phase]["runs_s"]))


def show(rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    console = Console()
    console.print(", ".join(f"{k} {v}" for k, v in settings.items()))
    for phase, title, cost in (("prefill", "prefill", "FLOPs"), ("decode", "decode, per token", "bytes")):
        columns = ("median\nms", "min, max\nms", "time", cost, f"time/\n{cost}", "to no\nadapter")
        console.print(_table(title, columns, {row["case"]: _times(row[phase]) for row in rows}))
    columns = ("KV\nMiB", "prompt\nMiB", "weights\nMiB", "moved per\ntoken MiB", "prefill\nGFLOPs", "decode\nGFLOPs")
    units = {
        "kv_bytes": 2**20,
        "prompt_bytes": 2**20,
        "weight_bytes": 2**20,
        "moved_bytes": 2**20,
        "prefill_flops": 1e9,
        "decode_flops": 1e9,
    }
    amounts = {row["case"]: [f"{row[key] / unit:.2f}" for key, unit in units.items()] for row in rows}
    console.print(_table("amounts", columns, amounts))


def _times(times: dict[str, float]) -> list[str]:
    median, least, most = (f"{1e3 * times[key]:.4g}" for key in ("median_s", "min_s", "max_s"))
    ratios = (f"{times[key]:.3f}" for key in ("time_ratio", "cost_ratio", "quotient"))
    return [median, f"{least}, {most}", *ratios, f"{times['to_no_adapter']:.3f}" if "to_no_adapter" in times else ""]


def _table(title: str, columns: Sequence[str], rows: dict[str, list[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("case", *columns):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for case, cells in rows.items():
        table.add_row(case, *cells)
    return table


if __name__ == "__main__":
    typer.run(main)
