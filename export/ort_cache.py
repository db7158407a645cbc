"""What an ONNX engine remembers of its rows: keys, values, and what adapters know of the prompts.

A graph's memory holds all rows; a prompt runs row by row, on slices of it, so that nothing is stacked or copied when
decoding starts. In place, the graph writes new columns into the memory it reads from (GroupQueryAttention with shared
buffers); else it gives new tensors, which take the old ones' place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vte_compile.errors import EngineError
from vte_compile.export.ort_sessions import Array, Call, Device, Graph, Value, View

_KV, _PROMPT = "past_key_values.", "past_prompt."


@dataclass(frozen=True)
class Layout:
    """What a graph takes of the past, and gives for the future."""

    slots: dict[str, tuple[int, int]]
    """Keys and values, such as "3.key": heads and head size."""
    prompt: dict[str, list[int]]
    """What adapters know of a row's prompt: shape without the batch."""

    @classmethod
    def of(cls, graph: Graph) -> Layout:
        """From the names and shapes of a graph's inputs.

        Raises:
            EngineError: A size that does not change is not a number.
        """
        slots: dict[str, tuple[int, int]] = {}
        prompt: dict[str, list[int]] = {}
        for name, shape in graph.inputs.items():
            sizes = [shape[1], shape[3]] if name.startswith(_KV) and len(shape) == 4 else shape[1:]
            if not name.startswith((_KV, _PROMPT)):
                continue
            if (name.startswith(_KV) and len(shape) != 4) or not all(isinstance(size, int) for size in sizes):
                raise EngineError(f"{graph.file}: input {name} has shape {shape}: export the model again.")
            if name.startswith(_KV):
                slots[name.removeprefix(_KV)] = (sizes[0], sizes[1])
            else:
                prompt[name.removeprefix(_PROMPT)] = sizes
        return cls(slots, prompt)

    @property
    def inputs(self) -> list[str]:
        """Names of the graph's inputs."""
        return [*(_KV + name for name in self.slots), *(_PROMPT + name for name in self.prompt)]

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
        return [*(f"present.{name}" for name in self.slots), *(f"present_prompt.{name}" for name in self.prompt)]


