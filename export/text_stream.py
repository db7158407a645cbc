"""Text from tokens as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """The text of one row.

    Args:
        decode: Tokens -> text.
        stops: Strings that end the text; they are no part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._context, self._read = 0, 0
        self._shown = 0
        self.text = ""
        """So far, without what may still change or become a stop string."""
        self.stopped = False
        """Whether a stop string came."""
        self._certain = ""

    def push(self, token: int) -> str:
        """One more token; the text that is certain now, maybe none."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        # How a token reads depends on the one before it: both are decoded, and the earlier one's text is cut off.
        before = self._decode(self._tokens[self._context : self._read])
        now = self._decode(self._tokens[self._context :])
        if len(now) <= len(before) or now.endswith("�"):  # nothing, or the first bytes of a character
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._show(now[len(before) :])

    def finish(self) -> str:
        """No token follows: the rest of the text."""
        if self.stopped:
            return ""
        before = self._decode(self._tokens[self._context : self._read])
        piece = self._show(self._decode(self._tokens[self._context :])[len(before) :])
        if self.stopped:
            return piece
        self._read = self._context = len(self._tokens)
        self.text = self._certain
        piece += self._certain[self._shown :]
        self._shown = len(self._certain)
        return piece

    def _show(self, new: str) -> str:
        longest = max(map(len, self._stops), default=0)
        start = max(0, len(self._certain) - longest + 1)
        self._certain += new
        found = [place for stop in self._stops if (place := self._certain.find(stop, start)) >= 0]
        if found:
            self.stopped = True
            self._certain = self._certain[: min(found)]
            end = len(self._certain)
        else:
            end = len(self._certain) - self._held_back()
        piece = self._certain[self._shown : end]
        self._shown = max(self._shown, end)
        self.text = self._certain[: self._shown]
        return piece

    def _held_back(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        for count in range(max(map(len, self._stops), default=0) - 1, 0, -1):
            if any(len(stop) > count and self._certain.endswith(stop[:count]) for stop in self._stops):
                return count
        return 0
