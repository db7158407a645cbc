"""The fields of a plan's JSON, taken one by one; what is wrong is said with its place in the file."""

from __future__ import annotations

import json
import math
from reprlib import repr as short_repr
from typing import Any, NoReturn

from vte_compile.errors import PlanError

SCHEMA_VERSION = 4
JSON_NAME = "vte_plan.json"
TENSORS_NAME = "vte_plan.safetensors"


class Fields:
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


def parse_json(data: bytes) -> object:
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
