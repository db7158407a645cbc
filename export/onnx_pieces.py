"""A piece as an ONNX graph: values and weights in, values out. torch.onnx does it; norms are fused behind that.

Each distinct piece is converted once, whatever the model's depth, and compared with what it was made from.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
import torch.fx.experimental._config as symbolic_shapes_config
from onnxscript.rewriter.rules.fusion import _rms_normalization as rms_normalization
from torch import Tensor, nn
from torch.export import Dim
from torch.onnx._internal.exporter._registration import ONNXRegistry

from vte_compile.errors import CaptureError
from vte_compile.export.onnx_ops import ORT, Operators
from vte_compile.export.onnx_weights import as_array

# Of outputs, relative to the largest expected value.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class _Call(nn.Module):
    """torch.export takes modules."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Any:
        return self.function(*values)


def convert(
    function: Callable[..., Any],
    examples: Sequence[Tensor],
    dynamic: Sequence[set[int]],
    outputs: Sequence[str],
    operators: Operators = ORT,
) -> ir.Model:
    """Convert a function of tensors.

    Args:
        function: Returns a tuple.
        examples: Its arguments; no symbolic length may be 0 or 1, or equal to another that differs.
        dynamic: The dims of each that are symbolic.
        outputs: Names of the results.
        operators: Of the target.

    Returns:
        A model whose inputs are ``value_0``, ``value_1`` ...

    Raises:
        CaptureError: torch.onnx cannot convert it.
    """
    dims = tuple({d: Dim.AUTO for d in symbolic} for symbolic in dynamic)
    # Sizes 0 and 1 are otherwise other programs to torch.export; here one has to do for all.
    oblivious = symbolic_shapes_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    try:
        with torch.no_grad(), oblivious, _quiet(), _one_registry():
            exported = torch.export.export(_Call(function), tuple(examples), dynamic_shapes=(dims,), strict=False)
            program = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                opset_version=operators.opsets[""],
                verbose=False,
                input_names=[f"value_{i}" for i in range(len(examples))],
                output_names=list(outputs),
            )
    except Exception as error:  # whatever torch.export and torch.onnx raise
        raise CaptureError(f"torch.onnx could not convert a piece: {error}") from error
    assert program is not None
    if operators.fuses_norms:
        rms_normalization.fuse_rms_normalization(program.model)
        _normalize_in_one_type(program.model)
    return program.model


def _normalize_in_one_type(model: ir.Model) -> None:
    """ONNX Runtime takes values of the weight's type only, where a norm multiplies in float32 (Gemma in float16)."""
    for node in model.graph:
        if node.op_type != "RMSNormalization":
            continue
        values, weight = node.inputs
        assert values is not None
        assert weight is not None
        if weight.dtype is not None and values.dtype != weight.dtype:
            cast = ir.node("Cast", [values], {"to": int(weight.dtype)})
            cast.outputs[0].name, cast.outputs[0].dtype = f"{values.name}_{weight.name}", weight.dtype
            model.graph.insert_before(node, cast)
            node.replace_input_with(0, cast.outputs[0])


_registry = functools.cache(ONNXRegistry.from_torchlib)


@contextlib.contextmanager
def _one_registry() -> Iterator[None]:
    """torch.onnx reads the source of its 500 operators again in every export, which takes longer than a small piece."""
    with mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(_registry)):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx says in warnings that torchvision is not installed, which nothing here needs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx._internal.exporter._registration", "torch.onnx")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def check(model: ir.Model, function: Callable[..., Any], values: Sequence[Tensor]) -> None:
    """Compare a converted piece with its function, in ONNX Runtime on the CPU.

    Args:
        model: From :func:`convert`.
        function: What it was made from.
        values: Its arguments, at any lengths.

    Raises:
        CaptureError: The results differ.
    """
    with torch.no_grad():
        expected = function(*values)
    # What a piece does not read is no input any more.
    read = {value.name for value in model.graph.inputs}
    feeds = {f"value_{i}": as_array(value) for i, value in enumerate(values) if f"value_{i}" in read}
    # ONNX Runtime has no bfloat16 on CPUs; the reference has, slowly.
    run = _reference if any(v.dtype == torch.bfloat16 for v in (*values, *expected)) else _onnxruntime
    for want, have, output in zip(expected, run(ir.to_proto(model), feeds), model.graph.outputs, strict=True):
        wanted = as_array(want).astype(np.float64)
        scale = float(np.abs(wanted).max()) if wanted.size else 0.0
        # Small results of larger numbers, such as a router's share near 0, are rounded as those are.
        allowed = _TOLERANCE.get(want.dtype, 0.0) * max(scale, 1e-3)
        error = np.abs(have.astype(np.float64) - wanted).max(initial=0) if wanted.shape == have.shape else np.inf
        if not error <= allowed:
            raise CaptureError(
                f"a converted piece does not compute what its graph does: {output.name} differs by {error:.3g} "
                f"(allowed {allowed:.3g})."
            )


def _onnxruntime(proto: Any, feeds: dict[str, np.ndarray]) -> Sequence[Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results: Sequence[Any] = session.run(None, feeds)
    return results


def _reference(proto: Any, feeds: dict[str, np.ndarray]) -> Sequence[Any]:
    from onnx.reference import ReferenceEvaluator

    results: Any = ReferenceEvaluator(proto).run(None, feeds)
    return list(results)
