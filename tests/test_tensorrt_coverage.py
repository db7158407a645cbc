"""What a dry run says of models; and engines, where TensorRT (or that for RTX, which needs no GPU) is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from marks import thorough
from test_grid_positions import described
from tiny_families import tiny_family
from tiny_models import (
    gate,
    image_prompt,
    one_thread,  # noqa: F401
    plan,
    tiny,
    tiny_llava,
)
from typer.testing import CliRunner

import vte_compile
from vte_compile import load_engine, optimize
from vte_compile.cli import app
from vte_compile.errors import EngineError
from vte_compile.export.folder import read_manifest
from vte_compile.export.manifest import MANIFEST
from vte_compile.export.onnx_graph import OnnxGraph
from vte_compile.export.onnx_weights import WeightFiles
from vte_compile.export.ort_target import write_vision
from vte_compile.export.tensorrt_build import build_engine, import_tensorrt
from vte_compile.export.tensorrt_coverage import coverage, graph_coverage, refusal
from vte_compile.export.tensorrt_manifest import TensorRTManifest
from vte_compile.export.tensorrt_ops import TENSORRT

SIZES = {"batch": (1, 2, 4), "prompt": (1, 16, 64), "visual": (1, 8, 32), "columns": (1, 32, 128)}
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def fast():
    return optimize(tiny_llava(), plan(gate(0), gate(2)), compile=False)


def manifest(folder: Path) -> TensorRTManifest:
    return TensorRTManifest.from_body(read_manifest(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llava", "qwen2_vl", *map(thorough, ("internvl", "qwen3_vl", "gemma3", "paligemma"))]
)
def test_all_decoder_nodes_are_in_engines(family: str) -> None:
    fast = optimize(tiny_family(family), plan(gate(0), gate(2)), compile=False)
    found = coverage(fast, profiles=SIZES)
    assert found.decoder_nodes == found.decoder_placed > 300
    assert [e.layers for e in found.engines if e.layers] == [[0], [1, 2], [3]]
    assert not [e for engine in found.engines for e in engine.exceptions]
    assert "image encoder" not in found.host
    assert "exit decisions" in found.host


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", *map(thorough, ("idefics3", "mistral3", "llava_next"))])
def test_all_nodes_of_image_encoders_are_in_engines(family: str, tmp_path: Path) -> None:
    fast = described(family, torch.float32)
    graph = OnnxGraph("vision", WeightFiles(tmp_path), ir.DataType.FLOAT, operators=TENSORRT)
    facts, missing = write_vision(graph, fast, tmp_path / "vision.onnx")
    assert missing is None
    assert facts.piece == "vision.onnx"
    assert graph_coverage(tmp_path / "vision.onnx", [], []).exceptions == []


def node(kind: str, *inputs: ir.Value, domain: str = "") -> ir.Node:
    return ir.node(kind, list(inputs), domain=domain)


def value(dtype: str, constant: bool = False) -> ir.Value:
    tensor = ir.tensor(np.zeros(1, np.int64)) if constant else None
    return ir.Value(name="x", type=ir.TensorType(ir.DataType[dtype]), const_value=tensor)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (node("Add", value("FLOAT")), None),
        (node("CumSum", value("INT64"), value("INT64", True)), "not for INT64"),
        (node("CumSum", value("FLOAT"), value("INT64")), "wants a constant"),
        (node("CumSum", value("FLOAT"), value("INT64", True)), None),
        (node("Where", value("BOOL"), value("INT64")), None),
        (node("Add", value("DOUBLE")), "x is DOUBLE"),
        (node("NonZero", value("BOOL")), "does not know this operator"),
        (node("GroupQueryAttention", value("FLOAT"), domain="com.microsoft"), "domain com.microsoft"),
        (node("Add", ir.Value(name="x")), "is not known"),
    ],
)
def test_what_tensorrt_does_not_take(found: ir.Node, reason: str | None) -> None:
    why = refusal(found)
    assert why is None if reason is None else why is not None and reason in why


@pytest.mark.slow
def test_dry_run_of_the_command(tmp_path: Path, fast) -> None:
    tiny_llava().save_pretrained(tmp_path / "model")
    fast.plan.save_pretrained(tmp_path / "plan")
    arguments = ["export", str(tmp_path / "model"), "--plan", str(tmp_path / "plan"), "--target", "tensorrt"]
    result = CliRunner().invoke(app, [*arguments, "--dry-run", "--profile", "batch=1,1,2"])
    assert result.exit_code == 0, result.output
    assert "decoder nodes are in engines (100%)" in result.output
    assert "host: exit decisions" in result.output
    assert "trtexec --onnx=stage_0.onnx" in result.output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "plan"]
    for more, message in (
        (["--dry-run", "--out", str(tmp_path / "x")], "--dry-run without it"),
        (["--dry-run", "--profile", "batch=a"], "expected NAME=MIN,OPT,MAX"),
        (["--dry-run", "--quantize", "fp8"], "--quantize fp8 and --data go together"),
        (["--dry-run", "--target", "aoti"], "of target tensorrt only"),
    ):
        result = CliRunner().invoke(app, [*arguments, *more])
        assert result.exit_code == 1
        assert message in result.output


# ---------------------------------------------------------------- where TensorRT is installed


RTX = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed (tensorrt-rtx)")


@RTX
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "fp8"])
def test_tensorrt_for_rtx_builds_all_engines(fast, tmp_path: Path, precision: str) -> None:
    """NVIDIA's own parser and builder take every graph, with these profiles; no GPU is needed for that."""
    folder = tmp_path / "engine"
    options: dict[str, Any] = {"precision": precision, "profiles": SIZES}
    if precision == "fp8":
        ids, pixels, _ = image_prompt("tittt")
        options["calibration"] = [{"input_ids": ids, "pixel_values": pixels}]
    vte_compile.export(fast, folder, target="tensorrt", build="tensorrt_rtx", **options)
    facts = manifest(folder)
    assert facts.builder is not None
    assert facts.builder.package == "tensorrt_rtx"
    for engine in facts.engines:
        assert (folder / engine.engine).stat().st_size > 10_000
        assert (folder / f"{engine.engine}.sha256").is_file()
    assert not [name for name in json.loads((folder / MANIFEST).read_text())["files"] if name.startswith("engines")]


