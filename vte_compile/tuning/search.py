"""search_skips(): which attentions of a model may go."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from vte_compile.errors import InputError
from vte_compile.plan import Plan
from vte_compile.tuning.ranking import SkipRanking, rank_skips

if TYPE_CHECKING:
    from vte_compile.tuning.train_adapters import TrainingSettings

RANKING_NAME = "vte_ranking.json"
METHODS = ("ranking", "redundancy")


def search_skips(
    model: nn.Module,
    samples: object,
    *,
    skips: int,
    processor: Any | None = None,
    method: Literal["ranking", "redundancy"] = "ranking",
    training: TrainingSettings | None = None,
    work: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    progress: bool = True,
    report: Callable[[SkipRanking], object] | None = None,
) -> Plan:
    """Find the attentions of a model that its answers need least, and make a plan that skips them.

    Args:
        model: A causal language model or MLLM of transformers, in eval mode, as it was loaded.
        samples: A datasets.Dataset, a list of conversations, or batches of a processor's outputs with labels, see
            :func:`vte_compile.tuning.samples.read_samples`. To those without an answer the model gives its own.
        skips: How many attentions are to go.
        processor: The model's processor, for conversations.
        method: "ranking", without training: delete the attention whose deletion leaves the answers' loss lowest, then
            the next one (:func:`vte_compile.tuning.ranking.rank_skips`); the plan has no adapters. "redundancy": the
            search of EAS (arXiv 2403.15226), which trains adapters meanwhile and then those of the attentions it found
            (:func:`vte_compile.tuning.train_adapters.search_and_train`). To train adapters for what the ranking chose,
            pass its plan to :func:`vte_compile.tuning.train_adapters.train_adapters`.
        training: Settings of "redundancy".
        work: A folder for what was measured or trained, from which a later call goes on; of a ranking it also gets
            vte_ranking.json, the table of all effects.
        max_new_tokens: Length limit of the model's own answers.
        seed: Of "redundancy"; the ranking has nothing random.
        progress: Whether to show progress bars.
        report: Is called with the ranking, all effects that were measured.

    Returns:
        The plan, for :func:`vte_compile.optimize`.

    Raises:
        InputError: A sample or an argument cannot be used; the message says what was saved.
        UnsupportedModelError: An attention of the model cannot be skipped.
    """
    if method not in METHODS:
        raise InputError(f"method: expected one of {', '.join(METHODS)}, got {method!r}.")
    if method == "redundancy":
        if report is not None:
            raise InputError("report: is for a ranking, of which method='redundancy' has none.")
        from vte_compile.tuning.train_adapters import search_and_train

        return search_and_train(
            model,
            samples,
            skips=skips,
            settings=training,
            processor=processor,
            work=work,
            max_new_tokens=max_new_tokens,
            seed=seed,
            progress=progress,
        )
    if training is not None:
        raise InputError("training: is for method='redundancy'; a ranking trains nothing.")
    ranking = rank_skips(
        model,
        samples,
        skips=skips,
        processor=processor,
        work=work,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    if work is not None:
        ranking.save(Path(work) / RANKING_NAME)
    if report is not None:
        report(ranking)
    return ranking.plan
