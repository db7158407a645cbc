"""Text from tokens as they come: its pieces make up the whole, and end before a stop string."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel

from vte_compile.export.text_stream import TextStream


def test_words_with_spaces_between() -> None:
    tokenizer = Tokenizer(WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="<s>"))
    tokenizer.add_special_tokens(["<s>"])
    stream = TextStream(tokenizer.decode)
    assert [stream.push(t) for t in (0, 1, 0, 2, 1)] == ["", "a", "", " b", " a"]
    assert stream.finish() == ""
    assert stream.text == tokenizer.decode([0, 1, 0, 2, 1]) == "a b a"


def test_characters_of_several_tokens() -> None:
    """Bytes of one character come as one piece; what never becomes a character comes at the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    ids = tokenizer.encode("né 🍲!").ids
    stream = TextStream(tokenizer.decode)
    pieces = [stream.push(t) for t in ids]
    assert pieces == ["n", "", "é", " ", "", "", "", "🍲", "!"]
    broken = TextStream(tokenizer.decode)
    assert [broken.push(t) for t in tokenizer.encode("é").ids[:1]] == [""]
    assert broken.finish() == broken.text == "\N{REPLACEMENT CHARACTER}"


def letters(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


@pytest.mark.parametrize(
    ("text", "stops", "pieces"),
    [
        ("one. two", [". "], ["o", "n", "e", "", ""]),
        ("a.b", [". "], ["a", "", ".b"]),
        ("aab", ["aaa"], ["", "", "aab"]),
        ("aaab", ["aab"], ["", "", "a", ""]),
        ("xyz", ["yz", "xyzzy"], ["", "", "x"]),
        ("abc", ["", "bc"], ["a", "", ""]),
        ("ab", [], ["a", "b"]),
    ],
)
def test_stop_strings(text: str, stops: list[str], pieces: list[str]) -> None:
    stream = TextStream(letters, stops)
    got = []
    for character in text:
        got.append(stream.push(ord(character)))
        if stream.stopped:
            break
    assert got == pieces
    given = "".join(got) + stream.finish()
    cut = min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))
    assert given == stream.text == text[:cut]
    assert stream.push(ord("!")) == stream.finish() == "" or not stream.stopped


def test_what_was_held_back_comes_at_the_end() -> None:
    stream = TextStream(letters, ["bcd"])
    assert [stream.push(ord(c)) for c in "abc"] == ["a", "", ""]
    assert stream.finish() == "bc"
    assert stream.text == "abc"
    assert not stream.stopped
