"""The decoder of an ONNX engine in its two forms: stages with decisions on the host between them, or one graph.

Prompts run row by row in the staged form, stage by stage: rows leave behind different layers, and when a stage begins
it is known how many columns each row needs. Decode steps run all rows at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vte_compile.errors import EngineError, InputError
from vte_compile.export.onnx_manifest import OnnxManifest, StageFacts
from vte_compile.export.ort_cache import GraphMemory, Layout, OnnxCache
from vte_compile.export.ort_inputs import Chunk, padded
from vte_compile.export.ort_sessions import Array, Graph, Setting, Value
from vte_compile.export.token_inputs import TokenInputs

FORMS = ("staged", "single")


class Decoder:
    """What both forms do.

    Args:
        graphs: In order.
        stages: How many lengths a row's cache has.
        may_exit: Whether visual tokens may leave.
        tokens: What graphs take of each token besides embedding and position.
        dtype: Of embeddings, keys and values.
        in_place: Whether the graphs can write new keys and values behind those they read.
        companion: Whether a token goes along with each prompt, which the graphs put behind its last.
    """

    def __init__(
        self,
        graphs: list[Graph],
        stages: int,
        may_exit: bool,
        tokens: TokenInputs,
        dtype: Any,
        in_place: bool,
        companion: bool,
    ) -> None:
        self.companion = companion
        self._graphs, self._stages, self._dtype, self._in_place = graphs, stages, dtype, in_place
        self._tokens = tokens
        self._token_inputs = [[name for name in tokens.names if name in graph.inputs] for graph in graphs]
        """Of each graph."""
        self._layouts = [Layout.of(graph) for graph in graphs]
        self._position_rows = _position_rows(graphs[0].inputs.get("position_ids", []))
        self.may_exit = may_exit

    def new_cache(self, batch: int) -> OnnxCache:
        """An empty one."""
        memories = [
            GraphMemory(layout, batch, self._dtype, graph.device, self._in_place)
            for graph, layout in zip(self._graphs, self._layouts, strict=True)
        ]
        return OnnxCache(memories, self._stages, batch)

    def run(self, chunk: Chunk, cache: OnnxCache, room: int) -> tuple[Array, Array]:
        """Run a prompt, or what follows one.

        Args:
            chunk: The new tokens.
            cache: Of the same rows; extended.
            room: Columns to keep free for what will follow.

        Returns:
            Logits [B, vocabulary] of each row's last token, zeros for rows without a token; exit layers [B].
        """
        counts = chunk.lengths
        self._check(cache)
        if len(counts) != cache.batch:
            raise InputError(f"The cache holds {cache.batch} rows, the inputs {len(counts)}.")
        if len(empty := np.flatnonzero((counts == 0) & (cache.next_positions == 0))):
            raise InputError(f"attention_mask: row {empty[0]} has no token.")
        if not counts.any():
            raise InputError("attention_mask: no row has a token.")
        lengths, exit_layer = cache.lengths.copy(), np.full(cache.batch, -1, np.int64)
        logits = self._run(chunk, cache, lengths, exit_layer, room)
        # Only now: after an error in between, the cache is what it was.
        cache.lengths = lengths
        cache.next_positions = cache.next_positions + chunk.reach
        return logits, exit_layer

    def step(self, embeds: Value, cache: OnnxCache, active: Array) -> Array:
        """One more token of each row.

        Args:
            embeds: [B, 1, C].
            cache: Of the same rows; extended.
            active: [B] bool; other rows' tokens are forgotten, and their logits mean nothing.

        Returns:
            Logits [B, vocabulary].
        """
        self._check(cache)
        logits = self._step(embeds, cache)
        cache.lengths = cache.lengths + active
        cache.next_positions = cache.next_positions + active
        return logits

    def _position_ids(self, positions: Array) -> Array:
        """[B, T] or [3, B, T] as graphs take them: text counts all rows of multimodal positions on alike."""
        if self._position_rows == 1 or positions.ndim == 3:
            return positions
        return np.repeat(positions[None], self._position_rows, 0)

    def _behind(self, cache: OnnxCache) -> int:
        """How many places graphs want behind a row's last token in a chunk."""
        return int(self.companion and cache.is_empty)

    def _check(self, cache: OnnxCache) -> None:
        """Refuse the cache of an engine with other exits, skips or adapters, or of the other form."""
        if len(cache.lengths) != self._stages or [memory.layout for memory in cache.memories] != self._layouts:
            raise InputError("cache: is of another engine, or of its other form: pass one that this engine returned.")

    def _run(self, chunk: Chunk, cache: OnnxCache, lengths: Array, exit_layer: Array, room: int) -> Array:
        """Fill in ``lengths`` and ``exit_layer``."""
        raise NotImplementedError

    def _step(self, embeds: Value, cache: OnnxCache) -> Array:
        raise NotImplementedError


