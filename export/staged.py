"""An optimized model as stages: for each phase the pieces of its graph and the exits between them, and all weights.

The same for every target. Equal pieces are one; weights are inputs of pieces, and each tensor is kept once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from vte_compile.errors import CaptureError, InputError, UnsupportedModelError
from vte_compile.export.block_facts import block_rule
from vte_compile.export.encoder_function import traced
from vte_compile.export.grid_facts import grid_facts
from vte_compile.export.manifest import AttendCall, ExitCall, GateWeights, ModelFacts, PhaseSteps, PieceCall, VisionCall
from vte_compile.export.vision import image_encoder
from vte_compile.live_model import LiveModel
from vte_compile.optimized_model import OptimizedModel
from vte_compile.passes.lower_piecewise import AttendPoint, ExitPoint, Piece, PiecewiseGraph, structure_key
from vte_compile.runtime.companion import NAME as COMPANION
from vte_compile.runtime.verify import packed_inputs

logger = logging.getLogger(__name__)
_PHASES = (("prefill", False), ("extend", False), ("decode", True))


@dataclass
class StagedPiece:
    """A graph to compile: values and weights in, values out."""

    name: str
    module: fx.GraphModule
    key: str
    """Equal for pieces that do the same."""
    examples: list[Tensor]
    """For all inputs and then all weights: tensors, fake ones where sizes are symbolic."""
    tried: list[list[Tensor]] = field(default_factory=list)
    """Inputs to compare what is compiled with, where not any will do."""
    shortest: int = 1
    """It is given no sequences shorter than that."""


@dataclass
class Staged:
    """All that an engine is made of. Pieces are called by their name, which a target makes a file's path."""

    model: ModelFacts
    embedding: str
    routed: bool
    pieces: list[StagedPiece] = field(default_factory=list)
    phases: dict[str, PhaseSteps] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    vision: VisionCall | None = None
    vision_missing: str | None = None

    def add_piece(self, piece: StagedPiece) -> str:
        """The name of the piece, or of an equal one that is there."""
        for known in self.pieces:
            if known.key == piece.key:
                known.shortest = min(known.shortest, piece.shortest)
                return known.name
        self.pieces.append(piece)
        return piece.name

    def add_weight(self, name: str, tensor: Tensor) -> str:
        """The name under which a tensor is kept: another one if it is there already (tied weights)."""
        for known, other in self.weights.items():
            if other is tensor:
                return known
        unique, count = name, 1
        while unique in self.weights:  # constants that tracing lifted have the same names in all phases
            unique, count = f"{name}.{count}", count + 1
        self.weights[unique] = tensor
        return unique


def stage(fast: Any) -> Staged:
    """Trace and lower all phases of an optimized model.

    Raises:
        InputError: Not an optimized model with a decoder.
        UnsupportedModelError: Its tokens are not embedded by a table alone, or its images are numbered in a way no
            engine knows; or its experts run as grouped products.
        CaptureError: A phase could not be traced or rewritten.
    """
    check_optimized(fast)
    runner = fast._vte_runner
    check_experts(fast)
    staged = Staged(model_facts(fast), "", runner.routed)
    for phase, batched in _PHASES:
        lowered = runner.lowered(phase, batched=batched)
        # A companion token is in front of a prompt, and what is behind it is not empty.
        shortest = 2 if staged.model.companion and phase == "prefill" else 1
        staged.phases[phase] = _phase(staged, phase, lowered, shortest=shortest)
    if staged.model.companion:  # then prompts of a batch run one by one
        staged.add_weight(COMPANION, fast.plan.companion.to(fast._vte_spec.device, fast._vte_spec.dtype))
    elif (packed := runner.lowered_packed()) is not None:
        # Where rows end are numbers that have to fit together.
        staged.phases["packed"] = _phase(staged, "packed", packed, packed_inputs(fast._vte_spec, packed))
    staged.embedding = staged.add_weight("embed_tokens.weight", embedding_table(fast))
    if fast._vte_spec.is_multimodal:
        _add_vision(staged, fast)
    return staged


def check_optimized(fast: Any) -> None:
    """Refuse what is no optimized model.

    Raises:
        InputError: It is none.
    """
    if isinstance(fast, LiveModel):
        raise InputError(
            f"export: {type(fast).__name__} has code of its own, which no engine runs: pass the {fast._vte_live.path} "
            "of this one, which takes embeddings; or optimize the checkpoint as a class of transformers or vte_compile "
            "(docs/models.md, Models with code of their own)."
        )
    if not isinstance(fast, OptimizedModel):
        raise InputError(
            f"export: expected what vte_compile.optimize() returned for a model with a decoder, got a "
            f"{type(fast).__name__}: call optimize(model, plan) first (plan=Plan() changes nothing)."
        )


