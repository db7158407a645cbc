"""Makes the demo's two plans with the library's own tools: learned exits, and those on top of skipped attentions.

Both are calibrated with a guarantee against the full model (docs/guarantee.md): P(the answer differs) is at most 2%,
with confidence 95%, for scenes drawn as those of the split `calibration`. There is one question per scene, since the
guarantee takes prompts for independent. The attentions to skip are searched on the split `train`, so that nothing of
the certified plans was chosen on what certifies them.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scenes import load_split

import vte_compile
from vte_compile import Plan
from vte_compile.environment import environment
from vte_compile.loading import load_model, load_processor
from vte_compile.tuning.ranking import SkipRanking
from vte_compile.tuning.report import CalibrationReport

ASSETS = Path(__file__).parents[2] / "vte_compile" / "demo" / "assets"

MAX_DISAGREEMENT, DELTA = 0.02, 0.05
# The paper's label compares losses by their ratio alone, which in this model are noise: see README.md.
SLACK = 0.03


def conversations(split: str, scenes: int, data: str | None) -> Iterator[dict[str, Any]]:
    """One question about each of a split's first scenes, without its answer: the model's own is what has to stay."""
    for image, (question,) in load_split(split, scenes, 1, data):
        yield {"image": image, "question": question.question}


def describe(name: str, plan: Plan, report: CalibrationReport, ranking: SkipRanking | None) -> str:
    """A plan's card; it repeats nothing that was not measured here."""
    found, samples = report.certificate, report.samples
    skipped = ", ".join(str(skip.layer) for skip in plan.skips)
    lines = [
        f"# Plan of the demo model: {name}",
        "",
        "For the model in `../model`. Load it with `Plan.from_pretrained`, or let `vte-compile demo` show it. Made by "
        "`examples/demo_model/make_plans.py` with `vte_compile.calibrate()`" + (
            " on top of what `vte_compile.search_skips()` found." if ranking else "."
        ),
        "",
        f"**Promise**: for scenes like those it was calibrated on, P(the answer differs from the full model's) <= "
        f"{found.max_disagreement:.0%}, with confidence {1 - found.delta:.0%} (`docs/guarantee.md`). On the "
        f"certification split {found.changed} of {found.samples} answers differ.",
        "",
        f"Prefill costs 1/{report.speedup:.2f} of its FLOPs without exits"
        + (", both with the attentions skipped." if ranking else "."),
        "",
        f"One question for each of {sum(samples.values())} scenes of the split `calibration`: "
        + ", ".join(f"{count} for {part}" for part, count in samples.items()) + ".",
    ]  # fmt: skip
    if ranking is not None:
        lines += [
            "",
            f"Skipped attentions: of layer {skipped}, without adapters, found on {ranking.samples} scenes of the split "
            "`train`: `ranking.json` has what deleting each attention does.",
        ]
    lines += ["", "| layer | threshold | leave here | of them changed |", "|---|---|---|---|"]
    for row in report.layers:
        threshold = "no gate" if row.threshold is None else f"{row.threshold:.2f}"
        lines.append(f"| {row.layer} | {threshold} | {row.exits:.1%} | {row.changed} |")
    lines += [
        f"| never | | {report.never:.1%} | {found.changed - sum(row.changed for row in report.layers)} |",
        "",
        "The gates know this model, and such questions, only. `calibration.json` has all numbers, settings and "
        "versions; what the plan does to other questions is in `benchmarks/results/shipped.json`.",
    ]
    return "\n".join(lines) + "\n"


def save(folder: Path, name: str, plan: Plan, report: CalibrationReport, ranking: SkipRanking | None = None) -> None:
    """Write a plan, its card, and the numbers behind it."""
    plan.save_pretrained(folder)
    content = json.loads(report.to_json()) | {"environment": environment()}
    (folder / "calibration.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "README.md").write_text(describe(name, plan, report, ranking))
    if ranking is not None:
        ranking.save(folder / "ranking.json")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps what was examined, to resume")
    parser.add_argument("--model", type=Path, default=ASSETS / "model", help="folder of the model (default: shipped)")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for `plan` and `plan_skips`")
    parser.add_argument("--data", help="folder with Fashion-MNIST (default: $FASHION_MNIST, or where Debian has it)")
    parser.add_argument("--device", help="such as cuda (default: a GPU if there is one)")
    parser.add_argument("--scenes", type=int, default=6144, help="to calibrate on")
    parser.add_argument("--search-scenes", type=int, default=256, help="to search skips on")
    parser.add_argument("--skips", type=int, default=1, help="how many attentions are to go")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Make both plans."""
    options = parse()
    model, processor = load_model(options.model, options.device), load_processor(options.model)
    reports: list[CalibrationReport] = []

    def calibrate(base: Plan | None, work: str) -> Plan:
        return vte_compile.calibrate(
            model,
            conversations("calibration", options.scenes, options.data),
            processor=processor,
            max_disagreement=MAX_DISAGREEMENT,
            delta=DELTA,
            slack=SLACK,
            base=base,
            work=options.work / work,
            seed=options.seed,
            report=reports.append,
        )

    exits = calibrate(None, "exits")
    save(options.out / "plan", "learned exits", exits, reports[-1])
    rankings: list[SkipRanking] = []
    skips = vte_compile.search_skips(
        model,
        conversations("train", options.search_scenes, options.data),
        skips=options.skips,
        processor=processor,
        work=options.work / "skips",
        report=rankings.append,
    )
    both = calibrate(skips, "exits_and_skips")
    save(options.out / "plan_skips", "learned exits and skipped attentions", both, reports[-1], rankings[-1])


if __name__ == "__main__":
    main()
