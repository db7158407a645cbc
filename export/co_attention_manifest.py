"""manifest.json of an engine of a model with co-attention layers: one graph, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vte_compile.export.manifest import FileFacts, from_fields
from vte_compile.export.onnx_manifest import Tools

TARGET = "onnxruntime co-attention"


@dataclass(frozen=True)
class CoAttentionFacts:
    """The model the engine was made from."""

    name: str
    dtype: str
    """Such as "float32"."""
    vocab_size: int
    max_tokens: int
    """Of a text."""
    image: list[int]
    """What goes with a text: [channels, height, width], or [images, channels, height, width]."""


@dataclass(frozen=True)
class CoAttentionManifest:
    """All about an engine but the numbers."""

    target: str
    built: Tools
    opset: int
    provider: str
    model: CoAttentionFacts
    plan: list[dict[str, Any]]
    """``Plan.describe()``; the plan itself is in the folder ``plan``."""
    graph: str
    """Its file; inputs are ``input_ids``, ``attention_mask`` and ``pixel_values``."""
    outputs: list[str]
    """Of the graph, by the model's names, such as "logits"."""
    files: dict[str, FileFacts]
    """By path, with slashes: all files of the folder but this one."""

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> CoAttentionManifest:
        """What :func:`vte_compile.export.manifest.decode` gave.

        Raises:
            EngineError: Not a manifest of this target.
        """

        def build(fields: dict[str, Any]) -> CoAttentionManifest:
            objects = {
                "built": Tools(**fields["built"]),
                "model": CoAttentionFacts(**fields["model"]),
                "files": {path: FileFacts(**facts) for path, facts in fields["files"].items()},
            }
            return cls(**(fields | objects))

        return from_fields(build, body)
