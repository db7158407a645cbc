"""Engines of models with multimodal positions (Qwen2.5-VL, Qwen2-VL) give what the optimized model and the oracle give.

Converting takes most of the time: one ONNX engine for all tests. Pieces of AOTInductor's engine run uncompiled here;
TensorRT's engine is in test_tensorrt.py, and what is computed of grids in test_grid_positions.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_families import handed_over
from tiny_families import END_TOKEN, IMAGE_TOKEN, START_TOKEN, family_inputs, shared_family, video_inputs
from tiny_models import (
    VOCAB,
    gate,
    one_thread,  # noqa: F401
    plan,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor
from uncompiled import uncompiled_engine

import vte_compile
from vte_compile import load_engine, optimize
from vte_compile.errors import InputError
from vte_compile.export.ort_engine import OnnxEngine
from vte_compile.oracle import Oracle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAME = "qwen2_5_vl"
EXITS = (gate(0), gate(2))
GREEDY = dict(do_sample=False, max_new_tokens=4, pad_token_id=0, eos_token_id=None)
OURS = dict(max_new_tokens=4, eos_token_ids=[])
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<start> <|image_pad|> <end> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
_SPECIAL = {IMAGE_TOKEN: "<|image_pad|>", START_TOKEN: "<start>", END_TOKEN: "<end>"}


class FakeProcessor:
    """The files of a Qwen-VL processor as published; the class itself wants torchvision."""

    def __init__(self, kind: str = "Qwen2_5_VLProcessor") -> None:
        self.kind = kind
        words = Tokenizer(WordLevel({_SPECIAL.get(i, f"w{i}"): i for i in range(VOCAB)}, unk_token="w3"))
        words.pre_tokenizer = WhitespaceSplit()
        # Placeholders stand side by side.
        special = {"additional_special_tokens": list(_SPECIAL.values())}
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **special)
        self.images = Qwen2VLImageProcessor(patch_size=4, size={"shortest_edge": 256, "longest_edge": 1024})

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        config = self.images.to_dict() | {"processor_class": self.kind}
        (folder / "preprocessor_config.json").write_text(json.dumps(config))

    def inputs(self, text: str, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What the class would give."""
        made = self.images(pictures, return_tensors="pt")
        parts = text.split("<|image_pad|>")
        whole = parts[0]
        for grid, part in zip(made["image_grid_thw"], parts[1:], strict=True):
            whole += "<|image_pad|>" * (int(grid.prod()) // 4) + part
        ids = torch.tensor([self.tokenizer.encode(whole)])
        types = (ids == IMAGE_TOKEN).long()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **made}


@pytest.fixture(scope="module")
def fast() -> Any:
    return optimize(shared_family(NAME), plan(*EXITS), compile=False)


@pytest.fixture(scope="module")
def folder(fast, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("qwen") / "engine"
    return vte_compile.export(fast, path, target="onnxruntime", processor=FakeProcessor())


@pytest.fixture(scope="module", params=["staged", "single"])
def engine(folder, request) -> OnnxEngine:
    engine = load_engine(folder, threads=1, form=request.param)
    assert isinstance(engine, OnnxEngine)
    return engine


def close(ours: Any, theirs: torch.Tensor) -> None:
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-4)


def prompts() -> list[dict[str, torch.Tensor]]:
    """Two images, none, batches that leave behind different layers, padding on the right, a video."""
    batches = [family_inputs(NAME, [2]), family_inputs(NAME, [0]), family_inputs(NAME, [1, 0, 2], seed=9, side="right")]
    return [*batches, *(family_inputs(NAME, [1, 2], seed=seed) for seed in (1, 2, 5)), video_inputs(NAME)]


@pytest.mark.shows("ONNX Runtime", "qwen2_5_vl")
def test_prompts_and_answers(fast, engine: OnnxEngine) -> None:
    oracle, seen = Oracle(shared_family(NAME), plan(*EXITS)), set()
    for i, inputs in enumerate(prompts()):
        got = engine.prefill(**inputs)
        want = oracle.forward(**handed_over(NAME, inputs))
        last = inputs["attention_mask"].shape[1] - 1 - inputs["attention_mask"].flip(1).argmax(1)
        close(got.logits, want.logits[torch.arange(len(last)), last])
        assert got.exit_layer.tolist() == want.exit_layer.tolist()
        assert got.cache.next_positions.tolist() == want.cache.next_positions()
        answer = engine.generate(**inputs, **OURS)
        if i != 2:  # transformers' generate() wants padding on the left
            known = fast.generate(**inputs, **GREEDY)
            assert answer.tokens.tolist() == known[:, inputs["input_ids"].shape[1] :].tolist()
        seen.update(answer.exit_layer.tolist())
    assert seen == {-1, 0, 2}


def test_two_turns(fast, engine: OnnxEngine) -> None:
    """The second one brings images of its own; then a token, counted on from both."""
    first, second = family_inputs(NAME, [1, 2], seed=3), family_inputs(NAME, [1, 1], seed=4, before=1)
    want, got = fast(**first), engine.prefill(**first)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    want = fast(**(second | {"attention_mask": mask}), past_key_values=want.past_key_values)
    got = engine.prefill(**second, cache=got.cache)
    close(got.logits, want.logits[:, -1])
    assert got.exit_layer.tolist() == want.exit_layer.tolist()
    tokens = want.logits[:, -1:].argmax(-1)
    mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    want = fast(input_ids=tokens, attention_mask=mask, past_key_values=want.past_key_values)
    close(engine.decode(tokens[:, 0], got.cache).logits, want.logits[:, -1])


