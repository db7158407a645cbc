"""What configurations of a model cost, and how often their answers are the full model's: by sample, and in the mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vte_compile.plan import Plan
from vte_compile.tuning.answers import Answer
from vte_compile.tuning.bootstrap import bootstrap
from vte_compile.tuning.evaluation import Configuration, Kind, Measure
from vte_compile.tuning.matching import Prompt, Removed, cached_bytes, flops

RESAMPLES, CONFIDENCE = 10_000, 0.95


@dataclass(frozen=True)
class Asked:
    """What is to be known of a sample: its sizes, with the full model's answer, and the right answer if it has one."""

    key: str
    prompt: Prompt
    answer: tuple[int, ...] | None


@dataclass(frozen=True)
class Case:
    """One configuration: what each sample got, by key, and what left its layers; the rest as in `Configuration`."""

    name: str
    kind: Kind
    answers: Mapping[str, Answer]
    removed: Callable[[Prompt, Answer], Removed]
    plan: Plan | None = None
    layer: int | None = None
    share: float | None = None


def exited(prompt: Prompt, answer: Answer) -> Removed:
    """What left through an exit."""
    # If nothing left, all visual tokens are named nevertheless: gates were asked.
    return Removed(answer.exit_layer, prompt.visual)


def all_stay(prompt: Prompt, answer: Answer) -> Removed:
    """Of the full model."""
    return Removed(-1, prompt.visual)


def earliest_exit(changing: Collection[int], layers: int) -> int:
    """The oracle exit: the earliest layer from which on no exit changes the answer; -1: none but the last.

    Args:
        changing: The layers behind which an exit changes it.
        layers: How many there are. Behind the last there is nothing to save.
    """
    layer = max(changing, default=-1) + 1
    return layer if layer < layers - 1 else -1


class Measurer:
    """Measures configurations on some samples.

    `config`, `dtype`: of the model. `asked`: the samples. `full`: the full model's answers, by key. `said`: what of an
    answer's tokens is compared with the right answer's.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        asked: Sequence[Asked],
        full: Mapping[str, Answer],
        said: Callable[[Sequence[int]], object],
    ) -> None:
        self._config, self._dtype, self._asked, self._full, self._said = config, dtype, asked, full, said
        self._layers: int = config.get_text_config(decoder=True).num_hidden_layers
        self._answered = torch.tensor([each.answer is not None for each in asked])

    def flops(self, case: Case) -> Tensor:
        """FLOPs of the prefill, and of prefill and decode of the full model's answer together: [n, 2]."""
        found = [flops(self._config, each.prompt, gone, case.plan) for each, _, gone in self._rows(case)]
        return torch.tensor(found, dtype=torch.float64)

    def configurations(self, cases: Sequence[Case], matched: str, seed: int) -> tuple[Configuration, ...]:
        """All measures of the cases, and their differences to the one that is called `matched`."""
        values = [self._measures(case) for case in cases]
        reference = values[[case.name for case in cases].index(matched)]
        found: list[tuple[dict[Measure, Any], dict[Measure, Any]]] = [({}, {}) for _ in cases]
        for name in reference:
            rows = self._answered if name == "accuracy" else torch.ones_like(self._answered)
            if not bool(rows.any()):
                continue
            columns = torch.stack([value[name] for value in values], 1)[rows]
            both = torch.cat([columns, columns - reference[name][rows, None]], 1)
            intervals = bootstrap(both, seed, RESAMPLES, CONFIDENCE)
            for index, (measures, differences) in enumerate(found):
                measures[name], differences[name] = intervals[index], intervals[len(cases) + index]
        return tuple(
            Configuration(case.name, case.kind, case.layer, case.share, *both, self._exit_layers(case))
            for case, both in zip(cases, found, strict=True)
        )

    def _rows(self, case: Case) -> list[tuple[Asked, Answer, Removed]]:
        given = [(each, case.answers[each.key]) for each in self._asked]
        return [(each, answer, case.removed(each.prompt, answer)) for each, answer in given]

    def _measures(self, case: Case) -> dict[Measure, Tensor]:
        """Each measure [n] of one configuration; the accuracy is 0 where there is nothing to compare with."""
        rows, work = self._rows(case), self.flops(case)
        columns: dict[Measure, Any] = {
            "agreement": [answer.tokens == self._full[each.key].tokens for each, answer, _ in rows],
            "accuracy": [
                each.answer is not None and self._said(answer.tokens) == self._said(each.answer)
                for each, answer, _ in rows
            ],
            "cost": [self._cost(each.prompt, gone) for each, _, gone in rows],
            "prefill_flops": work[:, 0],
            "total_flops": work[:, 1],
            "kv_bytes": [
                cached_bytes(self._config, each.prompt, gone, self._dtype, case.plan) for each, _, gone in rows
            ],
        }
        return {name: torch.as_tensor(column, dtype=torch.float64) for name, column in columns.items()}

    def _cost(self, prompt: Prompt, gone: Removed) -> float:
        """Layers that see the visual tokens, those that see a share of them by that share."""
        before = self._layers if gone.layer < 0 else gone.layer + 1
        return before + (self._layers - before) * (1 - gone.tokens / prompt.visual)

    def _exit_layers(self, case: Case) -> dict[int, int]:
        counts = Counter(case.answers[each.key].exit_layer for each in self._asked)
        return {layer: counts[layer] for layer in (*range(self._layers), -1)}
