"""Which token comes next: the likeliest, or one drawn from the distribution; with numpy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vte_compile.errors import InputError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature first, then ``top_k``, then ``top_p``, as transformers does it.

    Raises:
        InputError: A number that it cannot be.
    """

    temperature: float = 1.0
    """Above 0; logits are divided by it."""
    top_k: int | None = None
    """Draw from so many of the likeliest tokens."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens that have this probability together; above 0, at most 1."""
    seed: int | None = None
    """At least 0; the same seed gives the same tokens. None: other ones each time."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise InputError(
                f"temperature: expected a number above 0 (0 to take the likeliest), got {self.temperature!r}."
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k: expected a number of at least 1, got {self.top_k!r}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p: expected a number above 0 and at most 1, got {self.top_p!r}.")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed: expected a number of at least 0, got {self.seed!r}.")


class Sampler:
    """Draws the tokens of a batch. Rows have generators of their own: what one draws does not depend on the others.

    Args:
        sampling: None: always the likeliest.
        batch: Rows.
    """

    def __init__(self, sampling: Sampling | None, batch: int) -> None:
        self._sampling = sampling
        seed = None if sampling is None else sampling.seed
        self._generators = [np.random.Generator(np.random.PCG64(s)) for s in np.random.SeedSequence(seed).spawn(batch)]

    def pick(self, logits: Array) -> Array:
        """[B, vocabulary] -> [B] int64."""
        if self._sampling is None:
            return np.asarray(logits.argmax(-1))
        rows = zip(logits, self._generators, strict=True)
        return np.array([_draw(row, self._sampling, generator) for row, generator in rows], np.int64)


def probabilities(logits: Array, sampling: Sampling) -> tuple[Array, Array]:
    """What is drawn from, likeliest first: tokens [n] int64, and their probabilities [n] float64, which sum to 1."""
    logits = logits.astype(np.float64) / sampling.temperature
    tokens = np.argsort(-logits, kind="stable")
    if sampling.top_k is not None:
        tokens = tokens[: sampling.top_k]
    chances = np.exp(logits[tokens] - logits[tokens[0]])
    chances /= chances.sum()
    if sampling.top_p is not None:
        # The first that reaches it is still in.
        count = int(np.searchsorted(np.cumsum(chances), sampling.top_p)) + 1
        tokens, chances = tokens[:count], chances[:count] / chances[:count].sum()
    return tokens, chances


def _draw(logits: Array, sampling: Sampling, generator: np.random.Generator) -> int:
    tokens, chances = probabilities(logits, sampling)
    place = int(np.searchsorted(np.cumsum(chances), generator.random(), side="right"))
    return int(tokens[min(place, len(tokens) - 1)])  # sums may end a little below 1
