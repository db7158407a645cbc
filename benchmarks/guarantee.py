"""Does the guarantee hold? Calibrates the shipped model again and again, and tests each plan on other scenes.

    python benchmarks/guarantee.py --work DIR --json benchmarks/results/guarantee.json

Features and answers of a pool of scenes, one question each, are collected once. Each run draws a calibration set from
the pool, trains gates, chooses layers and thresholds and certifies them (vte_compile/tuning/calibrate_examined.py,
which is what calibrate() runs), and measures the disagreement twice: on all scenes of the pool that it did not draw,
and on a second pool, whose scenes are of other photographs. The drawn scenes are disjoint from those of both tests.
Between runs the sets overlap: the pool is finite, and the second pool is the same each time.

For contrast a naive choice: the same gates, with the greedy thresholds that change no more than the limit of the
answers in both splits that the certified plan is chosen and tested on, and no certificate.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import JsonOption, ThreadsOption, write_report
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vte_compile.demo.data import ASSETS
from vte_compile.errors import CalibrationError
from vte_compile.loading import load_model, load_processor
from vte_compile.tuning.calibrate_examined import (
    Choice,
    Costing,
    Promise,
    Splits,
    candidates,
    choose,
    exit_outcomes,
    fit_gates,
)
from vte_compile.tuning.examine import Examined
from vte_compile.tuning.exits import measure
from vte_compile.tuning.policies import thresholds_within
from vte_compile.tuning.samples import read_samples
from vte_compile.tuning.splits import PARTS
from vte_compile.tuning.store import collect

EXAMPLE = Path(__file__).parents[1] / "examples" / "demo_model"
SHIPPED_SCENES = 160
"""The first of the split `test` are those of the shipped questions."""
MAX_NEW_TOKENS = 64


def main(
    work: Annotated[Path, typer.Option(help="Folder that keeps what was examined of the pools.")],
    pool: Annotated[int, typer.Option(help="Scenes of the split `calibration`.")] = 8192,
    other: Annotated[int, typer.Option(help="Scenes of other photographs, of the split `test`.")] = 1024,
    runs: Annotated[int, typer.Option(help="Calibrations.")] = 100,
    samples: Annotated[int, typer.Option(help="Scenes that each calibration draws.")] = 2500,
    max_disagreement: float = 0.02,
    delta: float = 0.05,
    slack: Annotated[float, typer.Option(help="As in examples/demo_model/make_plans.py.")] = 0.03,
    width: int = 64,
    epochs: int = 30,
    threads: ThreadsOption = 1,
    data: Annotated[str | None, typer.Option(help="Folder with Fashion-MNIST; default: as in the example.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Calibrate many times, and count how often the measured disagreement is within the limit."""
    if threads:
        torch.set_num_threads(threads)
    model, processor = load_model(ASSETS / "model", "cpu"), load_processor(ASSETS / "model")
    first, second = (
        collect(model, read_samples(_questions(*which, data), processor), work / which[0], MAX_NEW_TOKENS)
        for which in (("calibration", 0, pool), ("test", SHIPPED_SCENES, other))
    )
    promise, costing = Promise(max_disagreement, delta), Costing(model.config)
    rows = []
    for run in tqdm(range(runs), "calibrations", unit="run", dynamic_ncols=True):
        order = torch.randperm(len(first.same), generator=torch.Generator().manual_seed(run)).tolist()
        splits = Splits.of(first.at(order[:samples]), divided(samples))
        gates = fit_gates(splits.train, slack=slack, width=width, epochs=epochs, seed=run)
        tests = {"fresh": first.at(order[samples:]), "other_photographs": second}
        try:
            choice = choose(gates, splits, slack, promise, costing)
        except CalibrationError as error:
            rows.append({"run": run, "refused": str(error)})
            continue
        rows.append({"run": run, **compare(choice, splits, tests, slack, costing, max_disagreement)})
    settings = {
        "pool": len(first.same), "other": len(second.same), "samples": samples, "runs": runs,
        "parts": dict(PARTS), "max_disagreement": max_disagreement, "delta": delta, "slack": slack, "width": width,
        "epochs": epochs, "questions_per_scene": 1, "threads": torch.get_num_threads(),
    }  # fmt: skip
    summaries = summarize(rows, max_disagreement)
    show(summaries, settings)
    if json_file is not None:
        write_report(json_file, "guarantee.py", settings | {"summary": summaries}, rows)


