"""torch.compile(model, backend="vte", options={"plan": ...}): the entry point.

Dynamo calls it with each graph it traced. Where the graph holds the decoder, the decoder is replaced by its rewritten
graphs, the very ones that optimize() makes; the rest of it, and graphs without decoder, go to Inductor.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.exc import InductorError
from transformers import PreTrainedModel

from vte_compile.dynamo.decoder_call import DecoderCall
from vte_compile.dynamo.handles import refuse_uncompiled_use
from vte_compile.dynamo.model_of_graph import find_model, placeholder_ids
from vte_compile.dynamo.region import Region, find_region
from vte_compile.dynamo.replace_region import Part, replace_region, split
from vte_compile.dynamo.report import Graph, record
from vte_compile.dynamo.visual import remember
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.decoder import DecoderSpec, describe
from vte_compile.families.independence import check_independence
from vte_compile.folded_weights import FoldedWeights
from vte_compile.plan import Plan
from vte_compile.runtime.decoder_runner import DecoderRunner
from vte_compile.runtime.inductor import PieceCompiler, compile_standalone, find_backend
from vte_compile.runtime.steps import Phase
from vte_compile.runtime.verify import verify_hidden

logger = logging.getLogger(__name__)
Compiled = Callable[..., Any]

# Here, where torch.compile() finds the backend, and so before anything is traced.
refuse_uncompiled_use()


@dataclass(frozen=True)
class Options:
    """What ``options=`` may hold."""

    plan: Plan | str | os.PathLike[str] | None = None
    """What to do, or the folder or hub id of it. None: only what is lossless."""
    compile: bool | None = None
    """Whether graphs run through Inductor. None: if its compiler is there (a warning says if it is not)."""
    fold: bool = True
    """Fold adapters into the weights behind them."""
    cuda_graphs: bool | None = None
    """Whether decode steps are recorded and replayed as CUDA graphs (docs/kernels.md). None: on CUDA devices."""
    visual_token_ids: Sequence[int] | None = None
    """Ids that stand for visual features, where the model's config does not name them."""

    @classmethod
    def read(cls, given: Mapping[str, Any] | None) -> Options:
        """Check what the user wrote.

        Raises:
            InputError: An option is not known, or of another type.
        """
        valid = cls.__dataclass_fields__
        given = dict(given or {})
        if unknown := sorted(given.keys() - valid.keys()):
            raise InputError(f"options: unknown {', '.join(unknown)}; valid are {', '.join(valid)}.")
        plan = given.get("plan")
        if not isinstance(plan, (Plan, str, os.PathLike, type(None))):
            raise InputError(f"options['plan']: expected a Plan, or the folder or hub id of one, got {plan!r}.")
        for name in ("compile", "fold", "cuda_graphs"):
            if given.get(name) not in (None, True, False):
                raise InputError(f"options[{name!r}]: expected True or False, got {given[name]!r}.")
        return cls(**given)


