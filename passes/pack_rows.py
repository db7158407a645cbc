"""pack_rows: turn a prefill graph of one row into one of many rows that stand one behind the other.

All but attention computes each token by itself, so only attentions have to know where rows end: they become
``vte::packed_attention``, with an input ``cu_seqlens`` [B + 1] int32 behind ``position_ids``. That nothing else mixes
tokens is asked of the numbers, before such a graph is used (runtime/verify.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from vte_compile.families.token_blocks import NAME as BLOCKS
from vte_compile.kernels.packed_attention import packed_attention
from vte_compile.passes.manager import PassResult, PassSettings, Refusal
from vte_compile.passes.residual import CAUSAL, SDPA

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

_EXAMPLE_ROWS = 7


def pack_rows(graph: DecoderGraph, settings: PassSettings) -> PassResult:
    """Rewrite graphs of the phase "packed"; ``applied`` counts the attentions.

    A graph that it refuses becomes one of the phase "prefill" again.
    """
    result = PassResult("pack_rows")
    if graph.phase != "packed":
        return result
    attentions = [n for n in graph.graph.nodes if n.target in (SDPA, CAUSAL)]
    if refusal := _refuse(graph, attentions):
        graph.phase = "prefill"
        result.refusals.append(refusal)
        return result
    with graph.graph.inserting_after(graph.placeholder("position_ids")):
        bounds = graph.graph.placeholder("cu_seqlens")
    bounds.meta["val"] = _example(graph.placeholder("inputs_embeds").meta["val"])
    for node in attentions:
        query, key, value = node.args[:3]
        options: Any = node.args[4:] if node.target is CAUSAL else (node.kwargs.get("scale"),)
        node.target = packed_attention._opoverload
        node.args, node.kwargs = (query, key, value, bounds, bounds, *options), {}
        result.applied += 1
    return result


def _refuse(graph: DecoderGraph, attentions: list[fx.Node]) -> Refusal | None:
    if graph.prompt_state:
        kinds = ", ".join(kind.name for kind in graph.prompt_state)
        return Refusal(f"adapters take means over the tokens of a row ({kinds}).", "inputs_embeds")
    if graph.spec.has_blocks:
        return Refusal("tokens attend to later ones of their block, through masks that packed rows lack.", BLOCKS)
    for node in attentions:
        arguments: Any = node.args
        mask = arguments[3] if len(arguments) > 3 else None
        causal = node.target is CAUSAL or (len(arguments) > 5 and bool(arguments[5]))
        if mask is not None or not causal or node.kwargs.keys() - {"scale", "enable_gqa"}:
            return Refusal(f"{node.name} is not known to be plain causal.", node.name, graph.layer_of.get(node))
    return None


def _example(embeds: torch.Tensor) -> torch.Tensor:
    """A fake ``cu_seqlens`` whose length is a symbol."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    mode: Any = embeds.fake_mode  # type: ignore[attr-defined]
    dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    example = torch.zeros(_EXAMPLE_ROWS + 1, dtype=torch.int32, device=embeds.device)
    fake: torch.Tensor = mode.from_tensor(example, source=ConstantSource("cu_seqlens"), symbolic_context=dynamic)
    return fake
