"""Redundancy scores: which attentions may go, learned from the losses of random sets (EAS, arXiv 2403.15226).

Every attention i has a preference r_i, 0 at first; higher is more redundant. In each training step a random set of k
attentions is skipped, drawn without replacement with probability p. Every T steps N distinct sets are evaluated, each
gets the reward R_j = exp(-loss_j), and for every i in set j::

    r_i += lr * (R_j - mean R) * p_i * (1 - p_i)        p = sigmoid(r), or softmax(10 r) (LaVIN); of before the update

The k attentions with the highest preference are what the search finds. No model here: numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from vte_compile.errors import InputError

# Of the softmax, in LaVIN's code.
_SHARPNESS = 10.0
# Draws that may repeat an earlier set before sets are drawn uniformly: where preferences are far apart, one set is
# nearly certain, and waiting for another would take for ever.
_TRIES = 100


@dataclass(frozen=True)
class SearchSettings:
    """How preferences are learned; the class methods are the published settings.

    `skips`: k, how many attentions are to go. `warmup`: steps before the first update. `period`: T, steps between
    updates. `sets`: N, how many are evaluated for one (fewer where there are not so many). `lr`: of the update.
    `probability`: of drawing an attention, from its preference. `ramp`: whether the number of attentions that a
    training step skips grows from 1 to k in the first half of the warm-up; else it is k from the start.

    Raises InputError if a number is out of range.
    """

    skips: int
    warmup: int
    period: int
    sets: int
    lr: float
    probability: Literal["sigmoid", "softmax"]
    ramp: bool

    def __post_init__(self) -> None:
        for name, least in (("skips", 1), ("warmup", 0), ("period", 1), ("sets", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected {least} or more, got {getattr(self, name)}.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr: expected a positive number, got {self.lr}.")

    @classmethod
    def llava(cls, skips: int, warmup: int) -> SearchSettings:
        """Of LLaVA-EAS."""
        return cls(skips, warmup, period=3, sets=5, lr=1.0, probability="sigmoid", ramp=True)

    @classmethod
    def lavin(cls, skips: int, warmup: int) -> SearchSettings:
        """Of LaVIN-EAS; there, the warm-up is half of the search."""
        return cls(skips, warmup, period=10, sets=3, lr=2.0, probability="softmax", ramp=False)

    @classmethod
    def meter(cls, skips: int, warmup: int) -> SearchSettings:
        """Of METER-EAS."""
        return cls(skips, warmup, period=10, sets=3, lr=1.0, probability="sigmoid", ramp=False)


class Redundancy:
    """The preferences of `attentions` attentions, and the random sets that they are learned from.

    Draws depend on `seed` and on the calls made so far, nothing else; :meth:`state` and :meth:`from_state` carry both.

    Raises InputError if there are fewer attentions than are to go.
    """

    def __init__(self, attentions: int, settings: SearchSettings, seed: int = 0) -> None:
        if settings.skips > attentions:
            raise InputError(f"skips: {settings.skips} attentions cannot go, there are {attentions}.")
        self.settings = settings
        self.scores = np.zeros(attentions)
        """[attentions] float64."""
        self.steps = 0
        """Training steps so far."""
        self._since_update = 0
        self._random = np.random.default_rng(seed)

    @property
    def probabilities(self) -> np.ndarray:
        """p [attentions]."""
        return np.exp(self._log_probabilities())

    @property
    def chosen(self) -> tuple[int, ...]:
        """The attentions with the highest preferences, ascending; of equal ones the higher, as a rule less needed."""
        order = sorted(range(len(self.scores)), key=lambda i: (self.scores[i], i), reverse=True)
        return tuple(sorted(order[: self.settings.skips]))

    def next_set(self) -> tuple[int, ...]:
        """What the next training step skips, ascending."""
        self.steps += 1
        self._since_update += 1
        return self._draw(self.skipped_now)

    @property
    def skipped_now(self) -> int:
        """How many attentions the current training step skips."""
        skips, warmup = self.settings.skips, self.settings.warmup
        if not self.settings.ramp or warmup == 0:
            return skips
        return min(skips, 2 * skips * self.steps // warmup + 1)

    @property
    def is_due(self) -> bool:
        """Whether the current training step ends with an update."""
        return self._since_update >= self.settings.period and self.steps >= self.settings.warmup

    def sets_to_evaluate(self) -> list[tuple[int, ...]]:
        """Distinct sets for :meth:`update`."""
        size = self.skipped_now
        count = min(self.settings.sets, math.comb(len(self.scores), size))
        found: list[tuple[int, ...]] = []
        tries = 0
        while len(found) < count:
            drawn = self._draw(size, uniformly=tries >= _TRIES)
            tries += 1
            if drawn not in found:
                found.append(drawn)
        return found

    def update(self, sets: Sequence[Sequence[int]], losses: Sequence[float]) -> None:
        """Learn from the loss of each set.

        Raises:
            InputError: Not one loss per set, or one is NaN (an infinite one is a reward of 0).
        """
        if len(sets) != len(losses):
            raise InputError(f"losses: expected {len(sets)}, one per set, got {len(losses)}.")
        for drawn, loss in zip(sets, losses, strict=True):
            if math.isnan(loss):
                raise InputError(f"losses: the loss with attentions {list(drawn)} skipped is NaN.")
        rewards = np.exp(-np.asarray(losses, float))
        p = self.probabilities
        change = np.zeros_like(self.scores)
        for drawn, advantage in zip(sets, rewards - rewards.mean(), strict=True):
            change[list(drawn)] += advantage
        self.scores = self.scores + self.settings.lr * change * p * (1 - p)
        self._since_update = 0

    def state(self) -> dict[str, Any]:
        """All there is, for JSON."""
        return {
            "settings": asdict(self.settings),
            "scores": self.scores.tolist(),
            "steps": self.steps,
            "since_update": self._since_update,
            "random": self._random.bit_generator.state,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Redundancy:
        """What :meth:`state` gave, to go on as if nothing had happened.

        Raises:
            InputError: It is something else.
        """
        try:
            restored = cls(len(state["scores"]), SearchSettings(**state["settings"]))
            restored.scores = np.array(state["scores"], float)
            restored.steps, restored._since_update = int(state["steps"]), int(state["since_update"])
            restored._random.bit_generator.state = state["random"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"state: is not that of a search: {type(error).__name__}: {error}") from error
        return restored

    def _log_probabilities(self) -> np.ndarray:
        if self.settings.probability == "sigmoid":
            return -np.logaddexp(0, -self.scores)
        sharp = _SHARPNESS * self.scores
        return sharp - np.logaddexp.reduce(sharp)

    def _draw(self, size: int, uniformly: bool = False) -> tuple[int, ...]:
        """A set, drawn one by one without replacement: the largest of log p with Gumbel noise have just that law."""
        noise = self._random.gumbel(size=len(self.scores))
        keys = noise if uniformly else noise + self._log_probabilities()
        return tuple(sorted(int(i) for i in np.argsort(keys)[-size:]))
