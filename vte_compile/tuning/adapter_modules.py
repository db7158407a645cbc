"""Adapters whose parameters are trained: modules made of a plan's adapters, and back, both exact.

The functions of vte_compile/adapters.py take such a module for the adapter it was made of, and carry gradients.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from vte_compile.adapters import PIA, Adapter, PlainAdapter, Projection, Router, StaticRouter

RouterKind = Literal["prompt", "static"]
AdapterT = TypeVar("AdapterT", PIA, PlainAdapter)
# As in the paper's code.
_GROUPS = 2


class _Weights(nn.Module):
    """Weight and bias, as a projection or a router has them."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = None if bias is None else nn.Parameter(bias.clone())


class _TrainedRouter(_Weights):
    """A router per prompt."""

    def __init__(self, router: Router) -> None:
        super().__init__(router.weight, router.bias)
        self.temperature = router.temperature


class AdapterModule(nn.Module):
    """An adapter with parameters. A static router stays as it is: what it weighs is trained, so it need not be."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self._kind = type(adapter)
        self._names = list(adapter.projections())
        for name, projection in adapter.projections().items():
            self.add_module(name, _Weights(projection.weight, projection.bias))
        self.router = _TrainedRouter(adapter.router) if isinstance(adapter.router, Router) else adapter.router
        self.scale, self.groups = adapter.scale, adapter.groups

    def projections(self) -> dict[str, nn.Module]:
        """The linear layers by field name."""
        return {name: self.get_submodule(name) for name in self._names}

    def adapter(self) -> Adapter:
        """The adapter as it is now, for a plan; a copy, on the CPU.

        Raises:
            PlanError: A value is NaN or infinite.
        """
        linear = {name: Projection(_copy(part.weight), _copy(part.bias)) for name, part in self.projections().items()}
        router: Router | StaticRouter
        if isinstance(self.router, _TrainedRouter):
            bias = None if self.router.bias is None else _copy(self.router.bias)
            router = Router(_copy(self.router.weight), bias, self.router.temperature)
        else:
            router = self.router
        return self._kind(**linear, router=router, scale=self.scale, groups=self.groups)


def initial_adapter(
    kind: type[AdapterT],
    hidden_size: int,
    width: int,
    router: RouterKind,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> AdapterT:
    """An adapter to start from: adapter(x) = x, so that a kept block computes what it did.

    The authors' code draws `down` and `pool` from Xavier's uniform distribution and starts the experts at zero (LaVIN;
    LLaVA's PIAs start them from Xavier too, far from x). With both at zero the experts get gradients that differ by a
    factor only, stay nearly equal under Adam, and the router has nothing to decide. So a router per prompt starts with
    even weights, and experts that are opposite: their sum is zero, they are not. A static router takes one expert only,
    (1, 0), which starts at zero.

    Args:
        kind: PIA or PlainAdapter.
        hidden_size: C.
        width: D, even.
        router: "prompt" or "static".
        generator: Of the CPU.
        dtype: Of the parameters.
    """

    def xavier(out: int, in_: int) -> Tensor:
        bound = math.sqrt(6 / (out + in_))
        return ((2 * torch.rand(out, in_, generator=generator) - 1) * bound).to(dtype)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    downs = ("pool", "down") if kind is PIA else ("down",)
    parts: dict[str, Any] = {name: Projection(xavier(width, hidden_size), zeros(width)) for name in downs}
    up = zeros(hidden_size, width // _GROUPS) if router == "static" else xavier(hidden_size, width // _GROUPS)
    parts |= {"up0": Projection(up, zeros(hidden_size)), "up1": Projection(-up, zeros(hidden_size))}
    weighs = StaticRouter((1.0, 0.0)) if router == "static" else Router(zeros(2, hidden_size), zeros(2))
    return kind(**parts, router=weighs, groups=_GROUPS)


def _copy(value: Tensor | nn.Module) -> Tensor:
    assert isinstance(value, Tensor)
    return value.detach().cpu().clone()
