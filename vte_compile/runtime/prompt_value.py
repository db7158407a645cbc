"""What a graph knows of a row's prompt for adapters, by name; without torch, since manifests hold it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PromptValue:
    """One thing a graph knows of the prompt: an output of prefill, an input of later chunks."""

    name: str
    per_row: bool
    """[B, ...], one per row of the batch; else the same for all rows, which then come from one prompt."""
