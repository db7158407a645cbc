"""An engine's folder as programs: checked, its weights and compiled pieces loaded, its steps bound to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
from torch import Tensor

# Packages of pieces call these by name.
import vte_compile.kernels.causal_attention
import vte_compile.kernels.packed_attention  # noqa: F401
from vte_compile.export import aoti
from vte_compile.export.folder import check_files
from vte_compile.export.manifest import AttendCall, ExitCall, Manifest, PhaseSteps, PieceCall
from vte_compile.runtime.companion import NAME as COMPANION
from vte_compile.runtime.runner import RowRunner
from vte_compile.runtime.steps import AttendStep, ExitStep, Phase, PieceStep, Step, StepProgram


@dataclass(frozen=True)
class Loaded:
    """An engine's parts, all there."""

    manifest: Manifest
    weights: dict[str, Tensor]
    programs: dict[str, StepProgram]
    """By phase."""
    encoder: aoti.Function | None
    """Of one image, with its weights behind it."""


def load(folder: Path, manifest: Manifest) -> Loaded:
    """Check a folder against its manifest, and then load it.

    Raises:
        EngineError: See :func:`vte_compile.load_engine`.
    """
    aoti.check_built(manifest.built)
    check_files(folder, manifest.files)
    weights: dict[str, Tensor] = {}
    for name in manifest.weights:
        weights |= safetensors.torch.load_file(folder / name, device=manifest.built.device)
    files = {s.piece for phase in manifest.phases.values() for s in phase.steps if isinstance(s, PieceCall)}
    if manifest.vision is not None:
        files.add(manifest.vision.piece)
    pieces = {name: aoti.load_piece(folder / name) for name in sorted(files)}
    programs = {name: _program(phase, weights, pieces) for name, phase in manifest.phases.items()}
    return Loaded(manifest, weights, programs, None if manifest.vision is None else pieces[manifest.vision.piece])


@dataclass
class _LoadedPiece(PieceStep):
    function: aoti.Function
    weights: list[Tensor]

    def run(self, arguments: list[Tensor]) -> Sequence[Tensor]:
        return self.function([*(a.contiguous() for a in arguments), *self.weights])


def _program(phase: PhaseSteps, weights: Mapping[str, Tensor], pieces: Mapping[str, aoti.Function]) -> StepProgram:
    slots: dict[str, int] = {}

    def slot(names: Sequence[str]) -> list[int]:
        return [slots.setdefault(name, len(slots)) for name in names]

    slot(phase.inputs)
    steps: list[Step] = []
    for step in phase.steps:
        if isinstance(step, PieceCall):
            own = [weights[name] for name in step.weights]
            steps.append(_LoadedPiece(slot(step.inputs), slot(step.outputs), pieces[step.piece], own))
        elif isinstance(step, AttendCall):
            settings = step.scale, step.window, step.softcap
            steps.append(AttendStep(slot(step.attend), slot(step.outputs), *settings))
        else:
            [stream] = slot([step.stream])
            gate = _gate(step, weights)
            steps.append(ExitStep(slot(step.inputs), slot(step.outputs), step.layer, stream, step.dims, gate))
    outputs = slot(phase.outputs)
    return StepProgram(steps, outputs, len(slots), phase.kv, phase.prompt_state)


def _gate(step: ExitCall, weights: Mapping[str, Tensor]) -> tuple[partial[Tensor], partial[Tensor], float] | None:
    if step.gate is None:
        return None
    w1, w2 = (partial(weights.__getitem__, name) for name in (step.gate.w1, step.gate.w2))
    return w1, w2, step.gate.threshold


class EngineRunner(RowRunner):
    """Rows and batches over an engine's programs, of which there is one per phase."""

    def __init__(self, loaded: Loaded) -> None:
        steps = [step for phase in loaded.manifest.phases.values() for step in phase.steps]
        exits = any(isinstance(step, ExitCall) for step in steps)
        rows = loaded.manifest.model.position_rows
        companion = loaded.weights[COMPANION] if loaded.manifest.model.companion else None
        super().__init__(exits, loaded.manifest.routed, False, rows, companion)
        self._programs = loaded.programs

    def packed_program(self, last: bool) -> StepProgram | None:
        """Of prompts at once, with the logits of each row's last token."""
        return self._programs.get("packed")

    def program(
        self, phase: Phase, *, batched: bool = False, last: bool = True, one_prompt: bool = True
    ) -> StepProgram:
        """The program of a phase: with the logits of the last token, for rows from any prompts."""
        return self._programs[phase]
