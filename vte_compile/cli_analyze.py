"""The command ``vte-compile analyze``; cli.py adds it to the program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vte_compile.cli import DebugOption, DeviceOption, ModelArgument, _out, _plain, app


@app.command()
def analyze(
    model: ModelArgument,
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="FILE", help="Chats, .json or .jsonl: a line may be {'image': path, 'question': text}."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where page, plots and numbers go.")] = Path(
        "vte-analysis"
    ),
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", min=2, help="So many at equal distances. Default: all.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the model's own answers.")] = 64,
    work: Annotated[
        Path | None, typer.Option("--work", metavar="DIR", help="Keep what was measured of each sample, to resume.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the intervals.")] = 0,
    device: DeviceOption = None,
    debug: DebugOption = False,
) -> None:
    """Study where a model attends to images, and what its answers lose without: by layer, on your own data."""
    from vte_compile.loading import load_model, load_processor
    from vte_compile.tuning.analysis_page import prepare_folder, write_analysis
    from vte_compile.tuning.analyze import analyze as measure
    from vte_compile.tuning.chat_file import read_chats

    prepare_folder(out)
    chats = read_chats(data)
    if samples is not None and samples < len(chats):
        chats = [chats[i * len(chats) // samples] for i in range(samples)]
    found = measure(
        load_model(model, device),
        chats,
        processor=load_processor(model),
        max_new_tokens=max_new_tokens,
        work=work,
        seed=seed,
    )
    files = write_analysis(found, out)
    console = _out()
    console.print(found, highlight=False)
    console.print("[dim]wrote[/]")
    for file in files.values():
        console.print(f"  {_plain(file)}", soft_wrap=True, highlight=False)
