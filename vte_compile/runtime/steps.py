"""Run one phase of a decoder as steps: pieces in order, at each exit a decision on the host, and in decode attentions.

What a piece is, a subclass of ``PieceStep`` says: a graph compiled in this process, or one that an engine loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vte_compile.kernels.append_attention import append_and_attend
from vte_compile.kernels.exit_gate import exit_logits
from vte_compile.kernels.packed_exit import exit_decisions
from vte_compile.runtime.prompt_value import PromptValue
from vte_compile.runtime.visual_tokens import PackedRows, VisualTokens

Phase = Literal["prefill", "packed", "extend", "decode", "chunk"]
"""What a graph is for; "packed": prefill of many rows; "chunk": all of it in one (vte_compile/capture/chunk.py)."""


@dataclass
class ProgramOutput:
    """What one run of a program gives."""

    logits: Tensor
    kv: list[tuple[Tensor, Tensor] | None]
    """Keys and values of each layer, past included; None where attention is skipped."""
    prompt_state: list[Tensor] = field(default_factory=list)
    """What adapters know of the prompt; of prefill only."""


@dataclass
class PieceStep:
    """A piece, and the slots of what it reads and gives."""

    inputs: list[int]
    outputs: list[int]

    def run(self, arguments: list[Tensor]) -> Sequence[Tensor]:
        """Its outputs, from its inputs without weights."""
        raise NotImplementedError

    def read_weights(self) -> list[Tensor]:
        """Those that it reads from where they may be replaced."""
        return []


@dataclass
class ExitStep:
    """A place where the visual tokens may leave, and the slots of all that is as long as the sequence."""

    inputs: list[int]
    outputs: list[int]
    layer: int
    stream: int
    """The slot of what the gate reads."""
    dims: list[list[int]]
    """Which dims of each input are as long as the sequence; none: it says where packed rows end."""
    gate: tuple[Callable[[], Tensor], Callable[[], Tensor], float] | None
    """How to read w1 and w2, and the threshold; None for a static exit."""
    weights: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def fires(self, stream: Tensor, question_start: int) -> bool:
        """Whether the visual tokens of a row [S, C] leave now."""
        if self.gate is None:
            return True
        logits = exit_logits(stream[question_start:], *self._weights(stream.device))
        return bool(logits[1] - logits[0] > self.gate[2])

    def rows_fire(self, stream: Tensor, rows: PackedRows, question_starts: list[int]) -> list[bool]:
        """The same of packed rows [T, C]; a question that starts where its row ends says no.

        The host waits for a gate, and not for a static exit, of which it knows all by itself.
        """
        if self.gate is None:
            return [start < end for start, end in zip(question_starts, rows.ends, strict=True)]
        cu_seqlens = rows.cu_seqlens(stream.device)
        starts = torch.tensor(question_starts, dtype=torch.int32).to(stream.device, non_blocking=True)
        fires = exit_decisions(stream, cu_seqlens, starts, *self._weights(stream.device), self.gate[2])
        decisions: list[bool] = fires.tolist()
        return decisions

    def _weights(self, device: torch.device) -> tuple[Tensor, Tensor]:
        assert self.gate is not None
        if device not in self.weights:
            read_w1, read_w2, _ = self.gate
            self.weights[device] = (read_w1().to(device), read_w2().to(device))
        return self.weights[device]


@dataclass
class AttendStep:
    """The attention of one layer in a decode step, and the slots of what it reads and gives."""

    inputs: list[int]
    """Query, key and value of the new token, keys and values with a free last column, and starts of a batch's rows."""
    outputs: list[int]
    """The attention's output; keys and values again, now filled."""
    scale: float | None
    window: int = 0
    """How many columns the token sees; 0: all."""
    softcap: float = 0.0
    """Of the scores; 0: none."""
    takes_ends: ClassVar[bool] = False
    """Whether keys and values may be whole buffers, of which ``ends`` says how much is filled."""

    def run(self, arguments: list[Tensor], ends: Tensor | None = None) -> Sequence[Tensor]:
        """Its outputs; ``ends``: [B] int32, behind the column to write, of buffers."""
        query, key, value, keys, values, *starts = arguments
        of_rows = starts[0] if starts else None
        settings = self.scale, self.window, self.softcap
        output = append_and_attend(query, key, value, keys, values, of_rows, *settings)
        return output, keys, values


