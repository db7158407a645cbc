"""What was examined, on disk: an interrupted run goes on where it was, and gates train anew in seconds.

A folder holds shards of samples as safetensors, and vte_examined.json, schema version 1::

    {"schema_version": 1,
     "model": {"fingerprint": as in a plan, "dtype", "weights": SHA-256 of a few values of every parameter,
               "base": SHA-256 of the skips and adapters that were in it, null without such},
     "shards": {file name: {"sha256": of the file, hexadecimal, "keys": [one per sample], ...}}

Shards are written whole, and before the index names them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vte_compile.atomic_file import write_atomically
from vte_compile.errors import InputError
from vte_compile.fingerprint import Fingerprint
from vte_compile.plan import Plan
from vte_compile.plan.json_fields import JSON_NAME
from vte_compile.tuning.examine import Examined, Examiner, own_answer
from vte_compile.tuning.samples import Sample

SCHEMA_VERSION = 1
INDEX_NAME = "vte_examined.json"
_SHARD_NAME = "examined-{:05d}.safetensors"
_SHARD_PATTERN = re.compile(r"examined-\d{5,}\.safetensors")
_PROBED_VALUES = 16  # of each parameter

_logger = logging.getLogger(__name__)


class ExaminedStore:
    """Examined samples of one model, by key; in memory, and in shards in `folder` unless that is None.

    `base`: the plan of skips and adapters with which they were examined, None without such. Shards that are missing or
    damaged are left out with a warning: their samples are to be examined again.

    Raises InputError if the folder is of another model, base or version, cannot be written, or its index is damaged.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, model: nn.Module, shard: int = 64, base: Plan | None = None
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._shard = shard
        self._model = model_identity(model) | {"base": None if base is None else plan_digest(base)}
        self._shards: dict[str, dict[str, Any]] = {}
        self._where: dict[str, tuple[str, int]] = {}
        self._pending: dict[str, Examined] = {}
        if self.folder is not None:
            self._open(self.folder)

    def __contains__(self, key: str) -> bool:
        return key in self._where or key in self._pending

    def __len__(self) -> int:
        return len(self._where) + len(self._pending)

    def add(self, key: str, examined: Examined) -> None:
        """Add one sample; writes a shard when there are enough.

        Raises:
            InputError: It cannot be written; what was written before stays.
        """
        self._pending[key] = examined
        if len(self._pending) >= self._shard:
            self.flush()

    def flush(self) -> None:
        """Write what has not been written yet.

        Raises:
            InputError: It cannot be written; what was written before stays.
        """
        if self.folder is None or not self._pending:
            return
        pending, self._pending = self._pending, {}
        whole = Examined.concatenate(list(pending.values()))
        data = safetensors.torch.save({field.name: getattr(whole, field.name).contiguous() for field in fields(whole)})
        name = next(name for n in range(len(self._shards) + 1) if (name := _SHARD_NAME.format(n)) not in self._shards)
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "keys": list(pending)}
        try:
            write_atomically(self.folder / name, data)
            self._write_index(self.folder, self._shards | {name: entry})
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot be written: {error}; the last {len(pending)} examined samples are lost: make "
                "room, and call again with the same folder to go on."
            ) from error
        self._take(name, entry)

    def read(self, keys: Sequence[str]) -> Examined:
        """The samples of these keys, in this order; a key may stand there more than once."""
        rows: dict[str, list[int]] = {}  # by shard: which of the wanted samples it has
        for position, key in enumerate(keys):
            rows.setdefault(self._where[key][0] if key in self._where else "", []).append(position)
        result: Examined | None = None
        for name, positions in rows.items():
            if name:
                assert self.folder is not None
                found = _load(self.folder / name, self._shards[name], self._sizes)
                order = [self._where[keys[position]][1] for position in positions]
                found = Examined(*(getattr(found, field.name)[order] for field in fields(found)))
            else:
                found = Examined.concatenate([self._pending[keys[position]] for position in positions])
            if result is None:  # one shard at a time, so that memory holds the result and little more
                result = Examined(
                    *(value.new_empty(len(keys), *value.shape[1:]) for value in vars(found).values()),
                )
            for field in fields(found):
                getattr(result, field.name)[positions] = getattr(found, field.name)
        if result is None:
            raise InputError("there are no samples to read.")
        return result

    @property
    def _sizes(self) -> tuple[int, int]:
        fingerprint = self._model["fingerprint"]
        return fingerprint["num_layers"], fingerprint["hidden_size"]

    def _open(self, folder: Path) -> None:
        try:
            text = (folder / INDEX_NAME).read_text(encoding="utf-8")
        except FileNotFoundError:
            try:  # now rather than when the first samples are examined
                folder.mkdir(parents=True, exist_ok=True)
                self._write_index(folder, {})
            except OSError as error:
                raise InputError(f"{folder}: cannot be written: {error}") from error
            return
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{folder}: {INDEX_NAME} cannot be read: {error}") from error
        model, shards = _parse_index(text, f"{folder}: {INDEX_NAME}")
        if different := [name for name in self._model if model.get(name) != self._model[name]]:
            raise InputError(
                f"{folder}: its samples were examined with another model ({', '.join(different)} differ): use another "
                "folder, or load that model, with the same base."
            )
        for name, entry in shards.items():
            try:
                _load(folder / name, entry, self._sizes)
            except InputError as error:
                _logger.warning("%s; its %d samples are examined again", error, len(entry["keys"]))
            else:
                self._take(name, entry)

    def _take(self, name: str, entry: dict[str, Any]) -> None:
        self._shards[name] = entry
        self._where |= {key: (name, row) for row, key in enumerate(entry["keys"])}

    def _write_index(self, folder: Path, shards: dict[str, dict[str, Any]]) -> None:
        described = {"schema_version": SCHEMA_VERSION, "model": self._model, "shards": shards}
        write_atomically(folder / INDEX_NAME, (json.dumps(described, allow_nan=False) + "\n").encode())


