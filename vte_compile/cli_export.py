"""The command ``vte-compile export``; cli.py adds it to the program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vte_compile.cli import DebugOption, DeviceOption, ModelArgument, PlanOption, _load_plan, _out, _plain, app


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The engine's folder; an engine is replaced.")],
    plan: PlanOption = None,
    target: Annotated[str, typer.Option("--target", help="What runs the engine: aoti.")] = "aoti",
    device: DeviceOption = None,
    debug: DebugOption = False,
) -> None:
    """Write a model with its plan as an engine, a folder that runs without transformers (docs/engines.md)."""
    import vte_compile
    from vte_compile.export.folder import check_target_folder, read_manifest
    from vte_compile.export.manifest import Manifest
    from vte_compile.loading import load_model

    check_target_folder(out)  # before minutes of work
    fast = vte_compile.optimize(load_model(model, device), _load_plan(plan), compile=False)
    vte_compile.export(fast, out, target)
    manifest = Manifest.from_body(read_manifest(out))
    size = sum(file.bytes for file in manifest.files.values())
    pieces = sum(file.endswith(".pt2") for file in manifest.files)
    images = "takes images" if manifest.vision else "takes image features" if manifest.vision_missing else "text only"
    _out().print(
        f"{_plain(out)}: {pieces} compiled pieces, {size / 1e6:.1f} MB, for {manifest.built.device} "
        f"({_plain(manifest.built.processor)}) and torch {_plain(manifest.built.torch)}; {images}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