def check_experts(fast: Any) -> None:
    """Refuse mixtures whose experts are traced as grouped products, an operator that engines do not have.

    Raises:
        UnsupportedModelError: They are.
    """
    spec = fast._vte_spec
    if spec.has_experts and spec.config._experts_implementation != "batched_mm":
        raise UnsupportedModelError(
            f"{type(fast).__name__}: engines have no operator for experts that run as "
            f"{spec.config._experts_implementation!r}: call model.set_experts_implementation('batched_mm') before "
            "optimize()."
        )


def model_facts(fast: Any) -> ModelFacts:
    """What a manifest says of a model.

    Raises:
        UnsupportedModelError: Its multimodal positions, or its blocks of tokens, are not those an engine knows.
    """
    spec = fast._vte_spec
    generation = fast.generation_config
    eos = generation.eos_token_id if generation.eos_token_id is not None else spec.config.eos_token_id
    ends = [] if eos is None else [int(token) for token in (eos if isinstance(eos, Sequence) else [eos])]
    pad = generation.pad_token_id
    return ModelFacts(
        name=type(fast).__name__,
        dtype=str(spec.dtype).removeprefix("torch."),
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        vocab_size=len(fast.get_input_embeddings().weight),
        visual_token_ids=list(spec.visual_token_ids),
        eos_token_ids=ends,
        pad_token_id=int(pad) if pad is not None else (ends[0] if ends else 0),
        position_rows=spec.position_rows,
        grids=grid_facts(fast),
        deepstack=spec.deepstack,
        blocks=block_rule(fast),
        companion=fast.plan.companion is not None,
    )


@torch.no_grad()
def embedding_table(fast: Any) -> Tensor:
    """What the model's embedding gives of each token, [vocabulary, C]: its weight, or a table of its own (Gemma).

    Raises:
        UnsupportedModelError: It does more than to look tokens up.
    """
    module: nn.Module = fast.get_input_embeddings()
    weight = module.get_parameter("weight")
    ids = torch.arange(min(len(weight), 64), device=weight.device)[None]
    if torch.equal(module(ids), F.embedding(ids, weight)):
        return weight
    table: Tensor = module(torch.arange(len(weight), device=weight.device))
    turned = ids.flip(1)
    if table.shape != weight.shape or not torch.equal(module(turned), F.embedding(turned, table)):
        raise UnsupportedModelError(
            f"{type(fast).__name__}: its {type(module).__name__} does more than look tokens up in a table: engines "
            "cannot embed its tokens."
        )
    return table


def _phase(
    staged: Staged,
    phase: str,
    lowered: PiecewiseGraph,
    tried: Mapping[str, list[list[Tensor]]] | None = None,
    shortest: int = 1,
) -> PhaseSteps:
    steps = [_call(staged, f"{phase}_{i}", step, tried or {}, shortest) for i, step in enumerate(lowered.steps)]
    return PhaseSteps(lowered.inputs, steps, lowered.outputs, lowered.kv, lowered.prompt_state)


def _call(
    staged: Staged,
    name: str,
    step: Piece | ExitPoint | AttendPoint,
    tried: Mapping[str, list[list[Tensor]]],
    shortest: int,
) -> PieceCall | ExitCall | AttendCall:
    if isinstance(step, Piece):
        return _piece_call(staged, name, step, tried.get(step.key, [])[:1], shortest)
    if isinstance(step, AttendPoint):
        assert step.kind == "append"  # engines attend with torch's own attention
        return AttendCall(step.inputs, step.outputs, step.scale, step.window, step.softcap)
    return _exit_call(staged, step)


def _piece_call(staged: Staged, name: str, piece: Piece, tried: list[list[Tensor]], shortest: int) -> PieceCall:
    known = staged.add_piece(StagedPiece(name, piece.module, piece.key, piece.examples, tried, shortest))
    named = zip(piece.weights, piece.parameters, strict=True)
    weights = [staged.add_weight(weight, read()) for weight, read in named]
    return PieceCall(known, piece.inputs, weights, piece.outputs)


def _exit_call(staged: Staged, point: ExitPoint) -> ExitCall:
    gate = None
    if point.gate is not None:
        read_w1, read_w2, threshold = point.gate
        w1, w2 = (
            staged.add_weight(f"exit_{point.layer}_{name}", read()) for name, read in (("w1", read_w1), ("w2", read_w2))
        )
        gate = GateWeights(w1, w2, threshold)
    return ExitCall(point.layer, point.stream, gate, point.inputs, point.dims, point.outputs)


def _add_vision(staged: Staged, fast: Any) -> None:
    try:
        encoder = image_encoder(fast)
        module, examples, weights = traced(encoder)
    except (CaptureError, UnsupportedModelError) as error:
        staged.vision_missing = str(error)
        logger.warning("export: the engine has no image encoder and takes image_features: %s", error)
        return
    key = structure_key(module.graph, examples)
    piece = staged.add_piece(StagedPiece("vision", module, key, examples, encoder.examples))
    names = [staged.add_weight(f"vision.{name}", tensor) for name, tensor in weights.items()]
    staged.vision = replace(encoder.facts, piece=piece, weights=names)
