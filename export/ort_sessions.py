"""ONNX Runtime sessions: one graph each, on one provider, with inputs and outputs that stay on its device.

Memory is handed over as addresses (IO binding), so that a row of a cache is read and written where it lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vte_compile.errors import EngineError, InputError

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_REMEDY = "copy the whole folder again, or export the model again"

Array = np.ndarray[Any, Any]


def import_onnxruntime() -> Any:
    """The package.

    Raises:
        EngineError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"ONNX engines need onnxruntime ({error}): pip install 'vte-compile[onnx]', or for an NVIDIA GPU "
            "'vte-compile[onnx-gpu]'."
        ) from error
    return onnxruntime


@dataclass(frozen=True)
class Device:
    """Where graphs run, and their values lie."""

    kind: str
    """"cpu" or "cuda"."""
    index: int = 0

    def put(self, array: Array) -> Any:
        """An OrtValue with this content; on a CPU, it is the array's own memory."""
        return import_onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.kind, self.index)


@dataclass(frozen=True)
class View:
    """Memory as a graph's input or output: a tensor, or rows of one."""

    owner: Any
    """Whose memory it is, an OrtValue, so that it lives on."""
    address: int
    dtype: Any
    shape: list[int]

    @classmethod
    def of(cls, owner: Any, dtype: Any, rows: slice | None = None) -> View:
        """All of a value [B, ...], or some of its rows."""
        shape = list(owner.shape())
        if rows is None:
            return cls(owner, owner.data_ptr(), dtype, shape)
        row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(dtype).itemsize
        start, stop, _ = rows.indices(shape[0])
        return cls(owner, owner.data_ptr() + start * row_bytes, dtype, [stop - start, *shape[1:]])


Value = Any
"""What a graph takes: a numpy array, an OrtValue, or a `View`."""


@dataclass(frozen=True)
class Setting:
    """How sessions are made."""

    device: Device
    threads: int | None
    """None: a thread for each core."""

    @classmethod
    def choose(cls, provider: str, threads: int | None) -> Setting:
        """Check options before anything is loaded.

        Args:
            provider: "cpu" or "cuda".
            threads: See ``threads``.

        Raises:
            InputError: One is not a value it can have.
            EngineError: ONNX Runtime, or this provider of it, is not installed here.
        """
        if provider not in _PROVIDERS:
            raise InputError(f"provider: {provider!r} is unknown; there are {', '.join(map(repr, _PROVIDERS))}.")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads: expected a number of at least 1, or None, got {threads!r}.")
        there = import_onnxruntime().get_available_providers()
        if _PROVIDERS[provider] not in there:
            ours = [name for name, full in _PROVIDERS.items() if full in there]
            raise EngineError(
                f"provider {provider!r}: this onnxruntime has no {_PROVIDERS[provider]}, only {', '.join(there)}: pass "
                f"provider={' or '.join(map(repr, ours))}, or install another build of onnxruntime "
                "(pip install 'vte-compile[onnx-gpu]' for NVIDIA GPUs)."
            )
        return cls(Device(provider), threads)


class Graph:
    """A graph that was loaded.

    Args:
        file: The .onnx file.
        setting: How to run it.
        small: It is too small for more than one thread.

    Raises:
        EngineError: ONNX Runtime does not take it, or cannot start the provider.
    """

    def __init__(self, file: Path, setting: Setting, *, small: bool = False) -> None:
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors, which are raised as well
        options.inter_op_num_threads = 1
        if small:
            options.intra_op_num_threads = 1
        elif setting.threads is not None:
            options.intra_op_num_threads = setting.threads
        # Sessions run in turns, each with threads of its own. If those of one spin while they wait, they take the cores
        # from the next one's: on a busy machine, prefill of the demo's model took 5 to 10 times as long.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        kind, index = setting.device.kind, setting.device.index
        provider: Any = _PROVIDERS[kind] if kind == "cpu" else (_PROVIDERS[kind], {"device_id": index})
        try:
            self.session = runtime.InferenceSession(str(file), options, providers=[provider])
        except Exception as error:  # its own classes derive from Exception alone
            raise EngineError(
                f"{file}: ONNX Runtime {runtime.__version__} cannot load it ({error}): {_REMEDY}."
            ) from error
        if (started := self.session.get_providers()[0]) != _PROVIDERS[kind]:
            raise EngineError(
                f"{file}: {_PROVIDERS[kind]} could not be started, ONNX Runtime chose {started} instead (are the CUDA "
                "and cuDNN libraries installed that this onnxruntime-gpu needs?): repair it, or pass another "
                "provider."
            )
        self.file, self.device = file, setting.device
        self.inputs: dict[str, list[Any]] = {i.name: list(i.shape) for i in self.session.get_inputs()}
        """Their shapes; dims of any size are names."""
        self.outputs = [o.name for o in self.session.get_outputs()]

    def check(self, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Make sure that a graph takes and gives what docs/onnx.md says.

        Raises:
            EngineError: It does not.
        """
        for what, wanted, there in (("inputs", inputs, self.inputs), ("outputs", outputs, self.outputs)):
            if set(wanted) != set(there):
                differs = ", ".join(sorted(set(wanted) ^ set(there)))
                raise EngineError(f"{self.file}: its {what} are not those of this schema ({differs}): {_REMEDY}.")

    def run(self, inputs: Mapping[str, Value], outputs: Sequence[str]) -> list[Any]:
        """Run it once; see :meth:`Call.run`."""
        return Call(self).run(inputs, outputs)


class Call:
    """A graph with some inputs and outputs bound to memory that stays, for one run or many.

    Args:
        graph: What runs.
        inputs: By name.
        places: Where outputs are written to; they have to have that shape.
    """

    def __init__(
        self, graph: Graph, inputs: Mapping[str, Value] | None = None, places: Mapping[str, View] | None = None
    ) -> None:
        self._graph = graph
        self._binding, self._wrap = graph.session.io_binding(), import_onnxruntime().OrtValue
        self._alive: dict[str, Value] = {}
        self._order: dict[str, int] = {}
        """Of the outputs, as they were bound."""
        for name, value in (inputs or {}).items():
            self._bind(name, value)
        for name, view in (places or {}).items():
            self._alive[name] = view
            device = graph.device
            self._binding.bind_output(name, device.kind, device.index, view.dtype, view.shape, view.address)
            self._order[name] = len(self._order)

    def run(self, inputs: Mapping[str, Value], outputs: Sequence[str]) -> list[Any]:
        """Run the graph.

        Args:
            inputs: Those that change from run to run.
            outputs: Which are wanted, without those that have a place.

        Returns:
            OrtValues on the graph's device, in the order of ``outputs``.
        """
        device = self._graph.device
        for name, value in inputs.items():
            self._bind(name, value)
        for name in outputs:  # each time anew, else ONNX Runtime writes over what it gave last time
            self._binding.bind_output(name, device.kind, device.index)
            self._order.setdefault(name, len(self._order))
        self._graph.session.run_with_iobinding(self._binding)
        given = self._binding.get_outputs_as_ortvaluevector()
        # Those with a place are left where they are.
        return [self._wrap(given[self._order[name]]) for name in outputs]

    def _bind(self, name: str, value: Value) -> None:
        # The binding does not keep alive what it points to.
        if isinstance(value, np.ndarray):
            value = np.ascontiguousarray(value)
            self._binding.bind_cpu_input(name, value)
        elif isinstance(value, View):
            device = self._graph.device
            self._binding.bind_input(name, device.kind, device.index, value.dtype, value.shape, value.address)
        else:
            self._binding.bind_ortvalue_input(name, value)
        self._alive[name] = value
