"""fuse_rotary: x cos + rotate_half(x) sin as one op, in front of the transposition that brings heads forward.

Models rotate queries and keys laid out as [B, heads, T, D], with tables [B, T, D] of equal halves. Exporters have
an op for that, which takes x as the linear layer gives it and half of the tables. In graphs of the phase "chunk" only:
where Inductor compiles, it fuses these operations by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from vte_compile.kernels.cached_attention import cached_attention, rotary
from vte_compile.passes.manager import PassResult, PassSettings, Refusal

if TYPE_CHECKING:
    from vte_compile.capture import DecoderGraph

aten = torch.ops.aten


def fuse_rotary(graph: DecoderGraph, settings: PassSettings) -> PassResult:
    """Fuse the rotations of queries and keys; ``applied`` counts them."""
    result = PassResult("fuse_rotary")
    if graph.phase != "chunk":
        return result
    halves: dict[fx.Node, fx.Node] = {}
    for attention in [n for n in graph.graph.nodes if n.target is cached_attention._opoverload]:
        for index, heads in ((0, attention.args[7]), (1, attention.args[8])):
            found = _match(attention.args[index])
            if isinstance(found, str):
                result.refusals.append(Refusal(found, attention.name, graph.layer_of.get(attention)))
                continue
            x, tables = found
            if not all(table in halves or _equal_halves(graph, table) for table in tables):
                reason = f"the halves of {tables[0].name} are not proven equal."
                result.refusals.append(Refusal(reason, attention.name, graph.layer_of.get(attention)))
                continue
            with graph.graph.inserting_before(attention):
                for table in tables:
                    if table not in halves:
                        halves[table] = _first_half(graph, table)
                cos, sin = (halves[table] for table in tables)
                flat = _call(graph, attention, aten.flatten.using_ints, x, -2)
                rotated = _call(graph, attention, rotary._opoverload, flat, cos, sin, heads)
            attention.update_arg(index, rotated)
            result.applied += 1
    return result


def _match(node: Any) -> tuple[fx.Node, tuple[fx.Node, fx.Node]] | str:
    """x [B, T, heads, D] and the tables [B, T, D], if a node is their rotation, flattened to [B, T, heads * D]."""
    for target in (aten.reshape.default, aten.view.default):
        if node.target is target:
            node = node.args[0]
            break
    swapped = _through(node, aten.transpose.int)
    if swapped is None or swapped.target is not aten.add.Tensor:
        return "its input is no rotation."
    products = [n for n in swapped.all_input_nodes if n.target is aten.mul.Tensor]
    for plain, turned in (products, products[::-1]) if len(products) == 2 else ():
        half = next((n for n in turned.all_input_nodes if n.target is aten.cat.default), None)
        x = None if half is None else _rotated_half(half)
        if x is None or half is None or x not in plain.all_input_nodes:
            continue
        cos, sin = (_table(p, value) for p, value in ((plain, x), (turned, half)))
        before = _through(x, aten.transpose.int)
        if cos is not None and sin is not None and before is not None:
            return before, (cos, sin)
    return "its input is no rotation of halves."


def _through(node: fx.Node, target: Any) -> fx.Node | None:
    """What a swap of dims 1 and 2 swaps."""
    if node.target is target and tuple(node.args[1:]) in ((1, 2), (2, 1)):
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


def _equal_halves(graph: DecoderGraph, table: fx.Node) -> bool:
    """Whether a table's halves are equal: computed, for positions that tell all of them apart."""
    positions = graph.placeholder("position_ids")
    needed = {table}
    for node in reversed(list(graph.graph.nodes)):
        if node in needed:
            needed.update(node.all_input_nodes)
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
            elif node in needed:
                environment[node] = node.target(
                    *fx.node.map_arg(node.args, lambda n: environment[n]),
                    **fx.node.map_arg(node.kwargs, lambda n: environment[n]),
                )
    value: Tensor = environment[table]
    first, second = value.chunk(2, dim=-1)
    return torch.equal(first, second)


def _size_only(node: fx.Node, needed: set[fx.Node]) -> bool:
    """Whether nothing but sizes of an input are read, or its dtype."""
    return all(user.target is aten.sym_size.int for user in node.users if user in needed)


def _first_half(graph: DecoderGraph, table: fx.Node) -> fx.Node:
    size = int(table.meta["val"].shape[-1])
    behind = table.next
    with graph.graph.inserting_before(behind):
        half = graph.graph.call_function(aten.slice.Tensor, (table, 2, 0, size // 2))
    half.meta["val"] = table.meta["val"][..., : size // 2]
    graph.layer_of[half] = graph.layer_of[table]
    return half


def _call(graph: DecoderGraph, beside: fx.Node, target: Any, *args: Any) -> fx.Node:
    node = graph.graph.call_function(target, args)
    with torch.no_grad(), beside.meta["val"][0].fake_mode:
        node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
    graph.layer_of[node] = graph.layer_of[beside]
    return node
