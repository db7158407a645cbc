"""The command line, ``vte-compile``. Commands import heavy packages themselves, so that --help is fast."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from vte_compile.errors import InputError, VTEError
from vte_compile.version import __version__

if TYPE_CHECKING:
    from vte_compile.folded_weights import FoldReport
    from vte_compile.plan import Plan


class _Group(TyperGroup):
    """Shows our own errors as one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except VTEError as error:
            if (ctx.obj or {}).get("debug"):
                raise
            _errors().print(f"[bold red]error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Let visual tokens leave an MLLM's decoder at a learned layer. [bold]vte-compile demo[/] shows it.",
)


def main() -> None:
    """The entry point."""
    app()


def _out() -> Console:
    return Console()


def _errors() -> Console:
    return Console(stderr=True)


def _plain(value: object) -> str:
    """Text with its square brackets, which rich would read as markup."""
    from rich.markup import escape

    return escape(str(value))


def _remember_debug(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.find_root().ensure_object(dict)["debug"] = True


def _print_version(value: bool) -> None:
    if value:
        _out().print(__version__, highlight=False)
        raise typer.Exit


DebugOption = Annotated[bool, typer.Option("--debug", callback=_remember_debug, help="Show the traceback of an error.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a transformers checkpoint.")]
PlanOption = Annotated[
    str | None,
    typer.Option(
        "--plan", metavar="PLAN", help="Folder or hub id of a plan. Default: the one beside the model, if any."
    ),
]
NoCompileOption = Annotated[bool, typer.Option("--no-compile", help="Run the graphs without Inductor.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="Such as cpu or cuda:0. Default: a GPU if there is one.")
]


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("vte_compile").setLevel(logging.INFO)


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False, debug: DebugOption = False
) -> None:
    """Show versions and hardware, for bug reports."""
    from vte_compile.environment import environment

    found = environment()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, version in found["versions"].items():
        table.add_row(name, version or "[dim]not installed[/]")
    table.add_row("platform", found["platform"])
    table.add_row("CPU", _plain(found["cpu"]["name"]))
    table.add_row("cores, threads", f"{found['cpu']['cores']} usable, torch uses {found['threads']} threads")
    gpus = [f"{g['name']}, {g['memory'] / 2**30:.0f} GiB, compute capability {g['capability']}" for g in found["gpus"]]
    table.add_row("GPU", "\n".join(gpus) or "[dim]none found[/]")
    table.add_row("C++ compiler", found["compiler"] or "[dim]none found: graphs for the CPU run uncompiled[/]")
    table.add_row("commit", found["commit"] or "[dim]not a checkout[/]")
    _out().print(table)


@app.command()
def optimize(
    model: ModelArgument,
    plan: PlanOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Save model and plan there, beside each other.")
    ] = None,
    no_compile: NoCompileOption = False,
    device: DeviceOption = None,
    debug: DebugOption = False,
) -> None:
    """Check a plan against a model, apply all passes, and show what they did."""
    import vte_compile
    from vte_compile.loading import load_model, load_processor

    loaded = load_model(model, device)
    fast: Any = vte_compile.optimize(loaded, _load_plan(plan), compile=_compile(no_compile))
    refusals = []
    table = Table(title=f"{type(loaded).__name__}: passes", title_justify="left")
    for heading in ("graph", "pass", "applied", "refused"):
        table.add_column(heading, justify="right" if heading in ("applied", "refused") else "left")
    for phase in ("prefill", "decode"):
        for i, result in enumerate(fast._vte_runner.program(phase).passes):
            table.add_row("" if i else phase, result.name, str(result.applied), str(len(result.refusals)))
            refusals += [(phase, result.name, refusal) for refusal in result.refusals]
        table.add_section()
    console = _out()
    console.print(table)
    if refusals:
        refused = Table("graph", "pass", "layer", "node", "reason", title="Refusals", title_justify="left")
        for phase, name, refusal in refusals:
            layer = "" if refusal.layer is None else str(refusal.layer)
            refused.add_row(phase, name, layer, _plain(refusal.node), _plain(refusal.reason))
        console.print(refused)
    console.print(_plan_table(fast.plan))
    if fast.fold_reports:
        console.print(_fold_table(fast.fold_reports))
    if out is not None:
        # The model as it came: an optimized one lacks what its plan deletes.
        loaded.save_pretrained(out)
        fast.plan.save_pretrained(out)
        try:
            load_processor(model).save_pretrained(out)
        except InputError:
            logging.getLogger(__name__).warning("%s has no processor or tokenizer to save", model)
        console.print(f"Model and plan are in {_plain(out)}: optimize() finds the plan there.", soft_wrap=True)


