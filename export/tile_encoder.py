"""The encoder of images that are cut into tiles (LLaVA-NeXT, LLaVA-OneVision), as a module for one tile.

What of the model's own code is left out is compared with tiles.py, which does it behind the encoder.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vte_compile.errors import UnsupportedModelError
from vte_compile.export.manifest import TileFacts
from vte_compile.export.own_features import check_features, own_features
from vte_compile.export.tiles import Size, pack_image, pack_video, parts

Encode = Callable[[Tensor], tuple[Tensor]]
"""A tile [1, channels, size, size] -> its tokens, and behind them what ends a row, [tokens + 1, C]."""


def tile_facts(fast: Any, merger: nn.Module) -> TileFacts | None:
    """How a model cuts its images into tiles, as its config says; None: it does not.

    Raises:
        UnsupportedModelError: In a way that tiles.py does not know.
    """
    config: Any = merger.config
    resolutions, vision = getattr(config, "image_grid_pinpoints", None), getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not resolutions or getattr(merger, "image_newline", None) is None:
        return None
    if not isinstance(size, int) or not isinstance(patch, int) or any(n % size for pair in resolutions for n in pair):
        raise UnsupportedModelError(
            f"{type(fast).__name__}: its image_grid_pinpoints {resolutions} are not in whole tiles of {size} pixels."
        )
    ratio = getattr(config, "vision_aspect_ratio", None)
    most = re.fullmatch(r"anyres_max_(\d+)", str(ratio))
    if ratio is not None and most is None:
        raise UnsupportedModelError(f"{type(fast).__name__}: its vision_aspect_ratio {ratio!r} is not known.")
    known = inspect.signature(merger.get_image_features).parameters  # type: ignore[arg-type]
    return TileFacts(
        size,
        size // patch,
        [list(map(int, pair)) for pair in resolutions],
        None if most is None else int(most[1]),
        "batch_num_images" in known,
        hasattr(merger, "get_video_features"),
    )


def of_one_tile(merger: nn.Module) -> nn.Module:
    """The same, but every image is whole: one tile, with what ends a row behind it."""
    whole = copy.copy(merger)
    whole.config = copy.copy(merger.config)
    whole.config.image_grid_pinpoints = [[0, 0]]  # type: ignore[union-attr]
    return whole


def check_tiles(fast: Any, encode: Encode, facts: TileFacts, example: Tensor) -> None:
    """Compare the encoder and tiles.py with the model's own code: an image, a video, and all ways to pack tiles.

    Args:
        fast: The optimized model.
        encode: What becomes the engine's encoder.
        facts: From :func:`tile_facts`.
        example: A tile.

    Raises:
        UnsupportedModelError: They differ.
    """
    fewest = min(facts.resolutions, key=math.prod)
    size = (max(1, fewest[0] * 3 // 4), fewest[1])
    count = 1 + math.prod(parts(facts, size))
    generator = torch.Generator().manual_seed(1)
    tiles = torch.randn(count, *example.shape[1:], generator=generator).to(example)
    features = [encode(tile[None])[0] for tile in tiles]
    if len(features[0]) != facts.side**2 + 1:
        raise UnsupportedModelError(
            f"{type(fast).__name__}: its encoder gives {len(features[0]) - 1} tokens of a tile, not {facts.side**2}."
        )
    arrays = [feature.float().cpu().numpy() for feature in features]
    image = torch.from_numpy(pack_image(facts, arrays, size))
    sizes = torch.tensor([size], device=example.device)
    given = "tiles and image_sizes alone"
    want = own_features(fast, len(image), given, pixel_values=tiles[None], image_sizes=sizes)
    check_features(fast, image.to(want), want, "encode tiles and put them side by side")
    _check_packing(fast, facts)
    if facts.videos:
        merger: Any = fast.get_submodule(fast._vte_spec.path.rpartition(".")[0])
        want = merger.get_video_features(tiles[None]).pooler_output[0]
        video = torch.from_numpy(pack_video(facts, arrays))
        check_features(fast, video.to(want), want, "pool the tokens of a video's frames")


def _check_packing(fast: Any, facts: TileFacts) -> None:
    """With the function of the model that packs, on random features of images of all resolutions."""
    merger: Any = fast.get_submodule(fast._vte_spec.path.rpartition(".")[0])
    pack = getattr(merger, "pack_image_features", None)
    if pack is None:
        raise UnsupportedModelError(f"{type(fast).__name__} has no pack_image_features to compare with.")
    options = {n: getattr(merger.config, n, None) for n in ("vision_feature_select_strategy", "vision_aspect_ratio")}
    options = {name: value for name, value in options.items() if name in inspect.signature(pack).parameters}
    generator = torch.Generator().manual_seed(2)
    newline = torch.randn(4, generator=generator)
    for size in sizes_of(facts):
        features = torch.randn(1 + math.prod(parts(facts, size)), facts.side**2, 4, generator=generator)
        want = pack([features], [size], image_newline=newline, **options)[0][0]
        tiles = [torch.cat([feature, newline[None]]).numpy() for feature in features]
        got = torch.from_numpy(pack_image(facts, tiles, size))
        check_features(fast, got, want, f"put tiles side by side, of an image of {size[0]} x {size[1]}")


def sizes_of(facts: TileFacts) -> list[Size]:
    """Of images: for each resolution one that fills it, one that is lower, and one that is narrower."""
    return [size for height, width in facts.resolutions for size in (
        (height, width), (max(1, height * 4 // 5), width), (height, max(1, width * 4 // 5)))]  # fmt: skip
