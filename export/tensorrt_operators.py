"""Which ONNX operators TensorRT's parser takes, with which types: what a coverage report is based on.

From docs/operators.md of github.com/onnx/onnx-tensorrt, commit 96e7811 of 2024-06-17, the one of TensorRT 10.0 and
10.1: what it lists, later versions take as well (compared with the table of 10.15). Left out: what is not supported,
recurrent and image operators, and control flow, none of which graphs here hold; of quantization, all but float8.
"""

from __future__ import annotations

from collections.abc import Mapping

SOURCE = "docs/operators.md of onnx-tensorrt 96e7811 (2024-06-17), for TensorRT 10.0 and 10.1"
OPSETS = range(9, 21)
"""That TensorRT 10.0 parses."""

_FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
_NUMBERS = _FLOATS | {"INT32", "INT64"}
_ANY = _NUMBERS | {"BOOL"}
_BOOL = frozenset({"BOOL"})
_FLOAT8 = frozenset({"FLOAT8E4M3FN"})

TENSOR_TYPES = _ANY | {"UINT8", "INT8", "INT4", "FLOAT8E4M3FN"}
"""That any value of a graph may have."""


def _table() -> dict[str, frozenset[str]]:
    groups = {
        _FLOATS: """Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose
        Cos Cosh CumSum Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GroupNormalization HardSigmoid HardSwish
        InstanceNormalization LayerNormalization LeakyRelu Log LogSoftmax LpNormalization MatMul Pow PRelu
        QuantizeLinear Reciprocal Resize Round Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh
        ThresholdedRelu""",
        _NUMBERS: """Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual Less LessOrEqual Max Mean
        Min Mod Mul Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
        ReduceProd ReduceSum ReduceSumSquare Relu ScatterElements ScatterND Sign SpaceToDepth Sub Sum TopK""",
        _ANY: """Cast Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity
        OneHot Reshape Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where""",
        _BOOL: "And Not Or Xor",
        _FLOAT8: "DequantizeLinear",
    }
    return {name: types for types, names in groups.items() for name in names.split()}


OPERATORS: Mapping[str, frozenset[str]] = _table()
"""For each operator, the types its data may have (see ``DATA``), by their names in ONNX."""

DATA: Mapping[str, int] = {"Where": 1}
"""Which input is the data, where that is not the first."""

CONSTANT_INPUTS: Mapping[str, int] = {
    "CumSum": 1,
    "Pad": 3,
    "Slice": 3,
    "Squeeze": 1,
    "Unsqueeze": 1,
    **{name: 1 for name in OPERATORS if name.startswith("Reduce")},
}
"""Inputs that have to be initializers: axes."""
