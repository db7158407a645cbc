"""Percentile bootstrap: intervals of means over samples, and of their paired differences, from the same resamples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vte_compile.errors import InputError

# Counts of one chunk of resamples, at most: 32 MiB.
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate, and the interval around it."""

    value: float
    low: float
    high: float


def bootstrap(values: Tensor, seed: int, resamples: int = 10_000, confidence: float = 0.95) -> list[Interval]:
    """The mean of each column, with its percentile interval (Efron, 1979).

    Columns are resampled together, row by row: the difference of two columns, as a column, has a paired interval. It
    knows no values but those that are there: a column in which all are equal has an interval of no width.

    Args:
        values: [n, m], one row per sample.
        seed: Of the resamples.
        resamples: How many.
        confidence: Of each interval by itself.

    Raises:
        InputError: No samples, or arguments out of range.
    """
    if values.ndim != 2 or not len(values):
        raise InputError(f"values: expected [samples, columns] with at least one sample, got {list(values.shape)}.")
    if resamples < 1 or not 0.0 < confidence < 1.0:
        raise InputError(f"resamples={resamples}, confidence={confidence}: expected 1 or more, and between 0 and 1.")
    values = values.detach().double().cpu()
    samples = len(values)
    generator = torch.Generator().manual_seed(seed)
    means = []
    for start in range(0, resamples, rows := max(1, _CHUNK // samples)):
        drawn = torch.randint(samples, (min(rows, resamples - start), samples), generator=generator)
        times = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(()).double().expand_as(drawn)
        )
        means.append(times @ values / samples)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(torch.cat(means), torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    found = zip(values.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)
    return [Interval(*parts) for parts in found]
