"""The decoder of a TensorRT engine: its stages, with decisions on the host between them, and one cache they all share.

Engines give the keys and values of new tokens; here they are put behind each row's past, into memory that the engines
read from then on. Prompts run row by row, decode steps all rows at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vte_compile.errors import EngineError, InputError
from vte_compile.export.onnx_manifest import StageFacts
from vte_compile.export.ort_cache import Layout, OnnxCache
from vte_compile.export.ort_decoder import Decoder, leaves, numbered
from vte_compile.export.ort_inputs import Chunk, padded
from vte_compile.export.ort_sessions import Array
from vte_compile.export.tensorrt_graph import as_tensor
from vte_compile.export.token_inputs import TokenInputs


class StageMemory:
    """Keys and values of one stage's layers, [B, heads, columns, head size], and what adapters know of the prompts.

    Args:
        facts: Of the stage.
        batch: Rows.
        dtype: Of keys and values.
        device: Where they lie.
        most: So many columns at most, as the engine's profiles say.
    """

    def __init__(self, facts: StageFacts, batch: int, dtype: torch.dtype, device: torch.device, most: int) -> None:
        self._most, self._columns = most, 0
        slots = {f"{c.layer}.{kind}": (c.kv_heads, size) for c in facts.caches
                 for kind, size in (("key", c.key_size), ("value", c.value_size))}  # fmt: skip
        self.layout = Layout(slots, {p.name: p.shape for p in facts.prompt})
        """What the cache of another engine differs in."""
        # Never empty: TensorRT takes no cache of no column. Zeros, since what is masked must be a number still.
        self._nothing = {
            name: torch.zeros(1, heads, 1, size, dtype=dtype, device=device) for name, (heads, size) in slots.items()
        }
        self._values = {name: value.new_zeros(batch, value.shape[1], 0, value.shape[3])
                        for name, value in self._nothing.items()}  # fmt: skip
        self._prompt = {p.name: torch.zeros(batch, *p.shape, dtype=dtype, device=device) for p in facts.prompt}
        self.outputs = [*(f"new.{name}" for name in slots), *(f"present_prompt.{name}" for name in self._prompt)]
        """Of the engine, beside its result."""

    @property
    def nbytes(self) -> int:
        """Of keys and values, with the room that is still free."""
        return sum(value.nbytes for value in self._values.values())

    def reserve(self, columns: int) -> None:
        """Make room for so many columns; what is there moves if there is too little.

        Raises:
            InputError: The engine's profiles allow fewer.
        """
        if columns <= self._columns:
            return
        if columns > self._most:
            raise InputError(
                f"the cache would hold {columns} tokens of a row, and the engine takes {self._most}: export the model "
                "with larger profiles.columns."
            )
        if self._columns:  # somebody did not know how long it gets: not every step shall move everything
            columns = min(max(columns, self._columns * 3 // 2), self._most)
        for name, old in self._values.items():
            grown = old.new_zeros(old.shape[0], old.shape[1], columns, old.shape[3])
            grown[:, :, : old.shape[2]] = old
            self._values[name] = grown
        self._columns = columns

    def row(self, b: int, empty: bool) -> dict[str, Tensor]:
        """Inputs for one row: its cache, or one column if nothing is in it."""
        values = self._nothing if empty else {name: value[b : b + 1] for name, value in self._values.items()}
        inputs = {f"past_key_values.{name}": value for name, value in values.items()}
        return inputs | {f"past_prompt.{name}": value[b : b + 1] for name, value in self._prompt.items()}

    def rows(self) -> dict[str, Tensor]:
        """Inputs for all rows."""
        inputs = {f"past_key_values.{name}": value for name, value in self._values.items()}
        return inputs | {f"past_prompt.{name}": value for name, value in self._prompt.items()}

    def extend_row(self, b: int, past: int, tokens: int, given: Sequence[Any]) -> None:
        """Keep what a chunk of one row gave of so many tokens: the outputs in their order."""
        for value, new in zip(self._values.values(), given, strict=False):
            value[b, :, past : past + tokens] = new.tensor[0, :, :tokens]
        for value, new in zip(self._prompt.values(), given[len(self._values) :], strict=True):
            value[b] = new.tensor[0]

    def extend(self, past: Tensor, given: Sequence[Any]) -> None:
        """Keep what a decode step gave: one column of each row, behind its ``past`` [B]."""
        rows = torch.arange(len(past), device=past.device)
        for value, new in zip(self._values.values(), given, strict=False):
            value[rows, :, past] = new.tensor[:, :, 0]


class TensorRTDecoder(Decoder):
    """Stages and gates, each a loaded engine (:class:`vte_compile.export.tensorrt_graph.TensorRTGraph`).

    Args:
        graphs: By file of the ONNX graph.
        stages: Of the manifest.
        dtype: Of embeddings, keys and values.
        device: Where they lie.
        sizes: Of the manifest: what the engines take.
        position_rows: How many numbers make a token's position.
        tokens: What graphs take of each token besides embedding and position.
        companion: As :class:`Decoder` takes it.

    Raises:
        EngineError: A graph does not take or give what docs/tensorrt.md says.
    """

    def __init__(
        self,
        graphs: Mapping[str, Any],
        stages: Sequence[StageFacts],
        dtype: torch.dtype,
        device: torch.device,
        sizes: Mapping[str, Sequence[int]],
        position_rows: int,
        tokens: TokenInputs,
        companion: bool,
    ) -> None:
        self.companion = companion
        if not stages or stages[-1].exit is not None or any(stage.exit is None for stage in stages[:-1]):
            raise EngineError("manifest.json: its stages do not end with the only one without exit.")
        self._facts, self._type, self._device, self._sizes = list(stages), dtype, device, sizes
        self._engines = [graphs[stage.file] for stage in stages]
        self._gates = [graphs[s.exit.gate] if s.exit is not None and s.exit.gate is not None else None for s in stages]
        self._exit_layers = [None if stage.exit is None else stage.exit.layer for stage in stages]
        self.may_exit = len(stages) > 1
        self._position_rows = position_rows
        self._tokens = tokens
        self._token_inputs = [[name for name in tokens.names if name in graph.inputs] for graph in self._engines]
        memories: list[Any] = self.new_cache(1).memories
        self._stages, self._layouts = len(stages), [memory.layout for memory in memories]
        for s, (graph, memory) in enumerate(zip(self._engines, memories, strict=True)):
            first = ["hidden_states", "keep"] if s else ["inputs_embeds"]
            first += ["position_ids", "new_lengths", "past_lengths", *self._token_inputs[s]]
            _check(graph, [*first, *memory.rows()], [
                self._result(s), *memory.outputs])  # fmt: skip
        for gate in self._gates:
            if gate is not None:
                _check(gate, ["hidden_states", "visual_mask", "new_lengths"], ["fire"])

    def new_cache(self, batch: int) -> OnnxCache:
        """An empty one."""
        most = self._sizes["columns"][2]
        memories: Any = [StageMemory(facts, batch, self._type, self._device, most) for facts in self._facts]
        return OnnxCache(memories, len(self._facts), batch)

    def _result(self, stage: int) -> str:
        return "next_hidden_states" if stage < len(self._facts) - 1 else "logits"

    def _run(self, chunk: Chunk, cache: OnnxCache, lengths: Array, exit_layer: Array, room: int) -> Array:
        counts, behind = chunk.lengths, self._behind(cache)
        if (most := self._sizes["prompt"][2] - behind) < (longest := int(counts.max())):
            raise InputError(
                f"a row has {longest} new tokens, and the engine takes {most}: export the model with larger "
                "profiles.prompt."
            )
        rows = np.flatnonzero(counts).tolist()
        visual = {b: padded(chunk.visual[b : b + 1], False, behind)[0] for b in rows}
        positions = {b: numbered(chunk.positions(b, int(cache.next_positions[b])), behind) for b in rows}
        keep = {b: np.arange(len(visual[b])) for b in rows}
        more = {b: self._tokens.of_row(chunk, b, not cache.next_positions[b]) for b in rows}
        stream: dict[int, Any] = {b: chunk.row(b, behind) for b in rows}
        for s, graph in enumerate(self._engines):
            memory: Any = cache.memories[s]
            memory.reserve(max(int(lengths[s, b]) + len(keep[b]) - behind for b in rows) + room)
            for b in rows:
                past, tokens = int(lengths[s, b]), len(keep[b]) - behind
                inputs = {
                    **({"hidden_states": stream[b], "keep": keep[b]} if s else {"inputs_embeds": stream[b]}),
                    "position_ids": self._position_ids(positions[b][..., None, :]),
                    "new_lengths": np.array([tokens], np.int64),
                    "past_lengths": lengths[s, [b]],
                    **{name: more[b][name][None] for name in self._token_inputs[s]},
                    **memory.row(b, empty=not past),
                }
                stream[b], *given = graph.run(inputs, [self._result(s), *memory.outputs])
                memory.extend_row(b, past, tokens, given)
                lengths[s, b] += tokens
                visual[b], keep[b] = visual[b][keep[b]], np.arange(len(keep[b]))
            if (layer := self._exit_layers[s]) is None:
                continue
            for b in rows:
                # The one place where the host waits for the GPU.
                if leaves(self._gates[s], stream[b], visual[b], len(keep[b]) - behind):
                    exit_layer[b] = layer
                    keep[b] = np.flatnonzero(~visual[b])
                    positions[b] = positions[b][..., keep[b]]
                    more[b] = {name: value[keep[b]] for name, value in more[b].items()}
        last = {b: stream[b].numpy()[0, -1].astype(np.float32) for b in rows}
        logits = np.zeros((cache.batch, len(last[rows[0]])), np.float32)
        for b in rows:
            logits[b] = last[b]
        return logits

    def _step(self, embeds: Any, cache: OnnxCache) -> Array:
        batch, stream = cache.batch, embeds
        lengths = as_tensor(cache.lengths, self._device)
        more = {name: as_tensor(value, self._device) for name, value in self._tokens.of_step(batch).items()}
        fixed = {
            "position_ids": as_tensor(self._position_ids(cache.next_positions[:, None]), self._device),
            "new_lengths": torch.ones(batch, dtype=torch.int64, device=self._device),
            "keep": torch.zeros(1, dtype=torch.int64, device=self._device),
        }
        for s, graph in enumerate(self._engines):
            memory: Any = cache.memories[s]
            memory.reserve(int(cache.lengths[s].max()) + 1)
            inputs = {**fixed, "hidden_states" if s else "inputs_embeds": stream, "past_lengths": lengths[s]}
            inputs |= {name: more[name] for name in self._token_inputs[s]}
            stream, *given = graph.run(inputs | memory.rows(), [self._result(s), *memory.outputs])
            memory.extend(lengths[s], given)
        return np.asarray(stream.numpy()[:, -1].astype(np.float32))


def _check(graph: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    for what, wanted, there in (("inputs", inputs, graph.inputs), ("outputs", outputs, graph.outputs)):
        if differs := set(wanted) ^ set(there):
            raise EngineError(
                f"{graph.file}: its {what} are not those of this schema ({', '.join(sorted(differs))}): run build.sh "
                "again, or export the model again."
            )
