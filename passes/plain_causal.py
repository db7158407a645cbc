"""plain_causal: prove that a materialized mask is plain causal, and say is_causal to the attention instead.

The proof evaluates the mask's subgraph at a symbolic position: an element is a sympy expression of the indices (q, k),
arange is its index, a comparison of two is a relation. A mask whose element at (q, k) is exactly ``k <= q`` is plain
causal, for every length. Anything the evaluation does not know, a padding mask say, is a refusal.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from vte_compile.passes.manager import PassResult, PassSettings, Refusal
from vte_compile.passes.residual import SDPA

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

aten = torch.ops.aten
Index = tuple[Any, ...]
_EXACT = (torch.bool, torch.int32, torch.int64)
"""Dtypes in which positions are what sympy takes them for."""


class _Unknown(Exception):
    """The evaluation met a node it does not know."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(f"{node.name}: {why}")
        self.node = node


def plain_causal(graph: DecoderGraph, settings: PassSettings) -> PassResult:
    """Drop the masks of attentions that are plain causal; ``applied`` counts the attentions."""
    result = PassResult("plain_causal")
    for node in list(graph.graph.nodes):
        if node.target is not SDPA or _argument(node, 3, "attn_mask") is None:
            continue
        refusal = _refuse(node)
        if refusal is not None:
            result.refusals.append(Refusal(*refusal, layer=graph.layer_of.get(node)))
            continue
        query, key, value = node.args[:3]
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "is_causal", "dropout_p")}
        node.args, node.kwargs = (query, key, value, None, 0.0, True), kwargs
        result.applied += 1
    return result


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _refuse(attention: fx.Node) -> tuple[str, str] | None:
    """(reason, node name), or None if the mask is proved plain causal."""
    mask = _argument(attention, 3, "attn_mask")
    if _argument(attention, 4, "dropout_p", 0.0) or _argument(attention, 5, "is_causal", False):
        return f"{attention.name} has dropout, or is_causal besides a mask.", attention.name
    queries, keys = (_args(attention)[i].meta["val"].shape[2] for i in (0, 1))
    if _sympy(queries) != _sympy(keys):
        return f"{attention.name} has {queries} queries for {keys} keys: causal from which end?", attention.name
    value = mask.meta["val"]
    if value.dtype != torch.bool:
        return f"{mask.name} is an additive mask ({value.dtype}).", mask.name
    *batch, q, k = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "bhqk"[-value.ndim :])
    try:
        element = _element(mask, (*batch, q, k))
    except _Unknown as unknown:
        return f"the mask depends on {unknown}", unknown.node.name
    if element != sympy.Le(k, q) and element != sympy.Ge(q, k):
        return f"an element of {mask.name} is {element}, not k <= q", mask.name
    return None


def _element(node: fx.Node, index: Index) -> Any:
    """The element of a node's value at an index, as a sympy expression."""
    rule = _RULES.get(node.target) if node.op == "call_function" else None
    if rule is None:
        raise _Unknown(node, f"{node.op} {node.target}" if node.op == "call_function" else f"a {node.op}")
    if (dtype := node.meta["val"].dtype) not in _EXACT:
        raise _Unknown(node, f"{dtype}, which may round or overflow")
    return rule(node, index)


def _sympy(size: Any) -> Any:
    if isinstance(size, fx.Node):
        size = size.meta["val"]
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)


def _operand(value: Any, index: Index) -> Any:
    """An operand at an index of the result: scalars as they are, tensors broadcast."""
    if not isinstance(value, fx.Node) or isinstance(value.meta["val"], torch.SymInt):
        return _sympy(value)
    shape = value.meta["val"].shape
    own = index[len(index) - len(shape) :]
    return _element(value, tuple(sympy.Integer(0) if size == 1 else i for size, i in zip(shape, own, strict=True)))


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[fx.Node, Index], Any]:
    def rule(node: fx.Node, index: Index) -> Any:
        if node.kwargs.get("alpha", 1) != 1:
            raise _Unknown(node, "alpha")
        return function(_operand(node.args[0], index), _operand(node.args[1], index))

    return rule


