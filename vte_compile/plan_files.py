"""How a plan is stored: vte_plan.json says everything but the numbers, vte_plan.safetensors holds the weights.

The JSON, schema version 4::

    {"schema_version": 3,
     "tensors_sha256": SHA-256 of vte_plan.safetensors, hexadecimal,
     "fingerprint": null, or {"model_type", "num_layers", "hidden_size", "vocab_size",
                              "probe": [{"name", "shape", "values"}, ...]},
     "exits": [{"kind": "gate", "layer", "threshold", "width", "tensors": {"w1": tensor name, "w2": tensor name}},
               {"kind": "static", "layer"}, ...],
     "skips": [{"layer", "adapter": null or an adapter}, ...],
     "adapters": [{"layer", "adapter": an adapter}, ...],
     "co_attention": [{"side": "text" or "image", "level", "skip_self": boolean, "skip_cross": boolean, "self_adapter",
                       "cross_adapter", "ffn_adapter": each null or an adapter}, ...],
     "companion": null, or {"tensors": {"embedding": tensor name}}}

    an adapter: {"width", "groups", "scale", "router", "tensors": {"down.weight": tensor name, "down.bias", ...}}
    a router: {"kind": "prompt", "temperature"}, its weights being the adapter's tensors "router.weight" and, where it
              has one, "router.bias"; or {"kind": "static", "weights": [w0, w1]}

Version 1 has no skips and adapters, version 2 no co_attention, version 3 no companion; all are still read.

Plans come from strangers, so a reader accepts exactly this: an unknown, missing or ill-typed field is an error that
names it, the files' names are fixed, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, NoReturn, TypeVar

import safetensors.torch
from torch import Tensor

from vte_compile.adapters import PIA, Adapter, PlainAdapter, Projection, Router, StaticRouter
from vte_compile.errors import InputError, PlanError
from vte_compile.fingerprint import Fingerprint, Probe
from vte_compile.plan import Exit, GateExit, KeptAdapter, Plan, SkippedAttention, StaticExit, place
from vte_compile.plan_co_attention import CoAttention
from vte_compile.plan_fields import located

SCHEMA_VERSION = 4
JSON_NAME = "vte_plan.json"
TENSORS_NAME = "vte_plan.safetensors"
AdapterT = TypeVar("AdapterT", bound=Adapter)


def save_plan(plan: Plan, folder: str | os.PathLike[str]) -> None:
    """See :meth:`vte_compile.Plan.save_pretrained`."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise PlanError(f"{folder}: is a file; a plan is saved to a folder")
    tensors: dict[str, Tensor] = {}
    exits = []
    for exit_ in plan.exits:
        if isinstance(exit_, GateExit):
            gate = {"kind": "gate", "layer": exit_.layer, "threshold": exit_.threshold, "width": exit_.width}
            weights = {"w1": exit_.w1, "w2": exit_.w2}
            exits.append({**gate, "tensors": _put_tensors(weights, f"exits.{exit_.layer}", tensors)})
        else:
            exits.append({"kind": "static", "layer": exit_.layer})
    skips = [
        {"layer": skip.layer, "adapter": _adapter_to_json(skip.adapter, f"skips.{skip.layer}", tensors)}
        for skip in plan.skips
    ]
    adapters = [
        {"layer": kept.layer, "adapter": _adapter_to_json(kept.adapter, f"adapters.{kept.layer}", tensors)}
        for kept in plan.adapters
    ]
    co_attention = [_co_attention_to_json(part, tensors) for part in plan.co_attention]
    companion = None
    if plan.companion is not None:
        companion = {"tensors": _put_tensors({"embedding": plan.companion}, "companion", tensors)}
    tensor_bytes = safetensors.torch.save(tensors)
    described = {
        "schema_version": SCHEMA_VERSION,
        "tensors_sha256": hashlib.sha256(tensor_bytes).hexdigest(),
        "fingerprint": _fingerprint_to_json(plan.fingerprint),
        "exits": exits,
        "skips": skips,
        "adapters": adapters,
        "co_attention": co_attention,
        "companion": companion,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TENSORS_NAME, tensor_bytes)
    # Last, so that a JSON never describes tensors that are not there yet.
    write_atomically(folder / JSON_NAME, (json.dumps(described, indent=2, allow_nan=False) + "\n").encode())


