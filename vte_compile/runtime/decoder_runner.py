"""The programs of a transformers decoder: traced, rewritten and compiled when first needed."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vte_compile.adapters import Router
from vte_compile.capture import DecoderGraph, capture, capture_chunk
from vte_compile.errors import UnsupportedModelError
from vte_compile.families.decoder import DecoderSpec
from vte_compile.folded_weights import FoldedWeights
from vte_compile.passes import PASSES, PassResult, PassSettings, run_passes
from vte_compile.passes.lower_piecewise import PiecewiseGraph, lower_piecewise
from vte_compile.plan import Plan
from vte_compile.runtime.decode_graphs import DecodeGraphs
from vte_compile.runtime.program import Program
from vte_compile.runtime.runner import RowRunner
from vte_compile.runtime.steps import Phase, StepProgram
from vte_compile.runtime.verify import fusing_error, packing_error

if TYPE_CHECKING:
    from vte_compile.runtime.program import Compiler

logger = logging.getLogger(__name__)
# What these refuse is something the user asked for.
_ASKED_FOR = ("insert_exits", "fold_adapters", "skip_attention")
_Key = tuple[Phase, bool, bool, bool, torch.dtype, torch.device]
"""Phase, batched, logits of the last token only, all rows from one prompt, and the weights' dtype and device."""


