"""TensorRT's graphs on a CPU: ONNX Runtime in the place of the engines, behind everything else the real runner does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from vte_compile.export.folder import read_manifest
from vte_compile.export.tensorrt_engine import TensorRTEngine, check_manifest
from vte_compile.export.tensorrt_graph import Values, as_tensor
from vte_compile.export.tensorrt_manifest import EngineFacts, TensorRTManifest
from vte_compile.export.tensorrt_profiles import fitting

CPU = torch.device("cpu")


class CpuGraph:
    """What TensorRTGraph does; sizes that no profile takes are refused as there."""

    def __init__(self, folder: Path, facts: EngineFacts) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.file, self._facts = folder / facts.graph, facts
        self._session = onnxruntime.InferenceSession(str(self.file), options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: list(i.shape) for i in self._session.get_inputs()}
        self.outputs = [o.name for o in self._session.get_outputs()]
        self.profiles: list[int] = []
        """Of each run."""

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Values]:
        tensors = {name: as_tensor(inputs[name], CPU) for name in self.inputs}
        self.profiles.append(fitting(self._facts.profiles, {name: t.shape for name, t in tensors.items()}))
        assert all(tensor.numel() for name, tensor in tensors.items() if name != "image_features")
        given = self._session.run(list(outputs), {name: tensor.numpy() for name, tensor in tensors.items()})
        return [Values(torch.from_numpy(array)) for array in given]


def load_on_cpu(folder: Path) -> tuple[TensorRTEngine, dict[str, CpuGraph]]:
    """The engine, and its graphs by file."""
    manifest = TensorRTManifest.from_body(read_manifest(folder))
    check_manifest(folder, manifest)
    graphs = {facts.graph: CpuGraph(folder, facts) for facts in manifest.engines}
    return TensorRTEngine(folder, manifest, graphs, CPU), graphs
