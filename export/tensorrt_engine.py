"""Run a TensorRT engine: what an ONNX engine does, with TensorRT's engines and torch's CUDA memory."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from vte_compile.errors import EngineError, InputError
from vte_compile.export.folder import check_files
from vte_compile.export.generation import GenerationDefaults
from vte_compile.export.manifest import MANIFEST
from vte_compile.export.ort_cache import OnnxCache
from vte_compile.export.ort_engine import OnnxEngine, OnnxOutput
from vte_compile.export.ort_inputs import Inputs
from vte_compile.export.ort_programs import Parts, image_encoder
from vte_compile.export.tensorrt_build import import_tensorrt
from vte_compile.export.tensorrt_decoder import TensorRTDecoder
from vte_compile.export.tensorrt_graph import TensorRTGraph
from vte_compile.export.tensorrt_manifest import TensorRTManifest
from vte_compile.export.token_inputs import TokenInputs

_NUMPY: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class TensorRTEngine(OnnxEngine):
    """A TensorRT engine, from :func:`vte_compile.load_engine`: ``prefill()``, ``decode()``, ``generate()``, ``chat()``.

    Args:
        folder: Where it was loaded from.
        manifest: Of the folder.
        graphs: The loaded engines, by file of their ONNX graph.
        device: Where they run.
    """

    def __init__(
        self, folder: Path, manifest: TensorRTManifest, graphs: Mapping[str, Any], device: torch.device
    ) -> None:
        dtype = np.dtype(_NUMPY[manifest.model.dtype])
        facts = manifest.model
        decoder = TensorRTDecoder(
            graphs,
            manifest.stages,
            getattr(torch, facts.dtype),
            device,
            manifest.sizes,
            facts.position_rows,
            TokenInputs(facts, dtype),
            facts.companion,
        )
        vision = None if manifest.vision is None else graphs[manifest.vision.piece]
        parts = Parts(
            manifest,
            device,  # type: ignore[arg-type]
            dtype,
            Inputs(manifest.model, graphs[manifest.embedding], dtype, decoder.may_exit),
            image_encoder(manifest, vision, dtype),
            decoder,
            GenerationDefaults.read(folder / "generation_config.json"),
        )
        super().__init__(parts, folder)
        self._sizes = manifest.sizes
        # TensorRT asks for a stream of its own: on the default one it waits more than it must.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @classmethod
    def load(
        cls,
        folder: Path,
        body: dict[str, Any],
        *,
        provider: str | None = None,
        threads: int | None = None,
        form: str | None = None,
    ) -> TensorRTEngine:
        """See :func:`vte_compile.load_engine`; ``body``: the manifest's fields."""
        if provider not in (None, "cuda") or threads is not None or form not in (None, "staged"):
            raise InputError("a TensorRT engine runs on an NVIDIA GPU, in stages: leave provider, threads, form out.")
        manifest = TensorRTManifest.from_body(body)
        check_manifest(folder, manifest)
        check_files(folder, manifest.files)
        trt = import_tensorrt("tensorrt" if manifest.builder is None else manifest.builder.package)
        if not torch.cuda.is_available():
            raise EngineError(
                f"{folder}: TensorRT's engines run on NVIDIA GPUs, and torch finds none (torch.cuda.is_available() is "
                "False): use a machine with one, and a torch built for CUDA."
            )
        device = torch.device("cuda", torch.cuda.current_device())
        graphs = {facts.graph: TensorRTGraph(trt, folder, facts, device) for facts in manifest.engines}
        return cls(folder, manifest, graphs, device)

    def prefill(self, *args: Any, **kwargs: Any) -> OnnxOutput:
        """See :meth:`OnnxEngine.prefill`."""
        with self._streamed():
            return super().prefill(*args, **kwargs)

    def decode(self, tokens: Any, cache: OnnxCache, *, active: Any = None) -> OnnxOutput:
        """See :meth:`OnnxEngine.decode`."""
        if (most := self._sizes["batch"][2]) < cache.batch:
            raise InputError(
                f"the cache has {cache.batch} rows, and the engine decodes {most} at once: export the model with a "
                "larger profiles.batch."
            )
        with self._streamed():
            return super().decode(tokens, cache, active=active)

    @contextlib.contextmanager
    def _streamed(self) -> Any:
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield


def check_manifest(folder: Path, manifest: TensorRTManifest) -> None:
    """Whether a manifest is whole: all graphs are among its files, and each has an engine.

    Raises:
        EngineError: It is not.
    """
    named = [manifest.embedding, *(stage.file for stage in manifest.stages)]
    named += [s.exit.gate for s in manifest.stages if s.exit is not None and s.exit.gate is not None]
    named += [] if manifest.vision is None else [manifest.vision.piece]
    engines = {facts.graph for facts in manifest.engines}
    if lost := [name for name in named if name not in manifest.files or name not in engines]:
        raise EngineError(f"{folder / MANIFEST}: {lost[0]} is not among its files and engines: export the model again.")
    if manifest.model.dtype not in _NUMPY:
        raise EngineError(f"{folder / MANIFEST}: dtype {manifest.model.dtype!r} is unknown: export the model again.")
