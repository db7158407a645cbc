"""manifest.json of an ONNX engine: its graphs, what they hold, and how they fit together, as plain data.

The names of the graphs' inputs and outputs are part of the format; docs/onnx.md lists them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vte_compile.export.manifest import FileFacts, ModelFacts, VisionCall, from_fields


@dataclass(frozen=True)
class Tools:
    """What wrote the graphs."""

    vte_compile: str
    torch: str
    transformers: str
    onnx: str
    onnxscript: str


@dataclass(frozen=True)
class CacheFacts:
    """Keys or values that a layer caches: [B, ``kv_heads``, columns, ``head_size``]."""

    layer: int
    kv_heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True)
class PromptFacts:
    """What adapters know of a row's prompt, [B, *``shape``]: an input and an output like the keys and values."""

    name: str
    shape: list[int]


@dataclass(frozen=True)
class ExitFacts:
    """Behind a stage the visual tokens may leave."""

    layer: int
    gate: str | None
    """File of the gate's graph; None: they leave always."""


@dataclass(frozen=True)
class StageFacts:
    """Layers between two exits, as one graph."""

    file: str
    layers: list[int]
    caches: list[CacheFacts]
    prompt: list[PromptFacts]
    exit: ExitFacts | None
    """None behind the last stage, which gives logits."""


@dataclass(frozen=True)
class OnnxManifest:
    """All about an ONNX engine but the numbers."""

    target: str
    built: Tools
    opset: int
    runtime: str | None
    """The oldest ONNX Runtime that computes what these graphs mean, such as "1.24"; None: any that loads them."""
    provider: str
    """Which kind of ONNX Runtime provider the graphs' operators were chosen for: "cpu" or "cuda"."""
    precision: str
    """Of the weights: "float32", "float16", "int8" or "int4"."""
    model: ModelFacts
    plan: list[dict[str, Any]]
    embedding: str
    """File of the graph that makes embeddings and the visual mask of token ids and image features."""
    vision: VisionCall | None
    vision_missing: str | None
    stages: list[StageFacts]
    """The staged form; empty if it was not asked for."""
    decoder: str | None
    """File of the decoder as one graph, with the exits inside; None if it was not asked for."""
    files: dict[str, FileFacts]
    """By path, with slashes: all files of the folder but this one."""

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> OnnxManifest:
        """What :func:`vte_compile.export.manifest.decode` gave.

        Raises:
            EngineError: Not a manifest of this target.
        """
        return from_fields(lambda fields: cls(**nested(fields)), body)


def nested(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of an :class:`OnnxManifest`, and others, with what is nested in them as objects."""
    vision = fields["vision"]
    objects = {
        "built": Tools(**fields["built"]),
        "model": ModelFacts.of(fields["model"]),
        "vision": None if vision is None else VisionCall.of(vision),
        "stages": [_stage(stage) for stage in fields["stages"]],
        "files": {path: FileFacts(**facts) for path, facts in fields["files"].items()},
    }
    return fields | objects


def _stage(fields: dict[str, Any]) -> StageFacts:
    exit_ = fields["exit"]
    nested = {
        "caches": [CacheFacts(**cache) for cache in fields["caches"]],
        "prompt": [PromptFacts(**value) for value in fields["prompt"]],
        "exit": None if exit_ is None else ExitFacts(**exit_),
    }
    return StageFacts(**(fields | nested))
