"""What a plan gains where a model is served: time to first token, time per output token, memory.

    python benchmarks/serving.py --presets LLaVA-1.5-7B --json benchmarks/results/serving.json --seconds 450
    python benchmarks/serving.py --presets tiny --batches 2 --runs 3 --steps 8      (anywhere: tries the script)

On a GPU: random weights, made there. Cases are the model as it comes (SDPA), through torch.compile (static shapes; its
decode steps with a StaticCache and CUDA graphs), and optimize(): without exit, with exits behind a quarter, half and
three quarters of the layers for all rows, and with gates at all three, of random weights and with thresholds such that
each lets half of the rows leave that are left. Cases run one after the other, each with the memory for itself.

- Time to first token: an embedded prompt to the tokens on the host. The image encoder, which no plan changes, is left
  out.
- Time per output token: one decode step and its argmax, waited for, as generate() waits. The first steps, in which
  steps are compiled and recorded, are not timed.
- Tokens per second: the batch over the time per output token.
- Predicted ratio: FLOPs that are done, each row with its own exit, over those of torch.compile's case; for decode,
  bytes (weights once, keys and values once). A quotient of 1: times fall exactly as predicted.
- Achieved FLOP/s of prefill and bytes/s of decode stand beside those of a large product and a large copy, measured
  here.
- The last logits of the first two rows are compared with the oracle's (relative to their norm); what differs by more
  than 0.1 is named and has no times.

A case that would not fit into memory is skipped, with a message. The file is written after each case, and a run with
the same file goes on where it ends: so `--batches`, `--cases` and `--seconds` split a run. Most of the time is
torch.compile's compiling, about a minute and a half for each batch size (an estimate: this has not run on a GPU yet).
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import BASELINE, JsonOption, chosen, measured_ceilings, spared_flops, spread_of, the_device, write_report
from rich.console import Console
from serving_cases import (
    CASES,
    EAGER,
    MIXED,
    PRESETS,
    WARM_STEPS,
    Models,
    Preset,
    Prompt,
    Served,
    device_bytes,
    needed_bytes,
    relative_error,
    serve,
)
from serving_report import compare, draw, show
from tqdm import tqdm

from vte_compile.environment import environment
from vte_compile.flops import decode_flops, kv_bytes, prefill_flops, weight_bytes
from vte_compile.plotting import require_matplotlib
from vte_compile.timing import interleaved

_ALLOWED_ERROR = 0.1
_USABLE = 0.95
"""Of the memory there is."""


def main(
    presets: Annotated[str, typer.Option(help=f"Of {', '.join(PRESETS)}.")] = "LLaVA-1.5-7B,LLaVA-NeXT",
    batches: Annotated[str, typer.Option(help="Rows of a batch, separated by commas.")] = "1,8,32",
    cases: Annotated[str, typer.Option(help=f"Of {', '.join(CASES)}.")] = ",".join(CASES),
    runs: Annotated[int, typer.Option(help="Timed prompts of each case.")] = 7,
    steps: Annotated[int, typer.Option(help="Timed decode steps of each case.")] = 48,
    seconds: Annotated[float, typer.Option(help="No case begins after so many; 0: no limit.")] = 0,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw prefill times over FLOPs there, a PNG file.")] = None,
) -> None:
    """Time models as they are served, side by side with torch.compile."""
    logging.basicConfig(level=logging.WARNING)
    names, wanted = chosen(presets, PRESETS, "presets"), chosen(cases, CASES, "cases")
    if plot is not None:
        require_matplotlib()
    begun, device, console, models = time.perf_counter(), the_device(), Console(), Models()
    settings: dict[str, Any] = {"runs": runs, "steps": steps}
    rows = earlier_rows(json_file, settings)
    dtypes = {PRESETS[name].dtype for name in names}
    ceilings = {str(dtype).removeprefix("torch."): measured_ceilings(device, dtype) for dtype in dtypes}
    turns = [
        turn
        for turn in itertools.product(names, map(int, batches.split(",")), wanted)
        if turn[1:] != (1, MIXED) and turn not in {_place(row) for row in rows if "tpot" in row}
    ]
    for done, (name, batch, case) in enumerate(tqdm(turns, desc="time", unit="case")):
        if seconds and time.perf_counter() - begun > seconds:
            console.print(f"{seconds:.0f} s are over: {len(turns) - done} cases are left; run again to go on.")
            break
        rows = [row for row in rows if _place(row) != (name, batch, case)]
        row = time_case(models, PRESETS[name], batch, case, runs, steps, ceilings)
        if reason := row.get("reason"):
            console.print(f"{name}, {batch} rows, {case}: {reason}", markup=False)
        rows.append({"preset": name, "batch": batch, "case": case} | row)
        rows.sort(key=lambda row: (list(PRESETS).index(row["preset"]), row["batch"], CASES.index(row["case"])))
        compare(rows)
        if json_file is not None:  # after each, so that a run that is cut off leaves what it has
            write_report(json_file, "serving.py", settings | {"ceilings": ceilings}, rows)
    show(rows, ceilings)
    if plot is not None:
        draw(rows, plot)
    if any(row.get("failed") for row in rows):
        raise typer.Exit(1)


def earlier_rows(file: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier run measured.

    Raises:
        typer.BadParameter: It measured something else, or on another machine.
    """
    if file is None or not file.exists():
        return []
    report, found = json.loads(file.read_text()), environment()
    machine = report["machine"]
    then = report["settings"] | report["versions"] | {key: machine[key] for key in ("gpus", "cpu", "commit")}
    now = settings | found["versions"] | {key: found[key] for key in ("gpus", "cpu", "commit")}
    if others := [key for key, value in now.items() if then.get(key) != value]:
        key = others[0]
        raise typer.BadParameter(f"{file} was measured with {key} {then.get(key)}, not {now[key]}: name another file.")
    rows: list[dict[str, Any]] = report["cases"]
    return rows


