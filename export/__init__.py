"""Engines: an optimized model as a folder that runs without transformers; installed as `vte_compile.export`.

The name is that of a function too: ``vte_compile.export(fast, path, target=...)``. So this package can be called, in
whatever order it and its modules are imported.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vte_compile.errors import EngineError, InputError, UnsupportedModelError

if TYPE_CHECKING:
    from vte_compile.export.co_attention_engine import CoAttentionEngine
    from vte_compile.export.engine import Engine
    from vte_compile.export.ort_engine import OnnxEngine

TARGETS = {
    "aoti": "vte_compile.export.aoti_target",
    "onnxruntime": "vte_compile.export.ort_target",
    "tensorrt": "vte_compile.export.tensorrt_target",
}
"""The modules that write engines, each with a function ``write(fast, path)``."""

CO_ATTENTION_TARGETS = {"onnxruntime": "vte_compile.export.co_attention_target"}
"""Those that write engines of models with co-attention layers."""

LOADERS = {
    "aoti": "vte_compile.export.engine:Engine",
    "onnxruntime": "vte_compile.export.ort_engine:OnnxEngine",
    "onnxruntime co-attention": "vte_compile.export.co_attention_engine:CoAttentionEngine",
    "tensorrt": "vte_compile.export.tensorrt_engine:TensorRTEngine",
}
"""The classes that run engines, each with ``load(folder, manifest's fields, **options)``; options: `load_engine`."""


def export(fast: Any, path: str | os.PathLike[str], target: str = "onnxruntime", **options: Any) -> Path:
    """Write what :func:`vte_compile.optimize` returned as an engine: a folder that is complete by itself.

    The folder appears when it is whole; an interrupted export leaves none, or the engine that was there before.
    docs/onnx.md, engines.md and tensorrt.md say what is in it.

    Args:
        fast: A causal language model or LLaVA-type MLLM from ``optimize()``; its exits, skips and folded adapters
            become part of the engine. Or a METER or BridgeTower, for ``onnxruntime``, without options.
        path: The folder: new, empty, or an engine, which is replaced.
        target: What runs it. ``aoti``: torch alone, pieces compiled ahead of time by AOTInductor for the device the
            model is on, and for processors like this one. ``onnxruntime``: ONNX graphs, for ONNX Runtime.
            ``tensorrt``: ONNX graphs of the stages between exits, and TensorRT's engines of them.
        options: For ``onnxruntime``: ``processor``, the model's processor (or tokenizer), whose files go into the
            folder, so that the engine takes text and pictures; ``forms``, ("staged", "single") or one of them: graphs
            between exits, which spare what leaves, and one graph with the exits inside; ``quantize``, "int4" or
            "int8": the weights of the decoder's linear layers in so many bits. For ``tensorrt`` (docs/tensorrt.md):
            ``processor``; ``profiles``, the sizes engines take; ``precision``, "fp32", "fp16", "bf16" or
            "fp8", the latter with ``calibration``, samples as :func:`vte_compile.calibrate` takes them; ``build``,
            which package builds the engines, or False; ``strip_weights``, engines without weights.

    Returns:
        ``path``.

    Raises:
        InputError: Unknown target or option, or not an optimized model.
        EngineError: ``path`` holds something else than an engine; or a package that the target needs is missing; or
            TensorRT does not take a graph.
        UnsupportedModelError: The model embeds or numbers its tokens in a way no engine knows.
        CaptureError: A part could not be traced or compiled, or does not compute what it did.
    """
    if target not in TARGETS:
        raise InputError(f"target: {target!r} is unknown; the targets are {', '.join(map(repr, TARGETS))}.")
    from vte_compile.co_attention_optimizer import OptimizedCoAttention

    targets = CO_ATTENTION_TARGETS if isinstance(fast, OptimizedCoAttention) else TARGETS
    if target not in targets:
        raise UnsupportedModelError(
            f"target {target!r}: models with co-attention layers are exported for {', '.join(map(repr, targets))} only."
        )
    try:
        write = import_module(targets[target]).write
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("vte_compile"):
            raise
        raise EngineError(
            f"target {target!r} needs {error.name}, which is not installed: pip install 'vte-compile[onnx]'."
        ) from error
    known = [name for name, p in inspect.signature(write).parameters.items() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(options.keys() - set(known)):
        raise InputError(
            f"export: {unknown[0]!r} is no option of target {target!r}: {', '.join(known) or 'it has none'}."
        )
    write(fast, Path(path), **options)
    return Path(path)


def load_engine(
    path: str | os.PathLike[str],
    *,
    provider: str | None = None,
    threads: int | None = None,
    form: str | None = None,
) -> Engine | OnnxEngine | CoAttentionEngine:
    """Load an engine that :func:`export` wrote.

    An engine of target "aoti" needs torch and safetensors; one of target "onnxruntime" needs onnxruntime and numpy, and
    for text and images tokenizers, jinja2 and pillow. Neither needs transformers.
    One of target "tensorrt" needs TensorRT, a torch for CUDA and an NVIDIA GPU (docs/tensorrt.md).

    AOTInductor's and TensorRT's engines hold compiled code, which loading lets run: load only engines you trust. The
    checksums, which are compared before anything is loaded, find damage; they do not prove who made the engine.

    Args:
        path: The folder.
        provider: What runs an ONNX engine: "cpu" or "cuda"; None: what it was exported for.
        threads: Of an ONNX engine on a CPU; None: ONNX Runtime's choice, a thread for each core.
        form: Which form of an ONNX engine runs, "staged" or "single"; None: the staged one if it is there.

    Returns:
        The engine, with ``generate()``, ``prefill()`` and ``decode()``: an
        :class:`~vte_compile.export.engine.Engine` or
        an :class:`~vte_compile.export.ort_engine.OnnxEngine` (or its subclass for TensorRT), which also has ``chat()``.
        Of a METER or BridgeTower a :class:`~vte_compile.export.co_attention_engine.CoAttentionEngine`, with ``run()``.

    Raises:
        InputError: An option is none of its values, or means nothing to an engine of this target.
        EngineError: A file is missing, truncated or altered, or the engine is of another version, or made for another
            device or processor, or the provider is not there; the message says which, and what to do.
    """
    from vte_compile.export.folder import read_manifest
    from vte_compile.export.manifest import MANIFEST

    folder = Path(path)
    body = read_manifest(folder)
    if body.get("target") not in LOADERS:
        raise EngineError(
            f"{folder / MANIFEST}: target {body.get('target')!r}, but this vte-compile runs "
            f"{', '.join(map(repr, LOADERS))} only."
        )
    module, _, name = LOADERS[body["target"]].partition(":")
    options = {"provider": provider, "threads": threads, "form": form}
    loader = getattr(import_module(module), name)
    given = {name: value for name, value in options.items() if value is not None}
    engine: Engine | OnnxEngine | CoAttentionEngine = loader.load(folder, body, **given)
    return engine


class _CallablePackage(types.ModuleType):
    def __call__(self, fast: Any, path: str | os.PathLike[str], target: str = "onnxruntime", **options: Any) -> Path:
        return export(fast, path, target, **options)


_CallablePackage.__call__.__doc__ = export.__doc__
sys.modules[__name__].__class__ = _CallablePackage
