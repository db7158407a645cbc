"""optimize() for models with co-attention layers (BridgeTower): the same model, with those layers rewritten."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from vte_compile.capture.co_attention import CoAttentionGraph, built_alike, capture_co_attention
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.families.co_attention import CoAttentionSpec, find_co_attention, with_layers
from vte_compile.inference_only import InferenceOnly
from vte_compile.passes import CO_ATTENTION_PASSES, PassResult, run_passes
from vte_compile.passes.fold_co_adapters import FoldResult
from vte_compile.plan import Plan
from vte_compile.plan.co_attention import SIDES, CoAttention
from vte_compile.runtime.co_attention import RewrittenCoAttentionLayer
from vte_compile.runtime.inductor import PieceCompiler, find_backend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
ModelT = TypeVar("ModelT", bound="PreTrainedModel")


def optimize_co_attention(model: ModelT, plan: Plan, compile: bool | None, fold: bool | None) -> ModelT:
    """See :func:`vte_compile.optimize`.

    The result shares all modules and weights with the model but its co-attention layers, and in these all weights that
    the plan leaves as they are. It holds nothing of deleted attentions, nor of weights that adapters were folded into.
    In its outputs, the ``attentions`` of these layers are None.

    Raises:
        InputError: The model is an optimized one; or not to fold was asked for.
        PlanMismatchError: The plan does not fit the model.
        UnsupportedModelError: A layer is not of the form that the plan's part is for.
        CaptureError: A layer could not be traced or compiled.
    """
    spec = find_co_attention(model)
    assert spec is not None
    if any(isinstance(layer, RewrittenCoAttentionLayer) for layer in (*spec.text, *spec.image)):
        raise InputError(
            "model: is optimized already, and what its plan deletes or folds is gone: optimize the original model."
        )
    if fold is False:
        raise InputError("fold=False: adapters of co-attention layers are always folded, which costs nothing.")
    plan.check(model)
    parameter = next(model.parameters())
    compiler = PieceCompiler() if find_backend(parameter.device, compile) else None
    parts = {part.place: part for part in plan.co_attention}
    layers: dict[str, list[nn.Module]] = {side: [] for side in SIDES}
    traced: list[tuple[nn.Module, CoAttentionGraph]] = []
    for index, side in enumerate(SIDES):
        for level in range(spec.levels):
            part = parts.get((index, level), CoAttention(side, level))
            graph = _trace(spec.layer(side, level), traced)
            layers[side].append(RewrittenCoAttentionLayer(graph, _rewrite(graph, part), compiler).eval())
    return _wrap(model, spec, plan, layers)


def _trace(layer: nn.Module, traced: list[tuple[nn.Module, CoAttentionGraph]]) -> CoAttentionGraph:
    """The layer's graph; layers that are built alike are traced once."""
    for other, graph in traced:
        if built_alike(layer, other):
            return graph.clone(layer)
    traced.append((layer, capture_co_attention(layer)))
    return traced[-1][1].clone(layer)


def _rewrite(graph: CoAttentionGraph, part: CoAttention) -> list[PassResult]:
    results = run_passes(CO_ATTENTION_PASSES, graph, part)
    for result in results:
        for refusal in result.refusals:
            # Without it the layer would give other numbers than the plan says.
            raise UnsupportedModelError(
                f"co_attention: {part.side} level {part.level}: {result.name} refused at {refusal.node}: "
                f"{refusal.reason}"
            )
        if isinstance(result, FoldResult) and result.rounding:
            path, error = max(result.rounding.items(), key=lambda item: item[1])
            logger.info(
                "optimize: %s level %d: rounding folded weights has a relative error of up to %.1e (%s)",
                part.side,
                part.level,
                error,
                path,
            )
    return results


def _wrap(model: ModelT, spec: CoAttentionSpec, plan: Plan, layers: dict[str, list[nn.Module]]) -> ModelT:
    """A shallow copy of the model with these layers, of a subclass that carries the same name."""
    base = type(model)
    fast = with_layers(model, spec, layers)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # whoever traces the model decides
            return base.forward(self, *args, **kwargs)
        with torch.no_grad():
            return base.forward(self, *args, **kwargs)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    fast.__class__ = type(base.__name__, (OptimizedCoAttention, base), {**names, "forward": forward})
    fast.training = False  # of this object; the shared modules stay as they are
    fast._vte_plan = plan  # type: ignore[assignment]
    return fast


class OptimizedCoAttention(InferenceOnly):
    """What :func:`optimize_co_attention` adds to a model's class."""

    _vte_plan: Plan

    @property
    def plan(self) -> Plan:
        """The plan that was applied."""
        return self._vte_plan

    @property
    def passes(self) -> dict[str, list[PassResult]]:
        """What the passes did, by layer, such as "text level 0"."""
        spec: Any = find_co_attention(self)  # type: ignore[arg-type]
        return {
            f"{side} level {level}": spec.layer(side, level).passes for side in SIDES for level in range(spec.levels)
        }

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Not possible.

        Raises:
            InputError: The checkpoint would lack what the plan deleted, and hold weights that adapters are folded into.
        """
        raise InputError(
            "save_pretrained: weights of the original are folded or gone: save the original model, and model.plan in "
            "the same folder, where optimize() finds it."
        )
