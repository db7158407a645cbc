"""float8 (E4M3) weights, and which linear layers are of float8; export/fp8.py says how ranges are found."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

OPSET = 19
"""The first whose QuantizeLinear and DequantizeLinear know float8."""
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0
"""The largest number that E4M3 knows."""


@dataclass(frozen=True)
class Fp8:
    """Which linear layers to compute in float8: by the name of their weight, the largest absolute input."""

    ranges: dict[str, float]

    def scale(self, weight: str) -> float | None:
        """Of a layer's inputs; None: it is not to be quantized."""
        largest = self.ranges.get(weight)
        return None if largest is None else largest / LARGEST or 1.0


def fp8_weight(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """A matrix in float8, and its scale."""
    values = matrix.astype(np.float32)
    scale = float(np.abs(values).max()) / LARGEST or 1.0
    return (values / scale).astype(FP8), scale
