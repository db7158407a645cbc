"""Weights of ONNX graphs as external data: written one by one, each once, shared by all graphs of a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from vte_compile.export.fp8_numbers import fp8_weight
from vte_compile.export.onnx_quantize import quantize_weight

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
        self._names: dict[tuple[int, str], tuple[str, Tensor]] = {}
        """By tensor and what was done to it."""
        self._attributes: dict[str, dict[str, int]] = {}

    def add(self, name: str, read: Callable[[], Tensor], transposed: bool = False) -> ir.Value:
        """An initializer that holds a tensor.

        Args:
            name: What to call it; a tensor that was added before (tied weights) keeps its first name.
            read: Gives the tensor, which is not kept in memory if it is made for this call.
            transposed: Store [N, K] as [K, N], as MatMul takes weights.
        """
        tensor = read()
        identity = (id(tensor), "transposed" if transposed else "")
        if identity not in self._names:
            # The tensor itself is kept, or its id could be that of a later one.
            self._names[identity] = (self._unique(name), tensor)
            self._write(self._names[identity][0], _array(tensor, transposed))
        return self._value(self._names[identity][0])

    def add_quantized(self, name: str, read: Callable[[], Tensor], kind: str) -> tuple[list[ir.Value], dict[str, int]]:
        """The initializers, and the attributes, of a MatMulNBits whose weight is a tensor [N, K]."""
        tensor = read()
        identity = (id(tensor), kind)
        if identity not in self._names:
            self._names[identity] = (self._unique(f"{name}.{kind}"), tensor)
            unique = self._names[identity][0]
            quantized = quantize_weight(_array(tensor, transposed=True), kind)
            self._write(unique, quantized.packed)
            self._write(f"{unique}.scales", quantized.scales)
            self._attributes[unique] = quantized.attributes
        unique = self._names[identity][0]
        return [self._value(unique), self._value(f"{unique}.scales")], self._attributes[unique]

    def add_fp8(self, name: str, read: Callable[[], Tensor], dtype: np.dtype) -> list[ir.Value]:
        """A tensor [N, K] as [K, N] in float8, and its scale, a number of a dtype."""
        tensor = read()
        identity = (id(tensor), "float8")
        if identity not in self._names:
            self._names[identity] = (self._unique(f"{name}.float8"), tensor)
            unique = self._names[identity][0]
            quantized, scale = fp8_weight(_array(tensor, transposed=True))
            self._write(unique, quantized)
            self._write(f"{unique}.scale", np.asarray(scale, dtype))
        unique = self._names[identity][0]
        return [self._value(unique), self._value(f"{unique}.scale")]

    def _unique(self, name: str) -> str:
        unique, count = name, 1
        while unique in self._known:
            unique, count = f"{name}.{count}", count + 1
        return unique

    def _value(self, name: str) -> ir.Value:
        external = self._known[name]
        value = ir.Value(name=name, const_value=external)
        value.dtype, value.shape = external.dtype, ir.Shape(external.shape)
        return value

    def _write(self, name: str, array: np.ndarray) -> None:
        if self._used and self._used + array.nbytes > _SHARD:
            self._number, self._used = self._number + 1, 0
        file = f"weights-{self._number:05d}.data"
        self._used += -self._used % _ALIGNMENT
        with open(self._folder / file, "r+b" if self._used else "wb") as opened:
            opened.seek(self._used)
            values = np.ascontiguousarray(array)
            opened.write(values.tobytes() if array.ndim == 0 else values.view(np.uint8).data)
        dtype, shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        self._known[name] = ir.ExternalTensor(
            file, self._used, array.nbytes, dtype, shape=shape, name=name, base_dir=self._folder
        )
        self._used += array.nbytes


def as_array(tensor: Tensor) -> np.ndarray:
    """A tensor's content; numpy itself knows no bfloat16."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: np.ndarray = tensor.numpy()
    return array


def _array(tensor: Tensor, transposed: bool) -> np.ndarray:
    values = tensor.detach().cpu()
    return as_array((values.T if transposed else values).contiguous())  # torch's copy is the faster one