def _position_rows(shape: list[Any]) -> int:
    """How many numbers make a token's position, from the shape of a graph's input."""
    return int(shape[0]) if len(shape) == 3 else 1


def numbered(positions: Array, behind: int) -> Array:
    """Positions [n] or [3, n] with so many places of padding behind them, whose numbers do not matter."""
    return np.pad(positions, [*[(0, 0)] * (positions.ndim - 1), (0, behind)], mode="edge")


def leaves(gate: Any, stream: Value, visual: Array, tokens: int) -> bool:
    """Whether a row's visual tokens leave behind a stage: if there are any, text follows, and the gate fires.

    Args:
        gate: A loaded gate; None: they leave always.
        stream: [1, n, C], what the stage gave.
        visual: [n] bool.
        tokens: How many of the n places are the row's tokens; what is behind them is no visual one.
    """
    if not visual.any() or visual[tokens - 1]:
        return False
    if gate is None:
        return True
    inputs = {"hidden_states": stream, "visual_mask": visual[None], "new_lengths": np.array([tokens])}
    return bool(gate.run(inputs, ["fire"])[0].numpy()[0])


class StagedDecoder(Decoder):
    """stage_0.onnx and so on, with a decision behind all but the last."""

    def __init__(
        self,
        folder: Path,
        stages: list[StageFacts],
        tokens: TokenInputs,
        dtype: Any,
        setting: Setting,
        in_place: bool,
        companion: bool,
    ) -> None:
        if not stages or stages[-1].exit is not None or any(stage.exit is None for stage in stages[:-1]):
            raise EngineError(f"{folder}: the manifest's stages do not end with the only one without exit.")
        graphs = [Graph(folder / stage.file, setting) for stage in stages]
        super().__init__(graphs, len(stages), len(stages) > 1, tokens, dtype, in_place, companion)
        self._exits = [stage.exit for stage in stages]
        self._gates = [
            Graph(folder / stage.exit.gate, setting, small=True) if stage.exit and stage.exit.gate else None
            for stage in stages
        ]
        for s, (graph, layout) in enumerate(zip(graphs, self._layouts, strict=True)):
            first = ["hidden_states", "keep"] if s else ["inputs_embeds"]
            given = [*first, "position_ids", "new_lengths", "past_lengths", *self._token_inputs[s], *layout.inputs]
            graph.check(given, [self._result(s), *layout.outputs])
        for gate in self._gates:
            if gate is not None:
                gate.check(["hidden_states", "visual_mask", "new_lengths"], ["fire"])

    def _result(self, stage: int) -> str:
        return "next_hidden_states" if stage < len(self._graphs) - 1 else "logits"

    def _run(self, chunk: Chunk, cache: OnnxCache, lengths: Array, exit_layer: Array, room: int) -> Array:
        rows = [b for b, mask in enumerate(chunk.visual) if len(mask)]
        behind = self._behind(cache)
        visual = {b: padded(chunk.visual[b : b + 1], False, behind)[0] for b in rows}
        positions = {b: numbered(chunk.positions(b, int(cache.next_positions[b])), behind) for b in rows}
        keep = {b: np.arange(len(visual[b])) for b in rows}
        more = {b: self._tokens.of_row(chunk, b, not cache.next_positions[b]) for b in rows}
        stream: dict[int, Value] = {b: chunk.row(b, behind) for b in rows}
        for s, (graph, memory) in enumerate(zip(self._graphs, cache.memories, strict=True)):
            counts = {b: len(keep[b]) - behind for b in rows}
            memory.reserve(max(int(lengths[s, b]) + len(keep[b]) for b in rows) + room)
            inputs = {
                b: self._inputs(s, stream[b], keep[b], positions[b][..., None, :], [counts[b]], lengths[s, [b]])
                | {name: more[b][name][None] for name in self._token_inputs[s]}
                for b in rows
            }
            filled = {b: int(lengths[s, b]) for b in rows}
            results = memory.run_rows(graph, inputs, filled, [self._result(s)])
            for b in rows:
                stream[b] = results[b][0]
                lengths[s, b] += counts[b]
                visual[b], keep[b] = visual[b][keep[b]], np.arange(len(keep[b]))
            if (exit_ := self._exits[s]) is None:
                continue
            for b in rows:
                if leaves(self._gates[s], stream[b], visual[b], counts[b]):
                    exit_layer[b] = exit_.layer
                    keep[b] = np.flatnonzero(~visual[b])
                    positions[b] = positions[b][..., keep[b]]
                    more[b] = {name: value[keep[b]] for name, value in more[b].items()}
        logits = None
        for b in rows:
            row = stream[b].numpy()[0, -1].astype(np.float32)
            logits = np.zeros((cache.batch, len(row)), np.float32) if logits is None else logits
            logits[b] = row
        assert logits is not None  # run() made sure that a row has a token
        return logits

    def _step(self, embeds: Value, cache: OnnxCache) -> Array:
        stream = embeds
        positions, ones, keep = cache.next_positions[:, None], [1] * cache.batch, np.zeros(1, np.int64)
        more = self._tokens.of_step(cache.batch)
        for s, (graph, memory) in enumerate(zip(self._graphs, cache.memories, strict=True)):
            memory.reserve(int(cache.lengths[s].max()) + 1)
            inputs = self._inputs(s, stream, keep, positions, ones, cache.lengths[s])
            inputs |= {name: more[name] for name in self._token_inputs[s]}
            stream = memory.run_all(graph, inputs, [self._result(s)], step=True)[0]
        return np.asarray(stream.numpy()[:, -1].astype(np.float32))

    def _inputs(
        self, s: int, stream: Value, keep: Array, positions: Array, new: list[int], past: Array
    ) -> dict[str, Value]:
        names = {"hidden_states": stream, "keep": keep} if s else {"inputs_embeds": stream}
        positions = self._position_ids(positions)
        return {**names, "position_ids": positions, "new_lengths": np.array(new, np.int64), "past_lengths": past}


