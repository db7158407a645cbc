"""The command ``vte-compile generate``; cli.py adds it to the program. An engine's answers need no torch."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vte_compile.cli import DebugOption, DeviceOption, NoCompileOption, PlanOption, _compile, _errors, _load_plan, app
from vte_compile.errors import InputError
from vte_compile.export.text_stream import TextStream


@dataclass(frozen=True)
class _Request:
    prompt: str
    images: list[Path]
    max_new_tokens: int
    sampling: dict[str, Any]
    """Those of temperature, top_k and top_p that were given."""
    seed: int | None
    stop: list[str]


@app.command()
def generate(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help="Folder or hub id of a transformers checkpoint, unless --engine is given; and what to ask.",
            show_default=False,
        ),
    ],
    engine: Annotated[
        Path | None, typer.Option("--engine", metavar="DIR", help="An ONNX engine from `export`, instead of a model.")
    ] = None,
    plan: PlanOption = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", metavar="FILE", help="A picture; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the answer.")] = 64,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Draw tokens, with logits divided by this. Default: the likeliest.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from so many of the likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(max=1, help="Draw from the fewest likeliest tokens that are this probable together.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of drawing.")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End the answer before this text; may be repeated."),
    ] = None,
    no_exit: Annotated[bool, typer.Option("--no-exit", help="Keep the visual tokens in all layers (models).")] = False,
    no_compile: NoCompileOption = False,
    device: DeviceOption = None,
    provider: Annotated[
        str | None, typer.Option(help="What runs the engine: cpu or cuda. Default: what it was exported for.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the engine. Default: one for each core.")] = None,
    debug: DebugOption = False,
) -> None:
    """Answer one prompt; the answer streams to stdout, exit layer and timing go to stderr."""
    for_models = {"--plan": plan, "--no-exit": no_exit, "--no-compile": no_compile, "--device": device}
    for_engines = {"--provider": provider, "--threads": threads}
    wrong = for_models if engine is not None else for_engines
    if given := [name for name, value in wrong.items() if value not in (None, False)]:
        other = "a model, not of --engine" if engine is not None else "--engine"
        raise InputError(f"{', '.join(given)}: an option of {other}: leave it out.")
    if len(words) != (1 if engine is not None else 2):
        form = "--engine DIR PROMPT" if engine is not None else "MODEL PROMPT"
        raise InputError(f"expected {form}, got {len(words)} words: put quotes around the prompt.")
    chosen = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = {name: value for name, value in chosen.items() if value is not None}
    request = _Request(words[-1], image or [], max_new_tokens, sampling, seed, stop or [])
    if engine is not None:
        _ask_engine(engine, request, provider, threads)
    else:
        _ask_model(words[0], request, plan, no_exit, no_compile, device)


def _ask_engine(folder: Path, request: _Request, provider: str | None, threads: int | None) -> None:
    from vte_compile.export import load_engine

    pictures = [_open_picture(file) for file in request.images]
    engine: Any = load_engine(folder, provider=provider, threads=threads)
    if not hasattr(engine, "chat"):
        if engine.manifest.target != "aoti":
            raise InputError(
                f"{folder}: an engine of {engine.manifest.model.name} gives no text: load_engine(...).run()."
            )
        raise InputError(f"{folder}: engines of target 'aoti' hold no tokenizer: export with --target onnxruntime.")
    engine.processor.decode([])  # read and compiled now, not while the time is taken
    times: list[float] = []
    start = time.perf_counter()
    answer = engine.chat(
        request.prompt,
        pictures,
        on_text=lambda piece: typer.echo(piece, nl=False),
        on_tokens=lambda tokens: times.append(time.perf_counter()),
        max_new_tokens=request.max_new_tokens,
        do_sample=bool(request.sampling),
        seed=request.seed,
        stop_strings=request.stop,
        **request.sampling,
    )
    typer.echo()
    _report(answer.exit_layer, engine.manifest.model.num_layers, answer.prompt_tokens, start, times)


def _ask_model(
    model: str, request: _Request, plan: str | None, no_exit: bool, no_compile: bool, device: str | None
) -> None:
    import torch

    import vte_compile
    from vte_compile.loading import load_model, load_processor
    from vte_compile.loading import prompt as in_template
    from vte_compile.plan import Plan

    pictures = [_open_picture(file) for file in request.images]
    loaded, processor = load_model(model, device), load_processor(model)
    wanted = Plan() if no_exit else _load_plan(plan)
    fast: Any = vte_compile.optimize(loaded, wanted, compile=_compile(no_compile))
    text = in_template(processor, request.prompt, len(pictures))
    arguments: dict[str, Any] = {"text": text, "return_tensors": "pt"} | ({"images": pictures} if pictures else {})
    inputs = processor(**arguments).to(fast.device)
    times: list[float] = []
    printer = _Printer(getattr(processor, "tokenizer", processor), request.stop, times)
    for phase in ("prefill", "decode"):
        fast._vte_runner.program(phase)  # traces and compiles now, not while the time is taken
    if request.seed is not None:
        torch.manual_seed(request.seed)
    drawing = bool(request.sampling) and request.sampling.get("temperature") != 0
    settings = dict(request.sampling) if drawing else {}
    start = time.perf_counter()
    result = fast.generate(
        **inputs,
        do_sample=drawing,
        max_new_tokens=request.max_new_tokens,
        streamer=printer,
        stopping_criteria=[printer.stops],
        **settings,
    )
    layers = fast.config.get_text_config().num_hidden_layers
    _report(int(result.exit_layer[0]), layers, inputs["input_ids"].shape[1], start, times)


def _report(exit_layer: int, layers: int, prompt_tokens: int, start: float, times: list[float]) -> None:
    first, last, tokens = times[0] - start, times[-1] - start, len(times)
    visual = "never left" if exit_layer < 0 else f"left after layer {exit_layer}"
    rate = f", then {(tokens - 1) / (last - first):.1f} tokens/s" if tokens > 1 else ""
    _errors().print(
        f"visual tokens {visual} (of layers 0..{layers - 1}); {prompt_tokens} prompt tokens, "
        f"{tokens} new; first token after {first:.2f} s{rate}",
        style="dim", highlight=False, soft_wrap=True,
    )  # fmt: skip


def _open_picture(file: Path) -> Any:
    from vte_compile.export.image_processor import open_picture

    return open_picture(file, "--image")


class _Printer:
    """What transformers calls a streamer: shows the text, notes when each token came, and stops at a stop string."""

    def __init__(self, tokenizer: Any, stops: list[str], times: list[float]) -> None:
        decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
        self._stream, self._times, self._is_prompt = TextStream(decode, stops), times, True

    def put(self, tokens: Any) -> None:
        """The prompt's tokens, then one by one the new ones."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._times.append(time.perf_counter())
        typer.echo(self._stream.push(int(tokens[0])), nl=False)

    def end(self) -> None:
        """All tokens came."""
        typer.echo(self._stream.finish())

    def stops(self, tokens: Any, scores: Any, **others: Any) -> Any:
        """As a stopping criterion: whether each row [1] ends."""
        import torch

        return torch.full((len(tokens),), self._stream.stopped, device=tokens.device)
