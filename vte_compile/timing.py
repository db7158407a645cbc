"""Timing for benchmarks and the demo: several ways of doing the same, run in turns, and what their times say."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vte_compile.families.cache_name import CACHE, cache_of


@dataclass(frozen=True)
class Summary:
    """Times of one case, in seconds."""

    median_s: float
    min_s: float
    max_s: float
    runs_s: tuple[float, ...]
    """Of each round, in order."""

    @classmethod
    def of(cls, times: Sequence[float]) -> Summary:
        return cls(statistics.median(times), min(times), max(times), tuple(times))

    def scaled(self, factor: float) -> Summary:
        """All of it times a factor, such as 1 / tokens."""
        return Summary.of([time * factor for time in self.runs_s])

    def ratio_to(self, other: Summary) -> float:
        """The median over rounds of this case's time by the other's, so that a machine that drifts hits both alike."""
        return statistics.median(a / b for a, b in zip(self.runs_s, other.runs_s, strict=True))


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    runs: int,
    *,
    warmup: int = 1,
    device: torch.device | None = None,
    after_each: Callable[[], object] = lambda: None,
    resets: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Summary]:
    """Time some functions in turns, so that a slow moment of the machine hits all of them alike.

    Args:
        cases: What to time, by name.
        runs: Rounds in which each case runs once; each round starts with another case.
        warmup: Untimed rounds before.
        device: Where the work happens, if that is not the CPU: waits for it.
        after_each: Called after each timed or untimed call, to show progress.
        resets: By name, what undoes a call; called after it, and not timed.
    """
    names = list(cases)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, runs):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            _synchronize(device)
            start = time.perf_counter()
            cases[name]()
            _synchronize(device)
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
            if resets is not None:
                resets[name]()
            after_each()
    return {name: Summary.of(values) for name, values in times.items()}


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Phases:
    """The two phases of one model on one embedded prompt, as functions to time."""

    prefill: Callable[[], object]
    """The decoder on the whole prompt, logits of the last token."""
    decode: Callable[[], object]
    """Some decode steps behind the prompt, or behind what was decoded already."""
    rewind: Callable[[], object]
    """Removes the tokens of one ``decode`` from the cache; untimed, since some caches copy what is left for it."""
    exit_layer: int
    """Where the visual tokens left; -1 = never."""


def phases(model: Any, embeds: Tensor, visual_mask: Tensor, decode_tokens: int) -> Phases:
    """Prefill and decode of one model, optimized or not.

    Args:
        model: A transformers model, or what optimize() made of it.
        embeds: [1, S, C], visual features in place, so that the vision tower is not timed.
        visual_mask: [1, S] bool.
        decode_tokens: Steps in one call of ``decode``.
    """
    inputs: dict[str, Any] = {"inputs_embeds": embeds, "logits_to_keep": 1, "use_cache": True}
    if hasattr(model, "plan"):
        inputs["visual_mask"] = visual_mask

    @torch.no_grad()
    def prefill() -> Any:
        return model(**inputs)

    first = prefill()
    cache = cache_of(first)
    token = first.logits[:, -1].argmax(-1, keepdim=True)

    @torch.no_grad()
    def decode() -> None:
        for _ in range(decode_tokens):
            model(input_ids=token, use_cache=True, **{CACHE: cache})

    def rewind() -> None:
        cache.crop(-decode_tokens)

    exit_layer = getattr(first, "exit_layer", None)
    return Phases(prefill, decode, rewind, -1 if exit_layer is None else int(exit_layer[0]))


def time_phases(
    cases: Mapping[str, Phases],
    runs: int,
    decode_runs: int,
    *,
    device: torch.device | None,
    after_each: Callable[[], object],
) -> tuple[dict[str, Summary], dict[str, Summary]]:
    """Times of prefill, and of ``decode`` as a whole, by case.

    ``after_each`` is called runs + decode_runs + 2 times per case: each phase is run once untimed.
    """
    prefill = interleaved(
        {name: case.prefill for name, case in cases.items()}, runs, device=device, after_each=after_each
    )
    decode = interleaved(
        {name: case.decode for name, case in cases.items()},
        decode_runs,
        device=device,
        after_each=after_each,
        resets={name: case.rewind for name, case in cases.items()},
    )
    return prefill, decode