class GraphMemory:
    """The past of all rows, as one graph has it.

    Args:
        layout: Of the graph.
        batch: Rows.
        dtype: Of keys, values and prompt values.
        device: Where they lie.
        in_place: Whether the graph can write where it reads.
    """

    def __init__(self, layout: Layout, batch: int, dtype: Any, device: Device, in_place: bool) -> None:
        self.layout, self._dtype, self._device, self._in_place = layout, dtype, device, in_place
        self._batch = batch
        self._values: dict[str, Any] = {}
        """OrtValues [B, heads, columns, size]; none before the first chunk."""
        self._prompt = {name: np.zeros((batch, *shape), dtype) for name, shape in layout.prompt.items()}
        self._columns = 0
        self._step: Call | None = None

    @property
    def nbytes(self) -> int:
        """Of keys and values, with the room that is still free."""
        return sum(value.tensor_size_in_bytes() for value in self._values.values())

    def reserve(self, columns: int) -> None:
        """Make room for so many columns. What is there already goes through the host's memory if it has to move."""
        if not self._in_place or columns <= self._columns:
            return
        if self._columns:  # somebody did not know how long it gets: not every step shall move everything
            columns = max(columns, self._columns * 3 // 2)
        for name, (heads, size) in self.layout.slots.items():
            grown = np.zeros((self._batch, heads, columns, size), self._dtype)
            if name in self._values:
                grown[:, :, : self._columns] = self._values[name].numpy()
            self._values[name] = self._device.put(grown)
        self._columns, self._step = columns, None

    def run_rows(
        self, graph: Graph, rows: Mapping[int, Mapping[str, Value]], filled: Mapping[int, int], outputs: Sequence[str]
    ) -> dict[int, list[Any]]:
        """Run a chunk of some rows, one by one, and remember what it adds.

        Args:
            graph: Of this memory's layout.
            rows: By number, the inputs of each beside the past.
            filled: How many columns of each row hold its past.
            outputs: Which are wanted.

        Returns:
            Those outputs of each row, as OrtValues.
        """
        results, grown = {}, {}
        for b, inputs in rows.items():
            part = slice(b, b + 1)
            call = self._call(graph, part, None if self._in_place else filled[b])
            given = call.run(inputs, [*outputs, *self._wanted(with_prompt=True)])
            results[b], grown[b] = given[: len(outputs)], self._take_prompt(given[len(outputs) :], part)
        if not self._in_place:
            self._replace_rows(grown)
        return results

    def run_all(self, graph: Graph, inputs: Mapping[str, Value], outputs: Sequence[str], *, step: bool) -> list[Any]:
        """Run all rows at once: a decode step, or a first chunk. As `run_rows`."""
        every = slice(0, self._batch)
        if step and self._in_place:
            # The same memory at every step: what is bound stays so, until it moves.
            call = self._step = self._step or self._call(graph, every)
        else:
            call = self._call(graph, every)
        given = call.run(inputs, [*outputs, *self._wanted(with_prompt=not step)])
        grown = given[len(outputs) :] if step else self._take_prompt(given[len(outputs) :], every)
        if not self._in_place:
            self._values = dict(zip(self.layout.slots, grown, strict=True))
        return given[: len(outputs)]

    def _wanted(self, with_prompt: bool) -> list[str]:
        """Outputs that have no place: new keys and values if not in place, and what a chunk says of the prompt."""
        slots = [] if self._in_place else [f"present.{name}" for name in self.layout.slots]
        return slots + [f"present_prompt.{name}" for name in self.layout.prompt if with_prompt]

    def _take_prompt(self, given: list[Any], rows: slice) -> list[Any]:
        """Keep prompt values, which are last; the rest is returned."""
        count = len(given) - len(self._prompt)
        for values, new in zip(self._prompt.values(), given[count:], strict=True):
            values[rows] = new.numpy()
        if self._prompt:
            self._step = None
        return given[:count]

    def _call(self, graph: Graph, rows: slice, filled: int | None = None) -> Call:
        inputs: dict[str, Value] = {}
        places = {}
        count = rows.stop - rows.start
        for name, (heads, size) in self.layout.slots.items():
            if name not in self._values:
                inputs[_KV + name] = np.zeros((count, heads, 0, size), self._dtype)
                continue
            if filled is not None and filled != self._values[name].shape()[2]:
                # Where there is no room for the new columns, attention wants none that is free at all.
                inputs[_KV + name] = self._device.put(self._values[name].numpy()[rows, :, :filled])
                continue
            inputs[_KV + name] = View.of(self._values[name], self._dtype, rows)
            if self._in_place:
                places[f"present.{name}"] = inputs[_KV + name]
        for name, values in self._prompt.items():
            inputs[_PROMPT + name] = self._device.put(values[rows])
        return Call(graph, inputs, places)

    def _replace_rows(self, grown: Mapping[int, list[Any]]) -> None:
        """Put new keys and values of some rows, of whatever lengths, in the place of their old ones."""
        if list(grown) == list(range(self._batch)) == [0]:
            self._values = dict(zip(self.layout.slots, grown[0], strict=True))
            return
        for i, (name, (heads, size)) in enumerate(self.layout.slots.items()):
            old = self._values[name].numpy() if name in self._values else None
            parts = {b: values[i].numpy()[0] for b, values in grown.items()}
            columns = max([part.shape[1] for part in parts.values()] + [0 if old is None else old.shape[2]])
            merged = np.zeros((self._batch, heads, columns, size), self._dtype)
            if old is not None:
                merged[:, :, : old.shape[2]] = old
            for b, part in parts.items():
                merged[b, :, : part.shape[1]] = part
            self._values[name] = self._device.put(merged)


class OnnxCache:
    """Keys and values of a batch of rows, from :meth:`OnnxEngine.prefill`; extended in place by what follows.

    A row's tokens are in its first columns. Layers above an exit hold fewer of them: only text.
    """

    def __init__(self, memories: list[GraphMemory], stages: int, batch: int) -> None:
        self.memories = memories
        """Of each graph."""
        self.lengths: Array = np.zeros((stages, batch), np.int64)
        """[stages, B]: how many tokens of each row the layers between two exits hold."""
        self.next_positions: Array = np.zeros(batch, np.int64)
        """[B]: the position of each row's next token: how many it had so far, or fewer where they are multimodal."""

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.next_positions)

    @property
    def is_empty(self) -> bool:
        """Whether no row has a token."""
        return not self.next_positions.any()

    @property
    def nbytes(self) -> int:
        """Of keys and values, with the room that is still free."""
        return sum(memory.nbytes for memory in self.memories)
