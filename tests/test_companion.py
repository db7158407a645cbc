"""A companion token beside each prompt (LaVIN-EAS's modality token): optimize() and generate() against the oracle.

Engines: test_companion_engines.py; tuning: test_tuning_examine.py, test_train_adapters.py.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import ALWAYS, C, gate, shared
from test_adapters_optimized import GREEDY, STATIC, assert_same, equal_rows, inputs_of, kept, lossless, skip, unfreed
from tiny_models import assert_relative, one_thread  # noqa: F401

from vte_compile import Oracle, Plan, SkippedAttention, StaticExit, optimize
from vte_compile.errors import PlanError, PlanMismatchError

SEEN = torch.linspace(-2, 2, C)
UNSEEN = torch.linspace(2, -3, C)


def planned(*parts: Any, exits: Any = (), companion: torch.Tensor | None = SEEN) -> Plan:
    skips = [part for part in parts if isinstance(part, SkippedAttention)]
    return Plan(exits, skips=skips, adapters=[part for part in parts if part not in skips], companion=companion)


PARTS = (skip(0), kept(1))
CASES = {
    "first": (PARTS, (), True),
    "first, exit 0": (PARTS, (gate(0, ALWAYS),), True),
    "first, gate": (PARTS, (gate(1),), True),
    "last": ((kept(1), skip(2)), (), True),
    "last, exit 1": ((kept(0), skip(2)), (StaticExit(1),), True),
    "unfolded": ((kept(0), skip(1), SkippedAttention(2)), (gate(2, ALWAYS),), False),
    "static": ((skip(0, **STATIC), skip(1), skip(2)), (), True),
}


@functools.cache
def main() -> Any:
    return optimize(lossless(), planned(*PARTS))


@pytest.mark.parametrize(("parts", "exits", "fold"), CASES.values(), ids=list(CASES))
def test_equals_the_oracle(parts: Any, exits: Any, fold: bool) -> None:
    """Prefill of rows of unequal lengths, a second turn, a decode step; and generate()."""
    plan = planned(*parts, exits=exits)
    fast, oracle = unfreed(lossless(), plan, fold), Oracle(shared(), plan)
    first = inputs_of("..tvvtt", "vvttttt", "..tttt.", "......t")
    caches = assert_same(fast, oracle, first)
    caches = assert_same(fast, oracle, inputs_of(*["tvt"] * 4, seed=1), *caches)
    assert_same(fast, oracle, inputs_of(*["t"] * 4, seed=2), *caches)
    assert fast.generate(**first, **GREEDY).tolist() == oracle.generate(*first.values(), max_new_tokens=4).tokens
    last = fast(**first, logits_to_keep=1).logits[:, 0]
    ends = [6, 6, 5, 6]
    assert_relative(last, oracle.forward(*first.values()).logits[range(4), ends])


def test_it_matters_and_rows_are_what_they_are_alone() -> None:
    fast, first = main(), inputs_of("..tvvtt", "vvttttt")
    together = fast(**first).logits
    alone = {name: value[:1, 2:] for name, value in first.items()}
    assert_relative(together[0, 2:], fast(**alone).logits[0])
    copies = fast(**equal_rows(alone, 2))
    assert copies.past_key_values.prompt_state.one_prompt
    assert_relative(copies.logits[1], together[0, 2:])
    for other in (None, UNSEEN):
        changed = unfreed(lossless(), planned(*PARTS, companion=other))(**first).logits
        assert float((changed - together).abs().max()) > 1e-2 * float(together.abs().max())


def test_another_companion_shares_all_weights() -> None:
    """The plan for prompts without an image, of a model whose weights were freed."""
    plan = replace(main().plan, companion=UNSEEN)
    fast = optimize(main(), plan)
    assert_same(fast, Oracle(shared(), plan), inputs_of(".tvvtt", "tttttt"))
    assert_same(main(), Oracle(shared(), main().plan), inputs_of(".tvvtt", "tttttt"))
    again = copy.deepcopy(fast)
    assert_same(again, Oracle(shared(), plan), inputs_of("tvvtt"))


def test_bad_companions_are_refused() -> None:
    for companion, message in (
        (3, "companion: expected a torch.Tensor, got int"),
        (torch.zeros(2, C), "companion: expected 1 dimension, got shape"),
        (torch.zeros(C, dtype=torch.long), "companion: expected float16"),
        (torch.full((C,), torch.nan), "companion: holds NaN"),
        (torch.zeros(C + 2), f"companion: is for hidden size {C + 2}, but skips"),
    ):
        with pytest.raises(PlanError, match=f"^{message}"):
            planned(skip(0), companion=companion)  # type: ignore[arg-type]
    for parts in ((kept(0),), (SkippedAttention(1),), ()):
        with pytest.raises(PlanError, match=r"^companion: nothing reads it"):
            planned(*parts)
    assert "a companion token" in repr(planned(skip(0)))
    other = shared(hidden_size=48)
    with pytest.raises(PlanMismatchError, match="is for hidden size"):
        planned(skip(0)).check(other)
