"""ONNX engines of decoders that are more than causal, in both forms: windows, capped scores, blocks, DeepStack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marks import thorough
from PIL import Image
from test_families import handed_over, optimized
from test_multimodal_engines import FakeProcessor
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
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

import vte_compile
from vte_compile import Oracle, StaticExit, load_engine, optimize
from vte_compile.errors import InputError
from vte_compile.export.ort_engine import OnnxEngine
from vte_compile.export.processor import Processor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FORMS = ("staged", "single")
EXITS = (gate(0), gate(2), gate(3))
OURS = dict(max_new_tokens=6, eos_token_ids=[])
QWEN3 = "Qwen3VLProcessor"


def close(ours: Any, theirs: torch.Tensor) -> None:
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-4)


def last(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of each row's last token."""
    columns = mask.shape[1] - 1 - mask.long().flip(1).argmax(1)
    return logits[torch.arange(len(mask)), columns]


@pytest.mark.shows("ONNX Runtime")
@pytest.mark.parametrize("name", ["gemma2", "mistral", thorough("qwen2")])
def test_windows(name: str, tmp_path: Path) -> None:
    """Rows that exit and one of text, padded; a further turn with an image, decode steps: all beyond the window."""
    model, exits = tiny(name, **WINDOWS[name]), plan(gate(0), StaticExit(1))
    oracle = Oracle(model, exits)
    vte_compile.export(optimize(model, exits, compile=False), tmp_path / "engine", target="onnxruntime")
    seen = set()
    for form in FORMS:
        engine: Any = load_engine(tmp_path / "engine", threads=1, form=form)
        for seed in range(3):
            known, ours = None, None
            for turn, layouts in enumerate((("ttvvvvttt", "..ttttttt", "vvvttvvtt"), ("tvvtt", "ttttt", "..ttt"))):
                embeds, visual, real = chunk(*layouts, seed=10 * seed + turn)
                given = {"inputs_embeds": embeds, "visual_mask": visual, "attention_mask": real}
                want = oracle.forward(**given, cache=known)
                got = engine.prefill(**given, cache=ours)
                close(got.logits, last(want.logits, real))
                assert got.exit_layer.tolist() == want.exit_layer.tolist()
                known, ours = want.cache, got.cache
                seen.update(got.exit_layer.tolist())
            answer = engine.generate(**given, **OURS)
            assert answer.tokens.tolist() == oracle.generate(**given, max_new_tokens=6).tokens
    assert seen == {-1, 0, 1}


NAMES = ("gemma3", *map(thorough, ("paligemma", "paligemma2")), "qwen3_vl")


