"""The program of a lowered graph: its pieces compiled in this process, or as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from vte_compile.passes import PassResult
from vte_compile.passes.lower_piecewise import AttendKind, AttendPoint, Piece, PiecewiseGraph
from vte_compile.runtime.fused_steps import RotaryAppendStep, RotaryPackedStep
from vte_compile.runtime.inductor import Function, PieceCompiler
from vte_compile.runtime.steps import AttendStep, ExitStep, PackedAttendStep, PieceStep, Step, StepProgram

if TYPE_CHECKING:
    from vte_compile.runtime.tensorrt_pieces import TensorRTCompiler

    Compiler = PieceCompiler | TensorRTCompiler

_ATTEND_STEPS: dict[AttendKind, type[AttendStep] | type[PackedAttendStep]] = {
    "append": AttendStep,
    "rotary_append": RotaryAppendStep,
    "rotary_packed": RotaryPackedStep,
}


@dataclass
class _LoweredPiece(PieceStep):
    piece: Piece
    function: Function
    lengths: list[tuple[int, int]]
    """(input, dim) of the symbolic sizes, other than the batch."""

    def read_weights(self) -> list[Tensor]:
        return [read() for read in self.piece.parameters]

    def run(self, arguments: list[Tensor]) -> Sequence[Tensor]:
        # torch.export treats sizes 0 and 1 as different programs: those run the same graph uncompiled.
        compiled = all(arguments[i].shape[d] > 1 for i, d in self.lengths)
        return (self.function if compiled else self.piece.module)(*arguments, *self.read_weights())


class Program(StepProgram):
    """A lowered graph, bound to compiled (or plain) pieces."""

    def __init__(self, lowered: PiecewiseGraph, passes: list[PassResult], compiler: Compiler | None) -> None:
        self.passes = passes
        """What the passes did and refused on the way here."""
        slots: dict[str, int] = {}

        def slot(names: Sequence[str]) -> list[int]:
            return [slots.setdefault(name, len(slots)) for name in names]

        slot(lowered.inputs)
        steps: list[Step] = []
        for step in lowered.steps if compiler is None else compiler.steps(lowered):
            if isinstance(step, Piece):
                function: Function = step.module if compiler is None else compiler.compile_piece(step, lowered)
                steps.append(_LoweredPiece(slot(step.inputs), slot(step.outputs), step, function, _lengths(step)))
            elif isinstance(step, AttendPoint):
                kind, places = _ATTEND_STEPS[step.kind], (slot(step.inputs), slot(step.outputs))
                steps.append(kind(*places, step.scale, step.window, step.softcap))
            else:
                [stream] = slot([step.stream])
                steps.append(ExitStep(slot(step.inputs), slot(step.outputs), step.layer, stream, step.dims, step.gate))
        outputs = slot(lowered.outputs)
        super().__init__(steps, outputs, len(slots), lowered.kv, lowered.prompt_state)


def _lengths(piece: Piece) -> list[tuple[int, int]]:
    return [
        (i, dim)
        for i, example in enumerate(piece.examples[: len(piece.inputs)])
        for dim, size in enumerate(example.shape)
        if dim > 0 and type(size) is not int
    ]
