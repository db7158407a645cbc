"""Writes in place, also through views, stay as long as what they write to is read."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from vte_compile.passes.dead_code import remove_dead_nodes

aten = torch.ops.aten


def traced(function, *inputs: Tensor) -> fx.GraphModule:
    """What torch.export sees, writes included."""

    class Module(torch.nn.Module):
        def forward(self, *given):
            return function(*given)

    return torch.export.export(Module(), inputs, strict=False).module(check_guards=False)


def halves(x: Tensor, y: Tensor) -> Tensor:
    """Written through views of views, and once behind an operation in place."""
    whole = x.new_empty(2, 8)
    whole[:, :4] = x
    whole.reshape(4, 4)[1::2].unbind(0)[0].copy_(y[0])
    whole[1:, 4:] = y[1:]
    return whole.mul_(2)


def test_writes_through_views_stay():
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    module = traced(halves, x, y)
    copies = [n for n in module.graph.nodes if n.target is aten.copy_.default]
    assert len(copies) == 3
    assert not any(n.users for n in copies)
    remove_dead_nodes(module.graph)
    module.recompile()
    assert [n for n in module.graph.nodes if n.target is aten.copy_.default] == copies
    assert torch.equal(module(x, y), halves(x, y))


def test_writes_to_what_nobody_reads_go():
    def unread(x: Tensor) -> Tensor:
        other = x.new_zeros(2, 4)
        other[:, :2] = x[:, :2].exp()
        return x + 1

    x = torch.randn(2, 4)
    module = traced(unread, x)
    remove_dead_nodes(module.graph)
    module.recompile()
    assert [n.target for n in module.graph.nodes if n.op == "call_function"] == [aten.add.Tensor]
    assert torch.equal(module(x), x + 1)
