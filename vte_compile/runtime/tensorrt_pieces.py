"""Pieces as TensorRT engines, through torch_tensorrt's compiler and partitioner: ``optimize(..., backend="tensorrt")``.

The layers between two exits become one module, their weights part of it, which torch.export traces for a range of
lengths and torch_tensorrt compiles. What TensorRT has no converter for, torch runs between engines; a warning names it.
Written after torch_tensorrt's documentation and source, and never run on a GPU (docs/tensorrt.md).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from vte_compile.errors import CaptureError, InputError
from vte_compile.export.tensorrt_profiles import Profiles, Sizes
from vte_compile.passes.lower_piecewise import AttendPoint, ExitPoint, Piece, PiecewiseGraph
from vte_compile.runtime.inductor import Function

logger = logging.getLogger(__name__)
SETTINGS = ("min_block_size", "torch_executed_ops", "require_full_compilation", "optimization_level", "workspace_size",
            "cache_built_engines", "reuse_cached_engines", "engine_cache_dir", "timing_cache_path")  # fmt: skip
"""Of ``torch_tensorrt.dynamo.compile``, which are handed on."""
_DEVICES = ("cuda",)
# Of outputs, relative to the largest expected value.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def find_torch_tensorrt(device: torch.device) -> Any:
    """The package.

    Args:
        device: Where the model is.

    Raises:
        CaptureError: It is not installed, or cannot be imported here; or the model is not on a GPU.
    """
    try:
        package = import_module("torch_tensorrt")
    except Exception as error:  # without a GPU, or with another CUDA, its import fails in ways of its own
        raise CaptureError(
            f"backend='tensorrt' needs torch_tensorrt, which cannot be imported ({type(error).__name__}: {error}): pip "
            "install torch-tensorrt, of the release that fits this torch, on a machine with an NVIDIA GPU; or leave "
            "backend at 'inductor'."
        ) from error
    if device.type not in _DEVICES:
        raise CaptureError(
            f"backend='tensorrt': the model is on {device}, and TensorRT runs on NVIDIA GPUs: model.to('cuda') first."
        )
    return package


@dataclass(frozen=True)
class StageReport:
    """What became of one compiled stage."""

    layer: int
    """Its first: -1 before the layers."""
    engines: int
    in_torch: dict[str, int]
    """Operators that torch runs, and how many of each; what only takes results apart is not counted."""


@dataclass
class _Limits:
    """Sizes of the symbols of a lowered graph."""

    by_symbol: dict[Any, Sizes] = field(default_factory=dict)

    @classmethod
    def of(cls, lowered: PiecewiseGraph, profiles: Profiles) -> _Limits:
        found: dict[Any, Sizes] = {}
        for name, example in zip(lowered.inputs, lowered.input_examples, strict=True):
            for dim, size in _symbolic(example).items():
                if size.node.expr.is_symbol:
                    own = (profiles.batch, profiles.prompt)[dim] if name == "inputs_embeds" else profiles.columns
                    # Sizes 0 and 1 are other programs to torch.export, and run uncompiled.
                    least, usual, most = (max(2, value) for value in own)
                    found.setdefault(size.node.expr, (least, usual, most))
        return cls(found)

    def sizes(self, size: Any) -> Sizes:
        """Of a dim: smallest, usual and largest."""
        if not isinstance(size, torch.SymInt):
            return (size, size, size)
        values = [int(size.node.expr.xreplace({s: v[i] for s, v in self.by_symbol.items()})) for i in range(3)]
        return (values[0], values[1], values[2])

    def dynamic(self, size: Any) -> Any:
        """The same of a symbolic dim, for torch.export."""
        if not size.node.expr.is_symbol:
            return Dim.AUTO  # follows from others
        least, _, most = self.by_symbol[size.node.expr]
        return Dim.AUTO(min=least, max=most)


class TensorRTCompiler:
    """Compiles stages on demand.

    Args:
        package: torch_tensorrt.
        options: ``profiles``, as in ``export(target="tensorrt")``, and :data:`SETTINGS`.

    Raises:
        InputError: An option is unknown, or is no size.
    """

    packs = False
    """Rows of a batch run one by one: TensorRT has no attention of packed rows."""

    def __init__(self, package: Any, options: Mapping[str, Any] | None = None) -> None:
        options = dict(options or {})
        profiles = options.pop("profiles", None)
        known = ("profiles", *SETTINGS)
        if unknown := sorted(options.keys() - set(known)):
            raise InputError(f"backend_options: {unknown[0]!r} is unknown; there are {', '.join(map(repr, known))}.")
        if not isinstance(profiles, Profiles):
            try:
                profiles = Profiles(**{name: tuple(sizes) for name, sizes in (profiles or {}).items()})
            except (TypeError, AttributeError) as error:
                raise InputError(
                    "backend_options: profiles: expected batch, prompt, visual, columns, each with (smallest, usual, "
                    f"largest) ({error})."
                ) from error
        self._package, self._profiles, self._settings = package, profiles, options
        self.reports: list[StageReport] = []
        """Of what was compiled, in order."""

    def __getstate__(self) -> dict[str, Any]:
        # Engines can be neither copied nor pickled here: copies compile anew, with the package where they are.
        return {"profiles": self._profiles, "settings": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        package = find_torch_tensorrt(torch.device(_DEVICES[0]))
        self.__init__(package, {"profiles": state["profiles"], **state["settings"]})  # type: ignore[misc]

    @property
    def compilations(self) -> int:
        """How many stages were compiled so far."""
        return len(self.reports)

    def steps(self, lowered: PiecewiseGraph) -> list[Piece | ExitPoint | AttendPoint]:
        """The steps of a phase, with all pieces between two decisions or attentions as one."""
        steps: list[Piece | ExitPoint | AttendPoint] = []
        run: list[Piece] = []
        for i, step in enumerate([*lowered.steps, None]):
            if isinstance(step, Piece):
                run.append(step)
                continue
            if run:
                steps.append(merged(run, _read_later(lowered, i)))
                run = []
            if step is not None:
                steps.append(step)
        return steps

    def compile_piece(self, piece: Piece, lowered: PiecewiseGraph) -> Function:
        """Compile a stage.

        Args:
            piece: One of :meth:`steps`.
            lowered: What it is of.

        Returns:
            A function of the stage's inputs and then its weights, of which it has its own copy.

        Raises:
            CaptureError: torch.export or torch_tensorrt failed, or the engine does not compute what the stage does.
        """
        limits, inputs = _Limits.of(lowered, self._profiles), piece.examples[: len(piece.inputs)]
        with torch.no_grad():
            stage = _Stage(piece.module, [read().detach() for read in piece.parameters]).eval()
        sizes = [[limits.sizes(size) for size in example.shape] for example in inputs]
        usual = [_value(e, [s[1] for s in own]) for e, own in zip(inputs, sizes, strict=True)]
        dims = tuple({dim: limits.dynamic(size) for dim, size in _symbolic(e).items()} for e in inputs)
        try:
            with torch.no_grad():
                exported = torch.export.export(stage, tuple(usual), dynamic_shapes=(dims,), strict=False)
                _check_dynamic(exported, inputs)
                compiled = self._package.dynamo.compile(
                    exported,
                    inputs=[self._spec(e, own) for e, own in zip(inputs, sizes, strict=True)],
                    device=usual[0].device,
                    disable_tf32=not torch.backends.cuda.matmul.allow_tf32,
                    **self._settings,
                )
        except CaptureError:
            raise
        except Exception as error:  # whatever torch.export, torch_tensorrt and TensorRT raise
            raise CaptureError(
                f"torch_tensorrt could not compile the stage from layer {piece.layer} on: {error}"
            ) from error
        self._report(piece.layer, compiled)
        for which in (1, 0):
            _check(stage, compiled, [_value(e, [s[which] for s in own]) for e, own in zip(inputs, sizes, strict=True)])
        return _Compiled(compiled, piece, [[(s[0], s[2]) for s in own] for own in sizes])

    def _spec(self, example: Tensor, sizes: Sequence[Sizes]) -> Any:
        if all(least == most for least, _, most in sizes):
            return self._package.Input(shape=[usual for _, usual, _ in sizes], dtype=example.dtype)
        least, usual, most = (list(own) for own in zip(*sizes, strict=True))
        return self._package.Input(min_shape=least, opt_shape=usual, max_shape=most, dtype=example.dtype)

    def _report(self, layer: int, compiled: nn.Module) -> None:
        engines, in_torch = _partition(compiled)
        self.reports.append(StageReport(layer, engines, dict(sorted(in_torch.items()))))
        if in_torch:
            named = ", ".join(f"{name} ({count})" for name, count in sorted(in_torch.items()))
            logger.warning("backend='tensorrt': from layer %d on, torch runs, not TensorRT: %s", layer, named)
        logger.info("backend='tensorrt': from layer %d on, %d engines", layer, engines)


class _Stage(nn.Module):
    """A piece with its weights inside."""

    def __init__(self, module: fx.GraphModule, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self._run, self._count = module, len(weights)
        for i, weight in enumerate(weights):
            self.register_buffer(f"weight_{i}", weight)

    def forward(self, *values: Tensor) -> Any:
        return self._run(*values, *(self.get_buffer(f"weight_{i}") for i in range(self._count)))


class _Compiled:
    """A compiled stage, for sizes within its limits; others run uncompiled, and a warning says so once."""

    def __init__(self, compiled: Callable[..., Any], piece: Piece, limits: list[list[tuple[int, int]]]) -> None:
        self._compiled, self._piece, self._limits, self._warned = compiled, piece, limits, False

    def __call__(self, *values: Tensor) -> Sequence[Tensor]:
        inputs = [value.contiguous() for value in values[: len(self._limits)]]
        for value, limits, name in zip(inputs, self._limits, self._piece.inputs, strict=True):
            if any(not least <= size <= most for size, (least, most) in zip(value.shape, limits, strict=True)):
                if not self._warned:
                    logger.warning(
                        "backend='tensorrt': %s is %s, beyond what the engine takes (%s): such calls run in torch, "
                        "uncompiled: pass larger backend_options={'profiles': ...}",
                        name,
                        list(value.shape),
                        limits,
                    )
                    self._warned = True
                results: Sequence[Tensor] = self._piece.module(*values)
                return results
        given = self._compiled(*inputs)
        return (given,) if isinstance(given, Tensor) else given


def merged(pieces: Sequence[Piece], wanted: set[str]) -> Piece:
    """Pieces that run one behind the other, as one.

    Args:
        pieces: In order.
        wanted: Names of values that are read behind them.
    """
    graph = fx.Graph()
    given = {name for piece in pieces for name in piece.outputs}
    outside = {
        name: example
        for piece in pieces
        for name, example in zip(piece.inputs, piece.examples, strict=False)
        if name not in given
    }
    env = {name: graph.placeholder(f"value_{i}") for i, name in enumerate(outside)}
    parameters = [read for piece in pieces for read in piece.parameters]
    weights = iter([graph.placeholder(f"weight_{i}") for i in range(len(parameters))])
    for piece in pieces:
        nodes = list(piece.module.graph.nodes)
        own = dict(
            zip(
                [n for n in nodes if n.op == "placeholder"],
                [*(env[name] for name in piece.inputs), *(next(weights) for _ in piece.parameters)],
                strict=True,
            )
        )
        for node in nodes:
            if node.op == "output":
                env |= zip(piece.outputs, (own[result] for result in node.args[0]), strict=True)
            elif node.op != "placeholder":
                own[node] = graph.node_copy(node, lambda n, own=own: own[n])  # type: ignore[misc]
    outputs = [name for piece in pieces for name in piece.outputs if name in wanted]
    graph.output(tuple(env[name] for name in outputs))
    return Piece(
        fx.GraphModule({}, graph),
        "\n\n".join(piece.key for piece in pieces),
        list(outside),
        parameters,
        outputs,
        [*outside.values(), *(e for piece in pieces for e in piece.examples[len(piece.inputs) :])],
        [name for piece in pieces for name in piece.weights],
        pieces[0].layer,
    )


def _read_later(lowered: PiecewiseGraph, start: int) -> set[str]:
    names = set(lowered.outputs)
    for step in lowered.steps[start:]:
        names |= {*step.inputs, *([step.stream] if isinstance(step, ExitPoint) else [])}
    return names


def _symbolic(example: Tensor) -> dict[int, Any]:
    """The dims of a fake tensor that may be of any size, and what they are."""
    shape: Any = example.shape
    return {dim: size for dim, size in enumerate(shape) if isinstance(size, torch.SymInt)}


def _value(example: Tensor, shape: Sequence[int]) -> Tensor:
    """Reproducible numbers; positions count on."""
    if not example.dtype.is_floating_point:
        return torch.arange(shape[-1], device=example.device).expand(*shape).to(example.dtype).contiguous()
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator).to(example.device, example.dtype)


def _check_dynamic(exported: Any, examples: Sequence[Tensor]) -> None:
    """Whether what was to be any size still is."""
    names = exported.graph_signature.user_inputs
    nodes = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    for name, example in zip(names, examples, strict=True):
        for dim in _symbolic(example):
            if not isinstance(nodes[name].shape[dim], torch.SymInt):
                raise CaptureError(f"torch.export fixed dim {dim} of {name} to {nodes[name].shape[dim]}.")


def _partition(compiled: nn.Module) -> tuple[int, Counter[str]]:
    """How many engines a compiled module has, and what else it computes."""
    engines, in_torch = 0, Counter[str]()
    graphs = [module for module in compiled.modules() if isinstance(module, fx.GraphModule)]
    for graph in graphs:
        for node in graph.graph.nodes:
            if node.op == "call_module" and not isinstance(graph.get_submodule(str(node.target)), fx.GraphModule):
                engines += 1
            elif node.op == "call_function" and "getitem" not in str(node.target):
                in_torch[str(node.target)] += 1
    return engines, in_torch


def _check(stage: nn.Module, compiled: Callable[..., Any], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        expected, got = stage(*values), compiled(*values)
    for want, have in zip(expected, (got,) if isinstance(got, Tensor) else got, strict=True):
        scale = float(want.abs().max()) if want.numel() else 0.0
        allowed = _TOLERANCE.get(want.dtype, 0.0) * max(scale, 1e-6)
        if want.shape != have.shape or not float((have.double() - want.double()).abs().max()) <= allowed:
            raise CaptureError("an engine of TensorRT does not compute what its graph does.")
