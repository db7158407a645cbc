"""Pieces as AOTInductor packages (.pt2): compiled for all lengths, compared with the graph, kept for next time."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as symbolic_shapes_config
from torch import Tensor, fx, nn
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim

from vte_compile.errors import CaptureError, EngineError
from vte_compile.export.manifest import Built
from vte_compile.version import __version__

Function = Callable[[list[Tensor]], Sequence[Tensor]]
"""From inputs and then weights, all contiguous, to outputs."""

# Of outputs, relative to the largest expected value.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def built(device: torch.device) -> Built:
    """What pieces that are compiled here for a device are compiled with, and need."""
    processor = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        processor = ".".join(map(str, torch.cuda.get_device_capability(device)))
    versions = {"vte_compile": __version__, "torch": torch.__version__}
    return Built(
        **versions, device=device.type, system=platform.system(), machine=platform.machine(), processor=processor
    )


def check_built(made: Built) -> None:
    """Make sure that pieces run here.

    Raises:
        EngineError: Other torch, device, system or processor; the message says which.
    """
    remedy = "export the model again here, or load the engine where it was made"
    if made.device == "cuda" and not torch.cuda.is_available():
        raise EngineError("the engine is for cuda, and torch finds no CUDA GPU here: export the model on the CPU.")
    here = built(torch.device(made.device))
    release = [version.split("+")[0] for version in (made.torch, here.torch)]
    if release[0] != release[1]:
        raise EngineError(f"the engine is for torch {release[0]}, this is torch {release[1]}: {remedy}.")
    for name in ("system", "machine", "processor"):
        if getattr(made, name) != getattr(here, name):
            raise EngineError(
                f"the engine is for {made.device} with {name} {getattr(made, name)}, this one has "
                f"{getattr(here, name)}: {remedy}."
            )


def compile_piece(
    module: fx.GraphModule,
    key: str,
    examples: Sequence[Tensor],
    file: Path,
    tried: Sequence[Sequence[Tensor]] = (),
    shortest: int = 1,
) -> None:
    """Compile a graph to a package, or take it from Inductor's cache folder.

    Args:
        module: Values and weights in, values out.
        key: Equal for graphs that do the same.
        examples: For all inputs: tensors, fake ones with symbolic sizes where any size is to do.
        file: Where the package goes.
        tried: Values of the first inputs that it is compared with; of the others, and if there are none, any.
        shortest: Lengths are so at least.

    Raises:
        CaptureError: It could not be compiled, or does not compute what the graph does.
    """
    kept = Path(cache_dir()) / "vte_compile" / f"{_fingerprint(key, examples)}.pt2"
    if kept.is_file():
        shutil.copyfile(kept, file)
    else:
        _compile(module, examples, file)
    _check(module, examples, load_piece(file), tried, shortest)
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=kept.parent)
        os.close(handle)
        shutil.copyfile(file, name)
        os.replace(name, kept)


def load_piece(file: Path) -> Function:
    """Load a package, which lets its code run."""
    # Not through the model's own call, which parses the argument lists anew at every call.
    run: Function = torch._inductor.aoti_load_package(str(file)).loader.boxed_run
    return run


def _fingerprint(key: str, examples: Sequence[Tensor]) -> str:
    """Of all that the package depends on: the graph, what compiles it, and for what."""
    made = built(examples[0].device)
    options = sorted((name, repr(value)) for name, value in torch._inductor.config.save_config_portable().items())
    return hashlib.sha256(repr((key, made, options)).encode()).hexdigest()


class _Module(nn.Module):
    """torch.export takes no graph module with placeholders as it is."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *values: Tensor) -> Any:
        return self.graph(*values)


def _compile(module: fx.GraphModule, examples: Sequence[Tensor], file: Path) -> None:
    symbolic = [{d for d, size in enumerate(e.shape) if not isinstance(size, int)} for e in examples]
    values = tuple(_value(example, _hint) for example in examples)
    dims = tuple({d: Dim.AUTO for d in sizes} for sizes in symbolic)
    # Sizes 0 and 1 are otherwise other programs to torch.export; here one has to do for all. Only while tracing: the
    # Inductor of torch 2.11 cannot lower x[:, -1:] in this mode. _check tries length 1 on what came out.
    oblivious = symbolic_shapes_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    try:
        with torch.no_grad():
            with oblivious:
                exported = torch.export.export(_Module(module), values, dynamic_shapes=(dims,), strict=False)
            torch._inductor.aoti_compile_and_package(exported, package_path=str(file))
    except Exception as error:  # whatever torch.export, Inductor and the C++ compiler raise
        raise CaptureError(f"AOTInductor could not compile a piece: {error}") from error


def _check(
    module: fx.GraphModule,
    examples: Sequence[Tensor],
    function: Function,
    tried: Sequence[Sequence[Tensor]],
    shortest: int,
) -> None:
    """Compare with the graph itself at other lengths: nothing else would show that one was taken for fixed."""
    for values, where in _given(examples, tried) if tried else _made(examples, shortest):
        with torch.no_grad():
            expected, got = module(*values), function([value.contiguous() for value in values])
        for want, have in zip(expected, got, strict=True):
            scale = float(want.abs().max()) if want.numel() else 0.0
            allowed = _TOLERANCE.get(want.dtype, 0.0) * max(scale, 1e-6)
            if want.shape != have.shape or not float((have.double() - want.double()).abs().max()) <= allowed:
                raise CaptureError(f"a compiled piece does not compute what its graph does at {where}.")


def _made(examples: Sequence[Tensor], shortest: int) -> Iterator[tuple[list[Tensor], str]]:
    """Values for all inputs, at lengths that a piece was not traced with; and which. Equal ones stay equal."""
    sizes: list[Any] = [size for e in examples for size in e.shape if not isinstance(size, int)]
    traced = {size.node.expr: _hint(size) for size in sizes}
    traced = {size: length for size, length in traced.items() if size.is_symbol}
    shorter, longer = dict.fromkeys(traced, shortest), {symbol: length + 4 for symbol, length in traced.items()}
    for lengths in (shorter, longer) if traced else (shorter,):
        values = [_value(example, lambda size, at=lengths: _at(size, at)) for example in examples]  # type: ignore[misc]
        yield values, f"lengths {list(lengths.values())}"


def _given(examples: Sequence[Tensor], tried: Sequence[Sequence[Tensor]]) -> Iterator[tuple[list[Tensor], str]]:
    """Those that are given, and for the inputs behind them the example, or numbers of its shape; and their shapes."""
    for first in tried:
        rest = [_value(x, _hint) if isinstance(x, FakeTensor) else x.detach() for x in examples[len(first) :]]
        yield [*first, *rest], f"sizes {[list(value.shape) for value in first]}"


def _value(example: Tensor, size: Callable[[Any], int]) -> Tensor:
    """A contiguous tensor like an example, of reproducible numbers."""
    shape = [size(s) for s in example.shape]
    if not example.dtype.is_floating_point:
        # Positions count on, two tokens alike, which are a block then; where a row begins may be nowhere but at 0.
        count = (torch.arange(shape[-1], device=example.device) // 2).expand(shape)
        return (count if len(shape) > 1 else torch.zeros_like(count)).to(example.dtype).contiguous()
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(example.device, example.dtype)


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _at(size: Any, lengths: dict[Any, int]) -> int:
    return size if isinstance(size, int) else int(size.node.expr.xreplace(lengths))
