"""One ONNX graph put together from converted pieces: copies of their nodes, named by layer, and shared weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnx_ir.tape import Tape
from torch import Tensor

from vte_compile.errors import CaptureError
from vte_compile.export.fp8_numbers import FP8, Fp8
from vte_compile.export.onnx_ops import ORT, Operators
from vte_compile.export.onnx_weights import WeightFiles
from vte_compile.version import __version__

_IR_VERSION = 10
Weight = tuple[str, Callable[[], Tensor]]
"""Name of a weight, and how to read it."""


class OnnxGraph:
    """A graph under construction.

    Args:
        name: Of the graph.
        weights: Where initializers go.
        dtype: What floating-point inputs are.
        quantize: "int4" or "int8" for linear layers of pieces that may be quantized, or which of them are of float8.
        operators: Of the target.
    """

    def __init__(
        self,
        name: str,
        weights: WeightFiles,
        dtype: ir.DataType,
        quantize: str | Fp8 | None = None,
        operators: Operators = ORT,
    ) -> None:
        self.dtype, self._quantize, self.operators = dtype, quantize, operators
        self._weights = weights
        self._graph = ir.Graph([], [], nodes=[], name=name, opset_imports=dict(operators.opsets))
        self._names: set[str] = set()

    def input(self, name: str, shape: Sequence[int | str], dtype: ir.DataType | None = None) -> ir.Value:
        """An input of the graph."""
        kind = self.dtype if dtype is None else dtype
        value = ir.Value(name=self._unique(name), shape=ir.Shape(shape), type=ir.TensorType(kind))
        self._graph.inputs.append(value)
        return value

    def output(self, name: str, value: ir.Value, shape: Sequence[int | str], dtype: ir.DataType | None = None) -> None:
        """Make a value an output of the graph, under a name of its own."""
        if value.is_graph_input() or value.is_initializer() or value.is_graph_output():
            value = self.op("Identity", [value], name=name)
        value.name, value.shape = self._unique(name), ir.Shape(shape)
        value.type = ir.TensorType(self.dtype if dtype is None else dtype)
        self._graph.outputs.append(value)

    def op(self, kind: str, inputs: Sequence[ir.Value | None], name: str = "", **attributes: Any) -> ir.Value:
        """A node with one output."""
        tape = Tape()
        result = tape.op(kind, list(inputs), attributes)
        for node in tape.nodes:
            node.name = self._unique(f"{name or 'node'}/{kind}")
            node.outputs[0].name = self._unique(f"{node.name}.out")
            self._graph.append(node)
        return result

    def smallest(self, values: ir.Value, count: ir.Value, name: str) -> ir.Value:
        """Where the smallest of the last dim are, the smallest first; ``count`` [1]."""
        node = ir.node("TopK", [values, count], {"axis": -1, "largest": 0, "sorted": 1}, num_outputs=2)
        node.name = self._unique(f"{name}/TopK")
        for output in node.outputs:
            output.name = self._unique(f"{node.name}.out")
        self._graph.append(node)
        return node.outputs[1]

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A small initializer, inside the graph's file."""
        array = np.asarray(value, dtype)
        name = f"const_{array.dtype}_{'x'.join(map(str, array.shape))}_{'_'.join(map(str, array.ravel().tolist()))}"
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        return self._register(ir.Value(name=name, const_value=ir.tensor(array, name=name)), array)

    def weight(self, name: str, read: Callable[[], Tensor], transposed: bool = False) -> ir.Value:
        """An initializer in the weights' files."""
        value = self._weights.add(name, read, transposed)
        return self._shared(value)

    def _shared(self, value: ir.Value) -> ir.Value:
        assert value.name is not None
        self._names.add(value.name)
        return self._graph.initializers.setdefault(value.name, value)

    def add(
        self, piece: ir.Model, prefix: str, values: Sequence[ir.Value | Weight], *, quantize: bool = False
    ) -> list[ir.Value]:
        """Copy a piece's nodes.

        Args:
            piece: From :func:`vte_compile.export.onnx_pieces.convert`.
            prefix: In front of the names of nodes and values, such as ``layers.3``.
            values: The piece's arguments, in order: values of this graph, or name and reader of a weight.
            quantize: Its linear layers may be quantized.

        Returns:
            Its results.

        Raises:
            CaptureError: It has control flow.
        """
        env: dict[ir.Value, ir.Value] = {}
        weights: dict[ir.Value, Weight] = {}
        for value in piece.graph.inputs:
            assert value.name is not None
            given = values[int(value.name.removeprefix("value_"))]
            if isinstance(given, ir.Value):
                env[value] = given
            else:
                weights[value] = given
        for value in piece.graph.initializers.values():
            assert value.const_value is not None
            array = value.const_value.numpy()
            env[value] = self._small(array) if array.size <= 16 else self._large(f"{prefix}.{value.name}", array)
        for node in piece.graph:
            found = _linear_weight(node, weights) if quantize else None
            if found is None or self._quantize is None:
                self._copy(node, prefix, env, weights)
            elif not isinstance(self._quantize, Fp8):
                env[node.outputs[0]] = self._quantized(node, prefix, env[node.inputs[0]], found)  # type: ignore[index]
            elif (scale := self._quantize.scale(found[0])) is None:
                self._copy(node, prefix, env, weights)
            else:
                env[node.outputs[0]] = self._fp8(env[node.inputs[0]], scale, found)  # type: ignore[index]
        return [self._read(value, env, weights) for value in piece.graph.outputs]

    def _quantized(self, node: ir.Node, prefix: str, x: ir.Value, weight: Weight) -> ir.Value:
        """x W, where W is [K, N] quantized."""
        assert isinstance(self._quantize, str)
        initializers, attributes = self._weights.add_quantized(*weight, self._quantize)
        inputs = [x, *(self._shared(value) for value in initializers)]
        name = self._unique(f"{weight[0].rpartition('.')[0]}/MatMulNBits")
        new = ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft", name=name)
        new.outputs[0].name, new.outputs[0].type = (
            self._unique(f"{prefix}/{node.outputs[0].name}"),
            node.outputs[0].type,
        )
        self._graph.append(new)
        return new.outputs[0]

    def _fp8(self, x: ir.Value, scale: float, weight: Weight) -> ir.Value:
        """x W, of float8 numbers."""
        module = weight[0].rpartition(".")[0]
        scales = self.constant(scale, self.dtype.numpy()), self.constant(0, FP8)
        factor = self.op(
            "DequantizeLinear", [self.op("QuantizeLinear", [x, *scales], f"{module}.input"), *scales], f"{module}.input"
        )
        initializers = [self._shared(value) for value in self._weights.add_fp8(*weight, self.dtype.numpy())]
        matrix = self.op("DequantizeLinear", initializers, f"{module}.weight")
        return self.op("MatMul", [factor, matrix], module)

    def _copy(
        self, node: ir.Node, prefix: str, env: dict[ir.Value, ir.Value], weights: Mapping[ir.Value, Weight]
    ) -> None:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise CaptureError(f"{prefix}: a node {node.op_type} has control flow, which no engine takes.")
        if _transposed(node.outputs[0], weights) is not None:
            return
        inputs = [None if value is None else self._read(value, env, weights) for value in node.inputs]
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=self._unique(f"{_where(node, prefix, weights)}/{node.op_type}"),
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            # No shapes: symbols of one piece mean something else in another.
            new.name, new.type = self._unique(f"{prefix}/{old.name}"), old.type
            env[old] = new
        self._graph.append(copy)

    def _read(self, value: ir.Value, env: dict[ir.Value, ir.Value], weights: Mapping[ir.Value, Weight]) -> ir.Value:
        if value in weights:
            return self.weight(*weights[value])
        if value not in env:  # a transposed weight, which is written when something reads it
            source = _transposed(value, weights)
            assert source is not None
            env[value] = self.weight(*source, transposed=True)
        return env[value]

    def _small(self, array: np.ndarray) -> ir.Value:
        return self.constant(array, array.dtype)

    def _large(self, name: str, array: np.ndarray) -> ir.Value:
        return self._register(ir.Value(name=self._unique(name), const_value=ir.tensor(array)), array)

    def _register(self, value: ir.Value, array: np.ndarray) -> ir.Value:
        value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        assert value.name is not None
        self._graph.initializers[value.name] = value
        return value

    def _unique(self, name: str) -> str:
        unique, count = name, 1
        while unique in self._names:
            unique, count = f"{name}_{count}", count + 1
        self._names.add(unique)
        return unique

    def save(self, file: Path) -> None:
        """Write the graph, without what no output needs, beside the weights' files."""
        model = ir.Model(self._graph, ir_version=_IR_VERSION, producer_name="vte_compile", producer_version=__version__)
        CommonSubexpressionEliminationPass()(model)
        RemoveUnusedNodesPass()(model)
        for name in [n for n, v in self._graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
            del self._graph.initializers[name]
        ir.save(model, file)


def _transposed(value: ir.Value | None, weights: Mapping[ir.Value, Weight]) -> Weight | None:
    """The weight [N, K], if a value is its transpose."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Transpose" or tuple(node.attributes.get_ints("perm", [])) != (1, 0):
        return None
    source = node.inputs[0]
    return weights.get(source) if source is not None else None


def _linear_weight(node: ir.Node, weights: Mapping[ir.Value, Weight]) -> Weight | None:
    """The weight [N, K] of a linear layer."""
    return _transposed(node.inputs[1], weights) if node.op_type == "MatMul" else None


def _where(node: ir.Node, prefix: str, weights: Mapping[ir.Value, Weight]) -> str:
    """The module a node belongs to: that of its weight, or else the layer."""
    for value in node.inputs:
        weight = _transposed(value, weights) or (weights.get(value) if value is not None else None)
        if weight is not None:
            return weight[0].rpartition(".")[0]
    return prefix
