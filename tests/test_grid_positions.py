"""What engines compute of images' grids with numpy: positions, layouts of frames, patches; all as transformers does."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import IMAGE_TOKEN, VIDEO_TOKEN, family_inputs, shared_family, tiny_family, video_inputs
from transformers import Qwen2VLImageProcessor
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from vte_compile.errors import InputError, UnsupportedModelError
from vte_compile.export.grid_facts import grid_facts
from vte_compile.export.grid_positions import Grids, Media, token_kinds
from vte_compile.export.image_processor import NotKnownError
from vte_compile.export.manifest import GridFacts, ModelFacts, PatchFacts
from vte_compile.export.patch_encoder import patch_encoder
from vte_compile.export.patch_processor import PatchProcessor
from vte_compile.export.patches import frame_inputs, split_frames
from vte_compile.families.decoder import describe

FACTS = GridFacts(IMAGE_TOKEN, VIDEO_TOKEN, 2, 4, False)
MODEL = ModelFacts("Tiny", "float32", 1, 8, 64, [VIDEO_TOKEN, IMAGE_TOKEN], [], 0, 3, FACTS)


def described(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model, with what optimize() would know of it."""
    model: Any = copy.copy(shared_family(name)) if dtype == torch.float32 else tiny_family(name).to(dtype)
    model._vte_spec = describe(model)
    return model


GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module", params=GRIDS)
def known(request):
    """A model, and how it numbers tokens."""
    model = described(request.param)
    return request.param, model, grid_facts(model)


def test_positions_are_those_of_the_model(known) -> None:
    """Rows with two images, one and none, padding on both sides; a video, whose seconds count where the family's do."""
    name, model, facts = known
    batches = [family_inputs(name, [2, 0, 1], side=side) for side in ("left", "right")]
    for inputs in [*batches, family_inputs(name, 0), video_inputs(name), video_inputs(name, frames=8)]:
        ids, real = inputs["input_ids"], inputs["attention_mask"].bool().numpy()
        grids = {key: inputs.get(key) for key in ("image_grid_thw", "video_grid_thw")}
        timed = {"second_per_grid_ts": [1.7]} if grids["video_grid_thw"] is not None else {}
        theirs, deltas = model.model.get_rope_index(
            ids, inputs["mm_token_type_ids"], attention_mask=inputs["attention_mask"], **grids, **timed
        )
        kinds = token_kinds(facts, ids.numpy())
        assert np.array_equal(kinds, inputs["mm_token_type_ids"].numpy())
        rows = [row[mask] for row, mask in zip(kinds, real, strict=True)]
        ours = Grids.of(facts, *grids.values(), **timed).positions(facts, rows)
        for b, row in enumerate(ours):
            assert np.array_equal(row, theirs[:, b, real[b]].numpy())
            assert row.max() + 1 - len(rows[b]) == deltas[b].item()


def test_a_model_that_numbers_images_in_another_way(monkeypatch) -> None:
    fast = described("qwen2_vl")
    before = type(fast.model).get_rope_index
    with monkeypatch.context() as patch:
        patch.setattr(
            type(fast.model), "get_rope_index", lambda *a, **k: (before(*a, **k)[0].flip(0), before(*a, **k)[1])
        )
        with pytest.raises(UnsupportedModelError, match=r"as Qwen2-VL or Qwen3-VL does: its own code, .* gives others"):
            grid_facts(fast)
    monkeypatch.setattr(fast, "config", SimpleNamespace(image_token_id=IMAGE_TOKEN, vision_config=SimpleNamespace()))
    with pytest.raises(UnsupportedModelError, match=r"no vision_config\.spatial_merge_size"):
        grid_facts(fast)


