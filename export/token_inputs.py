"""What decoders take of each token besides embedding and position, as an engine's graphs have it; with numpy alone.

DeepStack: what is added to visual tokens behind the first layers, zero at text. Blocks: tokens with the same number
attend to each other in both directions, -1 is causal. Both are inputs of the graphs, by the names that
vte_compile/families gives them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vte_compile.errors import EngineError
from vte_compile.export.manifest import BLOCK_RULES, PROMPTS, ModelFacts
from vte_compile.export.ort_inputs import Chunk, padded
from vte_compile.export.ort_sessions import Array

BLOCKS, _DEEPSTACK = "block_ids", "deepstack_{}"


def check_block_rule(facts: ModelFacts) -> None:
    """Make sure that the manifest's rule of blocks is one that is known here.

    Raises:
        EngineError: It is not.
    """
    if facts.blocks not in (None, *BLOCK_RULES):
        raise EngineError(f"manifest.json: blocks {facts.blocks!r} are unknown: export the model again.")


def block_ids(rule: str, placeholders: Array, first: bool) -> Array:
    """The blocks of one row's tokens.

    Args:
        rule: One of BLOCK_RULES.
        placeholders: [n] bool: which tokens are of images.
        first: Whether nothing comes before them.

    Returns:
        [n] int64.
    """
    if rule == PROMPTS:
        return np.full(len(placeholders), 0 if first or placeholders.any() else -1)
    begins = placeholders & ~np.append(False, placeholders[:-1])
    return np.where(placeholders, np.cumsum(begins) - 1, -1)


class TokenInputs:
    """Makes them.

    Args:
        facts: Of the model.
        dtype: Of embeddings.

    Raises:
        EngineError: The manifest has a rule that is unknown here.
    """

    def __init__(self, facts: ModelFacts, dtype: np.dtype[Any]) -> None:
        check_block_rule(facts)
        self._facts, self._dtype = facts, dtype
        self.names = [_DEEPSTACK.format(layer) for layer in range(facts.deepstack)]
        """Of the graphs' inputs."""
        if facts.blocks is not None:
            self.names.append(BLOCKS)

    def of_row(self, chunk: Chunk, b: int, first: bool) -> dict[str, Array]:
        """Of one row's new tokens, by name: [n, C] or [n].

        Args:
            chunk: The new tokens.
            b: Which row.
            first: Whether nothing comes before them.
        """
        added = chunk.added(b) if self._facts.deepstack else np.zeros((len(chunk.visual[b]), 0), self._dtype)
        parts = np.split(added, self._facts.deepstack, axis=1) if self._facts.deepstack else []
        inputs = {_DEEPSTACK.format(layer): part for layer, part in enumerate(parts)}
        if self._facts.blocks is not None:
            inputs[BLOCKS] = block_ids(self._facts.blocks, chunk.placeholders[b], first)
        return inputs

    def padded(self, chunk: Chunk) -> dict[str, Array]:
        """Of all rows of a first chunk, [B, T, C] or [B, T]; shorter rows are padded at their end."""
        rows = [self.of_row(chunk, b, True) for b in range(len(chunk.visual))]
        return {name: padded([row[name] for row in rows], _filler(name)) for name in self.names}

    def of_step(self, batch: int) -> dict[str, Array]:
        """Of a decode step: one token of text in each row."""
        sizes = (batch, 1)
        made = {name: np.zeros((*sizes, self._facts.hidden_size), self._dtype) for name in self.names}
        return made | ({} if self._facts.blocks is None else {BLOCKS: np.full(sizes, _filler(BLOCKS))})


def _filler(name: str) -> int:
    return -1 if name == BLOCKS else 0