@app.command()
def bench(
    model: ModelArgument,
    plan: PlanOption = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of the prompt. Default: visual tokens + 64.")] = None,
    visual: Annotated[int | None, typer.Option(help="How many of them are visual. Default: one image's.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 7,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Decode steps to time in each round.")] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch. Default: torch's own choice.")] = None,
    every_layer: Annotated[bool, typer.Option("--every-layer", help="Force an exit after each layer in turn.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there.")] = None,
    no_compile: NoCompileOption = False,
    device: DeviceOption = None,
    debug: DebugOption = False,
) -> None:
    """Time prefill and decode with the plan, without exit, and with forced exits, in turns, on a random prompt."""
    import torch

    from vte_compile.bench import bench as measure
    from vte_compile.loading import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_model(model, device)
    result = measure(
        loaded,
        _load_plan(plan),
        seq=seq,
        visual=visual,
        runs=runs,
        decode_tokens=decode_tokens,
        every_layer=every_layer,
        compile=_compile(no_compile),
    )
    size, threads = result["settings"], result["machine"]["threads"]
    title = f"{size['seq']} tokens, {size['visual']} of them visual; {size['runs']} runs; torch threads: {threads}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    headings = "case", "exit\nafter", "prefill\nms", "spread", "time", "FLOPs", "time/\nFLOPs", "decode\nms", "KV\nMiB"
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    for case in result["cases"]:
        table.add_row(
            case["case"],
            "never" if case["exit_layer"] < 0 else str(case["exit_layer"]),
            f"{case['prefill']['median_s'] * 1e3:.1f}",
            f"{(case['prefill']['max_s'] - case['prefill']['min_s']) / case['prefill']['median_s']:.0%}",
            f"{case['time_ratio']:.3f}",
            f"{case['flop_ratio']:.3f}",
            f"{case['quotient']:.3f}",
            f"{case['decode']['median_s'] * 1e3:.2f}",
            f"{case['kv_bytes'] / 2**20:.2f}",
        )
    console = _out()
    console.print(table)
    console.print(
        "[dim]Medians; spread: (max - min) / median. Time, FLOPs: of prefill, over no exit. Decode: per token.[/]"
    )
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {_plain(json_file)}", soft_wrap=True)