@pytest.mark.parametrize(
    ("media", "ids", "message"),
    [
        ({"image_grid_thw": [[1, 4, 4]]}, [5, *[60] * 3, 5], "3 placeholders in a row, where image_grid_thw says 4"),
        ({"image_grid_thw": [[1, 4, 4]]}, [5, *[60] * 5, 5], "image_grid_thw: has fewer entries"),
        ({"image_grid_thw": [[1, 4, 4]] * 2}, [5, *[60] * 4, 5], "image_grid_thw: has more entries"),
        ({"image_grid_thw": [[1, 4, 4]]}, [5, *[59] * 4, 5], "video_grid_thw: has fewer entries"),
        ({}, [5, 60], "image_grid_thw .or video_grid_thw.: is missing"),
        ({"image_grid_thw": [1, 4, 4]}, [60], "image_grid_thw: expected integers of shape"),
        ({"image_grid_thw": [[1.0, 4, 4]]}, [60], "image_grid_thw: expected integers of shape"),
        ({"image_grid_thw": [[1, 3, 4]]}, [60], "in multiples of 2"),
        ({"video_grid_thw": [[1, 2, 2]], "second_per_grid_ts": [1, 1]}, [59], "second_per_grid_ts: expected 1 numbers"),
    ],
)
def test_grids_that_do_not_fit(media, ids, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Media(**media).places(MODEL, [token_kinds(FACTS, np.array(ids))])


def test_what_is_said_of_tokens() -> None:
    grids = {"image_grid_thw": [[1, 2, 2]], "video_grid_thw": [[1, 2, 2]]}
    kinds, visual = np.array([[0, 1, 2]]), np.array([[False, True, True]])
    with pytest.raises(InputError, match="which visual tokens are of images and which of videos"):
        Media(**grids).kinds(visual)
    assert Media(**grids, mm_token_type_ids=kinds).kinds(visual).tolist() == kinds.tolist()
    with pytest.raises(InputError, match="are not 1 or 2 where visual_mask is True"):
        Media(**grids, mm_token_type_ids=kinds).kinds(~visual)
    assert Media(video_grid_thw=[[1, 2, 2]]).kinds(visual).tolist() == [[0, 2, 2]]
    assert Media().kinds(visual).tolist() == [[0, 1, 1]]
    Media(mm_token_type_ids=torch.tensor(kinds)).check_types(kinds)
    with pytest.raises(InputError, match="mm_token_type_ids: are not those of input_ids"):
        Media(mm_token_type_ids=[[0, 2, 1]]).check_types(kinds)
    text = ModelFacts("Tiny", "float32", 1, 8, 64, [], [], 0, 1, None)
    with pytest.raises(InputError, match="knows no image_grid_thw"):
        Media(image_grid_thw=[[1, 2, 2]]).places(text, [kinds[0]])


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 2), (10, 6), (8, 14), (2, 18)])
@pytest.mark.parametrize("window", [2, 3])
def test_layouts_of_frames(height: int, width: int, window: int) -> None:
    grid = torch.tensor([[1, height, width]])
    ours = frame_inputs(PatchFacts(12, 2, window), height, width)
    assert np.array_equal(ours["position_ids"], get_vision_position_ids(grid, 2).numpy())
    index, bounds = get_vision_window_index(grid, 2, window * 2 * 4, 4)
    assert np.array_equal(ours["window_index"], index.numpy())
    own = [row[row >= 0].tolist() for row in ours["windows"]]
    assert own == [list(range(a, b)) for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    assert ours["windows"].ravel()[ours["window_places"]].tolist() == list(range(height * width))
    assert list(frame_inputs(PatchFacts(12, 2, None), height, width)) == ["position_ids"]


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 2), (10, 6), (2, 18)])
def test_learned_positions_of_frames(height: int, width: int) -> None:
    options: dict[str, Any] = dict(mode="bilinear", align_corners=True, spatial_merge_size=2)
    index, weights = get_vision_interpolation_indices_and_weights(torch.tensor([[1, height, width]]), 8, **options)
    ours = frame_inputs(PatchFacts(12, 2, None, 8), height, width)
    assert np.array_equal(ours["learned_index"], index.numpy())
    np.testing.assert_allclose(ours["learned_weights"], weights.numpy(), atol=1e-6)
    assert ours["learned_weights"].dtype == np.float32