def divided(samples: int) -> list[str]:
    """The part of each of so many samples, in the shares that calibrate() has: they were drawn at random already."""
    parts: list[str] = []
    end = 0.0
    for part, share in PARTS.items():
        end += share
        parts += [part] * (round(end * samples) - len(parts))
    return parts


def compare(
    choice: Choice,
    splits: Splits,
    tests: dict[str, Examined],
    slack: float,
    costing: Costing,
    max_disagreement: float,
) -> dict[str, Any]:
    """What the certified thresholds, and the naive ones, do to each of the tests."""
    may_exit = candidates(splits.train, slack)[1].any(0)
    seen = Examined.concatenate([splits.selection, splits.certification])
    naive = thresholds_within(exit_outcomes(choice.gates, may_exit, seen, costing), max_disagreement)
    policies = {"certified": torch.tensor(choice.certificate.thresholds, dtype=torch.float64), "naive": naive}
    result: dict[str, Any] = {name: {} for name in policies}
    for test, examined in tests.items():
        outcomes = exit_outcomes(choice.gates, may_exit, examined, costing)
        for name, thresholds in policies.items():
            found = measure(outcomes, thresholds)
            result[name][test] = {
                "disagreement": found.changed / outcomes.samples,
                "speedup": outcomes.full_cost / found.cost,
            }
    certificate = choice.certificate
    result["certificate"] = {"samples": certificate.samples, "changed": certificate.changed}
    return result


def summarize(rows: list[dict[str, Any]], max_disagreement: float) -> list[dict[str, Any]]:
    """Of each way to choose and each test: how many calibrations keep within the limit, and the distribution."""
    made = [row for row in rows if "refused" not in row]
    summaries = []
    for name in ("certified", "naive"):
        for test in made[0][name] if made else ():
            rates = torch.tensor([row[name][test]["disagreement"] for row in made], dtype=torch.float64)
            speedups = torch.tensor([row[name][test]["speedup"] for row in made], dtype=torch.float64)
            summaries.append(
                {
                    "policy": name,
                    "test": test,
                    "calibrations": len(rows),
                    "refused": len(rows) - len(made),
                    "within": int((rates <= max_disagreement).sum()),
                    "disagreement": {
                        "mean": rates.mean().item(), "median": rates.median().item(),
                        "p95": rates.quantile(0.95).item(), "max": rates.max().item(),
                    },
                    "speedup": {"mean": speedups.mean().item(), "min": speedups.min().item()},
                }
            )  # fmt: skip
    return summaries


def show(summaries: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    table = Table(title=f"{settings['runs']} calibrations of {settings['samples']} samples")
    for column in ("policy", "tested on", "within", "mean", "95% of them", "max", "prefill costs 1/"):
        table.add_column(column, justify="left" if column in ("policy", "tested on") else "right")
    for row in summaries:
        spread = [f"{row['disagreement'][key]:.2%}" for key in ("mean", "p95", "max")]
        within = f"{row['within']} of {row['calibrations'] - row['refused']}"
        table.add_row(row["policy"], row["test"], within, *spread, f"{row['speedup']['mean']:.2f}")
    Console().print(table)


def _questions(split: str, start: int, count: int, data: str | None) -> Iterator[dict[str, Any]]:
    sys.path.insert(0, str(EXAMPLE))
    from scenes import load_split

    for image, (question,) in islice(load_split(split, start + count, 1, data), start, None):
        yield {"image": image, "question": question.question}


if __name__ == "__main__":
    typer.run(main)