@RTX
@pytest.mark.slow
def test_attention_is_fused(tmp_path: Path) -> None:
    """In both profiles of each layer, with a cache, a mask and grouped heads: the builder took a flash attention."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    fast = optimize(tiny(**sizes), plan(), compile=False)
    vte_compile.export(fast, tmp_path / "engine", target="tensorrt", build="tensorrt_rtx", precision="fp16")
    engine = (tmp_path / "engine" / "engines" / "stage_0.engine").read_bytes()
    assert engine.count(b"fused_multihead_flash_attention_kernel") >= 2 * 2


@RTX
def test_a_graph_that_tensorrt_refuses(tmp_path: Path) -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Abacus", ["x"], ["y"], "first")], "g", [x], [x])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), tmp_path / "g.onnx")
    with pytest.raises(EngineError, match=r"g\.onnx: TensorRT .* does not take the graph: .*Abacus"):
        build_engine(import_tensorrt("tensorrt_rtx"), tmp_path / "g.onnx", [])


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("tensorrt") is None, reason="TensorRT is not installed")
def test_engines_on_a_gpu(fast, tmp_path: Path) -> None:
    """Built and run by TensorRT: what the optimized model gives, token for token."""
    vte_compile.export(fast, tmp_path / "engine", target="tensorrt", build="tensorrt", profiles=SIZES)
    engine = load_engine(tmp_path / "engine")
    for seed in range(6):
        ids, pixels, mask = image_prompt("titt", "ittt", seed=seed)
        options = {"max_new_tokens": 5, "do_sample": False}
        answer = engine.generate(ids, pixel_values=pixels, attention_mask=mask, eos_token_ids=[], **options)
        known = fast.generate(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, pad_token_id=0, eos_token_id=None, **options
        )
        assert answer.tokens.tolist() == known[:, ids.shape[1] :].tolist()
