"""Conversations from a file, for the command line: .jsonl, one per line, or .json, a list of them.

Each is what :func:`vte_compile.tuning.samples.read_samples` takes, with pictures by path, relative to the file::

    {"messages": [{"role": "user", "content": [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "Who?"}]},
                  {"role": "assistant", "content": "A cat."}]}
    {"image": "cat.png", "conversations": [{"from": "human", "value": "<image>\\nWho?"}]}
    {"image": "cat.png", "question": "Who?", "answer": "A cat."}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vte_compile.errors import InputError

_SOURCES = frozenset("image images path url image_url".split())


def read_chats(file: Path) -> list[Any]:
    """All conversations of a file, with the paths of their pictures made absolute; the pictures are not opened.

    Raises:
        InputError: The file cannot be read, is no JSON, or holds no list; the message names the line.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    if file.suffix != ".jsonl":
        chats = _parse(text, str(file))
        if not isinstance(chats, list):
            raise InputError(f"{file}: expected a list of conversations, or a .jsonl file with one per line.")
    else:
        lines = enumerate(text.splitlines(), 1)
        chats = [_parse(line, f"{file}, line {number}") for number, line in lines if line.strip()]
    return [_located(chat, file.parent, False) for chat in chats]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: no JSON: {error}") from error


def _located(value: Any, folder: Path, is_source: bool) -> Any:
    """The same with absolute paths, where a file is at such a path; URLs and the like stay as they are."""
    if isinstance(value, dict):
        return {key: _located(inner, folder, key in _SOURCES) for key, inner in value.items()}
    if isinstance(value, list):
        return [_located(inner, folder, is_source) for inner in value]
    return str(folder / value) if is_source and isinstance(value, str) and _is_file(folder / value) else value


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a picture as text: too long for a name
        return False
