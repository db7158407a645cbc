"""Does torch.compile(backend="vte") cost anything beside optimize()? Steady times, and how long compiling takes.

    python benchmarks/backend.py --json benchmarks/results/backend.json

Steady times: a random-weight LLaVA, all cases in turns in one process; ratios are medians over the rounds. The prompt
is token ids, with the image's placeholder where visual tokens are: its embedding stands for image features, so that the
vision tower is not timed, and the visual tokens are known from their ids. The exit is a static one at half depth.

First calls: the time until all of this is compiled, with an empty Inductor cache, what is run meanwhile included.
Compile time by layers: each case in a process of its own with an empty Inductor cache, from the model to the first
round (a prompt of a new length, and two decode steps) in which nothing is compiled, less what the rounds take without
compiling. "Marked" is the backend with prompts that went through `torch._dynamo.mark_dynamic(input_ids, 1)`: Dynamo
traces them once then, and not once more at the second length. Seconds of CPU are the process's own, without the C++
compilers it waits for: unlike wall time, they do not count what else the machine does. The parts are wall time:
Dynamo's own tracing; Inductor; and the rest, which is capture, passes and checks.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Annotated, Any

import torch
import typer
from common import (
    BASELINE,
    IMAGE_TOKEN,
    PREFIX,
    DtypeOption,
    HiddenOption,
    JsonOption,
    SeqOption,
    ThreadsOption,
    VisualOption,
    build_model,
    build_prompt,
    write_report,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._dynamo.utils import compilation_time_metrics, counters
from torch._inductor.utils import fresh_cache
from tqdm import tqdm

from vte_compile import Plan, StaticExit, optimize
from vte_compile.families.cache_name import CACHE, cache_of
from vte_compile.timing import Phases, time_phases

OPTIMIZE, BACKEND = "optimize()", "backend vte"
MARKED = f"{BACKEND}, marked"
"""Its prompts are marked: their length is dynamic, so that Dynamo need not learn it from a second prompt."""
COMPILED_LAYERS = (8, 16, 32)
COMPILED_HIDDEN, COMPILED_VISUAL = 256, 32
MAX_ROUNDS = 8


def main(
    hidden: HiddenOption = 1024,
    layers: int = 16,
    seq: SeqOption = 700,
    visual: VisualOption = 576,
    dtype: DtypeOption = "float32",
    threads: ThreadsOption = 0,
    runs: int = 7,
    decode_runs: Annotated[int, typer.Option(help="A run is short, and the machine is not quiet: many.")] = 20,
    decode_tokens: Annotated[int, typer.Option(help="Decode steps in each run.")] = 8,
    compile_times: Annotated[bool, typer.Option(help="Also measure how long compiling takes.")] = True,
    json_file: JsonOption = None,
) -> None:
    """Time prefill and decode through optimize() and the backend, and how long both take to compile."""
    logging.basicConfig(level=logging.WARNING)
    rows = steady_rows(hidden, layers, seq, visual, dtype, threads, runs, decode_runs, decode_tokens)
    show_steady(rows)
    if compile_times:
        compiled = compile_rows(threads)
        show_compile(compiled)
        rows += compiled
    if json_file is not None:
        settings = {
            "hidden": hidden,
            "layers": layers,
            "seq": seq,
            "visual": visual,
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "runs": runs,
            "decode_runs": decode_runs,
            "decode_tokens": decode_tokens,
        }
        write_report(json_file, "backend.py", settings, rows)


def placeholder_ids(model: Any, seq: int, visual: int) -> Tensor:
    """Ids [1, S] of random text with one image."""
    _, visual_mask = build_prompt(model, seq, visual)
    ids = torch.randint(3, IMAGE_TOKEN, (1, seq), device=model.device)
    return ids.masked_fill(visual_mask, IMAGE_TOKEN)


def compiled_model(how: str, model: Any, plan: Plan) -> Any:
    """The model, as one of the three ways compiles it; nothing is compiled yet."""
    if how == BASELINE:
        return torch.compile(model)
    if how == OPTIMIZE:
        return optimize(model, plan)
    return torch.compile(model, backend="vte", options={"plan": plan})


def steady_rows(
    hidden: int,
    layers: int,
    seq: int,
    visual: int,
    dtype: str,
    threads: int,
    runs: int,
    decode_runs: int,
    decode_tokens: int,
) -> list[dict[str, Any]]:
    """Prefill and decode of each case, when all is compiled.

    Raises:
        RuntimeError: Something was compiled while times were taken.
    """
    # To Dynamo all cases are one function, whose forms it would stop compiling after the eighth.
    torch._dynamo.config.recompile_limit = 64
    model = build_model(hidden, layers, visual, dtype, threads)
    ids = placeholder_ids(model, seq, visual)
    exit_ = StaticExit(layers // 2 - 1)
    exited = f", exit after {exit_.layer}"
    ways = [(BASELINE, "", Plan())]
    ways += [(how, name, plan) for name, plan in (("", Plan()), (exited, Plan([exit_]))) for how in (OPTIMIZE, BACKEND)]
    timed, first_calls = {}, {}
    for how, name, plan in tqdm(ways, desc="compile", unit="case"):
        start, cpu = time.perf_counter(), time.process_time()
        with fresh_cache():
            timed[how + name] = phases(compiled_model(how, model, plan), ids, decode_tokens)
        first_calls[how + name] = {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    before = compilations()
    with tqdm(total=len(timed) * (runs + decode_runs + 2), desc="steady", unit="run") as bar:
        prefill, decode = time_phases(timed, runs, decode_runs, device=model.device, after_each=bar.update)
    if compilations() != before:
        raise RuntimeError("something was compiled while times were taken: they mean nothing.")
    rows = []
    for name in timed:
        beside = name.replace(BACKEND, OPTIMIZE)
        row: dict[str, Any] = {"case": name, "exit_layer": exit_.layer if name.endswith(exited) else -1}
        row["first_calls"] = first_calls[name]
        for phase, times in (("prefill", prefill), ("decode", decode)):
            scale = 1 / decode_tokens if phase == "decode" else 1
            row[phase] = asdict(times[name].scaled(scale)) | {"time_ratio": times[name].ratio_to(times[BASELINE])}
            if beside != name:
                row[phase]["to_optimize"] = times[name].ratio_to(times[beside])
        rows.append(row)
    return rows


def phases(compiled: Any, ids: Tensor, decode_tokens: int) -> Phases:
    """What :func:`vte_compile.timing.phases` gives, of a prompt in token ids. Compiles everything."""

    @torch.no_grad()
    def prefill(prompt: Tensor = ids) -> Any:
        return compiled(input_ids=prompt, use_cache=True, logits_to_keep=1)

    # Dynamo takes the first length for a constant.
    prefill(ids[:, :-1])
    cache: Any = cache_of(prefill())
    prompt_kv = [(layer.keys, layer.values) for layer in cache.layers]
    # The backend's cache hands out handles, which know the real one.
    real = getattr(prompt_kv[0][0], "_vte_cache", cache)

    @torch.no_grad()
    def decode() -> None:
        for _ in range(decode_tokens):
            compiled(input_ids=ids[:, :1], use_cache=True, **{CACHE: cache})

    def rewind() -> None:
        real.crop(-decode_tokens)
        if real is not cache:
            for layer, (keys, values) in zip(cache.layers, prompt_kv, strict=True):
                layer.keys, layer.values = keys, values

    for _ in range(2):  # once for lengths that grow, and once for the strides of a cache that was cropped
        decode()
        rewind()
    return Phases(prefill, decode, rewind, exit_layer=-1)


def compilations() -> int:
    """How many graphs and pieces the process compiled so far."""
    return counters["stats"]["unique_graphs"] + counters["aot_autograd"]["total"]


def compile_rows(threads: int) -> list[dict[str, Any]]:
    """How long compiling takes, by way and number of layers, and how it grows with them."""
    rows: list[dict[str, Any]] = []
    cases = [(how, layers) for how in (OPTIMIZE, BACKEND, MARKED) for layers in COMPILED_LAYERS]
    for how, layers in tqdm(cases, desc="compile", unit="process"):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            row = pool.submit(compile_time, how, layers, threads).result()
        first = row if layers == COMPILED_LAYERS[0] else rows[len(rows) // len(COMPILED_LAYERS) * len(COMPILED_LAYERS)]
        rows.append(row | {"to_fewest_layers": growth(row["compile"], first["compile"])})
    return rows


def growth(seconds: dict[str, float], first: dict[str, float]) -> dict[str, float | None]:
    """Ratios; None where there is nothing to compare with (Dynamo does nothing in optimize())."""
    return {key: value / first[key] if first[key] > 0 else None for key, value in seconds.items()}


def compile_time(how: str, layers: int, threads: int) -> dict[str, Any]:
    """Compile everything that serving takes, in a process that has compiled nothing; seconds, and their parts.

    Raises:
        RuntimeError: It still compiles after many rounds.
    """
    model = build_model(COMPILED_HIDDEN, layers, COMPILED_VISUAL, "float32", threads)
    prompts = [placeholder_ids(model, PREFIX + COMPILED_VISUAL + 8 + i, COMPILED_VISUAL) for i in range(MAX_ROUNDS)]
    if how == MARKED:
        for ids in prompts:
            torch._dynamo.mark_dynamic(ids, 1)
    start, cpu = time.perf_counter(), time.process_time()
    with fresh_cache():
        compiled = compiled_model(how, model, Plan([StaticExit(layers // 2 - 1)]))
        for rounds, ids in enumerate(prompts, 1):  # noqa: B007
            before, round_start, round_cpu = compilations(), time.perf_counter(), time.process_time()
            with torch.no_grad():
                cache = cache_of(compiled(input_ids=ids, use_cache=True, logits_to_keep=1))
                for _ in range(2):
                    compiled(input_ids=ids[:, :1], use_cache=True, **{CACHE: cache})
            if compilations() == before:
                break
        else:
            raise RuntimeError(f"{how}: still compiles after {MAX_ROUNDS} prompts.")
        end, cpu_end = time.perf_counter(), time.process_time()
    spent = {
        "wall_s": end - start - rounds * (end - round_start),
        "cpu_s": cpu_end - cpu - rounds * (cpu_end - round_cpu),
    }
    known = {
        "dynamo_s": timed_s("_compile.compile_inner") - timed_s("OutputGraph.call_user_compiler"),
        "inductor_s": timed_s("create_aot_dispatcher_function"),
    }
    rest = {"rest_s": spent["wall_s"] - sum(known.values())}
    return {"case": how, "layers": layers, "rounds": rounds, "compile": spent | known | rest}


def timed_s(name: str) -> float:
    """What torch.compile measured of one of its own steps so far."""
    return sum(compilation_time_metrics.get(name, []))


def show_steady(rows: list[dict[str, Any]]) -> None:
    for phase in ("prefill", "decode"):
        table = Table(title=phase + (", per token" if phase == "decode" else ""))
        for column in ("case", "median\nms", "min, max\nms", f"to\n{BASELINE}", "to\noptimize()"):
            table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
        for row in rows:
            times = row[phase]
            median, least, most = (f"{1e3 * times[key]:.4g}" for key in ("median_s", "min_s", "max_s"))
            beside = f"{times['to_optimize']:.3f}" if "to_optimize" in times else ""
            table.add_row(row["case"], median, f"{least}, {most}", f"{times['time_ratio']:.3f}", beside)
        Console().print(table)
    firsts = (f"{row['case']} {row['first_calls']['wall_s']:.0f} ({row['first_calls']['cpu_s']:.0f})" for row in rows)
    Console().print("first calls, s (of CPU): " + "; ".join(firsts))


def show_compile(rows: list[dict[str, Any]]) -> None:
    title = f"compile time, s (and its ratio to {COMPILED_LAYERS[0]} layers)"
    table = Table(title=title, caption=f"hidden {COMPILED_HIDDEN}; rounds until nothing compiles")
    columns = {"wall": "wall_s", "CPU": "cpu_s", "Dynamo": "dynamo_s", "Inductor": "inductor_s", "rest": "rest_s"}
    for column in ("case", "layers", "rounds", *columns):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for row in rows:
        cells = [_grown(row["compile"][key], row["to_fewest_layers"][key]) for key in columns.values()]
        table.add_row(row["case"], str(row["layers"]), str(row["rounds"]), *cells)
    Console().print(table)


def _grown(seconds: float, ratio: float | None) -> str:
    return "" if ratio is None else f"{seconds:.1f} ({ratio:.2f})"


if __name__ == "__main__":
    typer.run(main)
