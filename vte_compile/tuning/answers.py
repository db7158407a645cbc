"""What a configuration of a model answered, by sample, on disk: an interrupted evaluation goes on where it was.

One JSON file per configuration, replaced in one step, schema version 1::

    {"schema_version": 1, "configuration": what was run, "answers": {key of the sample: [exit layer, [tokens]]}}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vte_compile.atomic_file import write_atomically
from vte_compile.errors import InputError

SCHEMA_VERSION = 1
# Answers that an end without notice, such as a killed process, may lose.
_UNSAVED = 32


class Answer(NamedTuple):
    """The new tokens, the end token included, and the layer behind which the visual tokens left; -1: they did not."""

    tokens: tuple[int, ...]
    exit_layer: int = -1


class Answers(Mapping[str, Answer]):
    """The answers of one configuration; in memory, and in a file in `folder` unless that is None.

    `configuration`: whatever tells it from others of the same model, as JSON has it.

    Raises InputError if the file is damaged or cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, configuration: Mapping[str, Any]) -> None:
        self._configuration = dict(configuration)
        name = hashlib.sha256(json.dumps(self._configuration, sort_keys=True).encode()).hexdigest()[:16]
        self._file = None if folder is None else Path(folder) / f"answers-{name}.json"
        self._answers: dict[str, Answer] = {}
        self._unsaved = 0
        if self._file is not None and self._file.exists():
            self._answers = _read(self._file, self._configuration)

    def __iter__(self) -> Iterator[str]:
        return iter(self._answers)

    def __getitem__(self, key: str) -> Answer:
        return self._answers[key]

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, key: str, answer: Answer) -> None:
        """Add one; writes the file now and then.

        Raises:
            InputError: It cannot be written; what was written before stays.
        """
        self._answers[key] = answer
        self._unsaved += 1
        if self._unsaved >= _UNSAVED:
            self.flush()

    def flush(self) -> None:
        """Write what has not been written yet.

        Raises:
            InputError: It cannot be written; what was written before stays.
        """
        unsaved, self._unsaved = self._unsaved, 0
        if self._file is None or not unsaved:
            return
        answers = {key: [answer.exit_layer, list(answer.tokens)] for key, answer in self._answers.items()}
        content = {"schema_version": SCHEMA_VERSION, "configuration": self._configuration, "answers": answers}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, (json.dumps(content, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise InputError(
                f"{self._file}: cannot be written: {error}; the last {unsaved} answers are lost: make room, and call "
                "again with the same folder to go on."
            ) from error


def _read(file: Path, configuration: dict[str, Any]) -> dict[str, Answer]:
    try:
        root = json.loads(file.read_text(encoding="utf-8"))
        sound = root["schema_version"] == SCHEMA_VERSION and root["configuration"] == configuration
        answers = {key: Answer(tuple(tokens), layer) for key, (layer, tokens) in root["answers"].items()}
        sound = sound and all(
            type(number) is int for answer in answers.values() for number in (*answer.tokens, answer.exit_layer)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{file}: cannot be read ({type(error).__name__}: {error}): delete it to start anew."
        ) from error
    if not sound:
        raise InputError(f"{file}: is damaged, or of another version of vte-compile: delete it to start anew.")
    return answers