def test_features_and_embeddings_instead_of_patches(engine: OnnxEngine) -> None:
    inputs = family_inputs(NAME, [1, 2], seed=1)
    want = engine.prefill(**inputs)
    grid, pixels = inputs["image_grid_thw"], inputs.pop("pixel_values")
    features = engine.encode_images(pixels, grid)
    known = torch.cat(tuple(shared_family(NAME).get_image_features(pixels, grid).pooler_output))
    # With other windows, they would differ by 1e-4.
    np.testing.assert_allclose(features, known.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(engine.prefill(**inputs, image_features=features).logits, want.logits, rtol=1e-5)
    ids, visual = inputs["input_ids"], inputs["input_ids"] == IMAGE_TOKEN
    embeds = shared_family(NAME).get_input_embeddings()(ids).detach()
    embeds[visual] = torch.from_numpy(features)
    options = {"visual_mask": visual, "attention_mask": inputs["attention_mask"], "image_grid_thw": grid}
    np.testing.assert_allclose(engine.prefill(inputs_embeds=embeds, **options).logits, want.logits, rtol=1e-5)


def test_images_and_a_video_in_one_prompt(fast, engine: OnnxEngine) -> None:
    """Each kind's features go to its own placeholders, whatever stands first."""
    video, images = video_inputs(NAME), family_inputs(NAME, [2], seed=2)
    tokens = ("input_ids", "attention_mask", "mm_token_type_ids")
    inputs = {**video, **images} | {key: torch.cat([video[key], images[key]], 1) for key in tokens}
    want = fast(**inputs, second_per_grid_ts=torch.tensor([1.3]), logits_to_keep=1)
    got = engine.prefill(**inputs, second_per_grid_ts=[1.3])
    close(got.logits, want.logits[:, -1])
    assert got.cache.next_positions.tolist() == want.past_key_values.next_positions.tolist()
    other = engine.prefill(**inputs)  # a second each
    assert not np.allclose(other.logits, got.logits, atol=1e-3)


def test_chat(fast, engine: OnnxEngine) -> None:
    """Pictures of any size, without transformers' processor."""
    pictures = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (n, 40, 3), np.uint8)) for n in (25, 60)]
    answer = engine.chat("w7 w8", pictures, **OURS)
    inputs = FakeProcessor().inputs("<start> <|image_pad|> <end> " * 2 + "w7 w8", pictures)
    assert engine.prompt("w7 w8", pictures).ids == inputs["input_ids"][0].tolist()
    known = fast.generate(**inputs, **GREEDY)
    assert answer.tokens == known[0, inputs["input_ids"].shape[1] :].tolist()
    assert answer.exit_layer == known.exit_layer.item()
    assert engine.chat("w7 w8", **OURS).exit_layer == -1


def test_bad_inputs(engine: OnnxEngine) -> None:
    inputs = family_inputs(NAME)
    pixels = inputs.pop("pixel_values")
    with pytest.raises(InputError, match="placeholders: pass image_features or pixel_values"):
        engine.prefill(**inputs)
    with pytest.raises(InputError, match="expected a grid"):
        engine.prefill(inputs["input_ids"], pixel_values=pixels)
    with pytest.raises(InputError, match="mm_token_type_ids: are not those"):
        engine.prefill(**inputs | {"mm_token_type_ids": inputs["attention_mask"]}, pixel_values=pixels)
    with pytest.raises(InputError, match="has exits, but which of inputs_embeds"):
        engine.prefill(inputs_embeds=np.zeros((1, 2, 32), np.float32))


def test_aoti_engine(fast, tmp_path: Path) -> None:
    """The steps of an engine, with pieces that were not compiled; images and videos as patches and as features."""
    engine = uncompiled_engine(fast, tmp_path / "engine")
    for inputs in (*prompts()[:4], video_inputs(NAME)):
        video = "pixel_values_videos" in inputs
        encode = shared_family(NAME).get_video_features if video else shared_family(NAME).get_image_features
        pixels = [name for name in inputs if name.startswith("pixel_values")]
        grids = [inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs]
        features = encode(inputs[pixels[0]], *grids).pooler_output if pixels else None
        given = {k: v for k, v in inputs.items() if k not in pixels}
        want = fast(**inputs, logits_to_keep=1)
        got = engine.prefill(**given, image_features=features)
        close(got.logits, want.logits[:, -1])
        assert got.exit_layer.tolist() == want.exit_layer.tolist()
        close(engine.prefill(**inputs).logits, want.logits[:, -1])
        answer = engine.generate(**inputs, **OURS)
        step = engine.decode(got.logits.argmax(-1), got.cache)
        assert answer.tokens[:, 1].tolist() == step.logits.argmax(-1).tolist()
        if inputs["attention_mask"].all():
            known = fast.generate(**inputs, **GREEDY)
            assert answer.tokens.tolist() == known[:, inputs["input_ids"].shape[1] :].tolist()
    with pytest.raises(InputError, match=r"image_grid_thw .or video_grid_thw.: is missing"):
        engine.prefill(given["input_ids"], image_features=features)
