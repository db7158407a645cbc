"""Weights of ONNX graphs as external data: written one by one, each once, shared by all graphs of a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

_SHARD = 1 << 30
_ALIGNMENT = 4096
"""ONNX Runtime maps files into memory by pages."""


class WeightFiles:
    """Writes ``weights-00001.data`` and so on.

    Args:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number, self._used = 1, 0
        self._known: dict[str, ir.ExternalTensor] = {}
        self._names: dict[tuple[int, bool], tuple[str, Tensor]] = {}

    def add(self, name: str, read: Callable[[], Tensor], transposed: bool = False) -> ir.Value:
        """An initializer that holds a tensor.

        Args:
            name: What to call it; a tensor that was added before (tied weights) keeps its first name.
            read: Gives the tensor, which is not kept in memory if it is made for this call.
            transposed: Store [N, K] as [K, N], as MatMul takes weights.
        """
        tensor = read()
        identity = (id(tensor), transposed)
        if identity in self._names:
            name = self._names[identity][0]
        else:
            unique, count = name, 1
            while unique in self._known:
                unique, count = f"{name}.{count}", count + 1
            # The tensor itself is kept, or its id could be that of a later one.
            name = self._names.setdefault(identity, (unique, tensor))[0]
            self._known[name] = self._write(name, tensor.detach().T if transposed else tensor.detach())
        external = self._known[name]
        value = ir.Value(name=name, const_value=external)
        value.dtype, value.shape = external.dtype, ir.Shape(external.shape)
        return value

    def _write(self, name: str, tensor: Tensor) -> ir.ExternalTensor:
        if self._used and self._used + tensor.nbytes > _SHARD:
            self._number, self._used = self._number + 1, 0
        file = f"weights-{self._number:05d}.data"
        self._used += -self._used % _ALIGNMENT
        with open(self._folder / file, "r+b" if self._used else "wb") as opened:
            opened.seek(self._used)
            values = tensor.cpu().contiguous()
            opened.write(values.view(torch.uint8).numpy().data if values.ndim else values.numpy().tobytes())
        offset = self._used
        self._used += tensor.nbytes
        dtype = ir.DataType.from_numpy(as_array(values.flatten()[:0]).dtype)
        shape = ir.Shape(tuple(tensor.shape))
        return ir.ExternalTensor(file, offset, tensor.nbytes, dtype, shape=shape, name=name, base_dir=self._folder)


def as_array(tensor: Tensor) -> np.ndarray:
    """A tensor's content; numpy itself knows no bfloat16."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: np.ndarray = tensor.numpy()
    return array
