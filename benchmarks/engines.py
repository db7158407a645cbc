"""ONNX Runtime engines beside the best public export of the unmodified model: prefill, decode, memory, load time.

    python benchmarks/engines.py --json benchmarks/results/engines.json

The public export is transformers' own exporter with its fusions for ONNX Runtime; its prefill gives the logits of the
last token only, as ours does. Where openvino is installed, transformers' export to OpenVINO is timed as well, in a
process of its own without ONNX Runtime, and in float32 as the others (left alone, OpenVINO takes bfloat16 where the
CPU has it). All times of one phase are taken in turns; ratios are medians over the rounds. Exits are static: what
they spare is then known. FLOPs are those that an engine computes: without what it spares its last layer, whatever the
plan. Load time and peak memory (resident set, one prompt and some steps included) are of a process of its own that
imports numpy and the runtime, and no torch.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

PUBLIC = "transformers' exporter"
OURS = "engine, no exit"
OPENVINO = "OpenVINO"


def main(
    hidden: Annotated[int, typer.Option(help="Hidden size; heads have 64.")] = 1024,
    layers: int = 16,
    seq: Annotated[int, typer.Option(help="Tokens of the prompt, visual ones included.")] = 700,
    visual: Annotated[int, typer.Option(help="Visual tokens of the prompt.")] = 576,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: one per core.")] = 0,
    runs: int = 9,
    decode_runs: int = 20,
    decode_tokens: Annotated[int, typer.Option(help="Decode steps in each run.")] = 8,
    work: Annotated[Path | None, typer.Option(help="Keep the exports there. Default: a temporary folder.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results there.")] = None,
) -> None:
    """Time engines, and the public export of the same model, side by side."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from common import write_report

    threads = threads or len(os.sched_getaffinity(0))
    settings = {
        "hidden": hidden, "layers": layers, "seq": seq, "visual": visual, "threads": threads, "runs": runs,
        "decode_runs": decode_runs, "decode_tokens": decode_tokens, "onnxruntime": version("onnxruntime"),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if work is None else work
        cases = export_cases(folder, hidden, layers, visual, seq)
        rows = time_cases(cases, hidden, seq, visual, threads, runs, decode_runs, decode_tokens)
        for row in tqdm(rows, desc="load", unit="process"):
            path = cases[row["case"]]["path"]
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                row |= pool.submit(load_alone, row["case"], path, hidden, seq, visual, threads).result()
    show(rows, settings)
    if json_file is not None:
        write_report(json_file, "engines.py", settings, rows)


def export_cases(folder: Path, hidden: int, layers: int, visual: int, seq: int) -> dict[str, dict[str, Any]]:
    """Write everything that is timed; by name: where it is, its exit layer, and its FLOPs."""
    import torch
    from common import build_model, spared_flops
    from transformers import LlamaForCausalLM

    import vte_compile
    from vte_compile import Plan, SkippedAttention, StaticExit, optimize
    from vte_compile.flops import prefill_flops

    model = build_model(hidden, layers, visual, "float32", 0)
    skips = [SkippedAttention(layer) for layer in range(0, layers, 2)]  # not the last: it spares what is not counted
    plans = {OURS: Plan()}
    for k in (layers // 4 - 1, layers // 2 - 1, 3 * layers // 4 - 1):
        plans[f"engine, exit after {k}"] = Plan([StaticExit(k)])
    half = layers // 2 - 1
    plans[f"engine, exit {half}, 1/2 attentions"] = Plan([StaticExit(half)], skips=skips)
    cases: dict[str, dict[str, Any]] = {}
    for name, plan in plans.items():
        path = folder / name.replace(", ", "-").replace(" ", "-").replace("/", "of")
        if not path.exists():
            vte_compile.export(optimize(model, plan, compile=False), path, target="onnxruntime", forms=("staged",))
        exit_layer = plan.exits[0].layer if plan.exits else -1
        cases[name] = {
            "path": str(path),
            "exit_layer": exit_layer,
            "flops": prefill_flops(model.config, seq, visual, exit_layer, plan)
            - spared_flops(model, seq if exit_layer < 0 else seq - visual),
        }
    causal = LlamaForCausalLM(model.config.text_config).eval()
    causal.model, causal.lm_head = model.model.language_model, model.lm_head
    peers = [PUBLIC] + ([OPENVINO] if find_spec("openvino") else [])
    for name in peers:
        path = folder / ("openvino" if name == OPENVINO else "public")
        if not path.exists():
            export_public(causal, path, torch.zeros(2, 9, hidden), name)
        cases[name] = {"path": str(path), "exit_layer": -1, "flops": cases[OURS]["flops"]}
    return {name: cases[name] for name in (*peers, *plans)}


def export_public(model: Any, folder: Path, embeds: Any, name: str) -> None:
    """Prefill and decode of a language model through transformers' exporter, from embeddings as the MLLM has them."""
    import torch
    from transformers import DynamicCache

    from vte_compile.families.cache_name import CACHE, cache_of

    exporter: Any
    config: Any
    if name == OPENVINO:
        from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

        exporter, config = OpenVINOExporter(), OpenVINOConfig(dynamic=True)
    else:
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        exporter, config = OnnxExporter(), OnnxConfig(dynamic=True, ort_fusions="cpu")
    inputs = {"inputs_embeds": embeds, "use_cache": True, "logits_to_keep": 1}
    exporter.export(model, inputs, config).save_pretrained(folder / "prefill")
    with torch.no_grad():
        cache = cache_of(model(**inputs))
    assert isinstance(cache, DynamicCache)
    step = {**inputs, "inputs_embeds": embeds[:, :1], CACHE: cache}
    exporter.export(model, step, config).save_pretrained(folder / "decode")


class Public:
    """The public export in ONNX Runtime: what a session gives is the next one's past, without copies to numpy."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.prefill_session = session(folder / "prefill" / "model.onnx", threads)
        self.decode_session = session(folder / "decode" / "model.onnx", threads)

    def prefill(self, embeds: np.ndarray) -> list[Any]:
        feeds = self._feeds(self.prefill_session, embeds, [])
        return list(self.prefill_session.run_with_ort_values(None, feeds))[1:]

    def decode(self, embeds: np.ndarray, past: list[Any]) -> list[Any]:
        return list(self.decode_session.run_with_ort_values(None, self._feeds(self.decode_session, embeds, past)))[1:]

    @staticmethod
    def _feeds(own: Any, embeds: np.ndarray, past: list[Any]) -> dict[str, Any]:
        import onnxruntime

        feeds, rest = {}, list(past)
        for spec in own.get_inputs():
            if spec.name == "inputs_embeds":
                feeds[spec.name] = onnxruntime.OrtValue.ortvalue_from_numpy(embeds)
            elif any(name in spec.name for name in ("cache", "past_key_values")):
                feeds[spec.name] = rest.pop(0)
            else:
                raise RuntimeError(f"the public export takes {spec.name}, which this benchmark does not know.")
        return feeds


class OpenVino:
    """Its prefill, and its decode step, which holds keys and values as its state."""

    def __init__(self, folder: Path, threads: int) -> None:
        import openvino

        core, options = openvino.Core(), {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        self.requests = []
        for part in ("prefill", "decode"):
            [file] = (folder / part).glob("*.xml")
            self.requests.append(core.compile_model(core.read_model(file), "CPU", options).create_infer_request())
        self._tensor = openvino.Tensor

    def prefill(self, embeds: np.ndarray) -> None:
        self.requests[0].infer({"inputs_embeds": embeds})

    def decode(self, embeds: np.ndarray) -> None:
        inputs = {"inputs_embeds": embeds}
        if any("beam_idx" in value.names for value in self.requests[1].model_inputs):
            inputs["beam_idx"] = np.zeros(1, np.int32)
        self.requests[1].infer(inputs)

    def remember(self) -> Callable[[], None]:
        """What makes the state what it is now."""
        kept = [(state, state.state.data.copy()) for state in self.requests[1].query_state()]

        def restore() -> None:
            for state, data in kept:
                state.state = self._tensor(data)

        return restore


def session(file: Path, threads: int) -> Any:
    """As the engine's own sessions are."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def prompt(hidden: int, seq: int, visual: int) -> tuple[np.ndarray, np.ndarray]:
    """Random embeddings [1, S, C] of a prompt with one image, and where that is [1, S]."""
    embeds = 0.02 * np.random.default_rng(0).standard_normal((1, seq, hidden), np.float32)
    mask = np.zeros((1, seq), bool)
    mask[:, 35 : 35 + visual] = True
    return embeds, mask


def runnable(
    name: str, path: str, hidden: int, seq: int, visual: int, threads: int, decode_tokens: int
) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]:
    """Prefill, some decode steps behind it, and what takes these back."""
    embeds, mask = prompt(hidden, seq, visual)
    step = embeds[:, :1]
    if name == PUBLIC:
        public = Public(Path(path), threads)
        past = public.prefill(embeds)

        def public_decode() -> None:
            values = past
            for _ in range(decode_tokens):
                values = public.decode(step, values)

        return lambda: public.prefill(embeds), public_decode, lambda: None
    if name == OPENVINO:  # in a process of its own
        openvino = OpenVino(Path(path), threads)
        for token in range(seq):  # its state; more tokens than one at once crash this graph
            openvino.decode(embeds[:, token : token + 1])
        restore = openvino.remember()

        def openvino_decode() -> None:
            for _ in range(decode_tokens):
                openvino.decode(step)

        return lambda: openvino.prefill(embeds), openvino_decode, restore
    from vte_compile import load_engine

    engine = load_engine(path, threads=threads)
    cache = engine.prefill(inputs_embeds=embeds, visual_mask=mask, room=decode_tokens).cache

    def decode() -> None:
        for _ in range(decode_tokens):
            engine.decode(np.array([5]), cache)

    def rewind() -> None:
        cache.lengths -= decode_tokens
        cache.next_positions -= decode_tokens

    def prefill() -> Any:
        return engine.prefill(inputs_embeds=embeds, visual_mask=mask, room=decode_tokens)

    return prefill, decode, rewind


_apart: list[Callable[[], Any]] = []
"""What :func:`runnable` gave, in a process that :func:`runnable_apart` started."""


def runnable_apart(*arguments: Any) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]:
    """What :func:`runnable` gives, in a process of its own: calls of it wait for that process."""
    pool = ProcessPoolExecutor(1, get_context("spawn"))
    pool.submit(_prepare_apart, *arguments).result()

    def call(index: int) -> None:
        pool.submit(_call_apart, index).result()

    return partial(call, 0), partial(call, 1), partial(call, 2)


