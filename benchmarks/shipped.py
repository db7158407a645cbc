"""The shipped model on its held-out questions: learned exits, with and without skipped attentions, against baselines.

    python benchmarks/shipped.py --work DIR --json benchmarks/results/shipped.json

Answers, FLOPs and intervals are those of `vte-compile eval` (docs/evaluation.md), on all questions; eight of them
share a picture, which the intervals do not know. The best static exit, random dropping and FastV have at most the FLOPs
of the learned exit.

Times are of the decoder alone, one prompt at a time, all cases in turns, over one question of each type: of each round
the mean over questions, and of the rounds the median, with the least and the greatest; ratios to torch.compile are
medians over rounds too. Decode is per token, behind the prompt. Two baselines are the full model: as transformers runs
it, and through torch.compile, which compiles nothing while times are taken (checked). Random dropping and FastV run in
eager PyTorch, row by row, so their times would say nothing of the methods.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import BASELINE, JsonOption, ThreadsOption, write_report
from rich import box
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters
from tqdm import tqdm

from vte_compile import Plan, StaticExit, optimize
from vte_compile.demo.data import Assets, Question
from vte_compile.demo.evaluate import encode
from vte_compile.loading import load_model, load_processor
from vte_compile.oracle import embed
from vte_compile.timing import Phases, Summary, phases, time_phases
from vte_compile.tuning.evaluate import ATTENTION, FULL, ORACLE, RANDOM, STATIC, evaluate
from vte_compile.tuning.evaluation import Evaluation

LEARNED, WITH_SKIPS, NO_EXIT = "learned exit", "learned exit + skips", "optimized, no exit"
UNTIMED = {
    RANDOM: "runs in eager PyTorch, row by row",
    ATTENTION: "runs in eager PyTorch, row by row",
    ORACLE: "knows the answer: nothing that could run",
}
DECODE_TOKENS = 8
PHASES = ("prefill", "decode")


def main(
    work: Annotated[Path, typer.Option(help="Folder that keeps the answers, to go on after an interruption.")],
    questions: Annotated[int, typer.Option(help="How many of the shipped ones; 0: all.")] = 0,
    runs: Annotated[int, typer.Option(help="Timed rounds of each question.")] = 15,
    threads: ThreadsOption = 1,
    json_file: JsonOption = None,
) -> None:
    """Evaluate both shipped plans against baselines, and time what can be timed."""
    logging.basicConfig(level=logging.WARNING)
    if threads:
        torch.set_num_threads(threads)
    assets = Assets.find()
    asked = assets.spread(questions or len(assets.questions))
    model, processor = load_model(assets.model, "cpu"), load_processor(assets.model)
    plans = {LEARNED: Plan.from_pretrained(assets.plan), WITH_SKIPS: Plan.from_pretrained(assets.plan_skips)}
    found = evaluate(model, [each.as_sample() for each in asked], plans, processor=processor, folder=work)
    cases = timed_cases(model, plans, found)
    times = time_all(cases, processor, assets.one_of_each_type(), runs)
    rows = [row_of(found, name, times) for name in (FULL, BASELINE, NO_EXIT, *names_of(found))]
    settings = {
        "questions": found.samples, "timed_questions": len(assets.one_of_each_type()), "runs": runs,
        "decode_tokens": DECODE_TOKENS, "threads": torch.get_num_threads(), "baselines_within": found.matched,
        **found.settings,
    }  # fmt: skip
    show(rows, settings)
    if json_file is not None:
        full = found[FULL].measures["total_flops"].value
        static = [asdict(point) | {"total_flops": point.total_flops / full} for point in found.static_exits]
        write_report(json_file, "shipped.py", settings | {"static_exits": static}, rows)


def names_of(found: Evaluation) -> list[str]:
    """The evaluated configurations but the full model, the plans last but for the oracle."""
    order = (STATIC, RANDOM, ATTENTION, LEARNED, WITH_SKIPS, ORACLE)
    return sorted((case.name for case in found.configurations if case.name != FULL), key=order.index)


def timed_cases(model: Any, plans: Mapping[str, Plan], found: Evaluation) -> dict[str, Any]:
    """The models to time, by name."""
    without = optimize(model, Plan())
    cases = {FULL: model, BASELINE: torch.compile(model), NO_EXIT: without}
    for case in found.configurations:
        if case.kind == "static":
            assert case.layer is not None
            cases[STATIC] = optimize(without, Plan([StaticExit(case.layer)]))
    return cases | {name: optimize(without, plan) for name, plan in plans.items()}


def time_all(
    models: Mapping[str, Any], processor: Any, questions: Sequence[Question], runs: int
) -> dict[str, dict[str, Summary]]:
    """Prefill, and decode per token, of each model: of each round the mean over the questions.

    Raises:
        RuntimeError: The baseline was compiled again while times were taken.
    """
    model = models[FULL]
    prompts = []
    for question in questions:
        with torch.no_grad():
            prompts.append(embed(model, **encode(processor, [question], model.device)))

    def prepared(prompt: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Phases]:
        return {name: phases(each, *prompt, DECODE_TOKENS) for name, each in models.items()}

    for prompt in prompts:  # compiles everything, for all lengths
        for case in prepared(prompt).values():
            for _ in range(2):  # the second time with the cache that cropping leaves, whose strides differ
                case.decode()
                case.rewind()
    compiled = counters["stats"]["unique_graphs"]
    found: dict[str, dict[str, list[Summary]]] = {phase: {name: [] for name in models} for phase in PHASES}
    with tqdm(total=2 * (runs + 1) * len(prompts) * len(models), desc="timing", unit="run", dynamic_ncols=True) as bar:
        for prompt in prompts:
            prefill, decode = time_phases(prepared(prompt), runs, runs, device=model.device, after_each=bar.update)
            for name in models:
                found["prefill"][name].append(prefill[name])
                found["decode"][name].append(decode[name].scaled(1 / DECODE_TOKENS))
    if counters["stats"]["unique_graphs"] != compiled:
        raise RuntimeError("torch.compile compiled the baseline again while times were taken: they mean nothing.")
    return {phase: {name: _mean(each) for name, each in of.items()} for phase, of in found.items()}


def row_of(found: Evaluation, name: str, times: Mapping[str, Mapping[str, Summary]]) -> dict[str, Any]:
    """One case; the full model's other ways to run answer as it does, which the tests of optimize() check."""
    measured = found[FULL if name in (BASELINE, NO_EXIT) else name]
    full = found[FULL].measures
    row: dict[str, Any] = {
        "case": name,
        "layer": measured.layer,
        "share": measured.share,
        "accuracy": asdict(measured.measures["accuracy"]),
        "agreement": asdict(measured.measures["agreement"]),
        "agreement_difference": asdict(measured.differences["agreement"]),
        "layers_that_see_the_picture": measured.measures["cost"].value,
        "prefill_flops": measured.measures["prefill_flops"].value / full["prefill_flops"].value,
        "total_flops": measured.measures["total_flops"].value / full["total_flops"].value,
    }
    if name in UNTIMED:
        return row | {"untimed": UNTIMED[name]}
    return row | {
        phase: asdict(of[name]) | {"time_ratio": of[name].ratio_to(of[BASELINE])} for phase, of in times.items()
    }


def show(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """As Markdown, which README.md takes over."""
    table = Table(title=f"{settings['questions']} questions, {settings['threads']} thread(s)", box=box.MARKDOWN)
    for column in ("", "right", "same answer", "layers", "FLOPs", "prefill ms", "decode ms"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        same = row["agreement"]
        phased = [_milliseconds(row[phase]) if phase in row else "" for phase in PHASES]
        table.add_row(
            row["case"],
            f"{row['accuracy']['value']:.1%}",
            f"{same['value']:.1%} ({same['low']:.1%} .. {same['high']:.1%})",
            f"{row['layers_that_see_the_picture']:.2f}",
            f"{row['total_flops']:.1%}",
            *phased,
        )
    Console(width=140).print(table)


def _milliseconds(summary: Mapping[str, float]) -> str:
    median, least, greatest = (1e3 * summary[key] for key in ("median_s", "min_s", "max_s"))
    return f"{median:.2f} ({least:.2f} .. {greatest:.2f})"


def _mean(summaries: Sequence[Summary]) -> Summary:
    return Summary.of([statistics.fmean(times) for times in zip(*(each.runs_s for each in summaries), strict=True)])


if __name__ == "__main__":
    typer.run(main)