def load_plan(folder_or_hub_id: str | os.PathLike[str], revision: str | None) -> Plan:
    """See :meth:`vte_compile.Plan.from_pretrained`."""
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        if revision is not None:
            raise InputError(
                f"revision: {revision!r} was given, but {folder} is a local folder, which has no revisions"
            )
    else:
        folder = _download(os.fspath(folder_or_hub_id), revision)
    root = _Object(_parse_json(_read(folder, JSON_NAME)), "")
    version = root.take("schema_version", int)
    if version > SCHEMA_VERSION:
        raise PlanError(
            f"{JSON_NAME}: schema_version: {short_repr(version)} is newer than {SCHEMA_VERSION}, the newest that "
            "this vte-compile reads; upgrade vte-compile"
        )
    if version < 1:
        root.fail("schema_version", f"there is no schema {short_repr(version)}; expected 1 to {SCHEMA_VERSION}")
    sha256 = root.take("tensors_sha256", str)
    fingerprint = root.take("fingerprint", dict, type(None))
    described = {"exits": root.take("exits", list), "skips": [], "adapters": [], "co_attention": []}
    if version >= 2:
        described |= {name: root.take(name, list) for name in ("skips", "adapters")}
    if version >= 3:
        described["co_attention"] = root.take("co_attention", list)
    companion = root.take("companion", dict, type(None)) if version >= 4 else None
    root.done(version)
    tensors = _load_tensors(_read(folder, TENSORS_NAME), sha256)
    readers: dict[str, Callable[[object, str, dict[str, Tensor]], Any]] = {
        "exits": _exit_from_json,
        "skips": _skip_from_json,
        "adapters": _kept_from_json,
        "co_attention": _co_attention_from_json,
    }
    parts: dict[str, list[Any]] = {name: [] for name in readers}
    for name, read in readers.items():
        for index, item in enumerate(described[name]):
            parts[name].append(read(item, f"{name}[{index}]", tensors))
            if index and place(parts[name][index]) <= place(parts[name][index - 1]):
                # A plan sorts its parts; in a file they have to be sorted, so that every error's index is the file's.
                field = "level" if name == "co_attention" else "layer"
                root.fail(
                    f"{name}[{index}].{field}",
                    f"{_where(parts[name][index])} is not above {_where(parts[name][index - 1])}, the {field} of "
                    f"{name}[{index - 1}]",
                )
    embedding = None
    if companion is not None:
        fields = _Object(companion, "companion")
        embedding = _take_tensors(fields, "companion", ("embedding",), tensors)["embedding"]
        fields.done()
    if tensors:  # named ones have been taken out
        raise PlanError(f"{TENSORS_NAME}: {JSON_NAME} names no tensor {short_repr(min(tensors))}")
    made_for = None if fingerprint is None else _fingerprint_from_json(fingerprint)
    with located(JSON_NAME, ": "):
        return Plan(fingerprint=made_for, companion=embedding, **parts)


def _where(part: Any) -> str:
    return f"{part.side} {part.level}" if isinstance(part, CoAttention) else str(part.layer)


def _fingerprint_to_json(fingerprint: Fingerprint | None) -> dict[str, Any] | None:
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


def _fingerprint_from_json(data: dict[str, Any]) -> Fingerprint:
    fields = _Object(data, "fingerprint")
    model_type = fields.take("model_type", str)
    num_layers, hidden_size, vocab_size = (
        fields.take(name, int) for name in ("num_layers", "hidden_size", "vocab_size")
    )
    probe = []
    for index, item in enumerate(fields.take("probe", list)):
        entry = _Object(item, f"fingerprint.probe[{index}]")
        name = entry.take("name", str)
        shape = entry.take_list("shape", int)
        values = entry.take_list("values", float)
        entry.done()
        with located(f"{JSON_NAME}: fingerprint.probe[{index}]", "."):
            probe.append(Probe(name, tuple(shape), tuple(values)))
    fields.done()
    with located(f"{JSON_NAME}: fingerprint", "."):
        return Fingerprint(model_type, num_layers, hidden_size, vocab_size, tuple(probe))


