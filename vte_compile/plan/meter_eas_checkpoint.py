"""Read adapters from checkpoints of METER-EAS, the co-attention part of the EAS authors' code (DoubtedSteam/EAS)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from vte_compile.adapters import PIA, PlainAdapter, Projection, StaticRouter
from vte_compile.errors import PlanError
from vte_compile.field_checks import integer, located
from vte_compile.plan.co_attention import SIDES, CoAttention, Side
from vte_compile.plan.plan import Plan

_PLAIN = {"self": "attention.adapter", "cross": "crossattention.adapter", "ffn": "intermediate.adapter"}
_PIA = {"self": "adapter_self_attn", "cross": "adapter_cross_attn"}
_MODULE = "|".join(map(re.escape, (*_PLAIN.values(), *_PIA.values())))
# conv_D and the router are in checkpoints, but the authors' code does not use them.
_KEY = re.compile(
    r"(?:^|\.)cross_modal_(?P<side>text|image)_layers\.(?P<level>[0-9]{1,6})\."
    rf"(?P<module>{_MODULE})\.(?P<name>conv_[ABCD]|expert_weights)\.(?P<kind>weight|bias)$"
)
_ALWAYS_FIRST = StaticRouter((1.0, 0.0))
_Weights = dict[tuple[Side, int], dict[str, dict[str, Tensor]]]
"""Of each layer, by module, by name such as conv_B.weight."""


def is_meter_eas(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether there are adapters of METER-EAS."""
    return any(_KEY.search(key) for key in state_dict)


def read_meter_eas(state_dict: Mapping[str, Tensor], skip: Iterable[int], scale: float) -> Plan:
    """See :meth:`vte_compile.Plan.from_eas_checkpoint`."""
    found: _Weights = {}
    for key, tensor in state_dict.items():
        if match := _KEY.search(key):
            side: Side = "text" if match["side"] == "text" else "image"
            modules = found.setdefault((side, int(match["level"])), {})
            parameters = modules.setdefault(match["module"], {})
            name = f"{match['name']}.{match['kind']}"
            if name in parameters:
                raise PlanError(f"{key}: the checkpoint has this weight twice")
            parameters[name] = tensor
    levels = 1 + max(level for _, level in found)
    skipped = {_attention(number, levels) for number in skip}
    parts = []
    for side in SIDES:
        for level in range(levels):
            modules = found.get((side, level), {})
            skips = {kind: (side, level, kind) in skipped for kind in _PIA}
            with located(f"cross_modal_{side}_layers.{level}", "."):
                adapters = {
                    f"{kind}_adapter": _pia(modules, _PIA[kind], scale)
                    if skips.get(kind)
                    else _plain(modules, plain, scale)
                    for kind, plain in _PLAIN.items()
                }
                if any(skips.values()) or any(adapters.values()):
                    of_layer = {f"skip_{kind}": flag for kind, flag in skips.items()}
                    parts.append(CoAttention(side, level, **of_layer, **adapters))  # type: ignore[arg-type]
    return Plan(co_attention=parts)


def _attention(number: object, levels: int) -> tuple[Side, int, str]:
    """EAS numbers text self, text cross, image self and image cross attentions, each by level."""
    index = integer("skip", number, 0)
    if index >= 4 * levels:
        raise PlanError(f"skip: {index}: a METER of {levels} levels has attentions 0 to {4 * levels - 1}")
    group, level = divmod(index, levels)
    return SIDES[group // 2], level, ("self", "cross")[group % 2]


def _plain(modules: Mapping[str, dict[str, Tensor]], module: str, scale: float) -> PlainAdapter | None:
    if module not in modules:
        return None
    with located(module, ": "):
        down, up = (_projection(modules[module], letter) for letter in "CB")
        return PlainAdapter(down, up, up, _ALWAYS_FIRST, scale, _groups(down, up))


def _pia(modules: Mapping[str, dict[str, Tensor]], module: str, scale: float) -> PIA:
    with located(module, ": "):
        if module not in modules:
            raise PlanError("skip: the checkpoint has no adapter for this attention")
        pool, down, up = (_projection(modules[module], letter) for letter in "ACB")
        return PIA(pool, down, up, up, _ALWAYS_FIRST, scale, _groups(down, up))


def _projection(parameters: Mapping[str, Tensor], letter: str) -> Projection:
    with located(f"conv_{letter}", "."):
        for kind in ("weight", "bias"):
            if f"conv_{letter}.{kind}" not in parameters:
                raise PlanError(f"{kind}: the checkpoint lacks it")
        weight = parameters[f"conv_{letter}.weight"]
        if weight.ndim == 3 and weight.shape[-1] == 1:
            weight = weight[..., 0]
        return Projection(weight, parameters[f"conv_{letter}.bias"])


def _groups(down: Projection, up: Projection) -> int:
    # If the widths do not go together, the adapter's own check says so.
    return max(1, down.weight.shape[0] // up.weight.shape[1])