def _logical(function: Callable[[Any, Any], Any]) -> Callable[[fx.Node, Index], Any]:
    truth = {0: sympy.false, 1: sympy.true}

    def rule(node: fx.Node, index: Index) -> Any:
        if any(not isinstance(n, fx.Node) or n.meta["val"].dtype != torch.bool for n in node.args):
            raise _Unknown(node, "a logical operation on numbers")
        a, b = (_operand(n, index) for n in node.args)
        return function(truth.get(a, a), truth.get(b, b))

    return rule


def _arange(node: fx.Node, index: Index) -> Any:
    start = node.args[0] if node.target is not aten.arange.default else 0
    step = node.args[2] if len(node.args) > 2 else 1
    return _sympy(start) + index[0] * _sympy(step)


def _unsqueeze(node: fx.Node, index: Index) -> Any:
    source, dim = _args(node)
    dim %= len(index)
    return _element(source, (*index[:dim], *index[dim + 1 :]))


_SLICE_ARGUMENTS = ((0, "self", None), (1, "dim", 0), (2, "start", 0), (4, "step", 1))


def _slice(node: fx.Node, index: Index) -> Any:
    source, dim, start, step = (_argument(node, i, name, d) for i, name, d in _SLICE_ARGUMENTS)
    start, step = start or 0, step or 1
    if not isinstance(start, int) or start < 0:
        raise _Unknown(node, f"a slice from {start}")
    dim %= len(index)
    return _element(source, (*index[:dim], index[dim] * step + start, *index[dim + 1 :]))


def _reshape(node: fx.Node, index: Index) -> Any:
    """Only insertion and removal of dims of size 1."""
    source = _args(node)[0]
    old, new = list(source.meta["val"].shape), list(node.meta["val"].shape)
    if [_sympy(s) for s in old if s != 1] != [_sympy(s) for s in new if s != 1]:
        raise _Unknown(node, "a reshape that mixes dims")
    kept = iter([i for size, i in zip(new, index, strict=True) if size != 1])
    return _element(source, tuple(sympy.Integer(0) if size == 1 else next(kept) for size in old))


def _constant(value: Any) -> Callable[[fx.Node, Index], Any]:
    return lambda node, index: sympy.sympify(value)


def _full(position: int) -> Callable[[fx.Node, Index], Any]:
    return lambda node, index: sympy.sympify(node.args[position])


def _same(node: fx.Node, index: Index) -> Any:
    return _operand(node.args[0], index)


def _cast(node: fx.Node, index: Index) -> Any:
    source = _args(node)[0]
    if (source.meta["val"].dtype == torch.bool) != (node.meta["val"].dtype == torch.bool):
        raise _Unknown(node, "a cast between bool and number")
    return _element(source, index)


def _table(*groups: tuple[Sequence[Any], Callable[[fx.Node, Index], Any]]) -> dict[Any, Any]:
    return {target: rule for targets, rule in groups for target in targets}


_RULES = _table(
    ([aten.arange.default, aten.arange.start, aten.arange.start_step], _arange),
    ([aten.unsqueeze.default], _unsqueeze),
    ([aten.slice.Tensor], _slice),
    ([aten.view.default, aten.reshape.default], _reshape),
    ([aten.expand.default, aten.alias.default, aten.clone.default, aten.contiguous.default], _same),
    ([aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default], _cast),
    ([aten.ones.default, aten.ones_like.default, aten.new_ones.default], _constant(1)),
    ([aten.full.default], _full(1)),
    ([aten.new_full.default], _full(2)),
    ([aten.add.Tensor, aten.add.Scalar], _binary(operator.add)),
    ([aten.sub.Tensor, aten.sub.Scalar], _binary(operator.sub)),
    ([aten.le.Tensor, aten.le.Scalar], _binary(sympy.Le)),
    ([aten.lt.Tensor, aten.lt.Scalar], _binary(sympy.Lt)),
    ([aten.ge.Tensor, aten.ge.Scalar], _binary(sympy.Ge)),
    ([aten.gt.Tensor, aten.gt.Scalar], _binary(sympy.Gt)),
    ([aten.bitwise_and.Tensor, aten.logical_and.default, aten.__and__.Tensor], _logical(sympy.And)),
    ([aten.bitwise_or.Tensor, aten.logical_or.default, aten.__or__.Tensor], _logical(sympy.Or)),
)