def collect(
    model: nn.Module,
    samples: Iterable[Sample],
    folder: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 64,
    shard: int = 64,
    progress: bool = True,
    base: Plan | None = None,
) -> Examined:
    """Examine samples, but for those that an earlier run has saved.

    Args:
        model: The model, see :class:`Examiner`.
        samples: As :func:`read_samples` gives them. To those without an answer the model gives its own.
        folder: Where to keep what was examined; None: only in memory.
        max_new_tokens: Length limit of the model's own answers.
        shard: Samples per file. An interruption (but for a killed process) loses none.
        progress: Whether to show a progress bar.
        base: Skips and adapters, see :class:`Examiner`; None: none.

    Returns:
        One row per sample, in order, on the CPU: the same as without interruptions.

    Raises:
        InputError: A sample cannot be used, the disk is full, or the folder is of another model. The message says what
            was saved.
        UnsupportedModelError: See :class:`Examiner`.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("shard", shard)):
        if value < 1:
            raise InputError(f"{name}: expected 1 or more, got {value}.")
    examiner = Examiner(model, base)
    store = ExaminedStore(folder, model, shard, base)
    keys: list[str] = []
    total = operator.length_hint(samples) or None
    try:
        for sample in tqdm(samples, "examine", total, unit="sample", disable=not progress, dynamic_ncols=True):
            key = sample.key if sample.answer is not None else f"{sample.key}+{max_new_tokens}"
            if key not in store:
                answered = sample if sample.answer is not None else own_answer(examiner, sample, max_new_tokens)
                store.add(key, examiner.examine(answered))
            keys.append(key)
        store.flush()
    except BaseException as error:  # an interruption loses nothing
        store.flush()
        if isinstance(error, InputError) and folder is not None:
            raise InputError(f"{error} ({len(store)} examined samples are saved in {folder}.)") from error
        raise
    if not keys:
        raise InputError("samples: there are none.")
    return store.read(keys)


def model_identity(model: nn.Module) -> dict[str, Any]:
    """What tells a model from others, as JSON has it.

    A plan's fingerprint looks at the decoder only, and lets it be cast. Features depend on the vision tower and the
    projector too, hence the hash of a few values of all parameters.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
        if not parameter.is_meta:  # offloaded
            flat = parameter.detach().flatten()
            values = flat[:: max(1, flat.numel() // _PROBED_VALUES)]
            digest.update(repr(values.double().tolist()).encode())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    identity = {"fingerprint": asdict(Fingerprint.of(model)), "dtype": dtype, "weights": digest.hexdigest()}
    as_json: dict[str, Any] = json.loads(json.dumps(identity))
    return as_json


def plan_digest(plan: Plan) -> str:
    """A hash of all that is in a plan: that of its JSON file, which holds the hash of the tensors."""
    with tempfile.TemporaryDirectory() as folder:
        plan.save_pretrained(folder)
        return hashlib.sha256((Path(folder) / JSON_NAME).read_bytes()).hexdigest()


def _parse_index(text: str, where: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The model's identity and the shards."""
    remedy = "delete the folder to start anew"
    try:
        root = json.loads(text)
        version, model, shards = root["schema_version"], root["model"], root["shards"]
        sound = isinstance(model, dict) and all(
            _SHARD_PATTERN.fullmatch(name)
            and set(entry) == {"sha256", "keys"}
            and isinstance(entry["sha256"], str)
            and all(isinstance(key, str) for key in entry["keys"])
            for name, entry in shards.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where} is damaged ({type(error).__name__}: {error}): {remedy}.") from error
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{where}: schema_version is {version!r}, this vte-compile reads {SCHEMA_VERSION}: upgrade it, or {remedy}."
        )
    if not sound:
        raise InputError(f"{where} is damaged: {remedy}.")
    return model, shards


def _load(file: Path, entry: dict[str, Any], sizes: tuple[int, int]) -> Examined:
    """A shard, if it is what the index says: its hash, and shapes for this number of samples.

    Raises:
        InputError: It is missing or damaged.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise InputError(f"{file}: is damaged: it is not what {INDEX_NAME} says (SHA-256)")
    layers, hidden_size = sizes
    samples = len(entry["keys"])
    shapes = {
        "features": (samples, layers, 2 * hidden_size),
        "same": (samples, layers),
        "loss": (samples, layers + 1),
        "visual": (samples,),
        "tokens": (samples,),
    }
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except Exception as error:  # the hash is no protection from the file's author; the parser raises several kinds
        raise InputError(f"{file}: is not a valid safetensors file: {error}") from error
    if {name: tuple(value.shape) for name, value in tensors.items()} != shapes:
        raise InputError(f"{file}: does not hold {samples} samples of a model with {layers} layers")
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise InputError(f"{file}: holds NaN or infinite values")
    return Examined(**tensors)
