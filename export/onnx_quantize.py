"""Weights of linear layers in 4 or 8 bits, in blocks with a scale each: ONNX Runtime's quantizer, and MatMulNBits."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from vte_compile.errors import InputError

BITS = {"int4": 4, "int8": 8}
BLOCK = 32
"""Weights that share a scale; ONNX Runtime's default is 128, which costs answers in small models."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [K, N] as MatMulNBits takes it."""

    packed: np.ndarray
    """[N, blocks, bytes of a block] uint8."""
    scales: np.ndarray
    """[N, blocks]."""
    attributes: dict[str, int]


def check_quantize(quantize: str | None) -> None:
    """Refuse unknown kinds.

    Raises:
        InputError: It is none.
    """
    if quantize is not None and quantize not in BITS:
        raise InputError(f"quantize: expected one of {', '.join(map(repr, BITS))} or None, got {quantize!r}.")


def quantize_weight(matrix: np.ndarray, kind: str) -> QuantizedWeight:
    """Quantize a matrix [K, N], symmetrically."""
    quantizers = _quantizers()
    bits = BITS[kind]
    config = quantizers.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits)
    quantizer = quantizers.DefaultWeightOnlyQuantizer(config)
    packed, scales, _ = quantizer.qbits_block_quant(np.ascontiguousarray(matrix))
    rows, columns = matrix.shape
    # Accuracy level 4: products of 8-bit integers, the fast kernels on CPUs.
    attributes = {"K": rows, "N": columns, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
    return QuantizedWeight(packed, scales, attributes)


def _quantizers() -> Any:
    """The module, whose import sets up logging for the whole process, without that."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    module = import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    root.handlers[:] = handlers
    root.setLevel(level)
    return module
