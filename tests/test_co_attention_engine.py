"""ONNX engines of models with co-attention layers: METER and BridgeTower against the oracle; what is in the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_bridgetower
import tiny_meter
import torch
from marks import thorough
from test_packaging import modules_after
from tiny_bridgetower import bridgetower, random_part
from tiny_models import assert_relative, one_thread  # noqa: F401
from transformers import BridgeTowerForImageAndTextRetrieval
from typer.testing import CliRunner

import vte_compile
from vte_compile import Plan, load_engine, optimize
from vte_compile.cli import app
from vte_compile.errors import EngineError, InputError, UnsupportedModelError
from vte_compile.families.meter import load_meter
from vte_compile.oracle.co_attention import co_attention_oracle

pytestmark = [pytest.mark.slow]
METER, BRIDGETOWER = "vqa_classifier", "bridgetower"


def plan_of(hidden_size: int) -> Plan:
    """Image cross attention nowhere; a self attention skipped on both sides; adapters, and a level without."""
    parts = [
        random_part("text", 0, skip_self=True, hidden_size=hidden_size),
        random_part("image", 0, skip_self=True, skip_cross=True, hidden_size=hidden_size),
        random_part("image", 1, skip_cross=True, adapters=False),
    ]
    return Plan(co_attention=parts)


@pytest.fixture(scope="module", params=[METER, thorough(BRIDGETOWER)])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any, Path]:
    """Kind, model, optimized model, and its engine's folder."""
    kind, folder = request.param, tmp_path_factory.mktemp("engine")
    if kind == BRIDGETOWER:
        model, size = bridgetower(BridgeTowerForImageAndTextRetrieval), tiny_bridgetower.C
    else:
        model, size = load_meter(tiny_meter.save(folder / "meter.ckpt", tiny_meter.weights(kind))), tiny_meter.C
    fast = optimize(model, plan_of(size), compile=False)
    return kind, model, fast, vte_compile.export(fast, folder / "engine", target="onnxruntime")


def inputs(kind: str, *sizes: int, padded: int = 0) -> dict[str, torch.Tensor]:
    if kind == BRIDGETOWER:
        return tiny_bridgetower.inputs(*sizes, padded=padded)
    return tiny_meter.inputs(*sizes, padded=padded)


@pytest.mark.shows("ONNX Runtime", "meter")
@pytest.mark.shows("ONNX Runtime", "bridgetower")
def test_logits_are_the_oracles(exported: tuple[str, Any, Any, Path], tmp_path: Path) -> None:
    kind, model, fast, folder = exported
    engine: Any = load_engine(folder.rename(tmp_path / "moved"), threads=1)
    (tmp_path / "moved").rename(folder)
    oracle = co_attention_oracle(model, fast.plan)
    for given in (inputs(kind, 2, 7, padded=2), inputs(kind, 1, 4), inputs(kind, 4, 12, padded=5)):
        with torch.no_grad():
            expected, plain = oracle(**given).logits, model(**given).logits
        logits = torch.from_numpy(engine.run(**given)["logits"])
        assert_relative(logits, expected, 1e-4)
        assert float((logits - plain).abs().max()) > 1e-3
    given.pop("attention_mask")
    with torch.no_grad():
        expected = oracle(**given).logits
    assert_relative(torch.from_numpy(engine.run(**given)["logits"]), expected, 1e-4)


def test_what_is_skipped_is_not_in_the_graph(exported: tuple[str, Any, Any, Path]) -> None:
    kind, _, _, folder = exported
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    names = {tensor.name for tensor in graph.initializer}
    cross = {name.split("crossattention.")[1] for name in names if "image_layers" in name and "crossattention" in name}
    assert {name for name in cross if not name.startswith("pia.")} == {
        "output.LayerNorm.weight",
        "output.LayerNorm.bias",
    }
    assert not any("layers.0.attention.self" in name for name in names if "cross_modal" in name)
    assert any("cross_modal_text_layers.0.crossattention.self.query" in name for name in names)
    if kind == METER:
        # Two layers of RoBERTa, two of CLIP, and of the 8 attentions in two levels the 4 that are kept.
        assert sum(node.op_type == "Attention" for node in graph.node) == 2 + 2 + 4
    assert any("cross_modal_text_layers.1.intermediate.dense/" in node.name for node in graph.node)


def test_engine_runs_without_torch(exported: tuple[str, Any, Any, Path], tmp_path: Path) -> None:
    kind, _, _, folder = exported
    if kind != METER:
        pytest.skip("one kind shows it")
    size = tiny_meter.GRID * tiny_meter.PATCH
    code = (
        f"import numpy, vte_compile; engine = vte_compile.load_engine({str(folder)!r}); "
        f"engine.run(numpy.array([[3, 4, 5]]), numpy.zeros((1, 3, {size}, {size})))"
    )
    assert not {"torch", "transformers"} & set(modules_after(code, tmp_path))


def test_what_cannot_be_is_refused(exported: tuple[str, Any, Any, Path], tmp_path: Path) -> None:
    kind, model, fast, folder = exported
    if kind != METER:
        pytest.skip("one kind shows it")
    engine: Any = load_engine(folder)
    good = {name: tensor.numpy() for name, tensor in inputs(kind, 2, 7).items()}
    for change, message in (
        ({"input_ids": good["input_ids"][0]}, r"input_ids: expected integers \[B, T\]"),
        ({"input_ids": good["input_ids"] + 100}, "input_ids: expected 0 to 49, got"),
        ({"input_ids": np.full((2, 39), 3), "attention_mask": None}, "texts have up to 38 tokens, got 39"),
        ({"attention_mask": good["attention_mask"][:, 1:]}, r"attention_mask: expected \[2, 7\]"),
        ({"pixel_values": good["pixel_values"][:1]}, r"expected \[2, 3, 12, 12\], got \[1, 3,"),
    ):
        with pytest.raises(InputError, match=message):
            engine.run(**{**good, **change})
    with pytest.raises(InputError, match="form: means nothing"):
        load_engine(folder, form="single")
    with pytest.raises(UnsupportedModelError, match="co-attention layers are exported for 'onnxruntime' only"):
        vte_compile.export(fast, tmp_path / "e", target="aoti")
    with pytest.raises(InputError, match="'quantize' is no option of target 'onnxruntime': it has none"):
        vte_compile.export(fast, tmp_path / "e", quantize="int8")
    with pytest.raises(UnsupportedModelError, match=r"do not take torch\.bfloat16"):
        vte_compile.export(optimize(model.to(torch.bfloat16), Plan(), compile=False), tmp_path / "e")
    model.float()
    result = CliRunner().invoke(app, ["generate", "--engine", str(folder), "What is this?"])
    assert "an engine of MeterForQuestionAnswering gives no text" in result.output
    weights = folder / "weights-00001.data"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(EngineError, match="was altered"):
        load_engine(folder)
    weights.write_bytes(content)
