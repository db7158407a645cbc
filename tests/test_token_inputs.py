"""What engines tell their decoders of each token: blocks from ids, as the models' own code makes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_families import optimized

from vte_compile.errors import EngineError, UnsupportedModelError
from vte_compile.export import block_facts
from vte_compile.export.block_facts import block_rule
from vte_compile.export.manifest import IMAGES, PROMPTS
from vte_compile.export.staged import model_facts
from vte_compile.export.token_inputs import TokenInputs, block_ids

RULE = {"gemma3": IMAGES, "paligemma": PROMPTS, "llava": None}


@pytest.mark.parametrize(
    ("rule", "images", "first", "blocks"),
    [
        (IMAGES, "0110110", True, [-1, 0, 0, -1, 1, 1, -1]),
        (IMAGES, "11", False, [0, 0]),
        (IMAGES, "00", True, [-1, -1]),
        (PROMPTS, "00", True, [0, 0]),
        (PROMPTS, "010", False, [0, 0, 0]),
        (PROMPTS, "00", False, [-1, -1]),
    ],
)
def test_blocks_of_a_row(rule: str, images: str, first: bool, blocks: list[int]) -> None:
    assert block_ids(rule, np.array([c == "1" for c in images]), first).tolist() == blocks


@pytest.mark.parametrize("name", list(RULE))
def test_the_rule_is_found(name: str) -> None:
    assert block_rule(optimized(name)) == RULE[name]


@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
def test_a_model_with_other_blocks(name: str, monkeypatch: Any) -> None:
    [known] = [rule for rule in (IMAGES, PROMPTS) if rule != RULE[name]]
    monkeypatch.setattr(block_facts, "BLOCK_RULES", (known,))
    with pytest.raises(UnsupportedModelError, match=f"by the rule '{known}' it makes others of prompts with images"):
        block_rule(optimized(name))


def test_a_rule_that_is_unknown() -> None:
    facts = model_facts(optimized("gemma3"))
    assert TokenInputs(facts, np.dtype("float32")).names == ["block_ids"]
    with pytest.raises(EngineError, match="blocks 'words' are unknown"):
        TokenInputs(replace(facts, blocks="words"), np.dtype("float32"))
