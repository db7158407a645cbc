"""Conversations from files: both forms, pictures beside the file, and what is no such file."""

from __future__ import annotations

import json

import pytest

from vte_compile.errors import InputError
from vte_compile.tuning.chat_file import read_chats


def test_pictures_are_found_beside_the_file(tmp_path) -> None:
    (tmp_path / "a.png").touch()
    content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "a.png"}]
    chats = [
        {"messages": [{"role": "user", "content": content}]},
        {"images": ["a.png", "https://host/a.png"], "question": "a.png", "answer": "a.png"},
        [{"role": "user", "content": [{"type": "image", "image": "x" * 5000}]}],
    ]
    lines, whole = tmp_path / "chats.jsonl", tmp_path / "chats.json"
    lines.write_text("\n\n".join(map(json.dumps, chats)))
    whole.write_text(json.dumps(chats))
    found = read_chats(lines)
    assert found == read_chats(whole)
    here = str(tmp_path / "a.png")
    assert found[0]["messages"][0]["content"] == [{"type": "image", "path": here}, {"type": "text", "text": "a.png"}]
    assert found[1] == {"images": [here, "https://host/a.png"], "question": "a.png", "answer": "a.png"}
    assert found[2] == chats[2]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.json", None, "none.json: cannot be read"),
        ("a.json", b"\xff\xfe", "a.json: cannot be read"),
        ("a.json", b"{", "a.json: no JSON"),
        ("a.json", b"{}", "expected a list"),
        ("a.jsonl", b"{}\n{", r"a.jsonl, line 2: no JSON"),
    ],
)
def test_what_is_no_such_file(name, text, message, tmp_path) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(InputError, match=message):
        read_chats(tmp_path / name)