def _prepare_apart(*arguments: Any) -> None:
    _apart[:] = runnable(*arguments)


def _call_apart(index: int) -> None:
    _apart[index]()


def time_cases(
    cases: dict[str, dict[str, Any]],
    hidden: int,
    seq: int,
    visual: int,
    threads: int,
    runs: int,
    decode_runs: int,
    decode_tokens: int,
) -> list[dict[str, Any]]:
    """Times of all cases in turns."""
    from vte_compile.timing import Phases, time_phases

    phases = {}
    for name, case in cases.items():
        prepare = runnable_apart if name == OPENVINO else runnable
        calls = prepare(name, case["path"], hidden, seq, visual, threads, decode_tokens)
        phases[name] = Phases(*calls, case["exit_layer"])
    with tqdm(total=len(phases) * (runs + decode_runs + 2), desc="time", unit="run") as bar:
        prefill, decode = time_phases(phases, runs, decode_runs, device=None, after_each=bar.update)
    rows = []
    for name, case in cases.items():
        row: dict[str, Any] = {"case": name, "exit_layer": case["exit_layer"]}
        for phase, times in (("prefill", prefill), ("decode", decode)):
            scale = 1 / decode_tokens if phase == "decode" else 1
            row[phase] = asdict(times[name].scaled(scale)) | {"to_public": times[name].ratio_to(times[PUBLIC])}
        row["prefill"]["to_engine"] = prefill[name].ratio_to(prefill[OURS])
        row["flop_ratio"] = case["flops"] / cases[OURS]["flops"]
        row["prefill"]["over_flops"] = row["prefill"]["to_engine"] / row["flop_ratio"]
        rows.append(row)
    return rows


