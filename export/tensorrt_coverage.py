"""What a TensorRT export would do with a model, without TensorRT and without a GPU: which node goes into which engine.

The graphs are made as for an export, their weights are not written. What TensorRT takes is read from a table
(tensorrt_operators.py). TensorRT takes a graph whole or not at all: one node that it does not know is one too many.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
import onnx_ir as ir

from vte_compile.export.grid_facts import grid_facts
from vte_compile.export.onnx_weights import WeightFiles
from vte_compile.export.tensorrt_operators import CONSTANT_INPUTS, DATA, OPERATORS, OPSETS, SOURCE, TENSOR_TYPES
from vte_compile.export.tensorrt_profiles import Profiles
from vte_compile.export.tensorrt_target import check_profiles, find_ranges, in_precision, plan_engines, write_graphs


@dataclass(frozen=True)
class Exceptional:
    """A node that TensorRT does not take."""

    node: str
    operator: str
    reason: str


@dataclass(frozen=True)
class EngineCoverage:
    """One graph."""

    graph: str
    layers: list[int]
    """Of the decoder; [] beside it."""
    operators: dict[str, int]
    """How many nodes of each kind."""
    exceptions: list[Exceptional]
    trtexec: list[str]
    """The command line that builds the engine."""

    @property
    def nodes(self) -> int:
        """All of them."""
        return sum(self.operators.values())


@dataclass(frozen=True)
class Coverage:
    """What :func:`coverage` found."""

    model: str
    precision: str
    engines: list[EngineCoverage]
    host: dict[str, str]
    """What no engine does, and why."""
    source: str = SOURCE
    """Of what TensorRT takes."""

    @property
    def decoder_nodes(self) -> int:
        """Of all stages."""
        return sum(engine.nodes for engine in self.engines if engine.layers)

    @property
    def decoder_placed(self) -> int:
        """Of these, the ones that TensorRT takes."""
        return self.decoder_nodes - sum(len(engine.exceptions) for engine in self.engines if engine.layers)


def coverage(
    fast: Any,
    *,
    profiles: Profiles | Mapping[str, Sequence[int]] | None = None,
    precision: str | None = None,
    calibration: object = None,
    processor: Any = None,
) -> Coverage:
    """Report what ``export(fast, path, target="tensorrt")`` would place where. Writes nothing.

    Args:
        fast: From :func:`vte_compile.optimize`.
        profiles: As in the export.
        precision: As in the export.
        calibration: As in the export.
        processor: Of the samples in ``calibration``, if these are conversations.

    Raises:
        VTEError: What the export would raise.
    """
    sizes, float8 = check_profiles(profiles), find_ranges(fast, precision, calibration, processor)
    fast = in_precision(fast, precision)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stages, vision, vision_missing = write_graphs(fast, folder, _UnwrittenWeights(folder), float8)
        layers = {stage.file: stage.layers for stage in stages}
        engines = [
            graph_coverage(folder / facts.graph, layers.get(facts.graph, []), facts.trtexec)
            for facts in plan_engines(folder, sizes, False, vision)
        ]
    host = {
        "exit decisions": "a gate's answer is read back, in prompts with visual tokens only; the next stage gets the "
        "columns to keep, since an engine has one shape per call",
        "cache": "new keys and values are put behind each row's past, in one buffer per layer that all engines read",
        "positions": "tokens are numbered one by one",
        "sampling, text and pictures": "as in all engines",
    }
    if not any(stage.exit for stage in stages):
        del host["exit decisions"]
    if grid_facts(fast) is not None:
        host["positions"] = "multimodal rotary positions [3, batch, tokens] follow from the grids of images and videos"
    if vision is None and vision_missing is not None:
        host["image encoder"] = f"stays in PyTorch: {vision_missing}"
    dtype = "fp8" if float8 is not None else str(fast._vte_spec.dtype).removeprefix("torch.")
    return Coverage(type(fast).__name__, dtype, engines, host)


def graph_coverage(file: Path, layers: list[int], trtexec: list[str]) -> EngineCoverage:
    """Look at each node of an ONNX graph."""
    # Types of all values; weights are not needed for that.
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load(file, load_external_data=False)))
    exceptions = []
    if (opset := model.opset_imports.get("", 0)) not in OPSETS:
        reason = f"opset {opset}, where TensorRT 10.0 takes {OPSETS[0]} to {OPSETS[-1]}."
        exceptions.append(Exceptional(file.name, "graph", reason))
    for node in model.graph:
        if (why := refusal(node)) is not None:
            exceptions.append(Exceptional(str(node.name), node.op_type, why))
    counted = Counter(node.op_type for node in model.graph)
    return EngineCoverage(file.name, layers, dict(sorted(counted.items())), exceptions, trtexec)


def refusal(node: ir.Node) -> str | None:
    """Why TensorRT does not take a node; None: it does."""
    if node.domain not in ("", "ai.onnx"):
        return f"it is of the domain {node.domain}, of which TensorRT knows no operator."
    if node.op_type not in OPERATORS:
        return "TensorRT does not know this operator."
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.dtype is not None and value.dtype.name not in TENSOR_TYPES:
            return f"{value.name} is {value.dtype.name}, which TensorRT has not."
    data = node.outputs[0] if not node.inputs else node.inputs[DATA.get(node.op_type, 0)]
    dtype = data.dtype if data is not None else None
    if dtype is None:
        return "the type of what it computes with is not known."
    if dtype.name not in OPERATORS[node.op_type]:
        return f"TensorRT has it for {', '.join(sorted(OPERATORS[node.op_type]))}, not for {dtype.name}."
    at = CONSTANT_INPUTS.get(node.op_type)
    if at is not None and at < len(node.inputs) and (axes := node.inputs[at]) is not None and axes.const_value is None:
        return f"its input {axes.name} (axes) is computed, and TensorRT wants a constant."
    return None


class _UnwrittenWeights(WeightFiles):
    """Initializers that name a file which is not there."""

    def _write(self, name: str, array: np.ndarray) -> None:
        dtype, shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        self._known[name] = ir.ExternalTensor(
            "weights", 0, array.nbytes, dtype, shape=shape, name=name, base_dir=self._folder
        )