@pytest.fixture(params=NAMES)
def name(request: Any) -> str:
    """A family."""
    return str(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> Callable[[str], Path]:
    """Engines of families, made when first asked for."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            fast = optimize(optimized(name), plan(*EXITS))
            processor = FakeProcessor(QWEN3) if name == "qwen3_vl" else None
            folder = tmp_path_factory.mktemp("e") / "engine"
            made[name] = vte_compile.export(fast, folder, target="onnxruntime", processor=processor)
        return made[name]

    return folder


@pytest.fixture(params=FORMS)
def engine(folders: Callable[[str], Path], name: str, request: Any) -> OnnxEngine:
    loaded = load_engine(folders(name), threads=1, form=request.param)
    assert isinstance(loaded, OnnxEngine)
    return loaded


def turn_of(name: str, inputs: dict[str, torch.Tensor], later: bool) -> dict[str, Any]:
    """Arguments of the oracle."""
    turn = handed_over(name, inputs)
    if later and name in PREFIX:  # a turn of text is causal
        turn["block_ids"][~turn["visual_mask"].any(1)] = -1
    return turn


@pytest.mark.shows("ONNX Runtime")
def test_prompts_and_answers(name: str, engine: OnnxEngine) -> None:
    """Batches that leave behind different layers, several images, text alone, padding on either side."""
    oracle, seen = Oracle(shared_family(name), plan(*EXITS)), set()
    batches = [
        ([2, 0, 1], "left"),
        ([1, 0, 1], "right"),
        ([0, 0], "left"),
        ([1], "left"),
        ([3, 1], "left"),
        ([1, 2, 1], "left"),
    ]
    prompts = [family_inputs(name, images, seed=seed, side=side) for seed, (images, side) in enumerate(batches)]
    for inputs in [*prompts, *([video_inputs(name)] if name == "qwen3_vl" else [])]:
        prompt = handed_over(name, inputs)
        want, got = oracle.forward(**prompt), engine.prefill(**inputs)
        close(got.logits, last(want.logits, inputs["attention_mask"]))
        assert got.exit_layer.tolist() == want.exit_layer.tolist()
        answer = engine.generate(**inputs, **OURS)
        assert answer.tokens.tolist() == oracle.generate(**prompt, max_new_tokens=6).tokens
        seen.update(got.exit_layer.tolist())
    assert seen == {-1, 0, 2, 3}


def check_second_turn(name: str, engine: Any) -> None:
    """Of an engine with ``EXITS``: one row brings an image, the other text; then a token of each."""
    oracle = Oracle(shared_family(name), plan(*EXITS))
    first, second = family_inputs(name, [1, 2], seed=3), family_inputs(name, [1, 0], seed=4)
    known = oracle.forward(**turn_of(name, first, False)).cache
    turn = turn_of(name, second, True)
    turn["position_ids"] = following(turn["position_ids"], known)
    want = oracle.forward(**turn, cache=known)
    got = engine.prefill(**second, cache=engine.prefill(**first).cache)
    close(got.logits, last(want.logits, second["attention_mask"]))
    assert got.exit_layer.tolist() == want.exit_layer.tolist()
    tokens = torch.tensor([5, 7])
    embeds = shared_family(name).get_input_embeddings()(tokens[:, None])
    close(engine.decode(tokens, got.cache).logits, oracle.forward(embeds, cache=want.cache).logits[:, -1])


def test_second_turn(name: str, engine: OnnxEngine) -> None:
    check_second_turn(name, engine)


def test_features_and_embeddings_instead_of_pixels(name: str, engine: OnnxEngine) -> None:
    """With DeepStack, what is added behind layers comes with a visual token's embedding."""
    inputs = family_inputs(name, [1, 2], seed=5)
    want, pixels, grid = engine.prefill(**inputs), inputs.pop("pixel_values"), inputs.get("image_grid_thw")
    features = engine.encode_images(pixels, grid)
    assert features.shape[1] == C * (3 if name == "qwen3_vl" else 1)
    np.testing.assert_allclose(engine.prefill(**inputs, image_features=features).logits, want.logits, rtol=1e-5)
    ids = inputs.pop("input_ids")
    inputs.pop("mm_token_type_ids", None)
    with pytest.raises(InputError, match=r"token_type_ids: are not those|knows no token_type_ids"):
        engine.prefill(ids, image_features=features, **inputs | {"token_type_ids": torch.full_like(ids, 2)})
    embeds = np.zeros((*ids.shape, features.shape[1]), np.float32)
    embeds[..., :C] = shared_family(name).get_input_embeddings()(ids).detach()
    embeds[ids == IMAGE_TOKEN] = features
    got = engine.prefill(inputs_embeds=embeds, visual_mask=ids == IMAGE_TOKEN, **inputs)
    np.testing.assert_allclose(got.logits, want.logits, rtol=1e-5)
    with pytest.raises(InputError, match="which of inputs_embeds are visual is not known"):
        engine.prefill(inputs_embeds=embeds, **inputs)
    with pytest.raises(InputError, match=rf"inputs_embeds: expected shape \[batch, tokens, {features.shape[1]}\]"):
        engine.prefill(inputs_embeds=embeds[..., 1:], visual_mask=ids == IMAGE_TOKEN, **inputs)


def following(positions: torch.Tensor | None, cache: Any) -> torch.Tensor | None:
    """Multimodal positions of a turn that follows another."""
    if positions is None:
        return None
    return positions + torch.tensor(cache.next_positions())[:, None]


def pictures() -> list[Image.Image]:
    """One that is fitted into the fewest pixels, one into the most."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (size, 40, 3), np.uint8)) for size in (3, 60)]


def test_processor_of_qwen3_vl(tmp_path: Path) -> None:
    """Tokens and patches are those of transformers' own class."""

    class WithoutVideos(Qwen3VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
            """Its processor of videos, which is None here, wants torchvision."""

    files = FakeProcessor(QWEN3)
    files.save_pretrained(tmp_path)
    ours, theirs = Processor(tmp_path, True), WithoutVideos(files.images, files.tokenizer, None)
    seen: dict[str, Any] = {}

    def encode(made: Any) -> list[np.ndarray]:
        seen.update(made)
        return [np.zeros((grid.prod() // 4, 3 * C), np.float32) for grid in made["image_grid_thw"]]

    prompt = ours.prompt(ours.messages("w7 w8", pictures()), encode)
    text = "<start> <|image_pad|> <end> " * 2 + "w7 w8 "
    expected = theirs(text=[text], images=pictures(), return_tensors="np")
    assert prompt.ids == expected["input_ids"][0].tolist()
    np.testing.assert_array_equal(prompt.image_grid_thw, expected["image_grid_thw"])
    np.testing.assert_allclose(seen["pixel_values"], expected["pixel_values"], atol=1e-5)


def test_chat_of_qwen3_vl(folders: Callable[[str], Path]) -> None:
    """Pictures of any size, without transformers' processor; what is added behind layers comes from them, too."""
    engine: Any = load_engine(folders("qwen3_vl"), threads=1, form="staged")
    answer = engine.chat("w7 w8", pictures(), **OURS)
    inputs = FakeProcessor(QWEN3).inputs("<start> <|image_pad|> <end> " * 2 + "w7 w8", pictures())
    want = Oracle(shared_family("qwen3_vl"), plan(*EXITS)).generate(**handed_over("qwen3_vl", inputs), max_new_tokens=6)
    assert answer.tokens == want.tokens[0]
    assert [answer.exit_layer] == want.exit_layer.tolist()
