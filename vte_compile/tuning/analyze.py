"""analyze(): DyVTE's empirical study (arXiv 2411.19628) for the user's own model and data.

By layer: how attention is shared between modalities, what an exit of all visual tokens does to the answers, from where
on none changes them (the oracle exit of each sample), and what deleting the layer's attention does (the redundancy
that EAS, arXiv 2403.15226, is about). Everything is about the full model's own greedy answers, but for the accuracy.
"""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vte_compile.environment import environment
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.tuning.analysis import Analysis, LayerAnalysis, SampleAnalysis, Share
from vte_compile.tuning.analysis_work import AnalysisWork, Measured
from vte_compile.tuning.answered import embed_answered
from vte_compile.tuning.bootstrap import Interval, bootstrap
from vte_compile.tuning.deletions import Deleter
from vte_compile.tuning.examine import Examiner, own_answer
from vte_compile.tuning.measures import CONFIDENCE, RESAMPLES, earliest_exit
from vte_compile.tuning.modality_attention import (
    KEYS,
    QUERIES,
    key_groups,
    measure_attention,
    query_groups,
    uniform_shares,
)
from vte_compile.tuning.samples import Sample, read_samples

_logger = logging.getLogger(__name__)

# One has no spread; with fewer than the second number, bootstrap intervals are too narrow.
_LEAST, _FEW = 2, 30
_SPREAD = (0.1, 0.9)


