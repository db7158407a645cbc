"""What an ONNX engine runs: its files checked, then all its graphs loaded, or none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vte_compile.errors import EngineError, InputError
from vte_compile.export.folder import check_files
from vte_compile.export.generation import GenerationDefaults
from vte_compile.export.image_features import ImageEncoder, vision_inputs
from vte_compile.export.manifest import MANIFEST
from vte_compile.export.onnx_manifest import OnnxManifest
from vte_compile.export.ort_decoder import FORMS, Decoder, load_decoder
from vte_compile.export.ort_inputs import Inputs
from vte_compile.export.ort_sessions import Device, Graph, Setting, import_onnxruntime

_DTYPES = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class Parts:
    """An engine, loaded."""

    manifest: OnnxManifest
    device: Device
    dtype: np.dtype[Any]
    """Of embeddings, keys and values."""
    inputs: Inputs
    encoder: ImageEncoder
    decoder: Decoder
    defaults: GenerationDefaults


def load_parts(
    folder: Path, manifest: OnnxManifest, provider: str | None, threads: int | None, form: str | None
) -> Parts:
    """See :func:`vte_compile.load_engine`."""
    setting = Setting.choose(provider or manifest.provider, threads)
    _check_runtime(manifest)
    if form is not None and form not in FORMS:
        raise InputError(f"form: {form!r} is unknown; there are {', '.join(map(repr, FORMS))}.")
    if manifest.model.dtype not in _DTYPES:
        raise EngineError(
            f"{folder / MANIFEST}: dtype {manifest.model.dtype!r}, but the runner takes {', '.join(_DTYPES)} only: "
            "export the model again."
        )
    _check_named(manifest)
    check_files(folder, manifest.files)
    dtype = np.dtype(_DTYPES[manifest.model.dtype])
    decoder = load_decoder(folder, manifest, form, dtype, setting)
    embedding = Graph(folder / manifest.embedding, setting, small=True)
    embedding.check(["input_ids", "image_features"], ["inputs_embeds", "visual_mask"])
    vision = None
    if manifest.vision is not None:
        vision = Graph(folder / manifest.vision.piece, setting)
        vision.check(vision_inputs(manifest.vision), ["image_features"])
    return Parts(
        manifest,
        setting.device,
        dtype,
        Inputs(manifest.model, embedding, dtype, decoder.may_exit),
        image_encoder(manifest, vision, dtype),
        decoder,
        GenerationDefaults.read(folder / "generation_config.json"),
    )


def image_encoder(manifest: OnnxManifest, graph: Any, dtype: Any) -> ImageEncoder:
    """The runner of vision.onnx, or of an engine of it; ``graph`` None: there is none."""
    run = None if graph is None else lambda inputs: graph.run(inputs, ["image_features"])[0].numpy()
    return ImageEncoder(manifest.model, manifest.vision, manifest.vision_missing, run, dtype)


def _check_runtime(manifest: OnnxManifest) -> None:
    """Refuse an ONNX Runtime that would load the graphs and compute something else."""
    here = import_onnxruntime().__version__
    if manifest.runtime is not None and _numbers(here) < _numbers(manifest.runtime):
        raise EngineError(
            f"onnxruntime {here} counts sliding windows in another way: install {manifest.runtime} or a later one."
        )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]


def _check_named(manifest: OnnxManifest) -> None:
    """Every graph the manifest names is among its files, so that no other file is ever opened.

    Raises:
        EngineError: One is not.
    """
    names = [manifest.embedding, *(stage.file for stage in manifest.stages)]
    names += [stage.exit.gate for stage in manifest.stages if stage.exit is not None and stage.exit.gate is not None]
    names += [] if manifest.decoder is None else [manifest.decoder]
    names += [] if manifest.vision is None else [manifest.vision.piece]
    for name in names:
        if name not in manifest.files:
            raise EngineError(f"{MANIFEST}: {name} is not among its files: export the model again.")
