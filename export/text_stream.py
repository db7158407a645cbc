"""Text from tokens as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers give for bytes that are no whole character."""


class TextStream:
    """The text of one row.

    Args:
        decode: Tokens -> text.
        stops: Strings that end the text; they are no part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)
        self._tokens: list[int] = []
        # Tokens from _context on are decoded each time, those before _read are in _text already.
        self._context, self._read = 0, 0
        self._text, self._shown = "", 0
        self.stopped = False
        """Whether a stop string came."""

    @property
    def text(self) -> str:
        """What was given out so far."""
        return self._text[: self._shown]

    def push(self, token: int) -> str:
        """One more token; the text that is certain now, maybe none."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        new = self._unread()
        if not new or new.endswith(_INCOMPLETE):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        self._add(new)
        return self._show(len(self._text) - (0 if self.stopped else self._held_back()))

    def finish(self) -> str:
        """No token follows: the rest of the text."""
        if not self.stopped:
            self._add(self._unread())
            self._context = self._read = len(self._tokens)
        return self._show(len(self._text))

    def _unread(self) -> str:
        # How a token reads depends on the one before it: both are decoded, and the earlier one's text is cut off.
        before = self._decode(self._tokens[self._context : self._read])
        return self._decode(self._tokens[self._context :])[len(before) :]

    def _add(self, new: str) -> None:
        start = max(0, len(self._text) - self._longest + 1)
        self._text += new
        found = [place for stop in self._stops if (place := self._text.find(stop, start)) >= 0]
        if found:
            self.stopped, self._text = True, self._text[: min(found)]

    def _show(self, end: int) -> str:
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _held_back(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        for count in range(self._longest - 1, 0, -1):
            if any(len(stop) > count and self._text.endswith(stop[:count]) for stop in self._stops):
                return count
        return 0