def test_frames_of_images_and_videos() -> None:
    facts, pixels = PatchFacts(3, 2, None), np.arange(60.0).reshape(20, 3)
    split = split_frames(facts, pixels, torch.tensor([[1, 2, 2], [2, 2, 4]]))
    assert [([len(frame) for frame in frames], size) for frames, size in split] == [([4], (2, 2)), ([8, 8], (2, 4))]
    assert np.array_equal(np.concatenate([frame for frames, _ in split for frame in frames]), pixels)
    for grid, message in [
        (None, r"expected a grid \[n, 3\] for them .*got none"),
        ([1, 2, 2], "got .3."),
        ([[1, 2, 3]], "in multiples of 2"),
        ([[1, 2, 2]], r"expected \[4, 3\], as the grids say, got \[20, 3\]"),
    ]:
        with pytest.raises(InputError, match=message):
            split_frames(facts, pixels, grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_encoders_of_patches(known, dtype: torch.dtype) -> None:
    """Frame by frame, with windows of one length: the numbers of the model's own code, which patch_encoder compares."""
    name, _, facts = known
    model = described(name, dtype)
    encoder = patch_encoder(model, facts)
    window, learned = 2 if name == "qwen2_5_vl" else None, 8 if name == "qwen3_vl" else None
    assert encoder.facts.patches == PatchFacts(3 * 2 * 4**2, 2, window, learned)
    assert len(encoder.examples[0]) == {"qwen2_vl": 2, "qwen2_5_vl": 5, "qwen3_vl": 4}[name]
    [features] = encoder.function(*encoder.examples[1], *encoder.weights.values())
    width = 3 * 32 if name == "qwen3_vl" else 32  # embedding, and what is added behind two layers
    assert (features.shape, features.dtype) == ((4, width), dtype)


def test_encoders_that_do_something_else(monkeypatch) -> None:
    model: Any = tiny_family("qwen2_5_vl")
    model._vte_spec, visual = describe(model), model.model.visual
    with torch.no_grad():
        for block in visual.blocks:  # in a model of random weights, attention changes little
            block.attn.qkv.weight *= 5
    facts = grid_facts(model)
    assert patch_encoder(model, facts).facts.patches.window == 2
    with monkeypatch.context() as patch:
        patch.setattr(visual, "window_size", 3 * visual.window_size)  # not what its own code attends within
        own = get_vision_window_index
        patch.setattr(
            "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.get_vision_window_index",
            lambda grid, window_size, **options: own(grid, window_size=window_size // 3, **options),
        )
        with pytest.raises(UnsupportedModelError, match="does more than attend within frames and windows"):
            patch_encoder(model, facts)
    with monkeypatch.context() as patch:
        patch.setitem(model.model._modules, "visual", torch.nn.Linear(1, 1))
        with pytest.raises(UnsupportedModelError, match="has no encoder of patches"):
            patch_encoder(model, facts)


PROCESSOR = {"size": {"shortest_edge": 256, "longest_edge": 2560}, "patch_size": 4, "merge_size": 2}


@pytest.mark.parametrize("size", [(50, 37), (8, 8), (3, 90), (200, 100), (33, 64)])
def test_patches_are_those_of_transformers(size: tuple[int, int]) -> None:
    theirs = Qwen2VLImageProcessor(**PROCESSOR)
    ours = PatchProcessor.from_config(json.loads(theirs.to_json_string()))
    pictures = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)) for seed in (0, 1)
    ]
    expected = theirs(pictures, return_tensors="np")
    patches, grids = ours.batch(pictures).values()
    assert np.array_equal(grids, expected["image_grid_thw"])
    np.testing.assert_allclose(patches, expected["pixel_values"], atol=1e-5)


def test_configurations_of_patches() -> None:
    config = json.loads(Qwen2VLImageProcessor(**PROCESSOR).to_json_string())
    old = {key: value for key, value in config.items() if key != "size"} | {"min_pixels": 256, "max_pixels": 2560}
    assert PatchProcessor.from_config(old) == PatchProcessor.from_config(config)
    for changes in (
        {"image_processor_type": "CLIPImageProcessor"},
        {"do_resize": False},
        {"size": {"shortest_edge": 9, "longest_edge": 8}},
        {"resample": 9},
        {"patch_size": 0},
        {"image_mean": [0.5]},
    ):
        with pytest.raises(NotKnownError, match=next(iter(changes))):
            PatchProcessor.from_config(config | changes)
    with pytest.raises(InputError, match="more than 200 times as long"):
        PatchProcessor.from_config(config).fitted(1, 201)
