"""What the benchmarks share: their model and prompt, options, clocks, and the file of results."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vte_compile.environment import environment
from vte_compile.kernels.exit_gate import exit_logits, question_start
from vte_compile.plan import GateExit
from vte_compile.timing import Summary, interleaved

IMAGE_TOKEN = 31_999
PREFIX = 35  # text tokens before the image, as in LLaVA-1.5
BASELINE = "torch.compile"
GATE_WIDTH = 256

HiddenOption = Annotated[int, typer.Option(help="Hidden size; heads have 64.")]
SeqOption = Annotated[int, typer.Option(help="Tokens of the prompt, visual ones included.")]
VisualOption = Annotated[int, typer.Option(help="Visual tokens of the prompt.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
ThreadsOption = Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the results there.")]


def chosen(names: str, known: Iterable[str], option: str) -> list[str]:
    """Names separated by commas.

    Raises:
        typer.BadParameter: One is unknown.
    """
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise typer.BadParameter(f"--{option}: {unknown[0]!r} is unknown; there are {', '.join(known)}.")
    return wanted


def the_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_model(hidden: int, layers: int, visual: int, dtype: str, threads: int) -> Any:
    """A LLaVA with random weights, on the GPU if there is one.

    ``threads`` is set for the process, unless 0.
    """
    if threads:
        torch.set_num_threads(threads)
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=IMAGE_TOKEN + 1,
    )
    return llava_of(text, visual, getattr(torch, dtype))


def llava_of(text: LlamaConfig, visual: int, dtype: torch.dtype) -> Any:
    """A LLaVA with this decoder and random weights, made on the GPU if there is one.

    Its vision tower is never run, so a tiny one does.
    """
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, projection_dim=64
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=visual)
    with the_device():
        return LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()


def build_prompt(model: Any, seq: int, visual: int) -> tuple[Tensor, Tensor]:
    """Random embeddings [1, S, C] of a prompt with one image, and its visual mask [1, S].

    Raises:
        typer.BadParameter: No text is left behind the image, where an exit needs some.
    """
    if seq <= PREFIX + visual:
        raise typer.BadParameter(f"seq {seq}: must be more than {PREFIX} text tokens and {visual} visual ones.")
    hidden = model.config.text_config.hidden_size
    embeds = 0.02 * torch.randn(1, seq, hidden, device=model.device, dtype=model.dtype)
    visual_mask = torch.zeros(1, seq, dtype=torch.bool, device=model.device)
    visual_mask[:, PREFIX : PREFIX + visual] = True
    return embeds, visual_mask


def exit_candidates(layers: int) -> list[int]:
    """Behind a quarter, half and three quarters of the layers."""
    return [layers // 4 - 1, layers // 2 - 1, 3 * layers // 4 - 1]


def mixed_exits(model: Any, embeds: Tensor, visual_mask: Tensor, candidates: list[int]) -> list[GateExit]:
    """Gates of random weights with thresholds between the rows of this batch: half of those that are left fire."""
    width = embeds.shape[-1]
    generator = torch.Generator().manual_seed(0)
    states: dict[int, Tensor] = {}
    decoder_layers = model.get_decoder().layers

    def keep(layer: int) -> Any:
        return decoder_layers[layer].register_forward_hook(lambda module, args, output: states.update({layer: output}))

    hooks = [keep(layer) for layer in candidates]
    with torch.no_grad():
        model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    left = [b for b in range(len(embeds)) if visual_mask[b].any()]
    gates = []
    for layer in candidates:
        w1 = 0.1 * torch.randn(GATE_WIDTH, 2 * width, generator=generator)
        w2 = 0.1 * torch.randn(2, GATE_WIDTH, generator=generator)
        margins = {}
        for b in left:
            stay, leave = exit_logits(states[layer][b, question_start(visual_mask[b]) :], w1, w2)
            margins[b] = float(leave - stay)
        ordered = sorted(margins, key=margins.__getitem__)
        half = len(ordered) // 2
        between = 1e9 if not ordered else margins[ordered[0]] - 1
        if half:
            between = (margins[ordered[half - 1]] + margins[ordered[half]]) / 2
        gates.append(GateExit(layer, w1, w2, between))
        left = ordered[:half]
    return gates


def spared_flops(model: Any, tokens: int) -> int:
    """What the last layer, which attends in all cases, is spared: all but keys and values of the other tokens."""
    text = model.config.text_config
    hidden, inner = text.hidden_size, text.intermediate_size
    per_token = 2 * (2 * hidden * hidden + 3 * hidden * inner)  # q and o, and the FFN; heads are as many as keys
    pairs = tokens * (tokens + 1) // 2 - tokens
    return (tokens - 1) * per_token + 4 * hidden * pairs


# ---------------------------------------------------------------- clocks


def spread_of(summary: Summary) -> dict[str, float]:
    """Seconds: median, tenth and ninetieth percentile, least and most."""
    runs = summary.runs_s
    cuts = statistics.quantiles(runs, n=10, method="inclusive") if len(runs) > 1 else [summary.median_s] * 9
    return {
        "median_s": summary.median_s,
        "p10_s": cuts[0],
        "p90_s": cuts[-1],
        "min_s": summary.min_s,
        "max_s": summary.max_s,
    }


def timed(function: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds of something short: median, tenth and ninetieth percentile.

    On a GPU by Triton's do_bench, which empties the GPU's cache before each call.
    """
    if device.type != "cuda":
        times = spread_of(interleaved({"": function}, 5)[""])
        return {key: times[key] for key in ("median_s", "p10_s", "p90_s")}
    from triton.testing import do_bench

    low, median, high = do_bench(function, warmup=25, rep=200, quantiles=[0.1, 0.5, 0.9])
    return {"median_s": median / 1e3, "p10_s": low / 1e3, "p90_s": high / 1e3}


def measured_ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches: FLOP/s of a large product, bytes/s of a large copy (read and written)."""
    side, size = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    flops = 2 * side**3 / timed(lambda: a @ b, device)["median_s"]
    source = torch.empty(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = 2 * size / timed(lambda: target.copy_(source), device)["median_s"]
    return {"flops_per_s": flops, "bytes_per_s": copied}


# ---------------------------------------------------------------- the file of results


def write_report(file: Path, script: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write results with what is needed to get them again; ``script`` is the benchmark's file name."""
    machine = environment()
    versions = machine.pop("versions")
    command = f"python benchmarks/{script} " + " ".join(sys.argv[1:])
    report = {"command": command, "settings": settings, "machine": machine, "versions": versions, "cases": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    # Then renamed: a run that is cut off while it writes leaves what was there.
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(file)