def _exit_from_json(data: object, path: str, tensors: dict[str, Tensor]) -> Exit:
    """The exit `data` describes; its tensors are taken out of `tensors`."""
    fields = _Object(data, path)
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
    weights = _take_tensors(fields, path, ("w1", "w2"), tensors)
    fields.done()
    with located(f"{JSON_NAME}: {path}", "."):
        gate = GateExit(layer, weights["w1"], weights["w2"], threshold)
    if gate.width != width:
        fields.fail("width", f"{short_repr(width)}, but w1 has {gate.width} rows")
    return gate


def _skip_from_json(data: object, path: str, tensors: dict[str, Tensor]) -> SkippedAttention:
    fields = _Object(data, path)
    layer = fields.take("layer", int)
    adapter = fields.take("adapter", dict, type(None))
    fields.done()
    pia = None if adapter is None else _adapter_from_json(PIA, adapter, f"{path}.adapter", tensors)
    with located(f"{JSON_NAME}: {path}", "."):
        return SkippedAttention(layer, pia)


def _kept_from_json(data: object, path: str, tensors: dict[str, Tensor]) -> KeptAdapter:
    fields = _Object(data, path)
    layer = fields.take("layer", int)
    adapter = fields.take("adapter", dict)
    fields.done()
    plain = _adapter_from_json(PlainAdapter, adapter, f"{path}.adapter", tensors)
    with located(f"{JSON_NAME}: {path}", "."):
        return KeptAdapter(layer, plain)


