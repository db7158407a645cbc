"""Run one phase of a decoder: its pieces in order, and at each exit a decision on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vte_compile.kernels.exit_gate import exit_logits
from vte_compile.kernels.token_exit import compact
from vte_compile.passes import PassResult
from vte_compile.passes.lower_piecewise import ExitPoint, Piece, PiecewiseGraph
from vte_compile.runtime.inductor import Function, PieceCompiler


@dataclass
class VisualTokens:
    """Which tokens of one row are visual, as the host needs it at exits."""

    keep: Tensor
    """[n] int64: the positions of the text tokens."""
    question_start: int
    """Index of the first token behind the last visual one."""

    @classmethod
    def find(cls, visual_mask: Tensor) -> VisualTokens | None:
        """Of one row's mask [S] bool; None if its tokens can never leave (none is visual, or no text follows)."""
        positions = visual_mask.nonzero()[:, 0]
        if not len(positions) or int(positions[-1]) == len(visual_mask) - 1:
            return None
        return cls((~visual_mask).nonzero()[:, 0], int(positions[-1]) + 1)


@dataclass
class ProgramOutput:
    """What one run of a program gives."""

    logits: Tensor
    kv: list[tuple[Tensor, Tensor] | None]
    """Keys and values of each layer, past included; None where attention is skipped."""
    exit_layer: int = -1
    prompt_state: list[Tensor] = field(default_factory=list)
    """What adapters know of the prompt; of prefill only."""


@dataclass
class _PieceStep:
    piece: Piece
    function: Function
    inputs: list[int]
    outputs: list[int]
    lengths: list[tuple[int, int]]
    """(input, dim) of the symbolic sizes, other than the batch."""


@dataclass
class _ExitStep:
    point: ExitPoint
    stream: int
    inputs: list[int]
    outputs: list[int]
    weights: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Program:
    """A lowered graph, bound to compiled (or plain) pieces."""

    def __init__(self, lowered: PiecewiseGraph, passes: list[PassResult], compiler: PieceCompiler | None) -> None:
        self.passes = passes
        """What the passes did and refused on the way here."""
        self.prompt_state = lowered.prompt_state
        """What adapters know of the prompt: the last outputs of prefill, the last inputs of other phases."""
        self.attends = [i is not None for i in lowered.kv]
        """Of each layer: whether it has keys and values."""
        slots: dict[str, int] = {}

        def slot(names: Sequence[str]) -> list[int]:
            return [slots.setdefault(name, len(slots)) for name in names]

        slot(lowered.inputs)
        self._steps: list[_PieceStep | _ExitStep] = []
        for step in lowered.steps:
            if isinstance(step, Piece):
                function: Function = step.module
                if compiler is not None:
                    function = compiler.compile(step.module, step.key, step.examples)
                self._steps.append(_PieceStep(step, function, slot(step.inputs), slot(step.outputs), _lengths(step)))
            else:
                self._steps.append(_ExitStep(step, slot([step.stream])[0], slot(step.inputs), slot(step.outputs)))
        self._outputs, self._kv = slot(lowered.outputs), lowered.kv
        self._last_use = self._find_last_uses()
        self._slots = len(slots)

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

    def run(self, inputs: Sequence[Tensor], visual: VisualTokens | None = None) -> ProgramOutput:
        """Run all steps.

        Args:
            inputs: The graph's inputs, in its order (see :mod:`vte_compile.capture`).
            visual: The row's visual tokens; None if none can leave.
        """
        values: list[Tensor | None] = [*inputs, *[None] * (self._slots - len(inputs))]
        exit_layer = -1
        for step, freed in zip(self._steps, self._last_use, strict=True):
            arguments = [values[i] for i in step.inputs]
            if isinstance(step, _PieceStep):
                results = _run_piece(step, arguments)  # type: ignore[arg-type]
            elif visual is not None and _fires(step, values[step.stream], visual):  # type: ignore[arg-type]
                results = compact(arguments, step.point.dims, visual.keep)  # type: ignore[arg-type]
                exit_layer, visual = step.point.layer, None
            else:
                results = arguments  # type: ignore[assignment]
            for i, result in zip(step.outputs, results, strict=True):
                values[i] = result
            for i in freed:
                values[i] = None
        logits, *rest = [values[i] for i in self._outputs]
        assert logits is not None
        count = 2 * sum(i is not None for i in self._kv)
        pairs = list(zip(rest[:count:2], rest[1:count:2], strict=True))
        kv = [None if i is None else pairs[i] for i in self._kv]
        return ProgramOutput(logits, kv, exit_layer, rest[count:])  # type: ignore[arg-type]


def _lengths(piece: Piece) -> list[tuple[int, int]]:
    return [
        (i, dim)
        for i, example in enumerate(piece.examples[: len(piece.inputs)])
        for dim, size in enumerate(example.shape)
        if dim > 0 and type(size) is not int
    ]


def _run_piece(step: _PieceStep, arguments: list[Tensor]) -> Sequence[Tensor]:
    weights = [read() for read in step.piece.parameters]
    # torch.export treats sizes 0 and 1 as different programs: those run the same graph uncompiled.
    function = step.function if all(arguments[i].shape[d] > 1 for i, d in step.lengths) else step.piece.module
    return function(*arguments, *weights)


def _fires(step: _ExitStep, stream: Tensor, visual: VisualTokens) -> bool:
    gate = step.point.gate
    if gate is None:
        return True
    read_w1, read_w2, threshold = gate
    if stream.device not in step.weights:
        step.weights[stream.device] = (read_w1().to(stream.device), read_w2().to(stream.device))
    logits = exit_logits(stream[0, visual.question_start :], *step.weights[stream.device])
    return bool(logits[1] - logits[0] > threshold)
