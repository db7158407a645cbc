"""target="tensorrt": the staged ONNX graphs in a form TensorRT takes, and the engines it builds of them.

docs/tensorrt.md says what is in the folder. The graphs are always there, with the trtexec line of each.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from tqdm import tqdm

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.export.folder import check_target_folder, facts_of, sha256_of, whole_folder
from vte_compile.export.fp8 import calibrate
from vte_compile.export.fp8_numbers import Fp8
from vte_compile.export.manifest import MANIFEST, VisionCall, encode
from vte_compile.export.onnx_graph import OnnxGraph
from vte_compile.export.onnx_manifest import StageFacts
from vte_compile.export.onnx_weights import WeightFiles
from vte_compile.export.ort_target import (
    tools,
    trace_decoder,
    write_companions,
    write_embedding,
    write_stages,
    write_vision,
)
from vte_compile.export.staged import check_experts, check_optimized, embedding_table, model_facts
from vte_compile.export.tensorrt_build import build_engine, import_tensorrt
from vte_compile.export.tensorrt_manifest import BuilderFacts, EngineFacts, TensorRTManifest
from vte_compile.export.tensorrt_ops import TENSORRT, TENSORRT_FP8
from vte_compile.export.tensorrt_profiles import Profiles, shell_script, trtexec

logger = logging.getLogger(__name__)
DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TIMING_CACHE = "engines/timing.cache"


def write(
    fast: Any,
    path: Path,
    *,
    processor: Any = None,
    profiles: Profiles | Mapping[str, Sequence[int]] | None = None,
    precision: str | None = None,
    calibration: object = None,
    build: str | bool | None = None,
    strip_weights: bool = False,
) -> None:
    """See :func:`vte_compile.export`."""
    check_target_folder(path)
    sizes = check_profiles(profiles)
    float8 = find_ranges(fast, precision, calibration, processor)
    fast = in_precision(fast, precision)
    package = _package(build)
    trt = None if package is None else import_tensorrt(package)
    facts = model_facts(fast)
    if strip_weights and package == "tensorrt_rtx" and not torch.cuda.is_available():
        raise InputError(
            "strip_weights: TensorRT for RTX builds engines without weights only where a GPU is: build them there "
            "(build=False, and build.sh), or leave strip_weights out."
        )
    with whole_folder(path) as folder:
        parts = write_graphs(fast, folder, WeightFiles(folder), float8)
        write_companions(fast, processor, folder)
        engines = plan_engines(folder, sizes, strip_weights, parts[1])
        (folder / "build.sh").write_text(shell_script({engine.engine: engine.trtexec for engine in engines}))
        (folder / "build.sh").chmod(0o755)
        files = facts_of(folder)  # without engines, which build.sh may replace: each has its own checksum beside it
        if trt is not None and package is not None:
            # TensorRT for RTX chooses its kernels where the engine runs: there is nothing to time here.
            cache = folder / _TIMING_CACHE if package == "tensorrt" else None
            _build(trt, folder, engines, cache, strip_weights)
        manifest = TensorRTManifest(
            target="tensorrt",
            built=tools(),
            opset=(TENSORRT if float8 is None else TENSORRT_FP8).opsets[""],
            runtime=None,
            provider="cuda",
            precision="fp8" if float8 is not None else str(fast._vte_spec.dtype).removeprefix("torch."),
            model=facts,
            plan=fast.plan.describe(),
            embedding="embedding.onnx",
            vision=parts[1],
            vision_missing=parts[2],
            stages=parts[0],
            decoder=None,
            files=files,
            sizes={name: list(triple) for name, triple in asdict(sizes).items()},
            engines=engines,
            builder=None if trt is None or package is None else BuilderFacts(package, trt.__version__),
        )
        (folder / MANIFEST).write_bytes(encode(manifest))


def write_graphs(
    fast: Any, folder: Path, weights: Any, float8: Fp8 | None = None
) -> tuple[list[StageFacts], VisionCall | None, str | None]:
    """All graphs of a model: its stages, and its image encoder or why there is none."""
    dtype = DTYPES[fast._vte_spec.dtype]
    operators = TENSORRT if float8 is None else TENSORRT_FP8
    decoder = trace_decoder(fast, operators)
    decoder.convert_all()
    embedding = OnnxGraph("embedding", weights, dtype, operators=operators)
    write_embedding(embedding, fast, embedding_table(fast), folder / "embedding.onnx")
    vision, vision_missing = write_vision(
        OnnxGraph("vision", weights, dtype, operators=operators), fast, folder / "vision.onnx"
    )
    return write_stages(decoder, weights, dtype, float8, folder), vision, vision_missing


def plan_engines(
    folder: Path, sizes: Profiles, strip_weights: bool, vision: VisionCall | None = None
) -> list[EngineFacts]:
    """How to build the graphs of a folder, in the order they run."""
    order = ["vision", "embedding", "stage", "gate"]
    files = sorted(folder.glob("*.onnx"), key=lambda file: (order.index(file.stem.split("_")[0]), file.stem))
    engines = []
    for file in files:
        profiles = [
            {name: [list(sizes) for sizes in triple] for name, triple in profile.items()}
            for profile in sizes.of(input_shapes(file), vision)
        ]
        engine = f"engines/{file.stem}.engine"
        line = trtexec(file.name, engine, profiles, _TIMING_CACHE)
        engines.append(
            EngineFacts(file.name, engine, profiles, [*line, *(["--stripWeights"] if strip_weights else [])])
        )
    return engines


def input_shapes(file: Path) -> dict[str, list[int | str]]:
    """Of a graph: for each input its dims, numbers or names."""
    shapes: dict[str, list[int | str]] = {}
    for value in ir.load(file).graph.inputs:
        assert value.name is not None
        assert value.shape is not None
        shapes[value.name] = [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
    return shapes


def in_precision(fast: Any, precision: str | None) -> Any:
    """The model itself, or a copy of it in another precision; for fp8 in half precision, which it has around it.

    Raises:
        InputError: Not an optimized model, or an unknown precision.
        UnsupportedModelError: Its dtype is none TensorRT computes in, or it has experts that are a loop.
    """
    check_model(fast)
    known = (*PRECISIONS, "fp8")
    if precision is not None and precision not in known:
        raise InputError(f"precision: {precision!r} is unknown; there are {', '.join(map(repr, known))}.")
    dtype = fast._vte_spec.dtype
    if precision == "fp8":
        precision = "bf16" if dtype == torch.bfloat16 else "fp16"
    if precision is not None and PRECISIONS[precision] != dtype:
        return copy.deepcopy(fast).to(PRECISIONS[precision])
    if dtype not in DTYPES:
        raise UnsupportedModelError(
            f"TensorRT does not compute in {dtype}: pass precision= ({', '.join(map(repr, PRECISIONS))})."
        )
    return fast


def check_model(fast: Any) -> None:
    """Refuse what has no graphs here.

    Raises:
        InputError: Not an optimized model.
        UnsupportedModelError: It has experts that are a loop.
    """
    check_optimized(fast)
    check_experts(fast)


def find_ranges(fast: Any, precision: str | None, calibration: object, processor: Any = None) -> Fp8 | None:
    """For fp8, which layers, with the ranges of their inputs over samples; else None.

    Raises:
        InputError: fp8 without samples, or samples without fp8, or they cannot be used.
    """
    if precision == "fp8" and calibration is None:
        raise InputError(
            "precision: 'fp8' takes the scales of activations from samples: pass calibration=, a few dozen prompts as "
            "vte_compile.calibrate() takes them."
        )
    if calibration is None:
        return None
    if precision != "fp8":
        raise InputError(f"calibration: goes with precision='fp8', got {precision!r}.")
    check_model(fast)
    # In the model's own dtype: in half precision CPUs would be slow.
    return calibrate(fast, trace_decoder(fast, TENSORRT_FP8), calibration, processor)


def check_profiles(profiles: Profiles | Mapping[str, Sequence[int]] | None) -> Profiles:
    """Profiles as an object; None: the usual ones.

    Raises:
        InputError: Unknown names, or sizes that cannot be.
    """
    if profiles is None or isinstance(profiles, Profiles):
        return profiles or Profiles()
    try:
        return Profiles(**{name: tuple(sizes) for name, sizes in profiles.items()})  # type: ignore[arg-type]
    except (TypeError, AttributeError) as error:
        raise InputError(
            f"profiles: expected {', '.join(asdict(Profiles()))}, each with (smallest, usual, largest) ({error})."
        ) from error


def _package(build: str | bool | None) -> str | None:
    """Which package builds the engines; None: none does."""
    if build is False:
        return None
    if isinstance(build, str):
        return build
    try:
        import_tensorrt("tensorrt")
    except Exception:
        if build:
            raise
    else:
        if build or torch.cuda.is_available():
            return "tensorrt"
    logger.warning("export: no engine is built here (no TensorRT, or no GPU): run build.sh where there is one")
    return None


def _build(trt: Any, folder: Path, engines: Sequence[EngineFacts], cache: Path | None, strip_weights: bool) -> None:
    (folder / "engines").mkdir()
    for facts in tqdm(engines, desc="build engines", leave=False):
        built = build_engine(trt, folder / facts.graph, facts.profiles, cache, strip_weights=strip_weights)
        file = folder / facts.engine
        file.write_bytes(built)
        file.with_name(file.name + ".sha256").write_text(f"{sha256_of(file)}  {file.name}\n")
