"""Commands that tune a plan for a model, ``vte-compile search``; cli.py adds them to the program."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table

from vte_compile.cli import DebugOption, DeviceOption, ModelArgument, _out, _plain, _plan_table, app
from vte_compile.errors import InputError

if TYPE_CHECKING:
    from vte_compile.tuning.ranking import SkipRanking


@app.command()
def search(
    model: ModelArgument,
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="FILE", help="Chats, .json or .jsonl: a line may be {'image': path, 'question': text}."
        ),
    ],
    skips: Annotated[int, typer.Option(min=1, help="How many attentions are to go.")],
    method: Annotated[
        str, typer.Option(help="ranking, without training; or redundancy, which also trains adapters.")
    ] = "ranking",
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the plan goes.")] = Path("vte-plan"),
    search_steps: Annotated[int | None, typer.Option(min=1, help="Of redundancy: of the search.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of redundancy: of training what it found.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Of redundancy: samples per step.")] = None,
    width: Annotated[int | None, typer.Option(min=2, help="Of redundancy: of all adapters.")] = None,
    router: Annotated[str | None, typer.Option(help="Of redundancy: prompt or static.")] = None,
    distill: Annotated[float | None, typer.Option(help="Of redundancy: share of the full model in the loss.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the model's own answers.")] = 64,
    work: Annotated[
        Path | None, typer.Option("--work", metavar="DIR", help="Keep what was measured or trained, to resume.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of redundancy.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Of ranking: write the numbers there.")
    ] = None,
    device: DeviceOption = None,
    debug: DebugOption = False,
) -> None:
    """Find the attentions that the answers to your own data need least: writes a plan that skips them.

    Under torchrun, each process takes its share of the training.
    """
    import vte_compile
    from vte_compile.loading import load_model, load_processor
    from vte_compile.tuning.chat_file import read_chats

    wanted = {
        "search_steps": search_steps,
        "steps": steps,
        "batch": batch,
        "width": width,
        "kept_width": width,
        "router": router,
        "distill": distill,
    }
    given: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    if method == "redundancy":
        if json_file is not None:
            raise InputError("--json: is for --method ranking; the search of redundancy has no table.")
    elif given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given if name != "kept_width")
        raise InputError(f"{options}: for --method redundancy; a ranking trains nothing.")
    chats = read_chats(data)
    arguments: dict[str, Any] = {
        "processor": load_processor(model),
        "work": work,
        "max_new_tokens": max_new_tokens,
    }
    console = _out()
    loaded = load_model(model, device or _device_of_process())
    rankings: list[SkipRanking] = []
    if method == "redundancy":
        from vte_compile.tuning.train_adapters import TrainingSettings

        arguments |= {"training": TrainingSettings(**given), "seed": seed}
    else:
        arguments["report"] = rankings.append
    plan = vte_compile.search_skips(loaded, chats, skips=skips, method=cast(Any, method), **arguments)
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun, all processes have the same plan
    plan.save_pretrained(out)
    console.print(_ranking_table(rankings[0]) if rankings else _plan_table(plan))
    console.print(f"The plan is in {_plain(out)}.", soft_wrap=True)
    if json_file is not None:
        rankings[0].save(json_file)
        console.print(f"wrote {_plain(json_file)}", soft_wrap=True)


def _device_of_process() -> str | None:
    """Under torchrun with GPUs, the one of this process."""
    import torch

    own = os.environ.get("LOCAL_RANK")
    return f"cuda:{own}" if own is not None and torch.cuda.is_available() else None


def _ranking_table(ranking: SkipRanking) -> Table:
    """What deleting each attention alone does, and in which order they go."""
    title = f"{ranking.samples} samples, loss of the full model {ranking.loss:.4f}"
    table = Table(title=title, title_justify="left")
    for heading in ("layer", "loss", "answers changed", "skipped as", "then loss", "then changed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for effect in ranking.rounds[0]:
        row = [str(effect.layer), f"{effect.loss_increase:+.4f}", f"{effect.changed_answers:.1%}"]
        if effect.layer in ranking.chosen:
            number = ranking.chosen.index(effect.layer)
            then = next(each for each in ranking.rounds[number] if each.layer == effect.layer)
            row += [f"no. {number + 1}", f"{then.loss_increase:+.4f}", f"{then.changed_answers:.1%}"]
        table.add_row(*row, style="bold" if effect.layer in ranking.chosen else None)
    table.caption = "Each attention alone; then, of those skipped: with all that were skipped before."
    table.caption_justify = "left"
    return table
