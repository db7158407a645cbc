"""The demo in steps, each of which the command line shows when it is done: gallery, comparison, evaluation, pages."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vte_compile.demo import plots, report
from vte_compile.demo.data import Assets, Question
from vte_compile.demo.evaluate import (
    FULL,
    LEARNED,
    TIMED_RUNS,
    WITH_SKIPS,
    Answer,
    Evaluation,
    answer,
    configurations,
    encode,
)
from vte_compile.environment import environment
from vte_compile.loading import load_model, load_processor
from vte_compile.plan import Plan
from vte_compile.plotting import require_matplotlib
from vte_compile.tuning.evaluate import evaluate as compare
from vte_compile.tuning.evaluation import Evaluation as Comparison

SCHEMA_VERSION = 2
DEFAULT_QUESTIONS = 256


@dataclass(frozen=True)
class Example:
    """One question of the gallery, answered with and without exit."""

    question: Question
    full: Answer
    learned: Answer


class Demo:
    """The shipped model with its plans.

    Args:
        questions: How many of the held-out questions to evaluate.
        compile: As for optimize().
        device: Such as "cuda"; None: a GPU if there is one.
        assets: Their folder; None: the shipped ones.

    Raises:
        InputError: Assets or matplotlib are missing.
    """

    def __init__(
        self,
        questions: int = DEFAULT_QUESTIONS,
        *,
        compile: bool | None = None,
        device: str | None = None,
        assets: Path | None = None,
    ) -> None:
        self._start = time.perf_counter()
        require_matplotlib()
        self.assets = Assets.find(assets)
        chosen = self.assets.spread(questions)
        self.plans = {
            LEARNED: Plan.from_pretrained(self.assets.plan),
            WITH_SKIPS: Plan.from_pretrained(self.assets.plan_skips),
        }
        self._compile = compile
        self.model = load_model(self.assets.model, device)
        self.processor = load_processor(self.assets.model)
        cases = configurations(self.model, self.plans, compile)
        self.evaluation = Evaluation(self.processor, chosen, cases)
        self.examples: list[Example] = []

    def answer_examples(self) -> list[Example]:
        """Answer one question of each type with the full model and with the learned exit."""
        questions = self.assets.one_of_each_type()
        inputs = encode(self.processor, questions, self.model.device)
        full, learned = (answer(self.evaluation[name].model, self.processor, inputs) for name in (FULL, LEARNED))
        self.examples = [Example(*parts) for parts in zip(questions, full, learned, strict=True)]
        return self.examples

    def compare(self) -> Comparison:
        """Compare the plans with baselines that have the FLOPs of the first one."""
        samples = [question.as_sample() for question in self.evaluation.questions]
        return compare(self.model, samples, self.plans, processor=self.processor, compile=self._compile)

    def evaluate(self, comparison: Comparison, *, progress: bool = True) -> dict[str, Any]:
        """Evaluate all configurations; returns the report as plain data (docs: ``report.json``)."""
        evaluation = self.evaluation
        evaluation.answer_all(progress=progress)
        timed = self.assets.one_of_each_type()
        evaluation.time_all(timed, progress=progress)
        full, learned = evaluation[FULL], evaluation[LEARNED]
        return {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "environment": environment(),
            "model": {
                "class": type(self.model).__name__,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "layers": evaluation.layers,
                "hidden_size": self.model.config.get_text_config().hidden_size,
                "visual_tokens": full.answers[0].visual_tokens,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "device": str(self.model.device),
            },
            "plans": {name: _described(plan) for name, plan in self.plans.items()},
            "settings": {
                "questions": len(evaluation.questions),
                "timed_questions": len(timed),
                "timed_runs": TIMED_RUNS,
                "compiled": evaluation[LEARNED].model._vte_runner.compiler is not None,
            },
            "configurations": [evaluation.summary(c) for c in evaluation.configurations],
            "comparison": json.loads(comparison.to_json()),
            "examples": [_sample(e.question, e.full, e.learned) for e in self.examples],
            "samples": [
                _sample(*parts) for parts in zip(evaluation.questions, full.answers, learned.answers, strict=True)
            ],
            "seconds": time.perf_counter() - self._start,
        }

    def write(self, results: dict[str, Any], comparison: Comparison, out: Path) -> dict[str, Path]:
        """Write ``report.json``, the plots and ``demo.html`` into a folder: what -> file."""
        out.mkdir(parents=True, exist_ok=True)
        files = {"report": out / "report.json", "page": out / "demo.html"}
        files["report"].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        drawn = plots.draw(results, comparison, out)
        pictures = {e.question.image.name: e.question.image for e in self.examples}
        files["page"].write_text(report.page(results, drawn, pictures), encoding="utf-8")
        return files | drawn


def _described(plan: Plan) -> dict[str, Any]:
    return {"exits": plan.describe(), "skips": [skip.layer for skip in plan.skips]}


def _sample(question: Question, full: Answer, learned: Answer) -> dict[str, Any]:
    return {
        "image": question.image.name,
        "type": question.type,
        "question": question.text,
        "answer": question.answer,
        "full": full.text,
        "learned": learned.text,
        "exit_layer": learned.exit_layer,
    }
