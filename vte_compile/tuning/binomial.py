"""Exact binomial tests of a disagreement rate: p-values, confidence bounds, and how many samples they need.

Whether an answer differs is 0 or 1, so the number of answers that differ is binomial, and its tail is the p-value
itself: no inequality for bounded losses, such as Hoeffding-Bentkus (arXiv 2110.01052), can be tighter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from vte_compile.errors import InputError

_NEGLIGIBLE = 1e-17
"""Of a sum in float64."""


def tail(count: int, samples: int, rate: float) -> float:
    """P(X <= count) for X ~ Binomial(samples, rate).

    The p-value of the hypothesis that answers differ at `rate` or more often, when `count` of `samples` do.

    Raises:
        InputError: `count` is not in 0..samples, there are no samples, or `rate` is not between 0 and 1.
    """
    _check(count, samples)
    check_share("rate", rate)
    if count == samples:
        return 1.0
    if count > samples * rate:  # the other tail is the short one
        return 1.0 - tail(samples - count - 1, samples, 1.0 - rate)
    log_ways = math.lgamma(samples + 1) - math.lgamma(count + 1) - math.lgamma(samples - count + 1)
    term = math.exp(log_ways + count * math.log(rate) + (samples - count) * math.log1p(-rate))
    total = 0.0
    for k in range(count, -1, -1):  # below the mean the terms only fall
        total += term
        if term <= total * _NEGLIGIBLE:
            break
        term *= k * (1.0 - rate) / ((samples - k + 1) * rate)
    return min(total, 1.0)


def upper_bound(count: int, samples: int, delta: float) -> float:
    """The rate that the true one is below with confidence 1 - delta: Clopper and Pearson (Biometrika 26, 1934).

    It is the least rate that :func:`tail` rejects at level delta, so that ``tail(count, samples, alpha) <= delta``
    just where ``upper_bound(count, samples, delta) <= alpha``.

    Raises:
        InputError: As in :func:`tail`.
    """
    _check(count, samples)
    check_share("delta", delta)
    if count == samples:
        return 1.0
    low, high = count / samples, 1.0
    while low < (middle := (low + high) / 2) < high:  # until they are neighbours
        if tail(count, samples, middle) <= delta:
            high = middle
        else:
            low = middle
    return high


def samples_needed(max_disagreement: float, delta: float, rate: float = 0.0) -> int | None:
    """How many samples show a disagreement of at most `max_disagreement`, if they disagree at `rate`.

    With none that differs that is the least n with (1 - max_disagreement)^n <= delta. At a rate above 0 it is what is
    enough if the sample has the expected share, so with an even chance: an estimate.

    Returns:
        The number; None where the rate is not below `max_disagreement`, since then no number is enough.

    Raises:
        InputError: `max_disagreement` or `delta` is not between 0 and 1.
    """
    check_share("max_disagreement", max_disagreement)
    check_share("delta", delta)
    if rate >= max_disagreement:
        return None

    def enough(count: int, samples: int) -> bool:
        return count < samples and tail(count, samples, max_disagreement) <= delta

    # The fewest disagreements that may be observed among so many that they are no less than expected.
    count = 0 if rate <= 0 else _least(lambda count: enough(count, int(count / rate)))
    return _least(lambda samples: enough(count, samples))


def _least(holds: Callable[[int], bool]) -> int:
    """The least positive integer that has a property which all larger ones have."""
    high = 1
    while not holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def check_share(name: str, value: float) -> None:
    """Make sure that `value` lies between 0 and 1, both excluded."""
    if not 0.0 < value < 1.0:
        raise InputError(f"{name}={value}: expected a number between 0 and 1, both excluded.")


def _check(count: int, samples: int) -> None:
    if samples < 1 or not 0 <= count <= samples:
        raise InputError(f"count={count}, samples={samples}: expected 0 <= count <= samples, and samples >= 1.")