@app.command()
def calibrate(
    model: ModelArgument,
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="FILE", help="Chats, .json or .jsonl: a line may be {'image': path, 'question': text}."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the plan goes.")] = Path("vte-plan"),
    max_disagreement: Annotated[float, typer.Option(help="Share of answers that may differ from the model's.")] = 0.02,
    delta: Annotated[float, typer.Option(help="The promise holds with confidence 1 - delta.")] = 0.05,
    target_speedup: Annotated[
        float | None, typer.Option(help="Of prefill: instead of a limit on the disagreement, which is then bounded.")
    ] = None,
    width: Annotated[int, typer.Option(min=1, help="Of the gates.")] = 64,
    compare_width: Annotated[
        list[int] | None, typer.Option(metavar="WIDTH", help="Another width, to compare; may be repeated.")
    ] = None,
    slack: Annotated[
        float, typer.Option(min=0.0, help="Nats by which an answer's loss may grow where the visual tokens may leave.")
    ] = 0.0,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="PLAN", help="Skips and adapters to be in the plan too, from `search`."),
    ] = None,
    measured: Annotated[
        bool, typer.Option("--measured", help="Choose layers by times measured here, instead of FLOPs.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the answers.")] = 64,
    work: Annotated[
        Path | None, typer.Option("--work", metavar="DIR", help="Keep what was found of each sample, to resume.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split and the training.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw a PNG there.")] = None,
    device: DeviceOption = None,
    debug: DebugOption = False,
) -> None:
    """Train exit gates on your own data, and choose thresholds with a guarantee: writes a plan."""
    import vte_compile
    from vte_compile.loading import load_model, load_processor
    from vte_compile.plotting import require_matplotlib
    from vte_compile.tuning.chat_file import read_chats
    from vte_compile.tuning.plots import draw_calibration
    from vte_compile.tuning.report import CalibrationReport

    if plot is not None:
        require_matplotlib()
    chats = read_chats(data)
    reports: list[CalibrationReport] = []
    made = vte_compile.calibrate(
        load_model(model, device),
        chats,
        processor=load_processor(model),
        max_disagreement=max_disagreement,
        delta=delta,
        target_speedup=target_speedup,
        width=width,
        widths=compare_width or (),
        slack=slack,
        costs="measured" if measured else "flops",
        base=_load_plan(base),
        max_new_tokens=max_new_tokens,
        work=work,
        seed=seed,
        report=reports.append,
    )
    made.save_pretrained(out)
    console = _out()
    console.print(reports[0], highlight=False)
    console.print(f"The plan is in {_plain(out)}.", soft_wrap=True)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(reports[0].to_json(), encoding="utf-8")
        console.print(f"wrote {_plain(json_file)}", soft_wrap=True)
    if plot is not None:
        draw_calibration(reports[0], plot)
        console.print(f"wrote {_plain(plot)}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where page, plots and report go.")] = Path(
        "demo-out"
    ),
    questions: Annotated[
        int | None, typer.Option("--questions", metavar="N", min=1, help="How many held-out questions. Default: 256.")
    ] = None,
    no_compile: NoCompileOption = False,
    device: DeviceOption = None,
    debug: DebugOption = False,
) -> None:
    """Ask a small LLaVA about photographs with and without exit, evaluate it, and write a page about it."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from vte_compile.demo.run import DEFAULT_QUESTIONS, Demo
    from vte_compile.demo.tables import comparison_table, cost_table

    disable_progress_bar()  # of loading a model of a few megabytes
    torch.set_num_threads(1)  # the steps of so small a model are shorter than waking a second thread takes
    console = _out()
    with _errors().status("loading, tracing and compiling the model (about a minute)"):
        show = Demo(questions or DEFAULT_QUESTIONS, compile=_compile(no_compile), device=device)
        examples = show.answer_examples()
    gallery = Table("picture", "question", "full model", "with exit", "right answer", "exit after", title="Examples",
                    title_justify="left")  # fmt: skip
    for example in examples:
        layer = example.learned.exit_layer
        gallery.add_row(
            example.question.image.name,
            _plain(example.question.text),
            example.full.text,
            example.learned.text,
            example.question.answer,
            "never" if layer < 0 else f"layer {layer}",
        )
    console.print(gallery)
    comparison = show.compare()
    console.print(comparison_table(comparison), highlight=False)
    results = show.evaluate(comparison)
    files = show.write(results, comparison, out)
    console.print(cost_table(results))
    console.print(f"[dim]took {results['seconds']:.0f} s; wrote[/]", highlight=False)
    for file in files.values():
        console.print(f"  {_plain(file)}", soft_wrap=True, highlight=False)


def _plan_table(plan: Plan) -> Table | str:
    rows = plan.describe()
    if not rows:
        return "The plan is empty: only what is lossless was done."
    table = Table("layer", "kind", "threshold", "width", title="Plan", title_justify="left")
    for row in rows:
        threshold = "" if row["threshold"] is None else f"{row['threshold']:g}"
        table.add_row(str(row["layer"]), row["kind"], threshold, "" if row["width"] is None else str(row["width"]))
    if plan.companion is not None:
        table.caption = "A companion token goes along with each prompt."
    return table


def _fold_table(reports: list[FoldReport]) -> Table:
    headings = ("layer", "kind", "one prompt", "many prompts", "rounding", "MB", "why")
    table = Table(*headings, title="Adapters: their form in prefill / decode", title_justify="left")
    for report in reports:
        one, many = (f"{forms.prompt} / {forms.step}" for forms in (report.one_prompt, report.many_prompts))
        size, error = f"{report.added_bytes / 1e6:.1f}", f"{report.rounding_error:.1e}"
        table.add_row(str(report.layer), report.kind, one, many, error, size, report.one_prompt.reason)
    return table


def _load_plan(name: str | None) -> Plan | None:
    from vte_compile.plan import Plan

    return None if name is None else Plan.from_pretrained(name)


def _compile(no_compile: bool) -> bool | None:
    return False if no_compile else None


# At the end: they take the program and its options from here.
from vte_compile import cli_analyze as cli_analyze  # noqa: E402
from vte_compile import cli_eval as cli_eval  # noqa: E402
from vte_compile import cli_export as cli_export  # noqa: E402
from vte_compile import cli_generate as cli_generate  # noqa: E402
from vte_compile import cli_tuning as cli_tuning  # noqa: E402
