"""What a ranking of skips has measured, in a file: an interrupted run goes on where it was.

A folder holds vte_ranking_work.json, schema version 1::

    {"schema_version": 1,
     "model": as in an index of examined samples,
     "answers": {sample's key and length limit: the model's own answer, as tokens},
     "measured": {deleted layers, such as "3,5", ascending: {sample's key: {"loss": [one per other layer; null: not
                  finite], "changed": [one per other layer], "full": the full model's loss}}}}
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from vte_compile.atomic_file import write_atomically
from vte_compile.errors import InputError
from vte_compile.tuning.store import model_identity

SCHEMA_VERSION = 1
FILE_NAME = "vte_ranking_work.json"
# How much of a killed run is lost, in seconds. (One that is interrupted otherwise loses nothing.)
_FLUSH_AFTER = 30.0

Measured = tuple[list[float], list[float], float]
"""By candidate: loss, and share of changed positions; and the full model's loss."""


class RankingWork:
    """Measurements of one model, in memory, and in `folder` unless that is None.

    Raises InputError if the folder is of another model or another version, is damaged, or cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, model: nn.Module) -> None:
        self._file = None if folder is None else Path(folder) / FILE_NAME
        self._model = model_identity(model)
        self._answers: dict[str, list[int]] = {}
        self._measured: dict[str, dict[str, dict[str, Any]]] = {}
        self._flushed = time.monotonic()
        if self._file is not None:
            self._open(self._file)

    def answer(self, key: str) -> list[int] | None:
        """The model's own answer, if it is known."""
        return self._answers.get(key)

    def add_answer(self, key: str, answer: Iterable[int]) -> None:
        """Keep an answer."""
        self._answers[key] = list(answer)
        self._maybe_flush()

    def measured(self, deleted: Iterable[int], key: str) -> Measured | None:
        """What was measured of a sample with these layers deleted, and each of the others."""
        found = self._measured.get(_name(deleted), {}).get(key)
        if found is None:
            return None
        return [math.inf if loss is None else loss for loss in found["loss"]], found["changed"], found["full"]

    def add(self, deleted: Iterable[int], key: str, measured: Measured) -> None:
        """Keep a measurement.

        Raises:
            InputError: It cannot be written.
        """
        losses, changed, full = measured
        finite = [loss if math.isfinite(loss) else None for loss in losses]
        self._measured.setdefault(_name(deleted), {})[key] = {"loss": finite, "changed": changed, "full": full}
        self._maybe_flush()

    def flush(self) -> None:
        """Write the file.

        Raises:
            InputError: It cannot be written; what was written before stays.
        """
        self._flushed = time.monotonic()
        if self._file is None:
            return
        content = {
            "schema_version": SCHEMA_VERSION,
            "model": self._model,
            "answers": self._answers,
            "measured": self._measured,
        }
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, (json.dumps(content, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise InputError(
                f"{self._file}: cannot be written: {error}; what was measured since the last time is lost: make room, "
                "and call again with the same folder to go on."
            ) from error

    def _maybe_flush(self) -> None:
        if time.monotonic() - self._flushed > _FLUSH_AFTER:
            self.flush()

    def _open(self, file: Path) -> None:
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            self.flush()  # now rather than when the first samples are measured
            return
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read: {error}") from error
        remedy = "use another folder, or delete the file to start anew"
        try:
            root = json.loads(text)
            version = root["schema_version"]
            if version != SCHEMA_VERSION:
                raise InputError(f"{file}: schema_version is {version!r}, not {SCHEMA_VERSION}: {remedy}.")
            if root["model"] != self._model:
                raise InputError(f"{file}: was measured with another model: {remedy}.")
            answers, measured = root["answers"], root["measured"]
            sound = all(_is_list(answer, int) for answer in answers.values()) and all(
                _is_sound(each, self._model["fingerprint"]["num_layers"] - len(deleted.split(",")) + (not deleted))
                for deleted, samples in measured.items()
                for each in samples.values()
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file}: is damaged ({type(error).__name__}: {error}): {remedy}.") from error
        if not sound:
            raise InputError(f"{file}: is damaged: {remedy}.")
        self._answers, self._measured = answers, measured


def _name(deleted: Iterable[int]) -> str:
    return ",".join(str(layer) for layer in sorted(deleted))


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_sound(entry: dict[str, Any], candidates: int) -> bool:
    losses, changed = entry["loss"], entry["changed"]
    return (
        set(entry) == {"loss", "changed", "full"}
        and len(losses) == len(changed) == candidates
        and _is_list([loss for loss in losses if loss is not None], float)
        and _is_list(changed, float)
        and isinstance(entry["full"], float)
    )
