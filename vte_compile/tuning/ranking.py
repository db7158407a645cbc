"""Which attentions to skip, without training: what deleting each does to the answers of the user's samples.

In the first round each attention is deleted alone. The one whose deletion leaves the answers' loss lowest goes; the
next round deletes each of the others besides, and so on (greedy forward selection). The effect of a set is not the sum
of the effects of its members, which is why later rounds measure again.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from vte_compile.atomic_file import write_atomically
from vte_compile.errors import InputError
from vte_compile.fingerprint import Fingerprint
from vte_compile.plan import Plan, SkippedAttention
from vte_compile.tuning.answered import embed_answered
from vte_compile.tuning.deletions import Deleter
from vte_compile.tuning.examine import own_answer
from vte_compile.tuning.ranking_work import Measured, RankingWork
from vte_compile.tuning.samples import Sample, read_samples


@dataclass(frozen=True)
class DeletionEffect:
    """What it does to the answers that the attention of `layer` goes, besides those of the rounds before.

    All is relative to the full model. `loss_increase`: of the mean over samples of the answer's mean cross entropy;
    infinite where a loss is not finite. `changed_positions`: mean share of answer positions with another argmax.
    `changed_answers`: share of samples with such a position; where the labels are the model's own greedy answers,
    these are just the samples with another greedy answer.
    """

    layer: int
    loss_increase: float
    changed_positions: float
    changed_answers: float


@dataclass(frozen=True)
class SkipRanking:
    """A ranking of attentions.

    `fingerprint`: of the model. `samples`: how many. `loss`: the full model's mean loss. `rounds`: by round, the effect
    of each layer that was still there, in the order of the layers; the first has each attention alone. `chosen`: what
    each round chose.
    """

    fingerprint: Fingerprint
    samples: int
    loss: float
    rounds: tuple[tuple[DeletionEffect, ...], ...]
    chosen: tuple[int, ...]

    @property
    def plan(self) -> Plan:
        """Skips the chosen attentions, without adapters."""
        return Plan(skips=[SkippedAttention(layer) for layer in self.chosen], fingerprint=self.fingerprint)

    def as_json(self) -> dict[str, Any]:
        """Of JSON's types; an infinite loss is None."""
        result = asdict(self)
        for effects in result["rounds"]:
            for effect in effects:
                if not math.isfinite(effect["loss_increase"]):
                    effect["loss_increase"] = None
        as_json: dict[str, Any] = json.loads(json.dumps(result, allow_nan=False))
        return as_json

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write it as JSON.

        Raises:
            InputError: It cannot be written.
        """
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(file), (json.dumps(self.as_json(), indent=1) + "\n").encode())
        except OSError as error:
            raise InputError(f"{file}: cannot be written: {error}") from error


def rank_skips(
    model: nn.Module,
    samples: object,
    *,
    skips: int,
    processor: Any | None = None,
    work: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 64,
    progress: bool = True,
) -> SkipRanking:
    """Rank the attentions of a model by what deleting them does to the answers of samples, and choose greedily.

    With L layers a round takes about L/2 forward passes per sample. Samples are kept in memory.

    Args:
        model: The model, in eval mode, as it was loaded.
        samples: See :func:`vte_compile.tuning.samples.read_samples`. To those without an answer the model gives its
            own greedy one; leave the answers out to rank by agreement with the model rather than with labels.
        skips: How many attentions are to go.
        processor: The model's processor, for conversations.
        work: A folder for what was measured: a later call with the same model goes on there, and measures only what it
            has not. None: nothing is kept.
        max_new_tokens: Length limit of the model's own answers.
        progress: Whether to show progress bars.

    Returns:
        The ranking, the same with interruptions as without.

    Raises:
        InputError: A sample cannot be used, `skips` is out of range, or the folder is of another model or cannot be
            written; the message says what was saved.
        UnsupportedModelError: An attention of the model cannot be skipped.
    """
    deleter = Deleter(model)
    check_skips(skips, deleter.layers)
    store = RankingWork(work, model)
    answered: list[Sample] = []
    rounds: list[tuple[DeletionEffect, ...]] = []
    chosen: list[int] = []
    try:
        found = read_samples(samples, processor)
        for sample in tqdm(
            found, "read samples", operator.length_hint(found) or None, unit="sample", disable=not progress
        ):
            answered.append(_with_answer(deleter, store, sample, max_new_tokens))
        for number in range(skips):
            candidates = [layer for layer in range(deleter.layers) if layer not in chosen]
            measured = [
                _measure(deleter, store, sample, chosen, candidates)
                for sample in tqdm(
                    answered, f"skip {number + 1} of {skips}", unit="sample", disable=not progress, dynamic_ncols=True
                )
            ]
            effects = _effects(candidates, measured)
            rounds.append(effects)
            chosen.append(min(effects, key=lambda effect: (effect.loss_increase, effect.layer)).layer)
            loss = _mean([full for _, _, full in measured])
        store.flush()
    except BaseException as error:  # an interruption loses nothing
        store.flush()
        if isinstance(error, InputError) and work is not None:
            raise InputError(f"{error} (What was measured is saved in {work}.)") from error
        raise
    return SkipRanking(Fingerprint.of(model), len(answered), loss, tuple(rounds), tuple(chosen))


def check_skips(skips: int, layers: int) -> None:
    """Make sure that so many attentions can go.

    Raises:
        InputError: They cannot.
    """
    if not 1 <= skips <= layers:
        raise InputError(f"skips: expected 1 to {layers}, the number of the model's layers, got {skips}.")


def _with_answer(deleter: Deleter, store: RankingWork, sample: Sample, max_new_tokens: int) -> Sample:
    if sample.answer is not None:
        return sample
    key = f"{sample.key}+{max_new_tokens}"
    known = store.answer(key)
    if known is not None:
        return Sample.of(sample.inputs, known, sample.name)
    answered = own_answer(deleter.examiner, sample, max_new_tokens)
    assert answered.answer is not None
    store.add_answer(key, answered.answer)
    return answered


def _measure(
    deleter: Deleter, store: RankingWork, sample: Sample, deleted: Sequence[int], candidates: Sequence[int]
) -> Measured:
    known = store.measured(deleted, sample.key)
    if known is not None:
        return known
    losses, changed, full = deleter.effects(
        embed_answered(deleter.examiner.model, deleter.examiner.spec, sample), deleted, candidates, name=sample.name
    )
    measured = losses.tolist(), changed.tolist(), full
    store.add(deleted, sample.key, measured)
    return measured


def _effects(candidates: Sequence[int], measured: Sequence[Measured]) -> tuple[DeletionEffect, ...]:
    full = _mean([full for _, _, full in measured])
    return tuple(
        DeletionEffect(
            layer,
            _mean([losses[index] for losses, _, _ in measured]) - full,
            _mean([changed[index] for _, changed, _ in measured]),
            _mean([float(changed[index] > 0) for _, changed, _ in measured]),
        )
        for index, layer in enumerate(candidates)
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
