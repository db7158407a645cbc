"""What a rotation of queries or keys looks like in a traced graph: x cos + rotate_half(x) sin, heads brought forward.

Models rotate what is laid out as [B, heads, T, D], with tables [B, T, D] of equal halves (RoFormer, arXiv 2104.09864,
as Llama lays it out).
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from vte_compile.kernels.packed_exit import packed_exit
from vte_compile.kernels.token_exit import token_exit

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

aten = torch.ops.aten
_EXITS = (token_exit._opoverload, packed_exit._opoverload)


def rotation(node: Any) -> tuple[fx.Node, tuple[fx.Node, fx.Node]] | str:
    """x [B, T, heads, D] and the tables [B, T, D], if a node [B, heads, T, D] is their rotation; else why it is not."""
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor:
        return "its input is no rotation."
    products = [n for n in node.all_input_nodes if n.target is aten.mul.Tensor]
    for plain, turned in (products, products[::-1]) if len(products) == 2 else ():
        half = next((n for n in turned.all_input_nodes if n.target is aten.cat.default), None)
        x = None if half is None else _rotated_half(half)
        if x is None or half is None or x not in plain.all_input_nodes:
            continue
        cos, sin = (_table(p, value) for p, value in ((plain, x), (turned, half)))
        before = heads_back(x)
        if cos is not None and sin is not None and before is not None:
            return before, (cos, sin)
    return "its input is no rotation of halves."


def heads_back(node: Any) -> fx.Node | None:
    """What a swap of dims 1 and 2 swaps: [B, T, heads, D], of [B, heads, T, D]."""
    if isinstance(node, fx.Node) and node.target is aten.transpose.int and tuple(node.args[1:]) in ((1, 2), (2, 1)):
        return node.args[0]  # type: ignore[return-value]
    return None


def _rotated_half(cat: fx.Node) -> fx.Node | None:
    """x, if a concatenation is [-(second half of x), first half of x]."""
    parts: Any = cat.args[0]
    if len(parts) != 2 or parts[0].target is not aten.neg.default:
        return None
    second, first = parts[0].args[0], parts[1]
    if first.target is not aten.slice.Tensor or second.target is not aten.slice.Tensor:
        return None
    x = first.args[0]
    size = int(x.meta["val"].shape[-1])
    last = x.meta["val"].ndim - 1
    starts = [part.args[1] in (-1, last) and part.args[2] for part in (first, second)]
    if second.args[0] is not x or starts != [0, size // 2] or first.args[3] != size // 2:
        return None
    return x if size == 2 * (size // 2) and cat.args[1:] in ((-1,), (last,)) else None


def _table(product: fx.Node, factor: fx.Node) -> fx.Node | None:
    """The table [B, T, D] that multiplies, in front of its unsqueeze for the heads."""
    others = [n for n in product.all_input_nodes if n is not factor]
    if len(others) != 1 or others[0].target is not aten.unsqueeze.default or others[0].args[1] not in (1, -3):
        return None
    table: Any = others[0].args[0]
    return table if table.meta["val"].ndim == 3 else None


def equal_halves(graph: DecoderGraph, table: fx.Node) -> bool:
    """Whether a table's halves are equal: computed, for positions that tell all of them apart."""
    positions = graph.placeholder("position_ids")
    needed = {table}
    for node in reversed(list(graph.graph.nodes)):
        if node in needed:
            before = _before_exit(node)
            needed.update(node.all_input_nodes if before is None else [before])
    if any(n.op == "placeholder" and n is not positions and not _size_only(n, needed) for n in needed):
        return False
    shape = [int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in positions.meta["val"].shape]
    count = torch.arange(1, 1 + int(torch.tensor(shape).prod())).reshape(shape)
    environment: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.graph.nodes:
            if node is positions:
                environment[node] = count.to(positions.meta["val"].device)
            elif node.op == "placeholder" and node in needed:
                sizes = [int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in node.meta["val"].shape]
                environment[node] = torch.zeros(sizes, device=positions.meta["val"].device)
            elif node in needed and node.op == "get_attr":
                environment[node] = graph.parameters[str(node.target)]()
            elif node in needed and (before := _before_exit(node)) is not None:
                environment[node] = environment[before]
            elif node in needed:
                environment[node] = node.target(
                    *fx.node.map_arg(node.args, lambda n: environment[n]),
                    **fx.node.map_arg(node.kwargs, lambda n: environment[n]),
                )
    value: Tensor = environment[table]
    first, second = value.chunk(2, dim=-1)
    return torch.equal(first, second)


def _before_exit(node: fx.Node) -> fx.Node | None:
    """What a value behind an exit was before it, with more tokens."""
    marker: Any = node.args[0] if node.target is operator.getitem else None
    if not isinstance(marker, fx.Node) or marker.target not in _EXITS:
        return None
    values: Any = marker.args[-3]
    before: fx.Node = values[node.args[1]]
    return before


def _size_only(node: fx.Node, needed: set[fx.Node]) -> bool:
    """Whether nothing but sizes of an input are read, or its dtype."""
    return all(user.target is aten.sym_size.int for user in node.users if user in needed)
