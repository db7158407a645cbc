"""How a plan is stored: vte_plan.json says everything but the numbers, vte_plan.safetensors holds the weights.

The JSON, schema version 4::

    {"schema_version": 4,
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
import os
import re
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import safetensors.torch
from torch import Tensor

from vte_compile.atomic_file import write_atomically
from vte_compile.errors import InputError, PlanError
from vte_compile.field_checks import located
from vte_compile.plan.co_attention import CoAttention
from vte_compile.plan.json_fields import JSON_NAME, SCHEMA_VERSION, TENSORS_NAME, Fields, parse_json
from vte_compile.plan.parts import GateExit, place
from vte_compile.plan.parts_json import (
    adapter_to_json,
    co_attention_from_json,
    co_attention_to_json,
    exit_from_json,
    fingerprint_from_json,
    fingerprint_to_json,
    kept_from_json,
    put_tensors,
    skip_from_json,
    take_tensors,
)
from vte_compile.plan.plan import Plan


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
            exits.append({**gate, "tensors": put_tensors(weights, f"exits.{exit_.layer}", tensors)})
        else:
            exits.append({"kind": "static", "layer": exit_.layer})
    skips = [
        {"layer": skip.layer, "adapter": adapter_to_json(skip.adapter, f"skips.{skip.layer}", tensors)}
        for skip in plan.skips
    ]
    adapters = [
        {"layer": kept.layer, "adapter": adapter_to_json(kept.adapter, f"adapters.{kept.layer}", tensors)}
        for kept in plan.adapters
    ]
    co_attention = [co_attention_to_json(part, tensors) for part in plan.co_attention]
    companion = None
    if plan.companion is not None:
        companion = {"tensors": put_tensors({"embedding": plan.companion}, "companion", tensors)}
    tensor_bytes = safetensors.torch.save(tensors)
    described = {
        "schema_version": SCHEMA_VERSION,
        "tensors_sha256": hashlib.sha256(tensor_bytes).hexdigest(),
        "fingerprint": fingerprint_to_json(plan.fingerprint),
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
    root = Fields(parse_json(_read(folder, JSON_NAME)), "")
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
        "exits": exit_from_json,
        "skips": skip_from_json,
        "adapters": kept_from_json,
        "co_attention": co_attention_from_json,
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
        fields = Fields(companion, "companion")
        embedding = take_tensors(fields, "companion", ("embedding",), tensors)["embedding"]
        fields.done()
    if tensors:  # named ones have been taken out
        raise PlanError(f"{TENSORS_NAME}: {JSON_NAME} names no tensor {short_repr(min(tensors))}")
    made_for = None if fingerprint is None else fingerprint_from_json(fingerprint)
    with located(JSON_NAME, ": "):
        return Plan(fingerprint=made_for, companion=embedding, **parts)


def _where(part: Any) -> str:
    return f"{part.side} {part.level}" if isinstance(part, CoAttention) else str(part.layer)


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
