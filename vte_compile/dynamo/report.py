"""What the backend did with each graph, for whoever asks: explain() and tests."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vte_compile.runtime.decoder_runner import DecoderRunner
    from vte_compile.runtime.steps import Phase


@dataclass
class Graph:
    """One graph that Dynamo handed over."""

    nodes: int
    runner: DecoderRunner | None = None
    """Of the decoder in it, if it was rewritten."""
    phase: Phase | None = None
    """Which of its graphs runs there."""
    refusal: str = ""
    """Why it was not rewritten, if there is one."""


_recording: contextvars.ContextVar[list[Graph] | None] = contextvars.ContextVar("vte_graphs", default=None)


def record(graph: Graph) -> None:
    """Note a graph, if anybody asked."""
    graphs = _recording.get()
    if graphs is not None:
        graphs.append(graph)


@contextlib.contextmanager
def recording() -> Iterator[list[Graph]]:
    """The graphs that the backend compiles meanwhile, in this context."""
    graphs: list[Graph] = []
    token = _recording.set(graphs)
    try:
        yield graphs
    finally:
        _recording.reset(token)