def analyze(
    model: nn.Module,
    samples: object,
    *,
    processor: Any = None,
    max_new_tokens: int = 64,
    work: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Analysis:
    """Study where a model attends to its images, and how much of that its answers need.

    A sample takes its answer, three forward passes, and with L layers about L/2 more for the deleted attentions.

    Args:
        model: An MLLM of transformers in eval mode, not optimized, with "sdpa" or "eager" attention. With "eager" the
            layers themselves hold all scores [heads, S, S]; nothing here does.
        samples: As :func:`vte_compile.tuning.samples.read_samples` takes them; those without image are left out.
        processor: The model's, for conversations.
        max_new_tokens: Length limit of the model's own answers.
        work: A folder for what was measured of each sample, so that an interrupted call goes on; None: nothing is kept.
        seed: Of the bootstrap.
        progress: Whether to show a progress bar.

    Returns:
        The analysis, the same with interruptions as without.

    Raises:
        InputError: Arguments out of range, fewer than two samples with images, one that cannot be used, or a folder of
            another model or that cannot be written; the message says what was saved.
        UnsupportedModelError: The model's layers cannot be run one by one, or their attention cannot be seen.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: expected 1 or more, got {max_new_tokens}.")
    meter = _Meter(model, max_new_tokens)
    layers = meter.examiner.spec.num_layers
    store = AnalysisWork(work, model, layers, max_new_tokens)
    found: list[tuple[Sample, Measured]] = []
    try:
        read = read_samples(samples, processor)
        total = operator.length_hint(read) or None
        for sample in tqdm(read, "analyze", total, unit="sample", disable=not progress, dynamic_ncols=True):
            measured = store.get(sample.key)
            if measured is None:
                measured = meter.measure(sample)
                store.add(sample.key, measured)
            found.append((Sample({}, sample.answer, sample.key, sample.name), measured))  # without its pictures
    except InputError as error:
        if work is None:
            raise
        raise InputError(f"{error} (What was measured is saved in {work}.)") from error
    if len(found) < _LEAST:
        raise InputError(f"samples: {len(found)} with images is too few, {_LEAST} are the least.")
    if len(found) < _FEW:
        _logger.warning("%d samples are few: the bootstrap's intervals are too narrow", len(found))
    config = meter.examiner.decoder.config
    return Analysis(
        model={
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "layers": layers,
            "heads": config.num_attention_heads,
            "kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            "hidden_size": config.hidden_size,
            "dtype": str(meter.examiner.spec.dtype).removeprefix("torch."),
        },
        settings={
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "resamples": RESAMPLES,
            "confidence": CONFIDENCE,
            "spread": _SPREAD,
        },
        environment=environment(),
        deletions_refused=meter.deletions_refused,
        **_summary(found, layers, seed),
    )


class _Meter:
    """Measures samples of one model."""

    def __init__(self, model: nn.Module, max_new_tokens: int) -> None:
        self.examiner = Examiner(model)
        self._max_new_tokens = max_new_tokens
        self._deleter: Deleter | None = None
        self.deletions_refused: str | None = None
        try:
            self._deleter = Deleter(model)
        except UnsupportedModelError as error:  # all else can be measured
            self.deletions_refused = str(error)
            _logger.warning("no attention is deleted: %s", error)

    def measure(self, sample: Sample) -> Measured:
        """All that is measured of one sample.

        Raises:
            InputError: It cannot be used; the message names it.
        """
        answered = own_answer(self.examiner, sample, self._max_new_tokens)
        assert answered.answer is not None
        examined = self.examiner.examine(answered)
        embedded = embed_answered(self.examiner.model, self.examiner.spec, answered)
        queries, keys = (of(embedded.visual, embedded.prompt) for of in (query_groups, key_groups))
        windowed = self.examiner.spec.windowed
        seen = self.examiner.run(embedded).seen(windowed.index(False) if False in windowed else 0)
        unchanged = examined.unchanged[0]
        if sample.answer == answered.answer:
            right: list[bool] | None = unchanged.tolist()
        else:
            right = None if sample.answer is None else self.examiner.right(sample).tolist()
        losses, stays = None, None
        if self._deleter is not None:
            loss, changed, _ = self._deleter.effects(embedded, (), range(self._deleter.layers), sample.name)
            losses = [value if finite else None for value, finite in zip(loss.tolist(), loss.isfinite(), strict=True)]
            stays = (changed == 0).tolist()
        return Measured(
            answer=list(answered.answer),
            visual=int(examined.visual),
            tokens=int(examined.tokens),
            attention=measure_attention(self.examiner, embedded).tolist(),
            uniform=uniform_shares(queries, keys, seen).tolist(),
            loss=examined.loss[0].tolist(),
            unchanged=unchanged.tolist(),
            right=right,
            deletion_loss=losses,
            deletion_unchanged=stays,
        )


def _summary(found: Sequence[tuple[Sample, Measured]], layers: int, seed: int) -> dict[str, Any]:
    """The fields of `Analysis` that are about samples. Columns of one kind are resampled together."""

    def over_samples(values: Any) -> list[Interval]:
        return bootstrap(torch.as_tensor(values, dtype=torch.float64), seed, RESAMPLES, CONFIDENCE)

    measured = [each for _, each in found]
    attention = torch.tensor([each.attention for each in measured], dtype=torch.float64)  # [n, L, Q, K]
    shares = over_samples(attention.flatten(1))
    low, high = torch.quantile(attention, torch.tensor(_SPREAD, dtype=torch.float64), dim=0).tolist()
    uniform = torch.tensor([each.uniform for each in measured], dtype=torch.float64).mean(0).tolist()
    exits = [
        earliest_exit([k for k, same in enumerate(each.unchanged) if not same], layers) for each in measured
    ]  # -1: never
    seen = torch.tensor([layer + 1 if layer >= 0 else layers for layer in exits])
    by_layer = torch.arange(layers) >= seen[:, None] - 1
    loss = torch.tensor([each.loss for each in measured], dtype=torch.float64)
    agreement = over_samples([each.unchanged for each in measured])
    increase = over_samples(loss[:, :-1] - loss[:, -1:])
    may_exit, cost = over_samples(by_layer), over_samples(seen[:, None])[0]
    right = [each.right for each in measured if each.right is not None]
    accuracy = over_samples(right) if right else [None] * layers
    deleted_agreement, deleted_increase = _deletions(measured, loss[:, -1], layers, over_samples)

    def of(layer: int, q: int, k: int) -> Share:
        index = (layer * len(QUERIES) + q) * len(KEYS) + k
        return Share(shares[index], low[layer][q][k], high[layer][q][k])

    return {
        "answered": len(right),
        "uniform": {name: dict(zip(KEYS, row, strict=True)) for name, row in zip(QUERIES, uniform, strict=True)},
        "oracle_cost": cost,
        "samples": tuple(
            SampleAnalysis(sample.name, sample.key, each.visual, each.tokens, layer)
            for (sample, each), layer in zip(found, exits, strict=True)
        ),
        "layers": tuple(
            LayerAnalysis(
                layer=layer,
                attention={
                    queries: {keys: of(layer, q, k) for k, keys in enumerate(KEYS)} for q, queries in enumerate(QUERIES)
                },
                exit_agreement=agreement[layer],
                exit_loss_increase=increase[layer],
                exit_accuracy=accuracy[layer],
                oracle_exits=exits.count(layer),
                may_exit=may_exit[layer],
                deletion_agreement=deleted_agreement[layer],
                deletion_loss_increase=deleted_increase[layer],
            )
            for layer in range(layers)
        ),
    }


def _deletions(
    measured: Sequence[Measured], full: Tensor, layers: int, over_samples: Any
) -> tuple[list[Interval | None], list[Interval | None]]:
    """Agreement and increase of the loss for each deleted attention; `full` [n]: the full model's loss."""
    if any(each.deletion_loss is None for each in measured):  # then all are: it is for the model's sake
        return [None] * layers, [None] * layers
    agreement = over_samples([each.deletion_unchanged for each in measured])
    losses = [[torch.nan if loss is None else loss for loss in each.deletion_loss or []] for each in measured]
    increase = torch.tensor(losses, dtype=torch.float64) - full[:, None]
    finite = increase.isfinite().all(0)
    intervals = over_samples(increase.masked_fill(~finite, 0.0))
    return agreement, [each if ok else None for each, ok in zip(intervals, finite.tolist(), strict=True)]
