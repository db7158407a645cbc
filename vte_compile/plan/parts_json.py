"""Parts of a plan as JSON, their weights aside; plan/files.py says how all of it looks."""

from __future__ import annotations

from collections.abc import Iterable
from reprlib import repr as short_repr
from typing import Any, TypeVar

from torch import Tensor

from vte_compile.adapters import PIA, Adapter, PlainAdapter, Projection, Router, StaticRouter
from vte_compile.field_checks import located
from vte_compile.fingerprint import Fingerprint, Probe
from vte_compile.plan.co_attention import CoAttention
from vte_compile.plan.json_fields import JSON_NAME, TENSORS_NAME, Fields
from vte_compile.plan.parts import Exit, GateExit, KeptAdapter, SkippedAttention, StaticExit

AdapterT = TypeVar("AdapterT", bound=Adapter)


def fingerprint_to_json(fingerprint: Fingerprint | None) -> dict[str, Any] | None:
    if fingerprint is None:
        return None
    return {
        "model_type": fingerprint.model_type,
        "num_layers": fingerprint.num_layers,
        "hidden_size": fingerprint.hidden_size,
        "vocab_size": fingerprint.vocab_size,
        "probe": [
            {"name": probe.name, "shape": list(probe.shape), "values": list(probe.values)}
            for probe in fingerprint.probe
        ],
    }


def fingerprint_from_json(data: dict[str, Any]) -> Fingerprint:
    fields = Fields(data, "fingerprint")
    model_type = fields.take("model_type", str)
    num_layers, hidden_size, vocab_size = (
        fields.take(name, int) for name in ("num_layers", "hidden_size", "vocab_size")
    )
    probe = []
    for index, item in enumerate(fields.take("probe", list)):
        entry = Fields(item, f"fingerprint.probe[{index}]")
        name = entry.take("name", str)
        shape = entry.take_list("shape", int)
        values = entry.take_list("values", float)
        entry.done()
        with located(f"{JSON_NAME}: fingerprint.probe[{index}]", "."):
            probe.append(Probe(name, tuple(shape), tuple(values)))
    fields.done()
    with located(f"{JSON_NAME}: fingerprint", "."):
        return Fingerprint(model_type, num_layers, hidden_size, vocab_size, tuple(probe))


def exit_from_json(data: object, path: str, tensors: dict[str, Tensor]) -> Exit:
    """The exit `data` describes; its tensors are taken out of `tensors`."""
    fields = Fields(data, path)
    kind = fields.take("kind", str)
    layer = fields.take("layer", int)
    if kind == "static":
        fields.done()
        with located(f"{JSON_NAME}: {path}", "."):
            return StaticExit(layer)
    if kind != "gate":
        fields.fail("kind", f"unknown kind {short_repr(kind)}; expected 'gate' or 'static'")
    threshold = fields.take("threshold", float)
    width = fields.take("width", int)
    weights = take_tensors(fields, path, ("w1", "w2"), tensors)
    fields.done()
    with located(f"{JSON_NAME}: {path}", "."):
        gate = GateExit(layer, weights["w1"], weights["w2"], threshold)
    if gate.width != width:
        fields.fail("width", f"{short_repr(width)}, but w1 has {gate.width} rows")
    return gate


def skip_from_json(data: object, path: str, tensors: dict[str, Tensor]) -> SkippedAttention:
    fields = Fields(data, path)
    layer = fields.take("layer", int)
    adapter = fields.take("adapter", dict, type(None))
    fields.done()
    pia = None if adapter is None else _adapter_from_json(PIA, adapter, f"{path}.adapter", tensors)
    with located(f"{JSON_NAME}: {path}", "."):
        return SkippedAttention(layer, pia)


def kept_from_json(data: object, path: str, tensors: dict[str, Tensor]) -> KeptAdapter:
    fields = Fields(data, path)
    layer = fields.take("layer", int)
    adapter = fields.take("adapter", dict)
    fields.done()
    plain = _adapter_from_json(PlainAdapter, adapter, f"{path}.adapter", tensors)
    with located(f"{JSON_NAME}: {path}", "."):
        return KeptAdapter(layer, plain)


