"""fold_co_adapters: fold a co-attention layer's plain adapters into the linears behind them, at compile time, exactly.

They have no router, so AD(x) = R x + b with R and b constant, and W (R x + b) + bias = (W R) x + (W b + bias). That
concerns q, k and v of a kept self attention, q of a kept cross attention, and the FFN's first linear; residuals go
around the adapter, as before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vte_compile.adapters import PlainAdapter, StaticRouter
from vte_compile.folding import LinearLayer, affine, blend, fold_linear, rounding_error
from vte_compile.passes.manager import PassResult, Refusal
from vte_compile.passes.post_norm import Sublayer, find_sublayers

if TYPE_CHECKING:
    from vte_compile.capture.co_attention import CoAttentionGraph
    from vte_compile.plan.co_attention import CoAttention


@dataclass
class FoldResult(PassResult):
    """What was folded, and what rounding it to the model's dtype cost."""

    rounding: dict[str, float] = field(default_factory=dict)
    """By path of the folded weight or bias: relative, in the Frobenius norm."""


def fold_co_adapters(graph: CoAttentionGraph, part: CoAttention) -> FoldResult:
    """Fold the part's plain adapters; ``applied`` counts them.

    The graph gets weights of its own, under the same paths: the model's are not modified.
    """
    result = FoldResult("fold_co_adapters")
    adapters = (part.self_adapter, part.cross_adapter, part.ffn_adapter)
    if not any(isinstance(adapter, PlainAdapter) for adapter in adapters):
        return result
    found = find_sublayers(graph, part.level)
    if isinstance(found, Refusal):
        result.refusals.append(found)
        return result
    for sublayer, adapter in zip((found.self_attention, found.cross_attention, found.ffn), adapters, strict=True):
        if isinstance(adapter, PlainAdapter):
            _fold(graph, sublayer, adapter, result)
            result.applied += 1
    return result


def _fold(graph: CoAttentionGraph, sublayer: Sublayer, adapter: PlainAdapter, result: FoldResult) -> None:
    assert isinstance(adapter.router, StaticRouter)
    parts = affine(adapter)
    for linear in sublayer.first:
        _, *nodes = linear.args
        weight_path, bias_path = (_path(graph, node) for node in nodes)
        weight, bias = graph.weights[weight_path], graph.weights[bias_path]
        folded = fold_linear(parts, LinearLayer(weight, bias))
        for path, experts, before in ((weight_path, folded.base, weight), (bias_path, folded.const, bias)):
            exact = blend(adapter.router, experts)
            graph.weights[path] = exact.to(before.dtype)
            result.rounding[path] = rounding_error([exact], before.dtype)


def _path(graph: CoAttentionGraph, node: Any) -> str:
    path = graph.path_of(node)
    assert path is not None
    return path
