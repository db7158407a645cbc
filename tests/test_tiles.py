"""Images that are cut into tiles (LLaVA-NeXT, LLaVA-OneVision): how tiles become a sequence, and engines that do it.

The engines here are AOTInductor's with pieces that are not compiled; ONNX Runtime's are in test_ort_families.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_families import handed_over, optimized, oracle_of
from test_multimodal_engines import keep
from tiny_families import VIDEO_TOKEN, family_inputs, video_inputs
from tiny_models import one_thread  # noqa: F401
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

import vte_compile
from vte_compile import load_engine
from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.export import aoti
from vte_compile.export.encoder_function import traced
from vte_compile.export.manifest import TileFacts
from vte_compile.export.tiles import best_resolution, pack_image, parts, split_images
from vte_compile.export.vision import image_encoder
from vte_compile.runtime.inductor import missing_compiler

RESOLUTIONS = [[9, 18], [18, 9], [18, 18], [27, 9], [9, 27], [45, 45]]
FACTS = TileFacts(9, 3, RESOLUTIONS, None, False, False)
SIZES = [(6, 16), (16, 16), (14, 8), (5, 30), (90, 12), (40, 33), (37, 40), (8, 8), (400, 399)]


def test_resolutions_are_those_of_transformers() -> None:
    for height, width in np.random.default_rng(0).integers(1, 60, (300, 2)).tolist():
        assert best_resolution((height, width), RESOLUTIONS) == tuple(
            select_best_resolution((height, width), RESOLUTIONS)
        )


@pytest.mark.parametrize("most", [None, 1, 4, 9])
def test_sequences_are_those_of_transformers(most: int | None) -> None:
    """Filled up above and below, or beside; shrunk where there is a limit; whole."""
    facts, generator = TileFacts(9, 3, RESOLUTIONS, most, False, False), torch.Generator().manual_seed(0)
    newline = torch.randn(5, generator=generator)
    vision = SimpleNamespace(image_size=9, patch_size=3)
    model: Any = SimpleNamespace(config=SimpleNamespace(image_grid_pinpoints=RESOLUTIONS, vision_config=vision))
    for size in SIZES:
        tiles = torch.randn(1 + int(np.prod(parts(facts, size))), 9, 5, generator=generator)
        if most is None:
            want = LlavaNextModel.pack_image_features(model, [tiles], [size], "default", newline)[0][0]
        else:
            want = LlavaOnevisionModel.pack_image_features(model, [tiles], [size], newline, f"anyres_max_{most}")[0][0]
        ended = [torch.cat([tile, newline[None]]).numpy() for tile in tiles]
        got = pack_image(facts, ended, size)
        np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
        np.testing.assert_array_equal(pack_image(facts, ended[:1], None), ended[0])


@pytest.mark.parametrize(
    ("facts", "tiles", "sizes", "counts", "message"),
    [
        (FACTS, 5, None, None, "image_sizes: expected height and width of 2 images, got none"),
        (FACTS, 5, [[8, 8]], None, "expected height and width of 2 images"),
        (FACTS, 5, [[8, 8], [0, 8]], None, "expected height and width of 2 images"),
        (FACTS, 2, [[6, 16], [6, 16]], None, "an image of 6 x 16 has 3 tiles, got 2"),
        (FACTS, 5, [[6, 16], [6, 16]], [2], "this model cuts every image"),
        (TileFacts(9, 3, RESOLUTIONS, 9, True, True), 5, [[6, 16], [6, 16]], [1], "expected 2 images in all"),
    ],
)
def test_tiles_that_do_not_fit(facts: TileFacts, tiles: int, sizes: Any, counts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_images(facts, np.zeros((2, tiles, 3, 8, 8)), sizes, counts)


@pytest.fixture(scope="module", params=["llava_next", "llava_onevision"])
def engine(request, tmp_path_factory) -> Any:
    """With its name, and what takes the place of compiled pieces."""
    pieces: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aoti, "compile_piece", lambda module, key, examples, file, tried: keep(pieces, module, file))
        patch.setattr(aoti, "load_piece", lambda file: lambda values: pieces[file.name](*values))
        folder = tmp_path_factory.mktemp(request.param) / "engine"
        vte_compile.export(optimized(request.param, "natural"), folder, target="aoti")
        return request.param, load_engine(folder)


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
    if name == "llava_next":
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
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_encoders_compile(name: str, tmp_path: Path) -> None:
    """AOTInductor's package of an encoder is compared with it, of frames of several sizes."""
    encoder = image_encoder(optimized(name, "natural"))
    module, examples, weights = traced(encoder)
    assert len(examples) == len(encoder.examples[0]) + len(weights)
    aoti.compile_piece(module, name, examples, tmp_path / "vision.pt2", encoder.examples)
    assert len(encoder.examples) == (1 if name == "llava_next" else 4)
