"""What the demo ships: the model's folder, its plan, and held-out questions about photographs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vte_compile.errors import InputError
from vte_compile.plan.json_fields import JSON_NAME

ASSETS = Path(__file__).resolve().parent / "assets"


@dataclass(frozen=True)
class Question:
    """A question about one picture."""

    image: Path
    type: str
    text: str
    answer: str

    def as_sample(self) -> dict[str, str]:
        """As :func:`vte_compile.tuning.samples.read_samples` takes it."""
        return {"image": str(self.image), "question": self.text, "answer": self.answer}


@dataclass(frozen=True)
class Assets:
    """Where everything is."""

    model: Path
    plan: Path
    """Learned exits."""
    plan_skips: Path
    """Learned exits and skipped attentions."""
    questions: list[Question]

    @classmethod
    def find(cls, folder: Path | None = None) -> Assets:
        """Assets, complete; the shipped ones if no folder is given.

        Raises:
            InputError: One of them is missing or unreadable; the message says which, and how to get it.
        """
        folder = ASSETS if folder is None else folder
        model, plan, plan_skips, test = (folder / name for name in ("model", "plan", "plan_skips", "test"))
        wanted = {
            model / "config.json": "the demo model; examples/demo_model/README.md says how to train it",
            plan / JSON_NAME: "the demo's learned exits; examples/demo_model/make_plans.py makes them",
            plan_skips / JSON_NAME: "the demo's exits with skips; examples/demo_model/make_plans.py makes them",
            test / "questions.json": "the demo's questions; examples/demo_model/build_assets.py makes them",
        }
        for file, what in wanted.items():
            if not file.is_file():
                raise InputError(f"{file}: missing. This is {what}. (Is the installation of vte-compile complete?)")
        return cls(model, plan, plan_skips, _read_questions(test / "questions.json"))

    def spread(self, count: int) -> list[Question]:
        """``count`` questions at equal distances, or all if there are fewer.

        Raises:
            InputError: ``count`` is below 1.
        """
        if count < 1:
            raise InputError(f"questions: expected 1 or more, got {count}.")
        total = len(self.questions)
        count = min(count, total)
        return [self.questions[i * total // count] for i in range(count)]

    def one_of_each_type(self) -> list[Question]:
        """The first question of each type, each about another picture."""
        chosen: dict[str, Question] = {}
        for question in self.questions:
            if question.type not in chosen and all(question.image != other.image for other in chosen.values()):
                chosen[question.type] = question
        return list(chosen.values())


def _read_questions(file: Path) -> list[Question]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return [Question(file.parent / e["image"], e["type"], e["question"], e["answer"]) for e in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not a list of image, type, question and answer ({error!r}).") from error
