"""Engines of AOTInductor and TensorRT of decoders that are more than causal: windows, capped scores, blocks, DeepStack.

Pieces of AOTInductor's engines run uncompiled here, but for one that is compiled. TensorRT's graphs run in ONNX
Runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_tensorrt import load_fake
from marks import thorough
from test_families import handed_over, optimized
from test_ort_decoders import EXITS, OURS, check_second_turn, close, last
from test_windows import WINDOWS
from tiny_families import IMAGE_TOKEN, PREFIX, family_inputs, shared_family, video_inputs
from tiny_models import (
    C,
    chunk,
    gate,
    one_thread,  # noqa: F401
    plan,
    tiny,
)
from uncompiled import uncompiled_engine

import vte_compile
from vte_compile import Oracle, StaticExit, optimize
from vte_compile.errors import InputError
from vte_compile.export import aoti
from vte_compile.export.tensorrt_coverage import graph_coverage
from vte_compile.export.tensorrt_target import input_shapes
from vte_compile.passes.lower_piecewise import Piece
from vte_compile.passes.residual import CAUSAL
from vte_compile.runtime.inductor import missing_compiler

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SIZES = {"batch": (1, 2, 4), "prompt": (1, 16, 128), "visual": (1, 8, 100), "columns": (1, 32, 160)}
CASES = [
    ("aoti", "gemma3"),
    ("aoti", "qwen3_vl"),
    thorough("tensorrt", "gemma3"),
    ("tensorrt", "qwen3_vl"),
    *(thorough(door, name) for door in ("aoti", "tensorrt") for name in PREFIX),
]


def exported(door: str, fast: Any, folder: Path) -> Any:
    """The engine of a model."""
    if door == "aoti":
        return uncompiled_engine(fast, folder)
    vte_compile.export(fast, folder, target="tensorrt", build=False, profiles=SIZES)
    return load_fake(folder)[0]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: Any) -> Callable[[str, str], Any]:
    """Engines of families, made when first asked for."""
    made: dict[tuple[str, str], Any] = {}

    def engine(door: str, name: str) -> Any:
        if (door, name) not in made:
            fast = optimize(optimized(name), plan(*EXITS))
            made[door, name] = exported(door, fast, tmp_path_factory.mktemp("e") / "engine")
        return made[door, name]

    return engine


@pytest.mark.parametrize(("door", "name"), CASES)
def test_prompts_and_answers(door: str, name: str, engines: Any) -> None:
    """Batches that leave behind different layers, several images, text alone, padding on either side; a video."""
    engine, oracle, seen = engines(door, name), Oracle(shared_family(name), plan(*EXITS)), set()
    batches = [([2, 0, 1], "left"), ([1, 0, 1], "right"), ([0, 0], "left"), ([1], "left"), ([3, 1], "left")]
    prompts = [family_inputs(name, images, seed=seed, side=side) for seed, (images, side) in enumerate(batches)]
    prompts.append(family_inputs(name, [1, 2, 1], seed=5))
    for inputs in [*prompts, *([video_inputs(name)] if name == "qwen3_vl" else [])]:
        prompt = handed_over(name, inputs)
        want, got = oracle.forward(**prompt), engine.prefill(**inputs)
        close(got.logits, last(want.logits, inputs["attention_mask"]))
        assert got.exit_layer.tolist() == want.exit_layer.tolist()
        answer = engine.generate(**inputs, **OURS)
        assert answer.tokens.tolist() == oracle.generate(**prompt, max_new_tokens=6).tokens
        seen.update(got.exit_layer.tolist())
    assert seen == {-1, 0, 2, 3}


@pytest.mark.parametrize(("door", "name"), CASES)
def test_second_turn(door: str, name: str, engines: Any) -> None:
    check_second_turn(name, engines(door, name))


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_features_and_embeddings_instead_of_pixels(name: str, engines: Any) -> None:
    """With DeepStack, what is added behind layers comes with a visual token's embedding."""
    engine, inputs = engines("aoti", name), family_inputs(name, [1, 2], seed=5)
    want, pixels, grid = engine.prefill(**inputs).logits, inputs.pop("pixel_values"), inputs.get("image_grid_thw")
    features = engine.encode_images(pixels, grid)
    assert features.shape[1] == C * (3 if name == "qwen3_vl" else 1)
    close(engine.prefill(**inputs, image_features=features).logits, want)
    ids = inputs.pop("input_ids")
    inputs.pop("mm_token_type_ids", None)
    with pytest.raises(InputError, match=r"token_type_ids: are not those|knows no token_type_ids"):
        engine.prefill(ids, image_features=features, **inputs | {"token_type_ids": torch.full_like(ids, 2)})
    embeds = torch.zeros(*ids.shape, features.shape[1])
    embeds[..., :C] = shared_family(name).get_input_embeddings()(ids).detach()
    embeds[ids == IMAGE_TOKEN] = features
    close(engine.prefill(inputs_embeds=embeds, visual_mask=ids == IMAGE_TOKEN, **inputs).logits, want)
    with pytest.raises(InputError, match="which of inputs_embeds are visual is not known"):
        engine.prefill(inputs_embeds=embeds, **inputs)
    with pytest.raises(InputError, match=rf"inputs_embeds: expected shape \[batch, tokens, {features.shape[1]}\]"):
        engine.prefill(inputs_embeds=embeds[..., 1:], visual_mask=ids == IMAGE_TOKEN, **inputs)