def _place(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["preset"], row["batch"], row["case"]


def time_case(
    models: Models, preset: Preset, batch: int, case: str, runs: int, steps: int, ceilings: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Everything about one case; or why there is nothing: ``reason``, and ``failed`` if that is an error."""
    model = models.use(preset)
    total = device_bytes(model.device)
    if (needed := needed_bytes(model, preset, batch, case, WARM_STEPS + steps)) > _USABLE * total:
        return {"reason": f"skipped: it needs about {needed / 2**30:.0f} GiB, and there are {total / 2**30:.0f}."}
    try:
        prompt = Prompt.random(model, preset, batch)
        served = serve(case, models, prompt, WARM_STEPS + steps)
        row = measure(served, model, prompt, runs, steps)
        reached = ceilings[str(preset.dtype).removeprefix("torch.")]
        row |= prefill_amounts(model, preset, case, served, row, reached)
        row |= decode_amounts(model, preset, served, row, steps, reached)
    except Exception as error:  # this case's: the others are worth having
        row = _failure(error)
    served = prompt = None  # type: ignore[assignment]
    if model.device.type == "cuda":
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return row


def measure(served: Served, model: Any, prompt: Prompt, runs: int, steps: int) -> dict[str, Any]:
    """Error, times and memory."""
    device = model.device
    begun = time.perf_counter()
    output = served.prefill()
    exits = getattr(output, "exit_layer", None)
    row: dict[str, Any] = {"exit_layers": [-1] * len(prompt) if exits is None else exits.tolist()}
    row["first_call_s"] = time.perf_counter() - begun
    row["relative_error"] = error = relative_error(model, served, prompt, output)
    if error is not None and not error <= _ALLOWED_ERROR:
        return row | {"failed": True, "reason": f"wrong: its logits differ by {error:.1e} of their norm; not timed."}
    del output, exits
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def first_token() -> list[int]:
        tokens: list[int] = served.prefill().logits[:, -1].argmax(-1).tolist()
        return tokens

    row["ttft"] = _times(first_token, runs, device)
    try:
        step = served.steps()
        begun = time.perf_counter()
        for _ in range(WARM_STEPS):
            step()
        row["warm_steps_s"] = time.perf_counter() - begun
        row["tpot"] = _times(step, steps, device, warmup=0)
    except Exception as error:  # the first token's times are worth having
        row |= _failure(error)
    row |= served.how()
    if device.type == "cuda":
        return row | {"peak_bytes": torch.cuda.max_memory_allocated(device)}
    return row | {"peak_bytes": None, "peak_missing": "PyTorch counts allocated memory on GPUs alone"}


def _failure(error: Exception) -> dict[str, Any]:
    return {"failed": True, "reason": f"failed: {type(error).__name__}: {error}"}


def _times(function: Any, runs: int, device: torch.device, warmup: int = 1) -> dict[str, Any]:
    [summary] = interleaved({"": function}, runs, warmup=warmup, device=device).values()
    return spread_of(summary) | {"runs_s": asdict(summary)["runs_s"]}


def prefill_amounts(
    model: Any, preset: Preset, case: str, served: Served, row: dict[str, Any], reached: dict[str, float]
) -> dict[str, Any]:
    """FLOPs of a measured prefill, per second, and of what the machine reaches."""
    if "ttft" not in row:
        return {}
    exits, seconds = row["exit_layers"], row["ttft"]["median_s"]
    flops = sum(prefill_flops(model.config, preset.seq, preset.visual, layer, served.plan) for layer in exits)
    if case not in (EAGER, BASELINE):
        left = [preset.seq if layer < 0 else preset.seq - preset.visual for layer in exits]
        flops -= sum(spared_flops(model, tokens) for tokens in left)
    return {
        "prompt_tokens_per_s": len(exits) * preset.seq / seconds,
        "prefill_flops": flops,
        "prefill_flops_per_s": flops / seconds,
        "prefill_of_ceiling": flops / seconds / reached["flops_per_s"],
    }


def decode_amounts(
    model: Any, preset: Preset, served: Served, row: dict[str, Any], steps: int, reached: dict[str, float]
) -> dict[str, Any]:
    """Bytes and FLOPs of a measured decode step, per second, and of what the machine reaches."""
    if "tpot" not in row:
        return {}
    config, dtype, seconds = model.config, preset.dtype, row["tpot"]["median_s"]
    where = [(config, preset.seq, preset.visual, layer) for layer in row["exit_layers"]]
    decoded = WARM_STEPS + steps // 2  # behind the prompt, in the middle of what is timed
    of_tokens = len(where) * decoded * kv_bytes(config, 1, 0, -1, dtype)
    moved = weight_bytes(config, served.plan, dtype) + of_tokens + sum(kv_bytes(*place, dtype) for place in where)
    flops = sum(decode_flops(*place, steps, served.plan) for place in where) / steps
    return {
        "tokens_per_s": len(where) / seconds,
        "decode_bytes": moved,
        "decode_bytes_per_s": moved / seconds,
        "decode_of_ceiling": moved / seconds / reached["bytes_per_s"],
        "decode_flops_per_s": flops / seconds,
    }


if __name__ == "__main__":
    typer.run(main)
