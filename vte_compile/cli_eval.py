"""The command ``vte-compile eval``; cli.py adds it to the program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vte_compile.cli import DebugOption, DeviceOption, ModelArgument, NoCompileOption, _compile, _out, _plain, app
from vte_compile.errors import InputError


@app.command(name="eval")
def evaluate(
    model: ModelArgument,
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="FILE", help="Chats, .json or .jsonl: a line may be {'image': path, 'question': text}."
        ),
    ],
    plan: Annotated[
        list[str],
        typer.Option("--plan", metavar="PLAN", help="Folder or hub id of a plan; may be repeated."),
    ],
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Compare with others at the FLOPs of the first plan.")
    ] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the answers.")] = 64,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Draw the plot there, as PNG.")] = None,
    work: Annotated[Path | None, typer.Option("--work", metavar="DIR", help="Keep the answers, to resume.")] = None,
    seed: Annotated[int, typer.Option(help="Of random dropping and of the intervals.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there.")] = None,
    no_compile: NoCompileOption = False,
    device: DeviceOption = None,
    debug: DebugOption = False,
) -> None:
    """Measure how often plans keep a model's answers, against baselines with the same FLOPs, on your own data."""
    from vte_compile.loading import load_model, load_processor
    from vte_compile.plan import Plan
    from vte_compile.plotting import require_matplotlib
    from vte_compile.tuning.chat_file import read_chats
    from vte_compile.tuning.evaluate import evaluate as measure
    from vte_compile.tuning.evaluation_plot import draw_evaluation

    chats = read_chats(data)
    plans = {Path(name).name: Plan.from_pretrained(name) for name in plan}
    if len(plans) != len(plan):
        raise InputError("--plan: two plans have the same name, which is the last part of their path.")
    if out is not None:
        require_matplotlib()
    result = measure(
        load_model(model, device),
        chats,
        plans,
        processor=load_processor(model),
        baselines=baselines,
        max_new_tokens=max_new_tokens,
        folder=work,
        compile=_compile(no_compile),
        seed=seed,
    )
    console = _out()
    console.print(result, highlight=False)
    if out is not None:
        draw_evaluation(result, out)
        console.print(f"wrote {_plain(out)}", soft_wrap=True)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(result.to_json(), encoding="utf-8")
        console.print(f"wrote {_plain(json_file)}", soft_wrap=True)