@pytest.mark.parametrize(
    ("door", "name"),
    [
        ("aoti", "gemma2"),
        ("aoti", "mistral"),
        *(thorough(door, name) for door, name in (("aoti", "qwen2"), ("tensorrt", "gemma2"), ("tensorrt", "qwen2"))),
    ],
)
def test_windows(door: str, name: str, tmp_path: Path) -> None:
    """Rows that exit and one of text, padded; a further turn with an image, decode steps: all beyond the window."""
    model, exits = tiny(name, **WINDOWS[name]), plan(gate(0), StaticExit(1))
    oracle, seen = Oracle(model, exits), set()
    engine = exported(door, optimize(model, exits, compile=False), tmp_path / "engine")
    for seed in range(3):
        known, ours = None, None
        for turn, layouts in enumerate((("ttvvvvttt", "..ttttttt", "vvvttvvtt"), ("tvvtt", "ttttt", "..ttt"))):
            embeds, visual, real = chunk(*layouts, seed=10 * seed + turn)
            given = {"inputs_embeds": embeds, "visual_mask": visual, "attention_mask": real}
            want, got = oracle.forward(**given, cache=known), engine.prefill(**given, cache=ours)
            close(got.logits, last(want.logits, real))
            assert got.exit_layer.tolist() == want.exit_layer.tolist()
            known, ours = want.cache, got.cache
            seen.update(got.exit_layer.tolist())
        answer = engine.generate(**given, **OURS)
        assert answer.tokens.tolist() == oracle.generate(**given, max_new_tokens=6).tokens
    assert seen == {-1, 0, 1}


@pytest.mark.skipif((_MISSING := missing_compiler(torch.device("cpu"))) is not None, reason=f"no compiler: {_MISSING}")
def test_an_attention_in_a_package(tmp_path: Path) -> None:
    """A layer with a window, of tokens in blocks, compiled: compile_piece compares it with its graph."""
    lowered = optimized("gemma3")._vte_runner.lowered("extend", batched=False)
    piece = next(step for step in lowered.steps if isinstance(step, Piece) and step.layer == 0)
    assert any(node.target is CAUSAL for node in piece.module.graph.nodes)
    assert "block_ids" in piece.inputs
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        aoti.compile_piece(piece.module, piece.key, piece.examples, tmp_path / "piece.pt2")


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", *map(thorough, PREFIX)])
def test_all_nodes_are_taken(name: str, engines: Any) -> None:
    """By what is known of TensorRT's operators; features behind layers and blocks have no dims of their own."""
    folder = engines("tensorrt", name).folder
    inputs = {file.stem: input_shapes(file) for file in folder.glob("stage_*.onnx")}
    assert len(inputs) == 1 + len(EXITS)
    assert [entry for file in folder.glob("*.onnx") for entry in graph_coverage(file, [], []).exceptions] == []
    if name == "qwen3_vl":
        assert inputs["stage_1"]["deepstack_1"] == ["batch", "kept_tokens", C]
        assert "deepstack_1" not in inputs["stage_2"]
    else:
        assert inputs["stage_1"]["block_ids"] == ["batch", "kept_tokens"]
