"""How a plan is stored: vte_plan.json says everything but the numbers, vte_plan.safetensors holds the gates.

The JSON, schema version 1::

    {"schema_version": 1,
     "tensors_sha256": SHA-256 of vte_plan.safetensors, hexadecimal,
     "fingerprint": null, or {"model_type", "num_layers", "hidden_size", "vocab_size",
                              "probe": [{"name", "shape", "values"}, ...]},
     "exits": [{"kind": "gate", "layer", "threshold", "width", "tensors": {"w1": tensor name, "w2": tensor name}},
               {"kind": "static", "layer"}, ...]}

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, NoReturn

import safetensors.torch
from torch import Tensor

from vte_compile.errors import InputError, PlanError
from vte_compile.fingerprint import Fingerprint, Probe
from vte_compile.plan import Exit, GateExit, Plan, StaticExit

SCHEMA_VERSION = 1
JSON_NAME = "vte_plan.json"
TENSORS_NAME = "vte_plan.safetensors"


def save_plan(plan: Plan, folder: str | os.PathLike[str]) -> None:
    """See :meth:`vte_compile.Plan.save_pretrained`."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise PlanError(f"{folder}: is a file; a plan is saved to a folder")
    tensors: dict[str, Tensor] = {}
    exits = []
    for exit_ in plan.exits:
        if isinstance(exit_, GateExit):
            names = {weight: f"exits.{exit_.layer}.{weight}" for weight in ("w1", "w2")}
            # A copy of its own for each tensor: safetensors refuses tensors that share memory.
            tensors |= {
                name: getattr(exit_, weight).to("cpu", copy=True).contiguous() for weight, name in names.items()
            }
            exits.append(
                {
                    "kind": "gate",
                    "layer": exit_.layer,
                    "threshold": exit_.threshold,
                    "width": exit_.width,
                    "tensors": names,
                }
            )
        else:
            exits.append({"kind": "static", "layer": exit_.layer})
    tensor_bytes = safetensors.torch.save(tensors)
    described = {
        "schema_version": SCHEMA_VERSION,
        "tensors_sha256": hashlib.sha256(tensor_bytes).hexdigest(),
        "fingerprint": _fingerprint_to_json(plan.fingerprint),
        "exits": exits,
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_atomically(folder / TENSORS_NAME, tensor_bytes)
    # Last, so that a JSON never describes tensors that are not there yet.
    _write_atomically(folder / JSON_NAME, (json.dumps(described, indent=2, allow_nan=False) + "\n").encode())


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
    if version != SCHEMA_VERSION:
        root.fail("schema_version", f"there is no schema {short_repr(version)}; expected {SCHEMA_VERSION}")
    sha256 = root.take("tensors_sha256", str)
    fingerprint = root.take("fingerprint", dict, type(None))
    described = root.take("exits", list)
    root.done()
    tensors = _load_tensors(_read(folder, TENSORS_NAME), sha256)
    exits: list[Exit] = []
    for index, item in enumerate(described):
        exits.append(_exit_from_json(item, f"exits[{index}]", tensors))
        if index and exits[index].layer <= exits[index - 1].layer:
            # A plan sorts its exits; in a file they have to be sorted, so that every error's index is the file's.
            root.fail(
                f"exits[{index}].layer",
                f"{exits[index].layer} is not above {exits[index - 1].layer}, the layer of exits[{index - 1}]",
            )
    if tensors:  # named ones have been taken out
        raise PlanError(f"{TENSORS_NAME}: {JSON_NAME} names no tensor {short_repr(min(tensors))}")
    made_for = None if fingerprint is None else _fingerprint_from_json(fingerprint)
    with _at(JSON_NAME, ": "):
        return Plan(exits, made_for)


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
        with _at(f"{JSON_NAME}: fingerprint.probe[{index}]", "."):
            probe.append(Probe(name, tuple(shape), tuple(values)))
    fields.done()
    with _at(f"{JSON_NAME}: fingerprint", "."):
        return Fingerprint(model_type, num_layers, hidden_size, vocab_size, tuple(probe))


def _exit_from_json(data: object, path: str, tensors: dict[str, Tensor]) -> Exit:
    """The exit `data` describes; its tensors are taken out of `tensors`."""
    fields = _Object(data, path)
    kind = fields.take("kind", str)
    layer = fields.take("layer", int)
    if kind == "static":
        fields.done()
        with _at(f"{JSON_NAME}: {path}", "."):
            return StaticExit(layer)
    if kind != "gate":
        fields.fail("kind", f"unknown kind {short_repr(kind)}; expected 'gate' or 'static'")
    threshold = fields.take("threshold", float)
    width = fields.take("width", int)
    names = _Object(fields.take("tensors", dict), f"{path}.tensors")
    fields.done()
    weights = {}
    for weight in ("w1", "w2"):
        name = names.take(weight, str)
        if name not in tensors:
            names.fail(weight, f"{TENSORS_NAME} has no tensor {short_repr(name)}, or another field names it")
        weights[weight] = tensors.pop(name)
    names.done()
    with _at(f"{JSON_NAME}: {path}", "."):
        gate = GateExit(layer, weights["w1"], weights["w2"], threshold)
    if gate.width != width:
        fields.fail("width", f"{short_repr(width)}, but w1 has {gate.width} rows")
    return gate


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

    def done(self) -> None:
        if self._left:
            self.fail(
                short_repr(min(self._left)), f"unknown field; schema version {SCHEMA_VERSION} does not have it here"
            )


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


@contextmanager
def _at(where: str, separator: str) -> Iterator[None]:
    """Put `where` in front of the messages of plan errors, which start with a field's name."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f"{where}{separator}{error}") from error


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


def _write_atomically(path: Path, data: bytes) -> None:
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