def vte(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Compiled:
    """Compile one of Dynamo's graphs.

    Args:
        gm: The graph.
        example_inputs: Its inputs; weights are the model's own parameters.
        options: See :class:`Options`.

    Raises:
        InputError: Wrong options.
        PlanError: The plan is invalid, or (PlanMismatchError) made for another model.
    """
    settings = Options.read(options)
    report = Graph(len(gm.graph.nodes))
    record(report)
    found = find_model(gm, example_inputs)
    if found is None:
        return remember(gm, lambda graph: _inductor(graph, settings))
    model, weights = found
    try:
        _refuse_training(model)
        spec = describe(model)
        _refuse_loops(model, spec)
        _refuse_unseen_features(spec)
        region = find_region(gm.graph, weights, spec.windowed, spec.attention_softcap)
        _refuse_other_features(spec, region)
        _refuse_company(model, spec)
    except UnsupportedModelError as error:
        logger.warning("backend='vte': no pass applies to this graph, it runs as Inductor compiles it: %s", error)
        report.refusal = str(error)
        return remember(gm, lambda graph: _inductor(graph, settings))
    runner = _runner(model, spec, settings)
    report.runner, report.phase = runner, _phase(region)
    return _with_call(gm, region, runner, model, settings)


def _refuse_training(model: nn.Module) -> None:
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        raise UnsupportedModelError("gradients are wanted: call the model under torch.no_grad() or inference_mode().")


def _refuse_loops(model: nn.Module, spec: DecoderSpec) -> None:
    if spec.has_experts and spec.config._experts_implementation == "eager":
        raise UnsupportedModelError(
            f"{type(model).__name__} runs its experts in a loop over those that some token chose, which splits the "
            "decoder in Dynamo: call model.set_experts_implementation('grouped_mm') before the first call."
        )


_independent: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Decoders of which it is known."""


def _refuse_company(model: nn.Module, spec: DecoderSpec) -> None:
    if spec.decoder not in _independent:
        check_independence(model, spec)
        _independent.add(spec.decoder)


def _refuse_unseen_features(spec: DecoderSpec) -> None:
    """Also decode steps: their cache would have been filled by a prefill that Dynamo left uncompiled."""
    if spec.deepstack and not torch._dynamo.config.capture_dynamic_output_shape_ops:
        raise UnsupportedModelError(
            f"{type(spec.decoder).__name__} adds features to visual tokens behind layers, whose number depends on "
            "data: set torch._dynamo.config.capture_dynamic_output_shape_ops = True before the first call, or Dynamo "
            "splits the decoder."
        )


def _refuse_other_features(spec: DecoderSpec, region: Region) -> None:
    given = max(len(region.deepstack) - 1, 0)
    if given not in (0, spec.deepstack):
        raise UnsupportedModelError(
            f"features are added behind {given} layers, where the config of {type(spec.decoder).__name__} says "
            f"{spec.deepstack}."
        )


class _NoHead(nn.Module):
    """In the place of lm_head: Dynamo's graph has the model's own behind the decoder, or in another graph."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight  # tells dtype and device

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


_runners: weakref.WeakValueDictionary[tuple[Any, ...], DecoderRunner] = weakref.WeakValueDictionary()
"""By decoder and options; those in use are kept alive, with their decoder, by what Dynamo compiled."""
_verified: weakref.WeakSet[DecoderRunner] = weakref.WeakSet()


def _runner(model: PreTrainedModel, spec: DecoderSpec, settings: Options) -> DecoderRunner:
    """The decoder's runner, which all graphs of it share."""
    given = settings.plan if isinstance(settings.plan, Plan) else os.fspath(settings.plan or "")
    if settings.visual_token_ids is not None:
        ids = tuple(settings.visual_token_ids)
    elif spec.is_multimodal or (isinstance(given, Plan) and not given.exits):
        ids = spec.visual_token_ids
    else:
        ids = placeholder_ids(model)
    choices = (settings.compile, settings.fold, settings.cuda_graphs)
    key = (id(spec.decoder), id(given) if isinstance(given, Plan) else given, *choices, ids)
    if (runner := _runners.get(key)) is not None:
        return runner
    plan = given if isinstance(given, Plan) else Plan.from_pretrained(given) if given else Plan()
    plan.check(model)
    compiler = PieceCompiler() if find_backend(spec.device, settings.compile) else None
    no_head = _NoHead(next(spec.decoder.parameters()))
    headless = replace(spec, lm_head=no_head, logit_softcap=None, visual_token_ids=ids)
    folded = FoldedWeights(settings.fold)
    runner = DecoderRunner(headless, plan, compiler, folded, cuda_graphs=settings.cuda_graphs)
    _runners[key] = runner
    return runner


def _phase(region: Region) -> Phase:
    if not region.past:
        return "prefill"
    tokens = region.embeds.meta["example_value"].shape[1]
    # A symbolic number of tokens is more than one; to compare it would specialize the graph.
    return "decode" if isinstance(tokens, int) and tokens == 1 else "extend"


def _with_call(
    gm: fx.GraphModule, region: Region, runner: DecoderRunner, model: PreTrainedModel, settings: Options
) -> Compiled:
    def verify() -> None:
        # At the first run and not here: Dynamo is in the middle of tracing. All graphs have the same runner.
        if runner not in _verified:
            verify_hidden(model, runner)
            runner.unused_weights()  # refuses adapters that cannot apply
            _verified.add(runner)

    layout = replace_region(gm, region)
    before, replaced, behind = split(gm)
    steps: list[tuple[Part, Compiled]] = [
        (before, _inductor(before.module, settings)),
        (replaced, DecoderCall(runner, layout, verify)),
        (behind, _inductor(behind.module, settings)),
    ]
    inputs = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    results: Any = next(n for n in gm.graph.nodes if n.op == "output").args[0]

    def run(*args: Any) -> tuple[Any, ...]:
        values = dict(zip(inputs, args, strict=True))
        for part, function in steps:
            values |= zip(part.outputs, function(*[values[name] for name in part.inputs]), strict=True)
        return tuple(values[n.name] if isinstance(n, fx.Node) else n for n in results)

    return run


def _specialize_numbers(gm: fx.GraphModule) -> None:
    """Make constants of Python's floats, with a guard each: with dynamic=True Dynamo reads them from tensors.

    Inductor, without torch.compile around it, takes no such reads.
    """
    for node in gm.graph.find_nodes(op="call_method", target="item"):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymFloat) and value.node.has_hint():
            node.replace_all_uses_with(float(value))
            gm.graph.erase_node(node)


def _inductor(gm: fx.GraphModule, settings: Options) -> Compiled:
    """Compile a graph as it is."""
    _specialize_numbers(gm)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    device = next((v.device for n in placeholders if isinstance(v := n.meta.get("example_value"), Tensor)), None)
    if not any(n.op.startswith("call") for n in gm.graph.nodes):
        return gm.forward
    if not find_backend(device or torch.device("cpu"), settings.compile):
        return gm.forward
    examples = [n.meta["example_value"] for n in placeholders]
    try:
        return compile_standalone(gm, examples, "from_tracing_context")
    except InductorError as error:
        # Of what surrounds the decoder; its own pieces never run uncompiled without having been asked to.
        logger.warning("backend='vte': Inductor failed on a graph beside the decoder, which runs uncompiled: %s", error)
        return gm.forward
