"""What the benchmarks share: their model and prompt, options, and the file of results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vte_compile.environment import environment

IMAGE_TOKEN = 31_999
PREFIX = 35  # text tokens before the image, as in LLaVA-1.5
BASELINE = "torch.compile"

HiddenOption = Annotated[int, typer.Option(help="Hidden size; heads have 64.")]
SeqOption = Annotated[int, typer.Option(help="Tokens of the prompt, visual ones included.")]
VisualOption = Annotated[int, typer.Option(help="Visual tokens of the prompt.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
ThreadsOption = Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the results there.")]


def build_model(hidden: int, layers: int, visual: int, dtype: str, threads: int) -> Any:
    """A LLaVA with random weights, on the GPU if there is one; its vision tower is never run, so a tiny one does.

    ``threads`` is set for the process, unless 0.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=IMAGE_TOKEN + 1,
    )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, projection_dim=64
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=visual)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return LlavaForConditionalGeneration(config).to(device=device, dtype=getattr(torch, dtype)).eval()


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


def spared_flops(model: Any, tokens: int) -> int:
    """What the last layer, which attends in all cases, is spared: all but keys and values of the other tokens."""
    text = model.config.text_config
    hidden, inner = text.hidden_size, text.intermediate_size
    per_token = 2 * (2 * hidden * hidden + 3 * hidden * inner)  # q and o, and the FFN; heads are as many as keys
    pairs = tokens * (tokens + 1) // 2 - tokens
    return (tokens - 1) * per_token + 4 * hidden * pairs


def write_report(file: Path, script: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write results with what is needed to get them again; ``script`` is the benchmark's file name."""
    machine = environment()
    versions = machine.pop("versions")
    command = f"python benchmarks/{script} " + " ".join(sys.argv[1:])
    report = {"command": command, "settings": settings, "machine": machine, "versions": versions, "cases": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n")
