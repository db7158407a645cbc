"""The weights that adapters and the layers behind them are folded into: computed once, shared by all graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vte_compile.adapter_costs import AdapterSizes, Forms, choose_forms
from vte_compile.folding import FoldedLinear, LinearLayer, affine, fold_linear, rounding_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from vte_compile.adapters import Adapter

_UNFOLDED = Forms("unfolded", "unfolded", "fold=False")


@dataclass(frozen=True)
class FoldReport:
    """What was decided about one adapter, and what folding it did to the numbers."""

    layer: int
    kind: str
    """"PIA" or "PlainAdapter"."""
    one_prompt: Forms
    """Where all rows of a batch come from one prompt."""
    many_prompts: Forms
    """Where each row is routed by its own."""
    rounding_error: float
    """Of the folded weights in the model's dtype: relative, in the Frobenius norm, of the worst of them."""
    added_bytes: int
    """Of the weights that this adapter brings."""


class FoldedWeights(nn.Module):
    """Folded weights by layer, in float64 until they are cast to the model's dtype; parameters of the optimized model.

    Every form that a layer takes in any phase is prepared at once: the original weights may be freed afterwards.

    Args:
        fold: False: adapters stay in front of the layers' own weights.
    """

    def __init__(self, fold: bool = True) -> None:
        super().__init__()
        self.fold = fold
        self.reports: dict[int, FoldReport] = {}

    def prepare(
        self,
        layer: int,
        adapter: Adapter,
        linears: Sequence[LinearLayer] | None,
        outputs: tuple[int, ...],
        gain: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Choose a layer's forms and compute their weights, unless that was done.

        Args:
            layer: Of the adapter.
            adapter: A PIA or a plain adapter.
            linears: The linear layers behind it; None if one has no plain weight.
            outputs: Their output sizes.
            gain: g [C], what the norm behind a skipped attention multiplies by; None for a plain adapter.
            dtype: Of the model.
            device: Of the model.
        """
        if layer in self.reports:
            return
        parts = affine(adapter)
        static = isinstance(parts.router[0], float)
        sizes = AdapterSizes(adapter.hidden_size, adapter.width, outputs, static, linears is not None)
        one, many = (choose_forms(sizes, device, dtype, b) if self.fold else _UNFOLDED for b in (True, False))
        used: set[str] = {one.prompt, one.step, many.prompt, many.step}
        exact: dict[str, Tensor] = {}
        wide: dict[str, Tensor] = {}
        if parts.pool is not None:
            wide["pool_weight"], wide["pool_bias"] = parts.pool
        if not static:
            wide["router_weight"], wide["router_bias"] = parts.router  # type: ignore[assignment]
        if used & {"low_rank", "unfolded"}:
            exact["down"] = parts.down
        if "unfolded" in used:
            exact |= _pair("up", parts.up, parts.router) | _pair("offset", parts.offset, parts.router)
            if gain is not None:
                exact["gain"] = gain.double()
        if used - {"unfolded"}:
            assert linears is not None
            for index, linear in enumerate(linears):
                folded = fold_linear(parts, linear, gain)
                exact |= _linear_weights(index, folded, parts.router, used, parts.pool is not None)
        holder = nn.Module()
        add = partial(_register, holder, device=device)
        for name, value in exact.items():
            add(name, value.to(dtype))
        for name, value in wide.items():
            add(name, value.to(torch.promote_types(dtype, torch.float32)))
        self.add_module(f"layer_{layer}", holder)
        self.reports[layer] = FoldReport(
            layer,
            type(adapter).__name__,
            one,
            many,
            rounding_error(exact.values(), dtype),
            sum(p.nbytes for p in holder.parameters()),
        )

    def forms(self, layer: int, one_prompt: bool) -> Forms:
        """What a layer's adapter looks like."""
        report = self.reports[layer]
        return report.one_prompt if one_prompt else report.many_prompts

    def has(self, layer: int, name: str) -> bool:
        """Whether a layer has a weight of this name."""
        return name in self.get_submodule(f"layer_{layer}")._parameters

    def reader(self, layer: int, name: str) -> Callable[[], Tensor]:
        """Reads a weight where it is now: the model may have been moved."""
        return partial(getattr, self.get_submodule(f"layer_{layer}"), name)


def _register(holder: nn.Module, name: str, value: Tensor, device: torch.device) -> None:
    holder.register_parameter(name, nn.Parameter(value.to(device).contiguous(), requires_grad=False))


def _pair(
    name: str, experts: tuple[Tensor, Tensor], router: tuple[Tensor, Tensor] | tuple[float, float]
) -> dict[str, Tensor]:
    """Two experts as the first and the difference, which the router's w1 weighs; or as one, if the router is static."""
    w0, w1 = router
    if isinstance(w0, float):
        return {name: w0 * experts[0] + w1 * experts[1]}
    return {name: experts[0], f"{name}_delta": experts[1] - experts[0]}


def _linear_weights(
    index: int,
    folded: FoldedLinear,
    router: tuple[Tensor, Tensor] | tuple[float, float],
    used: set[str],
    pooled: bool,
) -> dict[str, Tensor]:
    """What the graphs need of one folded linear layer, by name."""
    weights = _pair(f"const_{index}", folded.const, router)
    factors = _pair(f"factor_{index}", folded.factor, router)
    if not pooled:  # then the factor is needed in the low-rank path alone, as the difference
        factors = {name: value for name, value in factors.items() if name.endswith("_delta") and "low_rank" in used}
    weights |= factors
    if isinstance(router[0], float):
        return weights | _pair(f"base_{index}", folded.base, router)
    weights[f"base_{index}"] = folded.base[0]
    if "blended" in used:
        weights[f"expert_{index}"] = folded.base[1]
    return weights