def _co_attention_to_json(part: CoAttention, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """`part` but for its weights, which are put into `tensors`."""
    return {
        "side": part.side,
        "level": part.level,
        "skip_self": part.skip_self,
        "skip_cross": part.skip_cross,
        **{
            name: _adapter_to_json(getattr(part, name), f"co_attention.{part.side}.{part.level}.{name}", tensors)
            for name in ("self_adapter", "cross_adapter", "ffn_adapter")
        },
    }


def _co_attention_from_json(data: object, path: str, tensors: dict[str, Tensor]) -> CoAttention:
    fields = _Object(data, path)
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


def _adapter_to_json(adapter: Adapter | None, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
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
        "tensors": _put_tensors(weights, prefix, tensors),
    }


def _adapter_from_json(kind: type[AdapterT], data: dict[str, Any], path: str, tensors: dict[str, Tensor]) -> AdapterT:
    """The adapter `data` describes; its tensors are taken out of `tensors`."""
    fields = _Object(data, path)
    width, groups = fields.take("width", int), fields.take("groups", int)
    scale = fields.take("scale", float)
    described = _Object(fields.take("router", dict), f"{path}.router")
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
    weights = _take_tensors(fields, path, parameters, tensors, optional)
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


def _put_tensors(weights: dict[str, Tensor], prefix: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Add `weights` to `tensors`, and return under which names."""
    for name, weight in weights.items():
        # A copy of its own for each tensor: safetensors refuses tensors that share memory.
        tensors[f"{prefix}.{name}"] = weight.to("cpu", copy=True).contiguous()
    return {name: f"{prefix}.{name}" for name in weights}


def _take_tensors(
    fields: _Object, path: str, names: Iterable[str], tensors: dict[str, Tensor], optional: Iterable[str] = ()
) -> dict[str, Tensor]:
    """The tensors that the field "tensors" names, by what they are; they are taken out of `tensors`."""
    named = _Object(fields.take("tensors", dict), f"{path}.tensors")
    weights = {}
    for name in (*names, *(name for name in optional if named.has(name))):
        stored = named.take(name, str)
        if stored not in tensors:
            named.fail(name, f"{TENSORS_NAME} has no tensor {short_repr(stored)}, or another field names it")
        weights[name] = tensors.pop(stored)
    named.done()
    return weights


class _Object:
    """A JSON object whose fields are taken one by one, by name and type; what is left at the end is unknown."""

    def __init__(self, data: object, path: str) -> None:
        self._path = path
        if not isinstance(data, dict):
            self.fail("", f"expected an object, got {_json_type(data)}")
        self._left = dict(data)

    def fail(self, name: str, problem: str) -> NoReturn:
        where = ".".join(part for part in (self._path, name) if part)
        raise PlanError(f"{JSON_NAME}: {where}: {problem}" if where else f"{JSON_NAME}: {problem}")

    def has(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, *types: type) -> Any:
        if name not in self._left:
            self.fail(name, "is missing")
        return self._convert(name, self._left.pop(name), types)

    def take_list(self, name: str, item_type: type) -> list[Any]:
        return [
            self._convert(f"{name}[{index}]", item, (item_type,)) for index, item in enumerate(self.take(name, list))
        ]

    def _convert(self, name: str, value: object, types: tuple[type, ...]) -> object:
        """`value`, if it is exactly of one of `types`: a boolean is no integer. An integer may stand for a float."""
        if type(value) is int and float in types:
            try:
                value = float(value)
            except OverflowError:
                value = math.inf
        if type(value) not in types:
            expected = " or ".join(_JSON_TYPES[type_] for type_ in types)
            self.fail(name, f"expected {expected}, got {_json_type(value)}")
        if type(value) is float and not math.isfinite(value):
            self.fail(name, "must be a finite number")
        return value

    def done(self, version: int = SCHEMA_VERSION) -> None:
        if self._left:
            self.fail(short_repr(min(self._left)), f"unknown field; schema version {version} does not have it here")


_JSON_TYPES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


def _json_type(value: object) -> str:
    return _JSON_TYPES[type(value)]


def _parse_json(data: bytes) -> object:
    def without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"field {short_repr(next(name for name in names if names.count(name) > 1))} stands twice")
        return fields

    try:
        return json.loads(data.decode(), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, integers of absurd length
        raise PlanError(f"{JSON_NAME}: is damaged or is not JSON: {error}") from error


def _load_tensors(data: bytes, sha256: str) -> dict[str, Tensor]:
    if re.fullmatch("[0-9a-f]{64}", sha256) is None:
        raise PlanError(f"{JSON_NAME}: tensors_sha256: expected 64 hexadecimal digits, got {short_repr(sha256)}")
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise PlanError(
            f"{TENSORS_NAME}: its SHA-256 is {found[:12]}..., but {JSON_NAME}: tensors_sha256 says {sha256[:12]}...: "
            "it is damaged, or belongs to another save of the plan; get or save both files again"
        )
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # the hash is no protection from the file's author, and the parser raises several kinds
        raise PlanError(f"{TENSORS_NAME}: is not a valid safetensors file: {error}") from error


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        raise PlanError(f"{name}: there is none in {folder}; is it the folder of a plan?") from None
    except OSError as error:
        raise PlanError(f"{name}: cannot be read: {error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step: whatever happens, it holds either the old content or all of the new."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # beside it: a rename stays on one file system
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _download(hub_id: str, revision: str | None) -> Path:
    """The folder of the plan's two files at one commit of a Hub repository."""
    from huggingface_hub import snapshot_download  # only here: importing it takes a while
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def failed(why: str) -> str:
        return f"{hub_id}: no such folder, and the Hugging Face Hub did not give a plan of that name: {why}"

    try:
        # The whole snapshot in one call, so that both files are of the same commit.
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[JSON_NAME, TENSORS_NAME]))
    except HFValidationError as error:
        raise PlanError(failed("it is not a valid Hub id")) from error
    except LocalEntryNotFoundError as error:
        raise PlanError(failed("it is not in the local cache, and the Hub was not reached (offline?)")) from error
    except Exception as error:  # many kinds: HTTP, authentication, revision, disk
        raise PlanError(failed(str(error))) from error