class DecoderRunner(RowRunner):
    """A decoder's programs, built when first needed and rebuilt when the model moved to another dtype or device.

    Args:
        spec: The decoder.
        plan: What its graphs are to do.
        compiler: Of pieces; None: they run uncompiled.
        folded: Weights that adapters were folded into.
        fuse_attention: Attentions as fused kernels; None: on CUDA devices.
        cuda_graphs: Decode steps with fused attentions as CUDA graphs; None: on CUDA devices.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        plan: Plan,
        compiler: Compiler | None,
        folded: FoldedWeights | None = None,
        fuse_attention: bool | None = None,
        cuda_graphs: bool | None = None,
    ) -> None:
        self.spec, self.plan, self.compiler = spec, plan, compiler
        self.fuse_attention, self.cuda_graphs = fuse_attention, cuda_graphs
        self.folded = FoldedWeights() if folded is None else folded
        adapters = [part.adapter for parts in (plan.adapters, plan.skips) for part in parts if part.adapter is not None]
        routed = any(isinstance(adapter.router, Router) for adapter in adapters)
        super().__init__(bool(plan.exits), routed, True, spec.position_rows, plan.companion)
        self._captures: dict[tuple[Any, ...], DecoderGraph] = {}
        self._graphs: dict[tuple[_Key, bool], tuple[PiecewiseGraph, list[PassResult]]] = {}
        """By key, and whether attentions are fused."""
        self._programs: dict[_Key, Program] = {}
        self._fused: dict[_Key, bool] = {}
        """Whether attentions are fused, of graphs that were asked for."""
        self._unpacked: dict[_Key, str] = {}
        """Why prompts are not packed; "" if they are."""
        self._decode_graphs: dict[StepProgram, DecodeGraphs | None] = {}
        self._lock = threading.RLock()

    def with_plan(self, plan: Plan, folded: FoldedWeights | None = None) -> DecoderRunner:
        """A runner of the same decoder for another plan, which shares what was traced and compiled."""
        other = DecoderRunner(self.spec, plan, self.compiler, folded, self.fuse_attention, self.cuda_graphs)
        other._captures, other._lock = self._captures, self._lock
        return other

    def rebound(self, spec: DecoderSpec) -> DecoderRunner:
        """The same runner of the same decoder, of which some weights were freed."""
        other = DecoderRunner(spec, self.plan, self.compiler, self.folded, self.fuse_attention, self.cuda_graphs)
        other._captures = {key: graph.rebound(spec) for key, graph in self._captures.items()}
        return other

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of a model rebuild their programs: those are bound to this model's weights.
        return {
            "spec": self.spec,
            "plan": self.plan,
            "compiler": self.compiler,  # which leaves what it compiled
            "folded": self.folded,
            "fuse_attention": self.fuse_attention,
            "cuda_graphs": self.cuda_graphs,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def program(self, phase: Phase, *, batched: bool = False, last: bool = True, one_prompt: bool = True) -> Program:
        """The program of one phase; ``last``: with the logits of the last token only.

        Raises:
            CaptureError: The decoder could not be traced or rewritten.
        """
        key = (phase, batched, last or phase == "decode", one_prompt, self.spec.dtype, self.spec.device)
        with self._lock:
            if key not in self._programs:
                self._programs[key] = Program(*self._lowered(key, self._fuses(key)), self.compiler)
            return self._programs[key]

    def decode_graphs(self, program: StepProgram) -> DecodeGraphs | None:
        """What records and replays the steps of a decode program; None if they run as they are."""
        wanted = self.spec.device.type == "cuda" if self.cuda_graphs is None else self.cuda_graphs
        if not wanted:
            return None
        with self._lock:
            if program not in self._decode_graphs:
                if not program.takes_ends:
                    level = logging.WARNING if self.cuda_graphs else logging.INFO
                    logger.log(level, "decode steps run without CUDA graphs: their attention is not fused.")
                self._decode_graphs[program] = DecodeGraphs(program) if program.takes_ends else None
            return self._decode_graphs[program]

    def lowered(self, phase: Phase, *, batched: bool) -> PiecewiseGraph:
        """What :meth:`program` compiles, with the logits of the last token only, rows from any prompts, and torch's own
        attention: for engines.

        Raises:
            CaptureError: The decoder could not be traced or rewritten.
        """
        one_prompt = not self.routed and phase != "chunk"
        return self._lowered((phase, batched, True, one_prompt, self.spec.dtype, self.spec.device), False)[0]

    def packed_program(self, last: bool) -> Program | None:
        """The program of a packed prefill; None, with a message to the log, if the graph cannot be packed.

        Args:
            last: With the logits of each row's last token only.
        """
        if self.compiler is not None and not self.compiler.packs:
            return None
        key: _Key = ("packed", False, last, True, self.spec.dtype, self.spec.device)
        if key not in self._unpacked:
            with self._lock:
                self._unpacked.setdefault(key, self._why_not_packed(key, self._fuses(key)))
                if reason := self._unpacked[key]:
                    logger.info("prompts of a batch run one by one: %s", reason)
        return None if self._unpacked[key] else self.program("packed", last=last)

    def lowered_packed(self) -> PiecewiseGraph | None:
        """What :meth:`lowered` gives, of a packed prefill; None, with a message to the log, if it cannot be packed.

        Raises:
            CaptureError: The decoder could not be traced or rewritten.
        """
        key: _Key = ("packed", False, True, True, self.spec.dtype, self.spec.device)
        if reason := self._why_not_packed(key, False):
            logger.info("export: the engine runs prompts of a batch one by one: %s", reason)
            return None
        return self._lowered(key, False)[0]

    def _why_not_packed(self, key: _Key, fuse: bool) -> str:
        lowered, results = self._lowered(key, fuse)
        for refusal in (r for result in results if result.name == "pack_rows" for r in result.refusals):
            return refusal.reason
        *_, last, one_prompt, dtype, device = key
        alone, _ = self._lowered(("prefill", False, last, one_prompt, dtype, device), False)
        error = packing_error(self.spec, Program(lowered, [], None), Program(alone, [], None))
        return "" if error is None else f"packed rows differ from rows alone by {error:.1e}, relative to the largest."

    def uncompiled_prefill(self) -> Program:
        """The prefill program without Inductor, to look at its numbers before compiling anything."""
        key: _Key = ("prefill", False, True, True, self.spec.dtype, self.spec.device)
        return Program(*self._lowered(key, False), None)

    def _fuses(self, key: _Key) -> bool:
        """Whether the attentions of a graph are fused: asked for, done, and with the numbers of torch's own."""
        wanted = self.spec.device.type == "cuda" if self.fuse_attention is None else self.fuse_attention
        if not wanted or key[0] not in ("packed", "decode"):
            return False
        if key not in self._fused:
            reason = self._why_not_fused(key)
            if reason:
                logger.warning(
                    "%s: attention stays torch's own: %s Please report this, with the GPU's name (vte-compile env).",
                    key[0],
                    reason,
                )
            self._fused[key] = not reason
        return self._fused[key]

    def _why_not_fused(self, key: _Key) -> str:
        """What is wrong with the kernels here; "" if nothing is, or if the pass refused by itself."""
        lowered, results = self._lowered(key, True)
        if not any(result.name == "fuse_attention" and result.applied for result in results):
            return ""
        own, _ = self._lowered(key, False)
        fused, unfused = (Program(graph, [], None) for graph in (lowered, own))
        try:
            error = fusing_error(self.spec, fused, unfused, lowered.input_examples)
        except Exception as problem:  # a kernel that Triton cannot compile, or that takes more than this GPU has
            return f"the fused kernels do not run: {type(problem).__name__}: {problem}"
        return "" if error is None else f"the fused kernels differ from it by {error:.1e}, relative to the largest."

    def unused_weights(self) -> list[str]:
        """Names in the decoder of the layers' weights that the model's forward reads and the rewritten graphs do not.

        Raises:
            UnsupportedModelError: An adapter of the plan could not be applied.
        """
        weights: set[str] = set()
        for one_prompt in (True, False) if self.routed else (True,):
            key: _Key = ("prefill", False, True, one_prompt, self.spec.dtype, self.spec.device)
            lowered, results = self._lowered(key, False)
            weights |= lowered.weights
            for refusal in (r for result in results if result.name == "fold_adapters" for r in result.refusals):
                raise UnsupportedModelError(f"layer {refusal.layer}: its adapter cannot apply: {refusal.reason}")
        captured = self._captures["prefill", False, self.spec.dtype, self.spec.device]
        # The same tensor may have several names (tied weights): it is unused if none of them is used.
        used = {id(captured.parameters[name]()) for name in captured.parameters.keys() & weights}
        read = {id(read()) for read in captured.parameters.values()}
        decoder = self.spec.decoder
        named = (*decoder.named_parameters(remove_duplicate=False), *decoder.named_buffers(remove_duplicate=False))
        return [name for name, value in named if name.startswith("layers.") and id(value) in read - used]

    def refused(self, phase: Phase) -> str | None:
        """What the user asked for and a pass refused in the graph of a phase, and why."""
        for result in self.pass_results(phase):
            for refusal in result.refusals if result.name in _ASKED_FOR else ():
                return f"{result.name} refused in layer {refusal.layer}: {refusal.reason}"
        return None

    def pass_results(self, phase: Phase) -> list[PassResult]:
        """What the passes did in the graph of a phase (in the form that was lowered first); [] before it is."""
        return next((results for (key, _), (_, results) in self._graphs.items() if key[0] == phase), [])

    def _lowered(self, key: _Key, fuse: bool) -> tuple[PiecewiseGraph, list[PassResult]]:
        if (key, fuse) not in self._graphs:
            phase, batched, last, one_prompt, *where = key
            # Packed rows are a rewritten prefill.
            of_phase: Phase = "prefill" if phase == "packed" else phase
            traced = (of_phase, batched, *where)
            if traced not in self._captures:
                chunk = phase == "chunk"
                traced_graph = capture_chunk(self.spec) if chunk else capture(self.spec, of_phase, batched=batched)
                self._captures[traced] = traced_graph
            graph = replace(self._captures[traced].clone(), phase=phase)
            results = run_passes(PASSES, graph, PassSettings(self.plan, last, one_prompt, self.folded, fuse))
            for result in results:
                for refusal in result.refusals:
                    level = logging.WARNING if result.name in _ASKED_FOR else logging.DEBUG
                    logger.log(
                        level,
                        "%s refused in the %s graph, layer %s: %s",
                        result.name,
                        phase,
                        refusal.layer,
                        refusal.reason,
                    )
            self._graphs[key, fuse] = lower_piecewise(graph), results
        return self._graphs[key, fuse]
