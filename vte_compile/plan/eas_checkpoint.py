"""Read adapters from checkpoints of the EAS authors' code (DoubtedSteam/EAS), of LLaVA-EAS and LaVIN-EAS."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from vte_compile.adapters import PIA, PlainAdapter, Projection, Router
from vte_compile.errors import PlanError
from vte_compile.field_checks import integer, located
from vte_compile.plan.parts import KeptAdapter, SkippedAttention
from vte_compile.plan.plan import Plan

# LLaVA-EAS: model.layers.3.adapter_attn.conv_A.weight; LaVIN-EAS: layers.3.adapter_attn.conv_A.weight.
_KEY = re.compile(r"(?:^|\.)layers\.(?P<layer>[0-9]{1,6})\.(?P<kind>adapter_attn|replaced_adapter)\.(?P<rest>.+)$")
_PARAMETER = re.compile(r"(?:conv_[ABCD]|expert_weights)\.(?:weight|bias)")


def read_eas_checkpoint(
    state_dict: Mapping[str, Tensor], skip: Iterable[int], temperature: float, scale: float
) -> Plan:
    """See :meth:`vte_compile.Plan.from_eas_checkpoint`."""
    found: dict[tuple[int, str], dict[str, str]] = {}
    for key in state_dict:
        adapter = _KEY.search(key)
        if adapter is None:
            continue
        if _PARAMETER.fullmatch(adapter["rest"]) is None:
            raise PlanError(f"{key}: not a parameter of conv_A to conv_D or expert_weights, as EAS has them")
        other = found.setdefault((int(adapter["layer"]), adapter["kind"]), {}).setdefault(adapter["rest"], key)
        if other != key:
            raise PlanError(f"{key}: the checkpoint has this weight twice, also as {other}")
    if not found:
        raise PlanError("state_dict: no EAS adapters (keys like model.layers.0.adapter_attn.conv_A.weight)")
    skipped = {integer("skip", layer, 0) for layer in skip}
    with_pia = {layer for layer, kind in found if kind == "replaced_adapter"}
    with_plain = {layer for layer, kind in found if kind == "adapter_attn"}
    if unknown := sorted(skipped - with_pia):
        raise PlanError(f"skip: no replaced_adapter for {unknown}; the checkpoint has them for {sorted(with_pia)}")
    if left := sorted(with_pia - with_plain - skipped):
        raise PlanError(f"skip: lacks {left}, for which the checkpoint has no adapter_attn but a replaced_adapter")

    def read(layer: int, kind: str) -> dict[str, Tensor]:
        return {name: state_dict[key] for name, key in found[layer, kind].items()}

    skips, adapters = [], []
    for layer in sorted(skipped):
        with located(f"layers.{layer}.replaced_adapter", ": "):
            (pool, down, up0, up1), router, groups = _parts(read(layer, "replaced_adapter"), "ACBD", temperature)
            skips.append(SkippedAttention(layer, PIA(pool, down, up0, up1, router, scale, groups)))
    for layer in sorted(with_plain - skipped):
        with located(f"layers.{layer}.adapter_attn", ": "):
            (down, up0, up1), router, groups = _parts(read(layer, "adapter_attn"), "ABD", temperature)
            adapters.append(KeptAdapter(layer, PlainAdapter(down, up0, up1, router, scale, groups)))
    return Plan(skips=skips, adapters=adapters)


def _parts(parameters: dict[str, Tensor], letters: str, temperature: float) -> tuple[list[Projection], Router, int]:
    """The linears conv_{letter}, of which the last two are grouped; the router; the number of groups."""
    projections = []
    for letter in letters:
        with located(f"conv_{letter}", "."):
            weight = _take(parameters, f"conv_{letter}", "weight")
            if isinstance(weight, Tensor) and weight.ndim == 3 and weight.shape[-1] == 1:
                weight = weight[..., 0]
            projections.append(Projection(weight, _take(parameters, f"conv_{letter}", "bias")))
    with located("expert_weights", "."):
        weight = _take(parameters, "expert_weights", "weight")
        router = Router(weight, parameters.pop("expert_weights.bias", None), temperature)
    if parameters:
        raise PlanError(f"{min(parameters)}: this adapter has only conv_{', conv_'.join(letters)} and expert_weights")
    down, up = projections[-3], projections[-1]
    # If the widths do not go together, the adapter's own check says so.
    return projections, router, max(1, down.weight.shape[0] // up.weight.shape[1])


def _take(parameters: dict[str, Tensor], module: str, name: str) -> Tensor:
    if f"{module}.{name}" not in parameters:
        raise PlanError(f"{name}: the checkpoint lacks it")
    return parameters.pop(f"{module}.{name}")