def load_alone(name: str, path: str, hidden: int, seq: int, visual: int, threads: int) -> dict[str, float]:
    """Seconds to load, and the process's peak memory with a prompt and eight steps."""
    if name != OPENVINO:
        import onnxruntime  # noqa: F401
    start = time.perf_counter()
    prefill, decode, _ = runnable(name, path, hidden, seq, visual, threads, 8)
    loaded = time.perf_counter() - start
    start = time.perf_counter()
    prefill()
    first = time.perf_counter() - start
    decode()
    # (Making the case runs one prompt. getrusage() would also count what the process was forked from.)
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return {"load_s": loaded - first, "peak_mb": int(status.split()[0]) / 1024}


def show(rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Two tables of a terminal's width."""
    Console().print("engines: " + ", ".join(f"{k} {v}" for k, v in settings.items()))
    for phase in ("prefill", "decode"):
        table = Table(title=phase + (", per token" if phase == "decode" else ""))
        columns = ["median, ms", "to\npublic"]
        columns += ["min, max", "to\nFLOPs"] if phase == "prefill" else ["load\ns", "peak\nMB"]
        for column in ("case", *columns):
            table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
        for row in rows:
            times = row[phase]
            median, least, most = (f"{1e3 * times[key]:.4g}" for key in ("median_s", "min_s", "max_s"))
            cells = [median, f"{times['to_public']:.3f}"]
            if phase == "prefill":
                cells += [f"{least}, {most}", "" if row["case"] in (PUBLIC, OPENVINO) else f"{times['over_flops']:.3f}"]
            else:
                cells += [f"{row['load_s']:.2f}", f"{row['peak_mb']:.0f}"]
            table.add_row(row["case"], *cells)
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
