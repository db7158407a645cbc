"""The command ``vte-compile export``; cli.py adds it to the program."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from vte_compile.cli import DebugOption, DeviceOption, ModelArgument, PlanOption, _load_plan, _out, _plain, app
from vte_compile.errors import InputError

_FORMS = {"staged": ("staged",), "single": ("single",), "both": ("staged", "single")}


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The engine's folder; an engine is replaced.")
    ] = None,
    plan: PlanOption = None,
    target: Annotated[
        str, typer.Option("--target", help="What runs the engine: onnxruntime, tensorrt or aoti.")
    ] = "onnxruntime",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, float16 or bfloat16. Default: what the checkpoint is in."),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize", help="The decoder's linear layers in int8 or int4 (onnxruntime), or fp8 (tensorrt)."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FILE", help="Chats, as calibrate takes them: the scales of fp8 come from them."
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--form", help="staged, single or both (onnxruntime): graphs between exits, or one graph."),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            metavar="NAME=MIN,OPT,MAX",
            help="Sizes the engines take (tensorrt): of batch, prompt, visual or columns. Can be given several times.",
        ),
    ] = None,
    build: Annotated[
        str | None,
        typer.Option("--build", help="tensorrt, tensorrt_rtx or none: what builds the engines (tensorrt)."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; show which node goes into which engine (tensorrt).")
    ] = False,
    device: DeviceOption = None,
    debug: DebugOption = False,
) -> None:
    """Write a model with its plan as an engine, a folder that runs without transformers (docs/onnx.md, engines.md)."""
    import vte_compile
    from vte_compile.export.folder import check_target_folder, read_manifest
    from vte_compile.loading import as_dtype, load_model, load_processor
    from vte_compile.tuning.chat_file import read_chats

    if dry_run != (out is None):
        raise InputError("export: pass --out DIR, or --dry-run without it.")
    if dry_run and target != "tensorrt":
        raise InputError(f"--dry-run: of target tensorrt only, got {target!r}.")
    if out is not None:
        check_target_folder(out)  # before minutes of work
    if form is not None and form not in _FORMS:
        raise InputError(f"--form: expected {', '.join(_FORMS)}, got {form!r}.")
    options: dict[str, Any] = {} if quantize is None else {"quantize": quantize}
    if (target == "tensorrt" and quantize is not None) or data is not None:
        if target != "tensorrt" or quantize != "fp8" or data is None:
            raise InputError("export: --target tensorrt, --quantize fp8 and --data go together.")
        options = {"precision": "fp8", "calibration": read_chats(data)}
    if form is not None:
        options["forms"] = _FORMS[form]
    if profile:
        options["profiles"] = dict(_sizes(text) for text in profile)
    if build is not None:
        options["build"] = False if build == "none" else build
    if data is not None:
        options["processor"] = load_processor(model)
    elif target != "aoti" and not dry_run:
        options["processor"] = _processor(model)
    loaded = as_dtype(load_model(model, device), dtype)
    fast = vte_compile.optimize(loaded, _load_plan(plan), compile=False)
    if out is None:
        from vte_compile.cli_coverage import show
        from vte_compile.export.tensorrt_coverage import coverage

        taken = ("profiles", "precision", "calibration", "processor")
        show(coverage(fast, **{name: options[name] for name in taken if name in options}))
        return
    vte_compile.export(fast, out, target, **options)
    body = read_manifest(out)
    _out().print(_summary(out, body), highlight=False, soft_wrap=True)


def _processor(model: str) -> Any:
    """A model's processor or tokenizer, if it has one."""
    from vte_compile.loading import load_processor

    try:
        return load_processor(model)
    except InputError as error:
        logging.getLogger(__name__).warning("the engine takes token ids and pixels, no text and pictures: %s", error)
        return None


def _sizes(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.partition("=")
    try:
        return name, tuple(int(size) for size in sizes.split(","))
    except ValueError as error:
        raise InputError(f"--profile: expected NAME=MIN,OPT,MAX, such as prompt=1,768,4096, got {text!r}.") from error


def _summary(out: Path, body: dict[str, Any]) -> str:
    files = body["files"]
    size = sum(file["bytes"] for file in files.values())
    images = "takes images" if body["vision"] else "takes image features" if body["vision_missing"] else "text only"
    if body["target"] == "aoti":
        pieces, built = sum(file.endswith(".pt2") for file in files), body["built"]
        what = f"{pieces} compiled pieces"
        where = f"for {built['device']} ({_plain(built['processor'])}) and torch {_plain(built['torch'])}"
    else:
        what = f"{sum(file.endswith('.onnx') for file in files)} ONNX graphs"
        where = f"{body['precision']}, opset {body['opset']}"
        images += ", and text" if any(file.startswith("processor/") for file in files) else ""
    if body["target"] == "tensorrt":
        builder = body["builder"]
        images += "; build the engines: build.sh" if builder is None else f"; engines built by {builder['package']}"
    return f"{_plain(out)}: {what}, {size / 1e6:.1f} MB, {where}; {images}"
