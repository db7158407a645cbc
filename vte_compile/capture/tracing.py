"""torch.export of a module that has a decoder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from vte_compile.capture.decoder_graph import DecoderGraph, reader
from vte_compile.capture.model_state import attention_implementation, evaluating, traceable_experts
from vte_compile.capture.repeated_layers import (
    NotRepeatable,
    layer_kinds,
    layers_to_trace,
    repeat_layers,
    with_first_layers,
)
from vte_compile.errors import CaptureError
from vte_compile.families.decoder import DecoderSpec
from vte_compile.runtime.steps import Phase

logger = logging.getLogger(__name__)


def trace(
    spec: DecoderSpec,
    wrapper: Any,
    phase: Phase,
    batched: bool,
    implementation: str,
    names: Sequence[str],
    examples: Callable[[int], tuple[tuple[Any, ...], tuple[Any, ...]]],
) -> DecoderGraph:
    """Trace a module that has the decoder, each kind of layer once if that is known to be enough.

    Args:
        spec: The decoder.
        wrapper: Has it as ``.decoder``, and all weights.
        phase: What is traced.
        batched: Whether the batch size is symbolic.
        implementation: The attention's, in AttentionInterface.
        names: Of the first inputs; behind them come keys and values of layers, and then ``kv_start_0`` and so on.
        examples: For a number of layers: the arguments, and which of their dims are symbolic.

    Raises:
        CaptureError: torch.export could not trace it.
    """
    kinds = layer_kinds(wrapper.decoder)
    for count in dict.fromkeys((layers_to_trace(kinds), len(kinds))):
        args, dynamic_shapes = examples(count)
        module = with_first_layers(wrapper, count)
        try:
            with (
                attention_implementation(spec.config, implementation),
                traceable_experts(spec.config),
                evaluating(wrapper),
                torch.no_grad(),
            ):
                exported = torch.export.export(module, args, dynamic_shapes=dynamic_shapes, strict=False)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"torch.export could not trace the {phase} of {type(spec.decoder).__name__}: {error}"
            ) from error
        traced = _named(exported, names, count)
        try:
            repeat_layers(traced, wrapper, kinds, count)
        except NotRepeatable as reason:
            logger.debug("%s: all layers are traced: %s", phase, reason)
            continue
        parameters = {n.target: reader(wrapper, traced, n.target) for n in traced.graph.nodes if n.op == "get_attr"}
        traced.recompile()
        if phase == "prefill":
            _check_heads(spec, traced)
        return DecoderGraph(traced, phase, batched, spec, parameters, kv_layers=list(range(spec.num_layers)))
    raise AssertionError("unreachable: with all layers traced, nothing is repeated")


def _check_heads(spec: DecoderSpec, traced: fx.GraphModule) -> None:
    """The other phases take keys and values of these sizes."""
    outputs: Any = next(n for n in traced.graph.nodes if n.op == "output").args[0]
    for index, node in enumerate(outputs[1:]):
        shape = node.meta["val"].shape
        if (shape[1], shape[3]) != (spec.kv_heads, spec.head_size):
            kind = "values" if index % 2 else "keys"
            raise CaptureError(
                f"layer {index // 2} of {type(spec.decoder).__name__} caches {kind} of {shape[1]} heads of {shape[3]}, "
                f"where its config says {spec.kv_heads} of {spec.head_size}: keys and values of sizes of their own "
                "(multi-head latent attention, say) are not supported so far."
            )


def _named(exported: torch.export.ExportedProgram, names: Sequence[str], layers: int) -> fx.GraphModule:
    """What torch.export traced, as a graph whose inputs have the names that passes know."""
    module = exported.module(check_guards=False)
    # Unflattening and checking the argument lists is none of our business: the flat placeholders are the interface.
    module.graph.set_codegen(fx.graph.CodeGen())
    module = fx.GraphModule(module, module.graph)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    if len(placeholders) > len(names):
        names = [*names, *(f"{kind}_{i}" for i in range(layers) for kind in ("past_key", "past_value"))]
    names = [*names, *(f"kv_start_{i}" for i in range(len(placeholders) - len(names)))]
    for node, name in zip(placeholders, names, strict=True):
        node._rename(name)
        node.target = node.name
    return module
