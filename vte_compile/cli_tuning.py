"""Commands that tune a plan for a model, ``vte-compile search``; cli.py adds them to the program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from vte_compile.cli import DebugOption, DeviceOption, ModelArgument, _out, _plain, app

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
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the plan goes.")] = Path("vte-plan"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the model's own answers.")] = 64,
    work: Annotated[
        Path | None, typer.Option("--work", metavar="DIR", help="Keep what was measured, to resume.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there.")] = None,
    device: DeviceOption = None,
    debug: DebugOption = False,
) -> None:
    """Find the attentions that the answers to your own data need least: writes a plan that skips them."""
    import vte_compile
    from vte_compile.loading import load_model, load_processor
    from vte_compile.tuning.chat_file import read_chats

    chats = read_chats(data)
    rankings: list[SkipRanking] = []
    plan = vte_compile.search_skips(
        load_model(model, device),
        chats,
        skips=skips,
        processor=load_processor(model),
        work=work,
        max_new_tokens=max_new_tokens,
        report=rankings.append,
    )
    plan.save_pretrained(out)
    console = _out()
    console.print(_ranking_table(rankings[0]))
    console.print(f"The plan is in {_plain(out)}.", soft_wrap=True)
    if json_file is not None:
        rankings[0].save(json_file)
        console.print(f"wrote {_plain(json_file)}", soft_wrap=True)


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
