"""Gates from checkpoints of the DyVTE authors' code (DoubtedSteam/DyVTE)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from vte_compile.errors import PlanError
from vte_compile.plan.parts import GateExit
from vte_compile.plan.plan import Plan

# Whatever stands before it, such as `base_model.model.` of a PEFT checkpoint, does not matter.
_DYVTE_KEY = re.compile(r"(?:^|\.)visual_gates_router\.(?P<rest>.+)$")
_DYVTE_WEIGHT = re.compile(r"(?P<layer>[0-9]{1,6})\.(?P<weight>w1|w2)\.weight")


def read_dyvte_checkpoint(
    state_dict: Mapping[str, Tensor], thresholds: Mapping[int, float] | None, layers: Iterable[int] | None
) -> Plan:
    """See :meth:`vte_compile.Plan.from_dyvte_checkpoint`."""
    found: dict[int, dict[str, str]] = {}
    for key in state_dict:
        router = _DYVTE_KEY.search(key)
        if router is None:
            continue
        weight = _DYVTE_WEIGHT.fullmatch(router["rest"])
        if weight is None:
            raise PlanError(f"{key}: not a gate of two bias-free linears w1 and w2, as DyVTE has it")
        other = found.setdefault(int(weight["layer"]), {}).setdefault(weight["weight"], key)
        if other != key:
            raise PlanError(f"{key}: the checkpoint has this weight twice, also as {other}")
    if not found:
        raise PlanError("state_dict: no DyVTE gates (keys like model.visual_gates_router.0.w1.weight)")
    thresholds = dict(thresholds or {})
    wanted = sorted(found) if layers is None else sorted(set(layers))
    for argument, named in (("layers", wanted), ("thresholds", thresholds)):
        if unknown := [layer for layer in named if layer not in found]:
            raise PlanError(f"{argument}: no gate for {unknown}; the checkpoint has gates for {sorted(found)}")
    exits = []
    for layer in wanted:
        keys = found[layer]
        for name, other_name in (("w1", "w2"), ("w2", "w1")):
            if name not in keys:
                raise PlanError(f"{keys[other_name]}: the checkpoint lacks its {name}.weight")
        try:
            exits.append(GateExit(layer, state_dict[keys["w1"]], state_dict[keys["w2"]], thresholds.get(layer, 0.0)))
        except PlanError as error:
            raise PlanError(f"visual_gates_router.{layer}: {error}") from error
    return Plan(exits)