def co_attention_to_json(part: CoAttention, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """`part` but for its weights, which are put into `tensors`."""
    return {
        "side": part.side,
        "level": part.level,
        "skip_self": part.skip_self,
        "skip_cross": part.skip_cross,
        **{
            name: adapter_to_json(getattr(part, name), f"co_attention.{part.side}.{part.level}.{name}", tensors)
            for name in ("self_adapter", "cross_adapter", "ffn_adapter")
        },
    }


def co_attention_from_json(data: object, path: str, tensors: dict[str, Tensor]) -> CoAttention:
    fields = Fields(data, path)
    side, level = fields.take("side", str), fields.take("level", int)
    skip_self, skip_cross = fields.take("skip_self", bool), fields.take("skip_cross", bool)
    kinds: dict[str, type[Adapter]] = {
        "self_adapter": PIA if skip_self else PlainAdapter,
        "cross_adapter": PIA if skip_cross else PlainAdapter,
        "ffn_adapter": PlainAdapter,
    }
    described = {name: fields.take(name, dict, type(None)) for name in kinds}
    fields.done()
    adapters: dict[str, Any] = {
        name: None if described[name] is None else _adapter_from_json(kind, described[name], f"{path}.{name}", tensors)
        for name, kind in kinds.items()
    }
    with located(f"{JSON_NAME}: {path}", "."):
        return CoAttention(side, level, skip_self, skip_cross, **adapters)


def adapter_to_json(adapter: Adapter | None, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """`adapter` but for its weights, which are put into `tensors` under names that start with `prefix`."""
    if adapter is None:
        return None
    weights: dict[str, Tensor] = {}
    for name, projection in adapter.projections().items():
        weights |= {f"{name}.weight": projection.weight, f"{name}.bias": projection.bias}
    router: dict[str, Any]
    if isinstance(adapter.router, StaticRouter):
        router = {"kind": "static", "weights": list(adapter.router.weights)}
    else:
        router = {"kind": "prompt", "temperature": adapter.router.temperature}
        weights["router.weight"] = adapter.router.weight
        if adapter.router.bias is not None:
            weights["router.bias"] = adapter.router.bias
    return {
        "width": adapter.width,
        "groups": adapter.groups,
        "scale": adapter.scale,
        "router": router,
        "tensors": put_tensors(weights, prefix, tensors),
    }


def _adapter_from_json(kind: type[AdapterT], data: dict[str, Any], path: str, tensors: dict[str, Tensor]) -> AdapterT:
    """The adapter `data` describes; its tensors are taken out of `tensors`."""
    fields = Fields(data, path)
    width, groups = fields.take("width", int), fields.take("groups", int)
    scale = fields.take("scale", float)
    described = Fields(fields.take("router", dict), f"{path}.router")
    router_kind = described.take("kind", str)
    names = [name for name in ("pool", "down", "up0", "up1") if name in kind.__dataclass_fields__]
    parameters = [f"{name}.{parameter}" for name in names for parameter in ("weight", "bias")]
    temperature = 0.0
    static: list[float] = []
    if router_kind == "static":
        static = described.take_list("weights", float)
    elif router_kind == "prompt":
        temperature = described.take("temperature", float)
        parameters.append("router.weight")
    else:
        described.fail("kind", f"unknown kind {short_repr(router_kind)}; expected 'prompt' or 'static'")
    described.done()
    optional = ("router.bias",) if router_kind == "prompt" else ()
    weights = take_tensors(fields, path, parameters, tensors, optional)
    fields.done()
    router: Router | StaticRouter
    with located(f"{JSON_NAME}: {path}.router", "."):
        if router_kind == "static":
            router = StaticRouter(static)
        else:
            router = Router(weights["router.weight"], weights.get("router.bias"), temperature)
    projections = {}
    for name in names:
        with located(f"{JSON_NAME}: {path}.{name}", "."):
            projections[name] = Projection(weights[f"{name}.weight"], weights[f"{name}.bias"])
    with located(f"{JSON_NAME}: {path}", "."):
        adapter = kind(**projections, router=router, scale=scale, groups=groups)
    if adapter.width != width:
        fields.fail("width", f"{short_repr(width)}, but down has {adapter.width} rows")
    return adapter


def put_tensors(weights: dict[str, Tensor], prefix: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Add `weights` to `tensors`, and return under which names."""
    for name, weight in weights.items():
        # A copy of its own for each tensor: safetensors refuses tensors that share memory.
        tensors[f"{prefix}.{name}"] = weight.to("cpu", copy=True).contiguous()
    return {name: f"{prefix}.{name}" for name in weights}


def take_tensors(
    fields: Fields, path: str, names: Iterable[str], tensors: dict[str, Tensor], optional: Iterable[str] = ()
) -> dict[str, Tensor]:
    """The tensors that the field "tensors" names, by what they are; they are taken out of `tensors`."""
    named = Fields(fields.take("tensors", dict), f"{path}.tensors")
    weights = {}
    for name in (*names, *(name for name in optional if named.has(name))):
        stored = named.take(name, str)
        if stored not in tensors:
            named.fail(name, f"{TENSORS_NAME} has no tensor {short_repr(stored)}, or another field names it")
        weights[name] = tensors.pop(stored)
    named.done()
    return weights