@dataclass
class PackedAttendStep:
    """The attention of one layer in packed prefill, which makes the layer's cache, and the slots of its values."""

    inputs: list[int]
    """Its own query, key and value, tables of positions, where queries and where keys of rows begin and end."""
    outputs: list[int]
    """The attention's output; keys and values [B, heads, columns with room, head size], aligned at the end of what is
    filled."""
    scale: float | None
    window: int
    """How many columns of its row a token sees; 0: all."""
    softcap: float
    """Of the scores; 0: none."""

    def run(self, arguments: list[Tensor], rows: PackedRows) -> Sequence[Tensor]:
        """Its outputs, for rows of which the host knows how long they are."""
        raise NotImplementedError


Step = PieceStep | ExitStep | AttendStep | PackedAttendStep


class StepProgram:
    """The steps of one phase.

    Args:
        steps: In order; slot i holds the i-th input, and the slots behind those what steps give.
        outputs: The slots of the logits, then of key and value of each layer that has them, then of ``prompt_state``'s
            values (in prefill).
        slots: How many there are.
        kv: For each layer, where its key and value are among those pairs; None where attention is skipped.
        prompt_state: What adapters know of the prompt: the last outputs of prefill, the last inputs of other phases.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        outputs: list[int],
        slots: int,
        kv: list[int | None],
        prompt_state: list[PromptValue],
    ) -> None:
        self.prompt_state = prompt_state
        """What adapters know of the prompt: the last outputs of prefill, the last inputs of other phases."""
        self.makes_caches = any(isinstance(step, PackedAttendStep) for step in steps)
        """Whether the keys and values it gives are a cache, with room; else each row's, one behind the other."""
        attend_steps = [step for step in steps if isinstance(step, AttendStep)]
        self.takes_ends = bool(attend_steps) and all(step.takes_ends for step in attend_steps)
        """Whether :meth:`run` takes buffers and their ``ends``."""
        self.attends = [i is not None for i in kv]
        """Of each layer: whether it has keys and values."""
        self._steps, self._outputs, self._slots, self._kv = steps, outputs, slots, kv
        self._last_use = self._find_last_uses()

    def _find_last_uses(self) -> list[list[int]]:
        """Which slots each step is the last to read, so that memory is freed as early as in eager execution."""
        last = {}
        for i, step in enumerate(self._steps):
            for slot in (*step.inputs, *step.outputs):
                last[slot] = i
        freed: list[list[int]] = [[] for _ in self._steps]
        for slot, i in last.items():
            if slot not in self._outputs:
                freed[i].append(slot)
        return freed

    def read_weights(self) -> list[Tensor]:
        """All that steps read from where they may be replaced."""
        return [weight for step in self._steps if isinstance(step, PieceStep) for weight in step.read_weights()]

    def run(
        self,
        inputs: Sequence[Tensor],
        visual: VisualTokens | PackedRows | None = None,
        ends: Sequence[Tensor] | Tensor | None = None,
    ) -> ProgramOutput:
        """Run all steps.

        Args:
            inputs: The graph's inputs, in its order (see :mod:`vte_compile.capture.phases`); in decode, keys and
                values have a free last column, which is written.
            visual: The row's visual tokens, None if none can leave; or the rows of a packed prefill. Where they left is
                noted there.
            ends: In decode, of each layer that attends, [B] int32: keys and values are whole buffers, of which so much
                is filled, the column included that is written.
        """
        values: list[Tensor | None] = [*inputs, *[None] * (self._slots - len(inputs))]
        of_layers = iter(() if ends is None else ends)
        for step, freed in zip(self._steps, self._last_use, strict=True):
            arguments: list[Tensor] = [values[i] for i in step.inputs]  # type: ignore[misc]
            if isinstance(step, PackedAttendStep):
                assert isinstance(visual, PackedRows)
                results = step.run(arguments, visual)
            elif isinstance(step, AttendStep):
                results = step.run(arguments, next(of_layers, None))
            elif isinstance(step, PieceStep):
                results = step.run(arguments)
            else:
                results = arguments
                if visual is not None:
                    results = visual.at_exit(step, values[step.stream], arguments)  # type: ignore[arg-type]
            for i, result in zip(step.outputs, results, strict=True):
                values[i] = result
            for i in freed:
                values[i] = None
        logits, *rest = [values[i] for i in self._outputs]
        assert logits is not None
        count = 2 * sum(i is not None for i in self._kv)
        pairs = list(zip(rest[:count:2], rest[1:count:2], strict=True))
        kv = [None if i is None else pairs[i] for i in self._kv]
        return ProgramOutput(logits, kv, rest[count:])  # type: ignore[arg-type]
