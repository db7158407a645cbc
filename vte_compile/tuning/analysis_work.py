"""What an analysis measured, one file per sample: an interrupted analysis goes on where it was.

A folder holds the index of examined samples (store.py), which says of which model, and per sample and length limit of
answers analysis-{key}-{max_new_tokens}.json, schema version 1::

    {"schema_version": 1, "measured": the fields of :class:`Measured`}

Losses that are not finite are null.
"""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vte_compile.atomic_file import write_atomically
from vte_compile.errors import InputError
from vte_compile.tuning.modality_attention import KEYS, QUERIES
from vte_compile.tuning.store import ExaminedStore

SCHEMA_VERSION = 1
_FILE_NAME = "analysis-{}-{}.json"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """What was measured of one sample, for the decoder's L layers."""

    answer: list[int]
    """The full model's greedy answer, which all but `right` is about."""
    visual: int
    """Visual tokens of the prompt."""
    tokens: int
    """All tokens of the prompt."""
    attention: list[list[list[float]]]
    """[L, Q, K]: the share of the attention of each of `QUERIES` on each of `KEYS`."""
    uniform: list[list[float]]
    """[Q, K]: likewise, if attention were uniform; in layers without a sliding window, where there are such."""
    loss: list[float]
    """[L + 1]: mean cross entropy of the answer for an exit after each layer, and for none."""
    unchanged: list[bool]
    """[L]: whether the answer stays, with an exit after that layer."""
    right: list[bool] | None
    """[L]: whether the sample's own answer is decoded; None if it has none."""
    deletion_loss: list[float | None] | None
    """[L]: mean cross entropy of the answer without the attention of that layer; None where it is not finite, or as a
    whole if attentions of this model cannot be deleted."""
    deletion_unchanged: list[bool] | None
    """[L]: whether the answer stays."""

    @classmethod
    def from_json(cls, root: Any, layers: int) -> Measured:
        """What `asdict` gave.

        Raises:
            ValueError: It is something else, or of a model with another number of layers.
        """
        try:
            found = cls(**root)
            deletions = (found.deletion_loss, found.deletion_unchanged)
            sound = (
                _is_list(found.answer, int)
                and type(found.visual) is type(found.tokens) is int
                and len(found.attention) == layers
                and all(_is_table(shares) for shares in (*found.attention, found.uniform))
                and _is_list(found.loss, float, layers + 1)
                and _is_list(found.unchanged, bool, layers)
                and (found.right is None or _is_list(found.right, bool, layers))
                and (
                    deletions == (None, None)
                    or (
                        _is_list([loss for loss in found.deletion_loss or [] if loss is not None], float)
                        and len(found.deletion_loss or []) == layers
                        and _is_list(found.deletion_unchanged, bool, layers)
                    )
                )
            )
        except TypeError as error:
            raise ValueError(str(error)) from error
        if not sound:
            raise ValueError("other fields than those of a measured sample of this model")
        return found


class AnalysisWork:
    """Measured samples of one model in `folder`, or nowhere if that is None.

    Raises InputError if the folder is of another model, or cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, model: nn.Module, layers: int, max_new_tokens: int
    ) -> None:
        ExaminedStore(folder, model)  # refuses a folder of another model
        self._folder = None if folder is None else Path(folder)
        self._layers, self._max_new_tokens = layers, max_new_tokens

    def get(self, key: str) -> Measured | None:
        """What is known of the sample with this key; a damaged file is left out, with a warning."""
        if self._folder is None or not (file := self._file(key)).exists():
            return None
        try:
            root = json.loads(file.read_text(encoding="utf-8"))
            if root["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema_version is {root['schema_version']!r}, not {SCHEMA_VERSION}")
            return Measured.from_json(root["measured"], self._layers)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            _logger.warning("%s: is damaged (%s: %s); its sample is measured again", file, type(error).__name__, error)
            return None

    def add(self, key: str, measured: Measured) -> None:
        """Keep what was measured.

        Raises:
            InputError: It cannot be written; what was written before stays.
        """
        if self._folder is None:
            return
        content = {"schema_version": SCHEMA_VERSION, "measured": asdict(measured)}
        try:
            write_atomically(self._file(key), (json.dumps(content, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise InputError(
                f"{self._folder}: cannot be written: {error}; make room, and call again with the same folder to go on."
            ) from error

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / _FILE_NAME.format(key, self._max_new_tokens)


def _is_list(value: object, kind: type, length: int | None = None) -> bool:
    return (
        isinstance(value, list)
        and all(type(item) is kind and (not isinstance(item, float) or math.isfinite(item)) for item in value)
        and length in (None, len(value))
    )


def _is_table(shares: object) -> bool:
    return (
        isinstance(shares, list)
        and len(shares) == len(QUERIES)
        and all(_is_list(row, float, len(KEYS)) for row in shares)
    )
