"""Build engines with TensorRT's Python package, or with TensorRT for RTX, which builds them without a GPU.

Both have one API, that of TensorRT 10. An engine of the first is for the GPU and the version it was built with, one of
the second for the version and any GPU from Ampere on.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vte_compile.errors import EngineError, InputError

if TYPE_CHECKING:
    import tensorrt

PACKAGES = ("tensorrt", "tensorrt_rtx")
_INSTALL = {
    "tensorrt": "pip install tensorrt (from NVIDIA's index, and with an NVIDIA GPU)",
    "tensorrt_rtx": "pip install tensorrt-rtx",
}


def import_tensorrt(package: str) -> Any:
    """TensorRT's Python package.

    Args:
        package: One of ``PACKAGES``.

    Raises:
        InputError: Unknown.
        EngineError: It is not installed, or too old.
    """
    if package not in PACKAGES:
        raise InputError(f"build: {package!r} is unknown; there are {', '.join(map(repr, PACKAGES))}.")
    try:
        trt: Any = importlib.import_module(package)
    except ImportError as error:  # also: its libraries are missing
        raise EngineError(f"{package} cannot be imported ({error}): {_INSTALL[package]}.") from error
    if not hasattr(trt, "Builder"):  # type stubs alone are importable, too
        raise EngineError(f"{package} is installed without its library (type stubs?): {_INSTALL[package]}.")
    if package == "tensorrt" and int(trt.__version__.split(".")[0]) < 10:
        raise EngineError(f"tensorrt {trt.__version__} is installed, but 10.0 or later is needed: {_INSTALL[package]}.")
    return trt


def new_logger(trt: Any) -> Any:
    """A logger that keeps TensorRT's errors, as ``errors``, for the exception that follows them."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def build_engine(
    trt: Any,
    graph: Path,
    profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]],
    timing_cache: Path | None = None,
    *,
    strip_weights: bool = False,
) -> bytes:
    """Build the engine of a graph.

    Args:
        trt: From :func:`import_tensorrt`.
        graph: The ONNX file, with its weights beside it.
        profiles: From :meth:`vte_compile.export.tensorrt_profiles.Profiles.of`.
        timing_cache: Read if it is there, and written. None: none.
        strip_weights: The engine has no weights, and takes them from the graph when it is loaded.

    Raises:
        EngineError: TensorRT does not take the graph, or cannot build it.
    """
    logger = new_logger(trt)
    builder: tensorrt.Builder = trt.Builder(logger)
    # Types are the graph's. TensorRT 11 knows no other networks, and ignores the flag.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser: tensorrt.OnnxParser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        reasons = "; ".join(_reason(parser.get_error(i)) for i in range(parser.num_errors))
        raise EngineError(f"{graph.name}: TensorRT {trt.__version__} does not take the graph: {reasons}.")
    config = builder.create_builder_config()
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in shapes.items():
            profile.set_shape(name, tuple(smallest), tuple(usual), tuple(largest))
        config.add_optimization_profile(profile)
    if strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    cache = None
    if timing_cache is not None:
        cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    built = builder.build_serialized_network(network, config)
    if built is None:
        errors = "; ".join(logger.errors) or "it gives no reason"
        raise EngineError(f"{graph.name}: TensorRT {trt.__version__} cannot build an engine of it: {errors}.")
    if timing_cache is not None and cache is not None:
        timing_cache.write_bytes(bytes(cache.serialize()))
    return bytes(built)


def _reason(error: Any) -> str:
    return f"node {error.node_name()} ({error.node_operator()}): {error.desc()}"
