"""A stand-in for TensorRT's Python package, on CPUs: ONNX Runtime runs the graphs behind TensorRT's API.

It is handed to the real TensorRTGraph, so that what this binds (shapes, addresses, profiles) is what gets run; misuse
that TensorRT punishes with wrong numbers is an assertion here. An engine's file holds the path of its ONNX graph.
"""

from __future__ import annotations

import ctypes
import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import torch

from vte_compile.export.folder import read_manifest, sha256_of
from vte_compile.export.tensorrt_engine import TensorRTEngine, check_manifest
from vte_compile.export.tensorrt_graph import TensorRTGraph
from vte_compile.export.tensorrt_manifest import TensorRTManifest

CPU = torch.device("cpu")
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "BOOL": np.bool_}
_ONNX = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64", "tensor(bool)": "BOOL"}


class _Mode(enum.Enum):
    INPUT, OUTPUT = 0, 1


class _Logger:
    INTERNAL_ERROR, ERROR = 0, 1


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine, self.profile = engine, None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        static = self._engine.get_tensor_shape(name)
        assert len(shape) == len(static), name
        assert all(size in (given, -1) for given, size in zip(shape, static, strict=True)), name
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address, f"{name}: a null address"
        self._addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> list[int]:
        """As TensorRT's shape inference knows it; here by running the graph."""
        return list(self._results()[name].shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert set(self._addresses) == {*self._engine.inputs, *self._engine.outputs}
        for name, array in self._results().items():
            array = np.ascontiguousarray(array)
            ctypes.memmove(self._addresses[name], array.ctypes.data, array.nbytes)
        self._engine.runs.append(self.profile)
        return True

    def _results(self) -> dict[str, np.ndarray]:
        feeds = {}
        for name in self._engine.inputs:
            dtype = np.dtype(_NUMPY[self._engine.get_tensor_dtype(name).name])
            array = np.zeros(self._shapes[name], dtype)
            ctypes.memmove(array.ctypes.data, self._addresses[name], array.nbytes)
            feeds[name] = array
        return dict(zip(self._engine.outputs, self._engine.session.run(None, feeds), strict=True))


class _Engine:
    def __init__(self, file: str) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = {o.name: o for o in self.session.get_outputs()}
        self.runs: list[int | None] = []
        """The profile of each run."""

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> _Mode:
        return _Mode.INPUT if name in self.inputs else _Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_ONNX[{**self.inputs, **self.outputs}[name].type])

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in {**self.inputs, **self.outputs}[name].shape]

    def create_execution_context(self) -> _Context:
        return _Context(self)


class _Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, content: bytes) -> _Engine | None:
        if not content.endswith(b".onnx"):
            self._logger.log(_Logger.ERROR, "the engine is for another version")
            return None
        return _Engine(content.decode())


fake: Any = SimpleNamespace(
    __name__="fake", __version__="10.0.0", ILogger=type("ILogger", (_Logger,), {}), Runtime=_Runtime, TensorIOMode=_Mode
)


def build_fake(folder: Path) -> TensorRTManifest:
    """What build.sh would write."""
    manifest = TensorRTManifest.from_body(read_manifest(folder))
    (folder / "engines").mkdir(exist_ok=True)
    for facts in manifest.engines:
        file = folder / facts.engine
        file.write_text(str(folder / facts.graph))
        file.with_name(file.name + ".sha256").write_text(f"{sha256_of(file)}  {file.name}\n")
    return manifest


def load_fake(folder: Path) -> tuple[TensorRTEngine, dict[str, Any]]:
    """The engine, and its graphs by file."""
    manifest = build_fake(folder)
    check_manifest(folder, manifest)
    graphs = {facts.graph: TensorRTGraph(fake, folder, facts, CPU) for facts in manifest.engines}
    return TensorRTEngine(folder, manifest, graphs, CPU), graphs
