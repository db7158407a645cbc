"""The adapters of efficient attention skipping (EAS, arXiv 2403.15226): their data, and what they compute, naively.

Which field is which letter of the paper and which module of the authors' code (DoubtedSteam/EAS):

====================  =====================================  ==============================================
field                 in a :class:`PIA`                      in a :class:`PlainAdapter`
====================  =====================================  ==============================================
``pool`` [D, C]       A, ``conv_A``: read by the mean        --
``down`` [D, C]       C, ``conv_C``                          A, ``conv_A``
``up0`` [C, D/groups] B, ``conv_B``: expert 0                B, ``conv_B``
``up1`` [C, D/groups] D, ``conv_D``: expert 1                D, ``conv_D``
``router`` [2, C]     ``expert_weights``                     ``expert_weights``
====================  =====================================  ==============================================

Here C is the hidden size and D the adapter's width. METER's adapters have no router and one expert: that is a
``StaticRouter((1.0, 0.0))``.

The functions are the reference for the compiler's passes. They compute in the widest of float32, the input's and the
adapter's dtype. Folding is always in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vte_compile.errors import InputError, PlanError
from vte_compile.field_checks import check_pair, check_values, finite, float_tensor, integer

# A softmax in float32 sums to 1 within a few 1e-7.
_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class Projection:
    """A linear layer, or a grouped (block-diagonal) one: output block i reads input block i.

    Args:
        weight: [out, in], or [out, in / groups]; floating point.
        bias: [out], same dtype and device.

    Raises:
        PlanError: a field is of the wrong type, shape or dtype, or is not finite; the message starts with its name.
    """

    weight: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", float_tensor("weight", self.weight, 2))
        object.__setattr__(self, "bias", float_tensor("bias", self.bias, 1))
        if self.weight.numel() == 0:
            raise PlanError(f"weight: expected shape [out, in], got {list(self.weight.shape)}")
        check_pair("bias", self.bias, [self.weight.shape[0]], "weight", self.weight)
        check_values("weight", self.weight)
        check_values("bias", self.bias)

    def __repr__(self) -> str:
        return f"Projection(weight={list(self.weight.shape)}, bias={list(self.bias.shape)})"


@dataclass(frozen=True, eq=False, repr=False)
class Router:
    """Weighs an adapter's two experts once per prompt: w = softmax((We . m + be) / t), m the mean of the prompt.

    Args:
        weight: We [2, C], floating point.
        bias: be [2], same dtype and device; None where the router has none (LLaVA-EAS's plain adapters).
        temperature: t, positive; 10 in the paper's code.

    Raises:
        PlanError: a field is of the wrong type, shape or dtype, or is not finite; the message starts with its name.
    """

    weight: Tensor
    bias: Tensor | None = None
    temperature: float = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", float_tensor("weight", self.weight, 2))
        if self.weight.shape[0] != 2 or self.weight.shape[1] == 0:
            raise PlanError(f"weight: expected shape [2, C], got {list(self.weight.shape)}")
        check_values("weight", self.weight)
        if self.bias is not None:
            bias = float_tensor("bias", self.bias, 1)
            check_pair("bias", bias, [2], "weight", self.weight)
            check_values("bias", bias)
            object.__setattr__(self, "bias", bias)
        object.__setattr__(self, "temperature", finite("temperature", self.temperature))
        if self.temperature <= 0:
            raise PlanError(f"temperature: must be positive, got {self.temperature}")

    def __repr__(self) -> str:
        return f"Router(temperature={self.temperature:g})"


@dataclass(frozen=True)
class StaticRouter:
    """Weighs an adapter's two experts the same for every prompt.

    Args:
        weights: (w0, w1), which sum to 1 as a softmax does; kept as a tuple.

    Raises:
        PlanError: not two finite numbers, or they do not sum to 1.
    """

    weights: tuple[float, float] | list[float]

    def __post_init__(self) -> None:
        if not isinstance(self.weights, tuple | list) or len(self.weights) != 2:
            raise PlanError(f"weights: expected two numbers, got {self.weights!r:.60}")
        weights = tuple(finite(f"weights[{index}]", value) for index, value in enumerate(self.weights))
        if abs(sum(weights) - 1) > _SUM_TOLERANCE:
            raise PlanError(f"weights: must sum to 1, got {weights[0]:g} + {weights[1]:g}")
        object.__setattr__(self, "weights", weights)


@dataclass(frozen=True, eq=False, repr=False)
class PIA:
    """Propagation-of-information adapter: what stands in place of a skipped attention (EAS, arXiv 2403.15226).

    ::

        p   = mean over the prompt's tokens of (pool x_i)          [D], "propagated information"
        z_i = 0.5 * (p + down x_i)
        PIA(x)_i = x_i + scale * (w0 * up0 z_i + w1 * up1 z_i)

    Args:
        pool: [D, C], with bias [D], as all projections have one.
        down: [D, C].
        up0: [C, D / groups], grouped; and `up1` likewise.
        router: where w comes from.
        scale: s; 1 in the paper's code.
        groups: of `up0` and `up1`; 2 in the paper's code.

    Raises:
        PlanError: a field is of the wrong type, or does not go with the others; the message starts with its name.
    """

    pool: Projection
    down: Projection
    up0: Projection
    up1: Projection
    router: Router | StaticRouter
    scale: float = 1.0
    groups: int = 2

    def __post_init__(self) -> None:
        _check_adapter(self)
        if self.pool.weight.shape != self.down.weight.shape:
            raise PlanError(
                f"pool.weight: expected shape {list(self.down.weight.shape)} like down, "
                f"got {list(self.pool.weight.shape)}"
            )

    @property
    def width(self) -> int:
        """D, the adapter's own width."""
        return self.down.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """C, the hidden size of the decoder it is for."""
        return self.down.weight.shape[1]

    def projections(self) -> dict[str, Projection]:
        """The linear layers by field name."""
        return {name: getattr(self, name) for name in ("pool", "down", "up0", "up1")}

    def __repr__(self) -> str:
        return _show(self)


@dataclass(frozen=True, eq=False, repr=False)
class PlainAdapter:
    """What stands in front of q, k and v of an attention that is kept (EAS, arXiv 2403.15226)::

        z_i = down x_i
        AD(x)_i = x_i + scale * (w0 * up0 z_i + w1 * up1 z_i)

    Args:
        down: [D, C], with bias [D], as all projections have one.
        up0: [C, D / groups], grouped; and `up1` likewise.
        router: where w comes from.
        scale: s; 1 in the paper's code.
        groups: of `up0` and `up1`; 2 in the paper's code.

    Raises:
        PlanError: a field is of the wrong type, or does not go with the others; the message starts with its name.
    """

    down: Projection
    up0: Projection
    up1: Projection
    router: Router | StaticRouter
    scale: float = 1.0
    groups: int = 2

    def __post_init__(self) -> None:
        _check_adapter(self)

    @property
    def width(self) -> int:
        """D, the adapter's own width."""
        return self.down.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """C, the hidden size of the decoder it is for."""
        return self.down.weight.shape[1]

    def projections(self) -> dict[str, Projection]:
        """The linear layers by field name."""
        return {name: getattr(self, name) for name in ("down", "up0", "up1")}

    def __repr__(self) -> str:
        return _show(self)


Adapter = PIA | PlainAdapter


def _check_adapter(adapter: Adapter) -> None:
    """The checks that both kinds share."""
    for name, projection in adapter.projections().items():
        if not isinstance(projection, Projection):
            raise PlanError(f"{name}: expected a Projection, got {type(projection).__name__}")
    if not isinstance(adapter.router, Router | StaticRouter):
        raise PlanError(f"router: expected a Router or StaticRouter, got {type(adapter.router).__name__}")
    object.__setattr__(adapter, "scale", finite("scale", adapter.scale))
    object.__setattr__(adapter, "groups", integer("groups", adapter.groups, 1))
    groups, width, hidden_size = adapter.groups, adapter.width, adapter.hidden_size
    if width % groups or hidden_size % groups:
        raise PlanError(f"groups: {groups} does not divide both sizes of down.weight, {[width, hidden_size]}")
    for name in ("up0", "up1"):
        shape = list(adapter.projections()[name].weight.shape)
        if shape != [hidden_size, width // groups]:
            raise PlanError(
                f"{name}.weight: expected shape {[hidden_size, width // groups]} to go with down and {groups} groups, "
                f"got {shape}"
            )
    if isinstance(adapter.router, Router) and adapter.router.weight.shape[1] != hidden_size:
        raise PlanError(
            f"router.weight: expected shape {[2, hidden_size]} to go with down, got {list(adapter.router.weight.shape)}"
        )


def _show(adapter: Adapter) -> str:
    name = type(adapter).__name__
    return f"{name}(width={adapter.width}, router={adapter.router!r}, scale={adapter.scale:g}, groups={adapter.groups})"


def route(router: Router | StaticRouter, x: Tensor, prompt_mask: Tensor | None = None) -> Tensor:
    """How each row weighs the two experts: softmax((We . m + be) / t), with m the mean of the row's prompt tokens.

    Args:
        router: of an adapter.
        x: [B, T, C], the adapter's input.
        prompt_mask: bool [B, T], True at the prompt's tokens, False at padding; None: all are.

    Returns:
        w [B, 2], at least float32, on x's device; NaN in a row without a prompt token (unless the router is static).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(router, StaticRouter):
        return torch.tensor(router.weights, dtype=dtype, device=x.device).expand(x.shape[0], 2)
    dtype = torch.promote_types(dtype, router.weight.dtype)
    mean = _mean(x.to(dtype), prompt_mask)
    bias = None if router.bias is None else router.bias.to(mean)
    return torch.softmax(F.linear(mean, router.weight.to(mean), bias) / router.temperature, -1)


def pool(pia: PIA, x: Tensor, prompt_mask: Tensor | None = None) -> Tensor:
    """The propagated information p of each row: the mean over its prompt's tokens of A x + bA.

    Args:
        pia: of a skipped attention.
        x: [B, T, C], its input.
        prompt_mask: bool [B, T], True at the prompt's tokens, False at padding; None: all are.

    Returns:
        p [B, D], at least float32, on x's device; NaN in a row without a prompt token.
    """
    return _mean(_linear(pia.pool, x.to(_dtype(pia, x))), prompt_mask)


def apply_pia(pia: PIA, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    """PIA(x) [B, T, C] in x's dtype, for x [B, T, C], router weights w [B, 2] and propagated information p [B, D].

    Prefill takes the w and p of this x; decode and later chunks take those of the prompt.
    """
    wide = x.to(_dtype(pia, x))
    return (wide + pia_term(pia, wide, w, p)).to(x.dtype)


def pia_term(pia: PIA, x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    """PIA(x) - x, which is what METER calls PIA; as :func:`apply_pia` else."""
    wide = x.to(_dtype(pia, x))
    z = 0.5 * (p.to(wide)[:, None] + _linear(pia.down, wide))
    return _experts(pia, z, w.to(wide)).to(x.dtype)


def apply_plain(adapter: PlainAdapter, x: Tensor, w: Tensor) -> Tensor:
    """AD(x) [B, T, C] in x's dtype, for x [B, T, C] and router weights w [B, 2]; decode takes the prompt's w."""
    wide = x.to(_dtype(adapter, x))
    return (wide + _experts(adapter, _linear(adapter.down, wide), w.to(wide))).to(x.dtype)


def fold(adapter: Adapter, w: Tensor, p: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The adapter of one prompt as one affine map: adapter(x) = R x + b (EAS, "re-parameterization").

    Args:
        adapter: a PIA or a plain adapter.
        w: [2], the prompt's router weights.
        p: [D], the prompt's propagated information, for a PIA; None for a plain adapter.

    Returns:
        R [C, C] and b [C], float64, on the adapter's device.

    Raises:
        InputError: a PIA without p, or a plain adapter with one.
    """
    if (p is not None) != isinstance(adapter, PIA):
        raise InputError(f"p: a {type(adapter).__name__} {'has no' if p is not None else 'needs the'} pooled vector")
    m1, m = adapter.down.weight.double(), adapter.down.bias.double()
    if p is not None:
        m1, m = 0.5 * m1, 0.5 * (m + p.to(m))
    w = w.to(m)
    m2, bias = m.new_zeros(adapter.hidden_size, adapter.width), m.new_zeros(adapter.hidden_size)
    for share, up in ((w[0], adapter.up0), (w[1], adapter.up1)):
        m2 = m2 + adapter.scale * share * torch.block_diag(*up.weight.double().chunk(adapter.groups))
        bias = bias + adapter.scale * share * up.bias.double()
    return torch.eye(adapter.hidden_size).to(m) + m2 @ m1, m2 @ m + bias


def fold_into(weight: Tensor, R: Tensor, b: Tensor, gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A linear layer W behind an adapter, as one linear layer of the adapter's input.

    W (g * (R x + b)) = (W diag(g) R) x + W diag(g) b. Both sides use the original W: the authors' code computes the
    bias from the weight it has already overwritten, and is wrong.

    Args:
        weight: W [out, C]: of q, k or v for a plain adapter; of gate or up for a PIA.
        R: [C, C], and b: [C], from :func:`fold`.
        gain: g [C], the post-attention norm's weight, for a PIA; None: ones.

    Returns:
        W' [out, C], and what is added to the layer's own bias, [out]; float64.
    """
    scaled = weight.double() if gain is None else weight.double() * gain.double()
    return scaled @ R.to(scaled), scaled @ b.to(scaled)


def _dtype(adapter: Adapter, x: Tensor) -> torch.dtype:
    dtype = torch.promote_types(x.dtype, torch.float32)
    for projection in adapter.projections().values():
        dtype = torch.promote_types(dtype, projection.weight.dtype)
    return dtype


def _linear(projection: Projection, x: Tensor) -> Tensor:
    return F.linear(x, projection.weight.to(x), projection.bias.to(x))


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of each row's tokens where `mask` says so; [B, T, N] -> [B, N]. What it hides may even be NaN."""
    if mask is None:
        return x.mean(1)
    mask = mask.to(x.device, torch.bool)[..., None]
    return x.masked_fill(~mask, 0).sum(1) / mask.sum(1)


def _experts(adapter: Adapter, z: Tensor, w: Tensor) -> Tensor:
    """s * (w0 * (GB z + bB) + w1 * (GD z + bD)) [B, T, C] of z [B, T, D] and w [B, 2]."""
    blocks = z.unflatten(-1, (adapter.groups, -1))
    outputs = []
    for up in (adapter.up0, adapter.up1):
        weights = up.weight.to(z).unflatten(0, (adapter.groups, -1))
        outputs.append(torch.einsum("btgi,goi->btgo", blocks, weights).flatten(-2) + up.bias.to(z))
    return adapter.scale * (w[:, 0, None, None] * outputs[0] + w[:, 1, None, None] * outputs[1])
