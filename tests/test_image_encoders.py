"""Image encoders of engines, from pixels on: images that are cut into tiles, that come with masks, of any size.

The engines here are AOTInductor's with pieces that are not compiled; ONNX Runtime's are in test_ort_families.py, and
those of patches (Qwen2-VL) in test_multimodal_engines.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from marks import thorough
from test_families import handed_over, optimized, oracle_of
from tiny_families import VIDEO_TOKEN, family_inputs, video_inputs
from tiny_models import one_thread  # noqa: F401
from uncompiled import uncompiled_engine

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.export import aoti
from vte_compile.export.encoder_function import traced
from vte_compile.export.vision import image_encoder
from vte_compile.runtime.inductor import missing_compiler


@pytest.fixture(scope="module", params=["llava_next", "llava_onevision", "idefics3", "mistral3", thorough("smolvlm")])
def engine(request, tmp_path_factory) -> Any:
    """With its name; its pieces are not compiled."""
    folder = tmp_path_factory.mktemp(request.param) / "engine"
    return request.param, uncompiled_engine(optimized(request.param, "natural"), folder)


def test_engine_is_the_oracle(engine: Any) -> None:
    """Images of different sizes, several, one and none, in a batch that leaves behind different layers."""
    name, loaded = engine
    oracle = oracle_of(name, "natural")
    for images, seed in (([2, 0, 1], 1), ([1], 2), ([0], 3)):
        inputs = family_inputs(name, images, seed=seed)
        want = oracle.forward(**handed_over(name, inputs))
        got = loaded.prefill(**inputs)
        torch.testing.assert_close(got.logits, want.logits[:, -1], rtol=1e-4, atol=1e-4)
        assert got.exit_layer.tolist() == want.exit_layer.tolist()


def test_a_video(engine: Any) -> None:
    name, loaded = engine
    if name != "llava_onevision":
        pixels = torch.zeros(1, 2, 3, 8, 8)
        with pytest.raises(InputError, match="pixel_values_videos: the engine's image encoder takes none"):
            loaded.prefill(torch.full((1, 4), 5), pixel_values_videos=pixels)
        return
    inputs = video_inputs(name)
    want = oracle_of(name, "natural").forward(**handed_over(name, inputs))
    assert VIDEO_TOKEN in inputs["input_ids"]
    torch.testing.assert_close(loaded.prefill(**inputs).logits, want.logits[:, -1], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="which placeholders are of videos, and which of images, is not known"):
        loaded.prefill(**inputs | family_inputs(name))


def test_what_the_model_does_otherwise_is_refused(monkeypatch) -> None:
    """Then the engine has no image encoder, and says why."""
    fast = optimized("llava_next", "natural")
    own = type(fast.model).pack_image_features

    def mirrored(self, *args: Any, **kwargs: Any) -> Any:
        packed, lengths = own(self, *args, **kwargs)
        return [image.flip(0) if len(image) > 5 else image for image in packed], lengths

    monkeypatch.setattr(type(fast.model), "pack_image_features", mirrored)
    with pytest.raises(UnsupportedModelError, match="does more than encode tiles and put them side by side"):
        image_encoder(fast)
    monkeypatch.undo()
    monkeypatch.setattr(fast.model.config, "image_grid_pinpoints", [[8, 12]])
    with pytest.raises(UnsupportedModelError, match="are not in whole tiles of 8 pixels"):
        image_encoder(fast)


@pytest.mark.thorough
@pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="AOTInductor cannot compile here")
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "idefics3", "mistral3"])
def test_encoders_compile(name: str, tmp_path: Path) -> None:
    """AOTInductor's package of an encoder is compared with it, of frames of several sizes."""
    encoder = image_encoder(optimized(name, "natural"))
    module, examples, weights = traced(encoder)
    assert len(examples) == len(encoder.examples[0]) + len(weights)
    aoti.compile_piece(module, name, examples, tmp_path / "vision.pt2", encoder.examples)


BAD: dict[str, list[Any]] = {
    "idefics3": [
        ("pixel_values", lambda x: x[0], r"expected \[prompts, images, 3, 8, 8\]"),
        ("pixel_attention_mask", lambda x: x[:, :1], r"pixel_attention_mask: expected \[1, 2, 8, 8\]"),
    ],
    "mistral3": [
        ("pixel_values", lambda x: x[0], r"expected \[images, 3, height, width\]"),
        ("image_sizes", lambda x: x - 1, r"expected height and width of 2 images, in multiples of 8 and at most"),
        ("image_sizes", lambda x: x[:1], "expected height and width of 2 images"),
    ],
    "llava_next": [("pixel_values", lambda x: x[0], r"expected \[number, tiles or frames, 3, 8, 8\]")],
    "llava_onevision": [("batch_num_images", lambda x: x - 1, r"expected 2 images in all, got \[1\]")],
}


def test_images_that_do_not_fit(engine: Any) -> None:
    name, loaded = engine
    inputs = family_inputs(name, [2])
    for given, change, message in BAD.get(name, []):
        with pytest.raises(InputError, match=message):
            loaded.prefill(**inputs | {given: change(inputs[given])})
