"""An adapter and the linear layers behind it, folded together in float64 (EAS, arXiv 2403.15226).

With the router's weights w0 + w1 = 1, an adapter is x + sum_e w_e (U_e (M1 x + m) + b_e), affine in x: M1 [D, C] is its
``down``, U_e [C, D] expert e's ``up`` as a dense block-diagonal matrix, and m [D] what a PIA knows of the prompt (a
plain adapter's m is constant). For a linear layer W [N, C] with bias c behind it, and a gain g (the weight of the norm
that a skipped attention leaves behind; ones otherwise), everything follows from five tensors per expert and layer::

    base_e   = W diag(g) (I + U_e M1)      [N, C]
    factor_e = W diag(g) U_e               [N, D]
    const_e  = W diag(g) b_e + c           [N]       and, of a plain adapter, + factor_e m
    y = (w0 base_0 + w1 base_1) x + w0 (const_0 + factor_0 m) + w1 (const_1 + factor_1 m)

The bias comes from the original W: the authors' code takes the one it has already overwritten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vte_compile.adapters import PIA, Adapter, Router, StaticRouter


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer behind an adapter: weight [N, C], bias [N] or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class FoldedLinear:
    """A linear layer folded with both experts of an adapter; float64."""

    base: tuple[Tensor, Tensor]
    """[N, C] each."""
    factor: tuple[Tensor, Tensor]
    """[N, D] each."""
    const: tuple[Tensor, Tensor]
    """[N] each."""


@dataclass(frozen=True)
class AffineAdapter:
    """The parts of an adapter that do not depend on what is behind it; float64."""

    down: Tensor
    """M1 [D, C]."""
    up: tuple[Tensor, Tensor]
    """U_0 and U_1 [C, D]."""
    offset: tuple[Tensor, Tensor]
    """b_0 and b_1 [C]; of a plain adapter, with U_e m."""
    pool: tuple[Tensor, Tensor] | None
    """Of a PIA: weight [D, C] and bias [D] that give m from the mean of the prompt; None for a plain adapter."""
    router: tuple[Tensor, Tensor] | tuple[float, float]
    """Weight [1, C] and bias [1] such that w1 = sigmoid(weight . mean + bias); or (w0, w1) if they are constant."""


def affine(adapter: Adapter) -> AffineAdapter:
    """Take an adapter apart."""
    down, m = adapter.down.weight.double(), adapter.down.bias.double()
    ups = (adapter.up0, adapter.up1)
    up0, up1 = (adapter.scale * torch.block_diag(*u.weight.double().chunk(adapter.groups)) for u in ups)
    offset0, offset1 = (adapter.scale * u.bias.double() for u in ups)
    if isinstance(adapter, PIA):
        down = 0.5 * down
        pool = (0.5 * adapter.pool.weight.double(), 0.5 * (adapter.pool.bias.double() + m))
    else:
        pool = None
        offset0, offset1 = offset0 + up0 @ m, offset1 + up1 @ m
    return AffineAdapter(down, (up0, up1), (offset0, offset1), pool, _router(adapter.router))


def _router(router: Router | StaticRouter) -> tuple[Tensor, Tensor] | tuple[float, float]:
    if isinstance(router, StaticRouter):
        w0, w1 = router.weights
        return w0, w1
    # A softmax of two is a sigmoid of their difference.
    weight = router.weight.double()
    bias = weight.new_zeros(2) if router.bias is None else router.bias.double()
    return (weight[1:] - weight[:1]) / router.temperature, (bias[1:] - bias[:1]) / router.temperature


def fold_linear(parts: AffineAdapter, linear: LinearLayer, gain: Tensor | None = None) -> FoldedLinear:
    """Fold a linear layer with both experts.

    Args:
        parts: from :func:`affine`.
        linear: W and its own bias.
        gain: g [C], or None for ones.
    """
    scaled = linear.weight.detach().double()
    if gain is not None:
        scaled = scaled * gain.to(scaled)
    bias = scaled.new_zeros(len(scaled)) if linear.bias is None else linear.bias.detach().double()
    factor0, factor1 = (scaled @ up.to(scaled) for up in parts.up)
    down = parts.down.to(scaled)
    const0, const1 = (scaled @ offset.to(scaled) + bias for offset in parts.offset)
    return FoldedLinear((scaled + factor0 @ down, scaled + factor1 @ down), (factor0, factor1), (const0, const1))


def blend(router: StaticRouter, experts: tuple[Tensor, Tensor]) -> Tensor:
    """w0 e_0 + w1 e_1, of a router that weighs them the same for every prompt."""
    w0, w1 = router.weights
    return w0 * experts[0] + w1 * experts[1]


def rounding_error(exact: Iterable[Tensor], dtype: torch.dtype) -> float:
    """What casting float64 tensors to `dtype` does to them: the largest relative error, in the Frobenius norm."""
    errors = (float((x.to(dtype).double() - x).norm() / x.norm().clamp_min(1e-300)) for x in exact)
    return max(errors, default=0.0)
