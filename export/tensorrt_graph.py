"""One engine of TensorRT, loaded: torch's CUDA tensors in, and out."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from vte_compile.errors import EngineError
from vte_compile.export.tensorrt_build import new_logger
from vte_compile.export.tensorrt_manifest import EngineFacts
from vte_compile.export.tensorrt_profiles import fitting

if TYPE_CHECKING:
    import tensorrt

_LOGGER = logging.getLogger(__name__)
_TORCH = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
"""By TensorRT's names."""


@dataclass(frozen=True)
class Values:
    """What a graph gives: a tensor, which becomes numpy's where numpy's is wanted."""

    tensor: Tensor

    def numpy(self) -> np.ndarray[Any, Any]:
        """A copy on the host; waits until it is computed. bfloat16 becomes float32."""
        tensor = self.tensor.float() if self.tensor.dtype == torch.bfloat16 else self.tensor
        array: np.ndarray[Any, Any] = tensor.cpu().numpy()
        return array


def as_tensor(value: Any, device: torch.device) -> Tensor:
    """numpy's, or :class:`Values`, on a device."""
    if isinstance(value, Values):
        value = value.tensor
    if not isinstance(value, Tensor):
        array = np.ascontiguousarray(value)
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
        value = torch.from_numpy(array)
    return value.to(device, non_blocking=True).contiguous()


class TensorRTGraph:
    """An engine that was loaded. It runs on torch's current stream.

    Args:
        trt: From :func:`vte_compile.export.tensorrt_build.import_tensorrt`.
        folder: Of the export.
        facts: Of this engine.
        device: A CUDA GPU.

    Raises:
        EngineError: The engine was not built yet, is damaged, or is for another version or GPU.
    """

    def __init__(self, trt: Any, folder: Path, facts: EngineFacts, device: torch.device) -> None:
        self._trt, self.file, self.device, self._facts = trt, folder / facts.engine, device, facts
        content = read_engine(folder, facts)
        self._logger = new_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            engine: tensorrt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            reasons = "; ".join(self._logger.errors) or "it gives no reason"
            raise EngineError(
                f"{self.file}: {trt.__name__} {trt.__version__} cannot load it ({reasons}). An engine is for the "
                "version and the GPU it was built with: run build.sh in the folder, on this machine."
            )
        self._engine = engine
        if "--stripWeights" in facts.trtexec:
            self._refit(folder / facts.graph)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.inputs: dict[str, list[int]] = {n: list(self._engine.get_tensor_shape(n)) for n in inputs}
        """Their shapes; -1 for dims of any size."""
        self.outputs: list[str] = [n for n in names if n not in self.inputs]
        self._types = {n: _TORCH[self._engine.get_tensor_dtype(n).name] for n in names}
        self._contexts: dict[int, tensorrt.IExecutionContext] = {}
        self._somewhere = torch.empty(1, device=device)

    def _refit(self, graph: Path) -> None:
        refitter: tensorrt.Refitter = self._trt.Refitter(self._engine, self._logger)
        parser: tensorrt.OnnxParserRefitter = self._trt.OnnxParserRefitter(refitter, self._logger)
        if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
            reasons = "; ".join(self._logger.errors) or "TensorRT gives no reason"
            raise EngineError(f"{self.file}: its weights could not be taken from {graph.name}: {reasons}.")

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Values]:
        """Run it once.

        Args:
            inputs: By name: tensors, :class:`Values` or numpy arrays.
            outputs: Which are wanted.

        Raises:
            InputError: No profile takes inputs of these shapes.
        """
        tensors = {name: as_tensor(inputs[name], self.device) for name in self.inputs}
        index = fitting(self._facts.profiles, {name: tensor.shape for name, tensor in tensors.items()})
        context = self._context(index)
        for name, tensor in tensors.items():
            if tensor.dtype != self._types[name]:
                tensor = tensors[name] = tensor.to(self._types[name])
            context.set_input_shape(name, tuple(tensor.shape))
            # TensorRT takes no null for a tensor that is empty (image features, where there is no image).
            context.set_tensor_address(name, tensor.data_ptr() or self._somewhere.data_ptr())
        given = {}
        for name in self.outputs:  # all of them: TensorRT writes those, too, that nobody wants
            shape = tuple(context.get_tensor_shape(name))
            given[name] = torch.empty(shape, dtype=self._types[name], device=self.device)
            context.set_tensor_address(name, given[name].data_ptr())
        if not context.execute_async_v3(self._stream):
            raise EngineError(f"{self.file}: cannot run: {'; '.join(self._logger.errors) or 'no reason is given'}.")
        return [Values(given[name]) for name in outputs]

    @property
    def _stream(self) -> int:
        """torch's current one, which memory is allocated on, too."""
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0

    def _context(self, profile: int) -> tensorrt.IExecutionContext:
        """One per profile, so that changing between prompts and decode steps waits for nothing."""
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None:
                raise EngineError(f"{self.file}: not enough GPU memory to run it: {'; '.join(self._logger.errors)}.")
            if self._facts.profiles:
                context.set_optimization_profile_async(profile, self._stream)
            self._contexts[profile] = context
        return self._contexts[profile]


def read_engine(folder: Path, facts: EngineFacts) -> bytes:
    """An engine's file, compared with the checksum beside it.

    Raises:
        EngineError: It was not built yet, or was altered since.
    """
    file = folder / facts.engine
    try:
        content = file.read_bytes()
    except OSError as error:
        raise EngineError(
            f"{file}: {error.strerror or error}: run build.sh in the folder, on the machine that will run the engine."
        ) from error
    beside = file.with_name(file.name + ".sha256")
    if not beside.is_file():
        _LOGGER.warning("%s: no checksum beside it: built by hand, or incomplete", file)
    elif beside.read_text().split()[:1] != [hashlib.sha256(content).hexdigest()]:
        raise EngineError(f"{file}: was altered, its SHA-256 is not that of {beside.name}: run build.sh again.")
    return content
