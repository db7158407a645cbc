"""What an ONNX engine runs: its files checked, then all its graphs loaded, or none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vte_compile.errors import EngineError, InputError
from vte_compile.export.folder import check_files
from vte_compile.export.generation import GenerationDefaults
from vte_compile.export.manifest import MANIFEST, PatchFacts
from vte_compile.export.onnx_manifest import OnnxManifest
from vte_compile.export.ort_decoder import FORMS, Decoder, load_decoder
from vte_compile.export.ort_inputs import Inputs
from vte_compile.export.ort_sessions import Array, Device, Graph, Setting, import_onnxruntime
from vte_compile.export.patches import encoder_inputs, frame_inputs, split_frames

_DTYPES = {"float32": np.float32, "float16": np.float16}


class ImageEncoder:
    """Images to the embeddings of their visual tokens.

    Args:
        manifest: Of the engine.
        graph: vision.onnx, if there is one.
        dtype: Of pixels.
    """

    def __init__(self, manifest: OnnxManifest, graph: Graph | None, dtype: Any) -> None:
        self._manifest, self._graph, self._dtype = manifest, graph, dtype

    def __call__(self, pixel_values: Array, grid_thw: Any = None) -> list[Array]:
        """Encode images or videos, frame after frame.

        Args:
            pixel_values: [images, channels, height, width]; of an encoder that takes patches, [patches, numbers].
            grid_thw: [n, 3], of an encoder that takes patches.

        Returns:
            [n, C] of each image; with DeepStack [n, (1 + layers) * C].

        Raises:
            InputError: The engine has no image encoder (the message says why), or takes images of another size.
        """
        facts = self._manifest
        if facts.vision is None or self._graph is None:
            why = facts.vision_missing or f"{facts.model.name} is a language model alone"
            raise InputError(f"pixel_values: the engine has no image encoder ({why}): pass image_features.")
        if facts.vision.patches is not None:
            return self._of_patches(facts.vision.patches, pixel_values, grid_thw)
        shape = facts.vision.image
        if pixel_values.ndim != 4 or list(pixel_values.shape[1:]) != shape or not len(pixel_values):
            raise InputError(
                f"pixel_values: expected [images, {', '.join(map(str, shape))}], got {list(pixel_values.shape)}."
            )
        images = pixel_values.astype(self._dtype, copy=False)
        return [self._run({"pixel_values": image[None]}) for image in images]

    def _of_patches(self, patches: PatchFacts, pixel_values: Array, grid_thw: Any) -> list[Array]:
        found = split_frames(patches, pixel_values.astype(self._dtype, copy=False), grid_thw)
        inputs: dict[tuple[int, int], dict[str, Array]] = {}
        features = []
        for frames, (height, width) in found:
            known = inputs.setdefault((height, width), frame_inputs(patches, height, width))
            features.append(np.concatenate([self._run({"pixel_values": frame} | known) for frame in frames]))
        return features

    def _run(self, inputs: dict[str, Array]) -> Array:
        assert self._graph is not None
        features: Array = self._graph.run(inputs, ["image_features"])[0].numpy()
        return features


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
        patches = manifest.vision.patches
        vision.check(["pixel_values"] if patches is None else encoder_inputs(patches), ["image_features"])
    return Parts(
        manifest,
        setting.device,
        dtype,
        Inputs(manifest.model, embedding, dtype, decoder.may_exit),
        ImageEncoder(manifest, vision, dtype),
        decoder,
        GenerationDefaults.read(folder / "generation_config.json"),
    )


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
