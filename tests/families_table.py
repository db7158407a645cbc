"""The tables of docs/models.md, from a run of the tests: what was run of which family, and why a cell is empty.

    python -m pytest -m shows --models-table=docs/models.md          (make models-table)

A test marked ``shows(column)`` fills that column for the family that its parameter ``name`` or ``family`` says, or for
the one that the mark names: ``shows(column, family)``. It may say with the fixture ``record_property("note", text)``
what its result holds for. Tests of refusals record ``("refused", [class, message])``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

COLUMNS = ("images", "videos", "exits", "skips", "generate", "second turn", 'backend="vte"', "ONNX Runtime")
FAMILIES = {
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "internvl": "InternVL",
    "internvl_chat": "InternVL, the authors' layout",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "vipllava": "VipLLaVA",
    "mistral3": "Mistral3",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "paligemma": "PaliGemma",
    "paligemma2": "PaliGemma 2",
    "gemma3": "Gemma3",
    "llava_mixtral": "LLaVA with Mixtral",
    "vila": "VILA, NVILA-Lite",
    "eagle2": "Eagle 2, 2.5",
    "lavin": "LaVIN, LaVIN-EAS",
    "meter": "METER, METER-EAS",
    "bridgetower": "BridgeTower",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "mixtral": "Mixtral, Qwen2-MoE",
}
"""In the order of the table; the names are those of parameters of tests."""
TEXT = ("llama", "mistral", "qwen2", "gemma", "gemma2", "mixtral")
CO_ATTENTION = ("meter", "bridgetower")
WITH_VIDEOS = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "vila", "eagle2")
_BEGIN, _END = "<!-- {}: written by tests/families_table.py -->", "<!-- {}: end -->"


def why_empty(family: str, column: str) -> str:
    """The reason of a cell that no test fills."""
    if family in TEXT and column in ("images", "videos"):
        return "a language model alone: pass `visual_mask`"
    if family in CO_ATTENTION and column != "ONNX Runtime":
        return "no decoder: no token leaves, nothing is generated"
    if column == "videos":
        return "frames are images to the model" if family == "smolvlm" else "the family has none"
    return "no test of its own"


class FamiliesTable:
    """A plugin of pytest: collects results, and writes the tables when all is run."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.outcomes: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.notes: dict[tuple[str, str], str] = {}
        self.refused: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome != "failed":
            return
        facts: dict[str, list[Any]] = defaultdict(list)
        for name, value in report.user_properties:
            facts[name].append(value)
        for column, family in facts["shows"]:
            self.outcomes[family, column].add(report.outcome)
            for text in facts["note"]:
                self.notes[family, column] = text
        self.refused |= dict(facts["refused"])

    def pytest_sessionfinish(self) -> None:
        text = self.file.read_text()
        for name, table in (("families", self.families()), ("refused", self.refusals())):
            begin, end = _BEGIN.format(name), _END.format(name)
            pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
            text, count = pattern.subn(lambda _, new=f"{begin}\n{table}\n{end}": new, text)
            assert count == 1, f"{self.file} has no place for the table of {name}"
        self.file.write_text(text)

    def families(self) -> str:
        """Rows are families; a number in a cell is that of a reason or note below."""
        numbers: dict[str, int] = {}

        def cell(family: str, column: str) -> str:
            outcomes = self.outcomes.get((family, column))
            text = self.notes.get((family, column)) if outcomes else why_empty(family, column)
            word = "—" if not outcomes else "yes" if outcomes == {"passed"} else " and ".join(sorted(outcomes))
            return word if text is None else f"{word} ({numbers.setdefault(text, len(numbers) + 1)})"

        lines = _table(
            ("family", *COLUMNS),
            ((title, *(cell(family, column) for column in COLUMNS)) for family, title in FAMILIES.items()),
        )
        return "\n".join([*lines, "", *(f"{number}. {text}" for text, number in numbers.items())])

    def refusals(self) -> str:
        return "\n".join(_table(("model", "what it says"), sorted(self.refused.items())))


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def mark_item(item: pytest.Item) -> None:
    """Note on a test what it shows, where reports carry it."""
    for mark in item.iter_markers("shows"):
        column, *family = mark.args
        params = getattr(item, "callspec", None)
        name = family[0] if family else params.params.get("name", params.params.get("family")) if params else None
        if column not in (*COLUMNS, "refused") or (column != "refused" and name not in FAMILIES):
            raise pytest.UsageError(f"{item.nodeid}: shows({column!r}) of {name!r}, which the table does not have.")
        if column != "refused":
            item.user_properties.append(("shows", [column, name]))
