"""manifest.json of a TensorRT engine: that of an ONNX engine, and how its graphs become TensorRT's engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vte_compile.export.manifest import from_fields
from vte_compile.export.onnx_manifest import OnnxManifest, nested


@dataclass(frozen=True)
class EngineFacts:
    """One graph, and the engine that is built of it."""

    graph: str
    """File of the ONNX graph."""
    engine: str
    """File of the engine; it is there if it was built, with the folder or later (build.sh)."""
    profiles: list[dict[str, list[list[int]]]]
    """For each optimization profile the smallest, usual and largest shape of each input that has dims of any size:
    first that of prompts, of one row, then that of decode steps."""
    trtexec: list[str]
    """The command line that builds it, in the folder."""


@dataclass(frozen=True)
class BuilderFacts:
    """What built the engines that came with the folder: they run with this version only."""

    package: str
    """"tensorrt" or "tensorrt_rtx"."""
    version: str


@dataclass(frozen=True)
class TensorRTManifest(OnnxManifest):
    """All about a TensorRT engine but the numbers. ``embedding``, ``vision.piece``, ``stages`` and their gates name
    ONNX graphs; ``engines`` has one entry for each of them. ``decoder`` is None.
    """

    sizes: dict[str, list[int]]
    """Which profiles the engines were made for (tensorrt_profiles.py): smallest, usual and largest of each size."""
    engines: list[EngineFacts]
    builder: BuilderFacts | None
    """None: no engine came with the folder."""

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> TensorRTManifest:
        """As :meth:`OnnxManifest.from_body`."""
        return from_fields(_manifest, body)

    def engine(self, graph: str) -> EngineFacts:
        """Of a graph's file."""
        return next(facts for facts in self.engines if facts.graph == graph)


def _manifest(fields: dict[str, Any]) -> TensorRTManifest:
    builder = fields["builder"]
    objects = {
        "engines": [EngineFacts(**engine) for engine in fields["engines"]],
        "builder": None if builder is None else BuilderFacts(**builder),
    }
    return TensorRTManifest(**(nested(fields) | objects))