class SingleDecoder(Decoder):
    """decoder.onnx, whose exits are inside."""

    def __init__(
        self,
        folder: Path,
        file: str,
        tokens: TokenInputs,
        dtype: Any,
        setting: Setting,
        in_place: bool,
        companion: bool,
    ) -> None:
        graph = Graph(folder / file, setting)
        stages = (graph.inputs.get("past_lengths") or [None])[0]
        if not isinstance(stages, int):
            raise EngineError(
                f"{graph.file}: input past_lengths has no fixed number of stages: export the model again."
            )
        super().__init__([graph], stages, stages > 1, tokens, dtype, in_place, companion)
        layout = self._layouts[0]
        given = ["inputs_embeds", "visual_mask", "position_ids", "new_lengths", "past_lengths"]
        graph.check([*given, *self._token_inputs[0], *layout.inputs], [*self._RESULTS, *layout.outputs])

    _RESULTS = ("logits", "present_lengths", "exit_layer")

    def _run(self, chunk: Chunk, cache: OnnxCache, lengths: Array, exit_layer: Array, room: int) -> Array:
        graph, memory, counts = self._graphs[0], cache.memories[0], chunk.lengths
        behind = self._behind(cache)
        memory.reserve(int((lengths.max(0) + counts).max()) + behind + room)
        if cache.is_empty:
            made = (chunk.padded(behind), chunk.padded_mask(behind), chunk.padded_positions(behind))
            inputs = self._inputs(*made, counts, lengths)
            inputs |= self._only_taken(self._tokens.padded(chunk))
            given = memory.run_all(graph, inputs, self._RESULTS, step=False)
            logits, lengths[:], exit_layer[:] = (value.numpy() for value in given)
            return np.asarray(logits[:, -1].astype(np.float32))
        # Attention takes several tokens behind a past of one row only.
        rows = {}
        for b in np.flatnonzero(counts).tolist():
            positions = chunk.positions(b, int(cache.next_positions[b]))[..., None, :]
            mask = chunk.visual[b][None]
            rows[b] = self._inputs(chunk.row(b), mask, positions, counts[[b]], lengths[:, [b]])
            more = self._tokens.of_row(chunk, b, not cache.next_positions[b])
            rows[b] |= self._only_taken({name: value[None] for name, value in more.items()})
        logits = np.zeros((cache.batch, 0), np.float32)
        # Layers above an exit hold less; they all get the columns of those below it.
        filled = {b: int(lengths[:, b].max()) for b in rows}
        for b, given in memory.run_rows(graph, rows, filled, self._RESULTS).items():
            row, lengths[:, [b]], exit_layer[[b]] = (value.numpy() for value in given)
            if not logits.size:
                logits = np.zeros((cache.batch, row.shape[-1]), np.float32)
            logits[b] = row[0, -1]
        return logits

    def _step(self, embeds: Value, cache: OnnxCache) -> Array:
        batch = cache.batch
        cache.memories[0].reserve(int(cache.lengths.max()) + 1)
        none, ones = np.zeros((batch, 1), bool), np.ones(batch, np.int64)
        inputs = self._inputs(embeds, none, cache.next_positions[:, None], ones, cache.lengths)
        inputs |= self._only_taken(self._tokens.of_step(batch))
        given = cache.memories[0].run_all(self._graphs[0], inputs, ["logits"], step=True)
        return np.asarray(given[0].numpy()[:, -1].astype(np.float32))

    def _only_taken(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return {name: inputs[name] for name in self._token_inputs[0]}

    def _inputs(self, embeds: Value, visual: Array, positions: Array, new: Array, past: Array) -> dict[str, Value]:
        return {
            "inputs_embeds": embeds,
            "visual_mask": visual,
            "position_ids": self._position_ids(positions),
            "new_lengths": new,
            "past_lengths": past,
        }


def load_decoder(folder: Path, manifest: OnnxManifest, form: str | None, dtype: Any, setting: Setting) -> Decoder:
    """The decoder of an engine, in the form that was asked for, or the staged one if it is there.

    Raises:
        InputError: The engine does not have this form.
        EngineError: A graph is not what the manifest says.
    """
    forms = [name for name, there in zip(FORMS, (manifest.stages, manifest.decoder), strict=True) if there]
    if form is not None and form not in forms:
        raise InputError(f"form: {form!r} is not in this engine, which has {', '.join(map(repr, forms))}.")
    if not forms:
        raise EngineError(f"{folder}: the manifest names no decoder: export the model again.")
    in_place = True  # GroupQueryAttention, or ScatterND, appends to the memory it reads
    tokens, companion = TokenInputs(manifest.model, dtype), manifest.model.companion
    if (form or forms[0]) == "staged":
        return StagedDecoder(folder, manifest.stages, tokens, dtype, setting, in_place, companion)
    assert manifest.decoder is not None
    return SingleDecoder(folder, manifest.decoder, tokens, dtype, setting, in_place, companion)
