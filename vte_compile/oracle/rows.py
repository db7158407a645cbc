"""What the oracle holds of the rows of a batch: what they have cached, where they are, what they gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vte_compile.oracle.blocks import PromptStatistics


@dataclass(frozen=True)
class RowCache:
    """What one row of the batch has cached.

    `layers`: per decoder layer (k, v), each [1, kv_heads, length, head_dim] and k after rotary; None before the row's
    first token, and where the attention is skipped. The lengths differ between layers after an exit. `next_position`:
    position id of the row's next token, if none is given. `statistics`: by layer, of the row's prompt, for adapters.
    """

    layers: tuple[tuple[Tensor, Tensor] | None, ...]
    next_position: int = 0
    statistics: Mapping[int, PromptStatistics] = field(default_factory=dict)

    def lengths(self) -> list[int]:
        """Number of cached tokens in each layer, [L]."""
        return [0 if kv is None else kv[0].shape[-2] for kv in self.layers]


@dataclass(frozen=True)
class OracleCache:
    """KV cache of a batch: one independent `RowCache` per row. Never changed in place."""

    rows: tuple[RowCache, ...]

    def lengths(self) -> list[list[int]]:
        """Number of cached tokens per row and layer, [B][L]."""
        return [row.lengths() for row in self.rows]

    def next_positions(self) -> list[int]:
        """Position id of the next token of each row, [B]."""
        return [row.next_position for row in self.rows]


@dataclass(frozen=True)
class OracleOutput:
    """Result of one chunk; B rows, T tokens in the chunk's layout, L layers.

    `logits` [B, T, vocab], zeros for padding and for tokens that an exit removed. `exit_layer` int64 [B], -1 = no exit
    in this chunk. `last_hidden_state`: per row [n_kept, C] after the final norm. `hidden_lens`: per row [L + 1], the
    number of tokens that enter each layer, and then the final norm. `gate_features` / `gate_logits`: layer -> {row:
    [2C] / [2]} for the gates that were evaluated: [mean of the question tokens except the last; last token] and [keep,
    exit].
    """

    logits: Tensor
    exit_layer: Tensor
    cache: OracleCache
    last_hidden_state: list[Tensor]
    hidden_lens: list[list[int]]
    gate_features: dict[int, dict[int, Tensor]]
    gate_logits: dict[int, dict[int, Tensor]]


@dataclass(frozen=True)
class OracleGeneration:
    """Result of `Oracle.generate`.

    `tokens`: the new tokens of each row, the end token included. `exit_layer` int64 [B] of the prompt, -1 = no exit.
    `cache`: holds all but the last token of each row, which has not been fed back (as in Hugging Face).
    """

    tokens: list[list[int]]
    exit_layer: Tensor
    cache: OracleCache


@dataclass
class RowRun:
    """State of one row while it goes through the layers: n tokens, no padding."""

    hidden: Tensor  # [1, n, C]
    visual: Tensor  # bool [n]
    positions: Tensor  # int64 [1, n], or [3, 1, n] if positions are multimodal
    columns: Tensor  # int64 [n], where the tokens stand in the chunk
    statistics: dict[int, PromptStatistics]  # by layer, of the row's prompt
    blocks: Tensor  # int64 [n], tokens of one attend to each other in both directions; -1: as text
    deepstack: Sequence[Tensor] = ()  # [visual tokens, C], added to them behind layers 0, 1 ..
    companion: Tensor | None = None  # [1, 1, C], beside the tokens of a prompt
    exit_layer: int = -1
    lens: list[int] = field(default_factory=list)
    features: dict[int, Tensor] = field(default_factory=dict)
    gate_logits: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, keep: Tensor) -> None:
        """Remove all tokens but those of the mask [n]. Their positions keep their numbers.

        What would still be added to removed tokens goes with them.
        """
        self.deepstack = [features[keep[self.visual]] for features in self.deepstack]
        self.hidden, self.positions = self.hidden[:, keep], self.positions[..., keep]
        self.columns, self.visual, self.blocks = self.columns[keep], self.visual[keep], self.blocks[keep]
