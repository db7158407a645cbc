"""Images that are cut into tiles (LLaVA-NeXT, LLaVA-OneVision): how the tiles' tokens become a sequence."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import llava  # noqa: F401
from test_ort_processor import random_picture
from tiny_models import one_thread  # noqa: F401
from transformers import AutoProcessor, LlavaNextImageProcessor, LlavaNextProcessor, LlavaOnevisionImageProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from vte_compile.errors import InputError
from vte_compile.export.image_processor import NotKnownError
from vte_compile.export.manifest import TileFacts
from vte_compile.export.processor import Processor
from vte_compile.export.tile_processor import TileProcessor
from vte_compile.export.tiles import best_resolution, pack_image, parts, split_images

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


GRIDS = [[32, 64], [64, 32], [64, 64], [96, 32]]
PROCESSORS = {
    "next": LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=GRIDS
    ),
    "onevision": LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=GRIDS),
}


@pytest.mark.parametrize("sizes", [[(50, 37)], [(20, 90)], [(31, 64), (64, 64), (7, 9)]], ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_are_cut_as_transformers_does(name: str, sizes: list[tuple[int, int]]) -> None:
    """One picture or several of a prompt: of these, LLaVA-OneVision cuts none."""
    theirs = PROCESSORS[name]
    ours = TileProcessor.from_config(json.loads(theirs.to_json_string()))
    pictures = [random_picture(width, height) for height, width in sizes]
    expected = theirs([pictures], return_tensors="np")
    made = ours.batch(pictures)
    assert made.keys() == set(expected.keys())
    for key, value in made.items():
        np.testing.assert_allclose(value, expected[key], atol=1e-5)


def test_prompts_have_a_placeholder_for_each_token(llava: Path, tmp_path: Path) -> None:  # noqa: F811
    """As transformers' processor has them, from the files that it saves; without it."""
    words = AutoProcessor.from_pretrained(llava).tokenizer
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "image_token": "<image>"}
    theirs = LlavaNextProcessor(PROCESSORS["next"], words, num_additional_image_tokens=1, **options)
    theirs.save_pretrained(tmp_path)
    facts = TileFacts(32, 4, GRIDS, None, False, False)

    def encode(made: dict[str, Any]) -> list[np.ndarray]:
        found = split_images(facts, made["pixel_values"], made["image_sizes"], None)
        return [pack_image(facts, [np.zeros((17, 2), np.float32)] * len(tiles), size) for tiles, size in found]

    ours = Processor(tmp_path, True)
    pictures = [random_picture(50, 37), random_picture(90, 20)]
    prompt = ours.prompt(ours.messages("what", pictures), encode)
    expected = theirs(text="<image>\n<image>\nwhat", images=pictures, return_tensors="np")
    token = words.convert_tokens_to_ids("<image>")
    assert prompt.ids.count(token) == int((expected["input_ids"] == token).sum())
    assert len(prompt.features) == prompt.ids.count(token) > 2 * 16
    assert isinstance(ours._images, TileProcessor)


@pytest.mark.parametrize(
    "changed", [{"image_grid_pinpoints": None}, {"crop_size": {"height": 30, "width": 32}}, {"do_pad": False}]
)
def test_processors_that_are_not_known(changed: dict[str, Any]) -> None:
    with pytest.raises(NotKnownError):
        TileProcessor.from_config(json.loads(PROCESSORS["next"].to_json_string()) | changed)
