"""Run an engine of a model with co-attention layers with numpy and ONNX Runtime: texts and images in, logits out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vte_compile.errors import EngineError, InputError
from vte_compile.export.co_attention_manifest import CoAttentionManifest
from vte_compile.export.folder import check_files
from vte_compile.export.manifest import MANIFEST
from vte_compile.export.ort_sessions import Array, Graph, Setting

_DTYPES = {"float32": np.float32, "float16": np.float16}
_INPUTS = ("input_ids", "attention_mask", "pixel_values")


class CoAttentionEngine:
    """An engine of METER or BridgeTower, from :func:`vte_compile.load_engine`. Nothing of a request is kept on it.

    Arrays are numpy's; what has ``__array__`` (such as a torch tensor on the CPU) is taken as well.
    """

    def __init__(self, manifest: CoAttentionManifest, graph: Graph, folder: Path) -> None:
        self.manifest = manifest
        """What the engine is made of, and was made from."""
        self.folder = folder
        """Where it was loaded from."""
        self._graph = graph

    @classmethod
    def load(
        cls,
        folder: Path,
        body: dict[str, Any],
        *,
        provider: str | None = None,
        threads: int | None = None,
        form: str | None = None,
    ) -> CoAttentionEngine:
        """See :func:`vte_compile.load_engine`; ``body``: the manifest's fields."""
        manifest = CoAttentionManifest.from_body(body)
        setting = Setting.choose(provider or manifest.provider, threads)
        if form is not None:
            raise InputError("form: means nothing to an engine of a model with co-attention layers: it is one graph.")
        if manifest.model.dtype not in _DTYPES or manifest.graph not in manifest.files:
            raise EngineError(f"{folder / MANIFEST}: not of an engine this runner takes: export the model again.")
        check_files(folder, manifest.files)
        graph = Graph(folder / manifest.graph, setting)
        graph.check(_INPUTS, manifest.outputs)
        return cls(manifest, graph, folder)

    def run(self, input_ids: Any, pixel_values: Any, attention_mask: Any = None) -> dict[str, Array]:
        """Run texts with their images.

        Args:
            input_ids: [B, T] integers.
            pixel_values: [B, channels, height, width]; of a model for several images a text (NLVR2) [B, images,
                channels, height, width]. Normalized as the model wants it.
            attention_mask: [B, T], 1 for tokens and 0 for padding; None: no padding.

        Returns:
            The model's outputs by name, such as ``logits`` [B, labels].

        Raises:
            InputError: Misshaped inputs, or ids that the vocabulary does not have; the message says which.
        """
        facts = self.manifest.model
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"input_ids: expected integers [B, T], got {ids.dtype} {list(ids.shape)}.")
        if ids.min() < 0 or ids.max() >= facts.vocab_size:
            raise InputError(f"input_ids: expected 0 to {facts.vocab_size - 1}, got {ids.min()} to {ids.max()}.")
        if ids.shape[1] > facts.max_tokens:
            raise InputError(f"input_ids: texts have up to {facts.max_tokens} tokens, got {ids.shape[1]}.")
        mask = np.ones(ids.shape, np.int64) if attention_mask is None else np.asarray(attention_mask)
        if mask.shape != ids.shape:
            raise InputError(f"attention_mask: expected {list(ids.shape)}, as input_ids, got {list(mask.shape)}.")
        pixels = np.asarray(pixel_values)
        if list(pixels.shape) != [len(ids), *facts.image]:
            expected = ", ".join(map(str, [len(ids), *facts.image]))
            raise InputError(f"pixel_values: expected [{expected}], got {list(pixels.shape)}.")
        given = (ids.astype(np.int64), mask.astype(np.int64), pixels.astype(_DTYPES[facts.dtype], copy=False))
        results = self._graph.run(dict(zip(_INPUTS, given, strict=True)), self.manifest.outputs)
        return {name: value.numpy() for name, value in zip(self.manifest.outputs, results, strict=True)}
