"""FLOPs of exits and of token reductions on a set of prompts, and which of them a budget allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from vte_compile.errors import InputError
from vte_compile.flops import decode_flops, kv_bytes, prefill_flops
from vte_compile.plan import Plan
from vte_compile.tuning.baselines import TokenReduction

SHARE_STEPS = 10_000
"""Shares are matched to multiples of one in so many."""


class Prompt(NamedTuple):
    """The sizes that FLOPs follow from: all tokens, how many of them are visual, and tokens of the answer."""

    tokens: int
    visual: int
    answer: int


class Removed(NamedTuple):
    """What became of a prompt's visual tokens: `tokens` of them left behind `layer`; -1: none left."""

    layer: int
    tokens: int


def removed(prompt: Prompt, reduction: TokenReduction) -> Removed:
    """What a reduction removes from a prompt with text behind its last visual token."""
    return Removed(reduction.layer, prompt.visual - reduction.kept(prompt.visual))


def flops(config: Any, prompt: Prompt, gone: Removed, plan: Plan | None = None) -> tuple[int, int]:
    """FLOPs of the prefill, and of prefill and decode of the answer together.

    To see fewer tokens costs the same whichever way they left; that attention scores are ranked is not counted. The
    first token of the answer comes out of prefill.

    Args:
        config: As :func:`vte_compile.flops.prefill_flops` takes it.
        prompt: Its sizes.
        gone: What left, and where.
        plan: For its skips, adapters and gates.
    """
    # To the FLOPs of a layer the visual tokens that stay are tokens like any others.
    sizes = (config, prompt.tokens, gone.tokens, gone.layer)
    prefill = prefill_flops(*sizes, plan=plan)
    return prefill, prefill + decode_flops(*sizes, tokens=prompt.answer - 1, plan=plan)


def cached_bytes(config: Any, prompt: Prompt, gone: Removed, dtype: Any, plan: Plan | None = None) -> int:
    """Bytes of the keys and values after prefill; arguments as in :func:`flops`."""
    return kv_bytes(config, prompt.tokens, gone.tokens, gone.layer, dtype, plan)


def mean_flops(config: Any, prompts: Iterable[Prompt], reduction: TokenReduction) -> float:
    """FLOPs of prefill and decode with a reduction, in the mean of the prompts.

    Raises:
        InputError: There are no prompts.
    """
    counts = Counter(prompts)
    if not counts:
        raise InputError("prompts: there are none.")
    each = {prompt: flops(config, prompt, removed(prompt, reduction))[1] for prompt in counts}
    return sum(each[prompt] * count for prompt, count in counts.items()) / counts.total()


def exit_within(config: Any, prompts: Iterable[Prompt], budget: float) -> int | None:
    """The last layer behind which all visual tokens may leave such that the mean FLOPs are within the budget.

    The one behind which there is nothing left to save does not count.

    Returns:
        None where not even leaving behind the first layer is within the budget.
    """
    prompts = list(prompts)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    within = (k for k in reversed(range(layers - 1)) if mean_flops(config, prompts, TokenReduction(k, 0.0)) <= budget)
    return next(within, None)


def share_within(config: Any, prompts: Iterable[Prompt], layer: int, budget: float) -> float | None:
    """The largest share of visual tokens that may stay behind a layer such that mean FLOPs are within the budget.

    Returns:
        A multiple of 1 / SHARE_STEPS; None where a share of 0 is not within the budget.
    """
    prompts = list(prompts)

    def fits(steps: int) -> bool:
        return mean_flops(config, prompts, TokenReduction(layer, steps / SHARE_STEPS)) <= budget

    if not fits(0):
        return None
    low, high = 0, SHARE_STEPS + 1  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low / SHARE_STEPS
